//! Conversion of questions with a closed set of answers to exchanges with a server, and of the replies to
//! probabilities.

use std::time::Duration;

use super::Unusable;
use super::answer::Answer;
use super::client::Client;
use super::reading::{Listed, split_prefixes, votes};
use super::wire::Request;
use crate::config::{Evidence, RemoteApi};
use crate::pipeline::label::backend::{Ask, NoAnswer, Reply, Usage};

/// Remedy for a model that reasons before its answer.
const REASONS: &str = "the model reasons before it answers; set labeler.remote.chat_template_kwargs = { enable_thinking = false } if the server accepts it, or leave labeler.remote.probe on, which finds out how to ask it";

impl Client {
    /// Asks two simple questions to find out which requests the server accepts; see [`super::Remote::probe`].
    pub(super) async fn find_abilities(&self) -> Result<Option<String>, Unusable> {
        let answers = ["1".to_owned(), "2".to_owned()];
        let prompt = "Which number is larger, 1 or 2? Answer with the number and nothing else.\nAnswer:";
        let listing = |client: &Self| Request::first_token(prompt, None, client.abilities().top_logprobs);
        let voting = Request::vote(prompt, 0);
        let mut answer = None;
        if self.abilities().top_logprobs > 0 {
            answer = Some(self.first(&listing(self)).await?);
        }
        let mut vote = None;
        if answer.as_ref().is_none_or(|answer| !answer.reasons) {
            vote = Some(self.first(&voting).await?);
        }
        if [&answer, &vote].into_iter().flatten().any(|answer| answer.reasons) {
            self.stop_reasoning(&voting).await?;
            answer = match self.abilities() {
                now if now.reasons || now.top_logprobs == 0 => None,
                _ => Some(self.first(&listing(self)).await?),
            };
            vote = Some(self.first(&voting).await?);
        }
        let no_list = answer.as_ref().is_none_or(|answer| answer.first_token.is_none());
        if no_list && self.judge.evidence == Evidence::Logprobs {
            let words = format!(
                "{} sends no log-probabilities, which labeler.remote.evidence = \"logprobs\" asks for; set it to \"auto\" or \"votes\"",
                self.judge.url
            );
            return Err(Unusable { words, refuses: true });
        }
        tracing::info!("judge {}: {}", self.judge.url, self.abilities().words());
        let read = match (answer.and_then(|answer| answer.first_token), vote) {
            (Some(tokens), _) => Listed(tokens).weights(&answers).map(drop),
            // For some models one token is too short for an answer in words, but votes have more tokens.
            (None, Some(vote)) => votes(&[vote.text], &answers).map(drop),
            (None, None) => Ok(()),
        };
        Ok(read.err().map(|refusal| {
            format!(
                "the judge at {} did not answer a simple question as asked, and may abstain from all: {refusal}",
                self.judge.url
            )
        }))
    }

    /// Turns reasoning off with the template variable of reasoning models if that works; otherwise allows tokens for
    /// it.
    async fn stop_reasoning(&self, question: &Request) -> Result<(), Unusable> {
        let switch = "enable_thinking";
        let given = self.judge.chat_template_kwargs.contains_key(switch);
        if self.judge.api == RemoteApi::Chat && !given {
            self.change(|abilities| abilities.thinking_off = true);
            let answer = self.first(question).await?;
            if !answer.reasons && self.abilities().thinking_off {
                tracing::warn!(
                    "the judge at {} reasons before it answers; it is asked not to (chat_template_kwargs = {{ {switch} = false }})",
                    self.judge.url
                );
                return Ok(());
            }
        }
        self.change(|abilities| (abilities.thinking_off, abilities.reasons) = (false, true));
        tracing::warn!(
            "the judge at {} reasons before it answers; each question has room for {} tokens of it (labeler.remote.thinking_tokens), and {} answers are sampled and counted as votes",
            self.judge.url,
            self.judge.thinking_tokens,
            self.judge.votes
        );
        Ok(())
    }

    async fn first(&self, request: &Request) -> Result<Answer, Unusable> {
        const PATIENCE: Duration = Duration::from_secs(30);
        let answer = self.probe(request, PATIENCE).await;
        answer.map_err(|cause| Unusable { words: cause.words, refuses: cause.refuses })
    }

    /// Returns whether answers are sampled and counted, because the server sends no log-probabilities, or none for the
    /// answer itself.
    fn counts_votes(&self) -> bool {
        let abilities = self.abilities();
        abilities.top_logprobs == 0 || abilities.reasons
    }
}

/// Returns the text of an answer that is free text.
///
/// # Errors
/// An abstention if the reasoning used all tokens.
pub(super) fn written(client: &Client, answer: Answer) -> Reply<String> {
    if answer.text.is_empty() && answer.reasons {
        let limit = client.judge.thinking_tokens;
        return Err(NoAnswer::Abstention(format!(
            "the reasoning of {} used all tokens before an answer (labeler.remote.thinking_tokens = {limit}); {REASONS}",
            client.judge.url
        )));
    }
    Ok(answer.text)
}

/// Returns the probabilities of the answers, and whether they come from votes.
pub(super) async fn weigh(client: &Client, ask: &Ask, usage: &mut Usage) -> Reply<(Vec<f64>, bool)> {
    if !client.counts_votes() {
        let request = Request::first_token(&ask.prompt, None, client.abilities().top_logprobs);
        let answer = client.ask(&request, usage).await?;
        if let Some(tokens) = answer.first_token {
            let mut listed = Listed(tokens);
            let (mass, unlisted) = (listed.mass(&ask.answers), listed.unlisted(&ask.answers, request.top_logprobs));
            if let Some((space, p)) = listed.space_before(&ask.answers).map(|(space, p)| (space.to_owned(), p)) {
                add_after_space(client, ask, &mut listed, (space, p), p > mass, usage).await?;
            }
            client.watch_for_cut_lists(&request, unlisted, listed.mass(&ask.answers));
            let weights = listed.weights(&ask.answers).map_err(|refusal| match refusal {
                NoAnswer::Abstention(why) if answer.reasons => NoAnswer::Abstention(format!("{why}; {REASONS}")),
                other => other,
            })?;
            return Ok((longer(client, ask, &listed, weights, usage).await?, false));
        }
        if client.judge.evidence == Evidence::Logprobs {
            return Err(NoAnswer::Abstention(format!(
                "{} sent no log-probabilities; set labeler.remote.evidence = \"votes\"",
                client.judge.url
            )));
        }
    }
    let (mut texts, mut reasons) = (Vec::with_capacity(client.judge.votes), false);
    for vote in 0..client.judge.votes {
        let answer = client.ask(&Request::vote(&ask.prompt, vote as u64), usage).await?;
        reasons |= answer.reasons && answer.text.is_empty();
        texts.push(answer.text);
    }
    let shares = votes(&texts, &ask.answers).map_err(|refusal| match refusal {
        NoAnswer::Abstention(why) if reasons && client.abilities().reasons => NoAnswer::Abstention(format!(
            "{why}: the reasoning took all {} tokens; raise labeler.remote.thinking_tokens",
            client.judge.thinking_tokens
        )),
        NoAnswer::Abstention(why) if reasons => NoAnswer::Abstention(format!("{why}; {REASONS}")),
        other => other,
    })?;
    Ok((shares, true))
}

/// Adds to `listed` the answers that follow a separate space token, weighted by its probability. If the server does not
/// continue a begun answer and the space is less likely than the answers without one, it is ignored, unless it is
/// `needed`.
async fn add_after_space(
    client: &Client,
    ask: &Ask,
    listed: &mut Listed,
    (space, p): (String, f64),
    needed: bool,
    usage: &mut Usage,
) -> Reply<()> {
    if !needed && !client.abilities().continues() {
        return Ok(());
    }
    let request = Request::first_token(&ask.prompt, Some(space.clone()), client.abilities().top_logprobs);
    match client.ask(&request, usage).await {
        Ok(after) => listed.add_after_space(&space, p, Listed(after.first_token.unwrap_or_default())),
        // The server was found not to continue a begun answer.
        Err(NoAnswer::Abstention(_)) if !needed && !client.abilities().continues() => {}
        Err(refusal) => return Err(refusal),
    }
    Ok(())
}

/// Separates the probability of an answer from that of a longer one it begins (`1` and `10`), if the server's tokens do
/// not distinguish them: asks for the token that follows the shorter one.
async fn longer(
    client: &Client,
    ask: &Ask,
    listed: &Listed,
    mut weights: Vec<f64>,
    usage: &mut Usage,
) -> Reply<Vec<f64>> {
    for (shorter, longer) in split_prefixes(&ask.answers) {
        if listed.has(&ask.answers[longer]) || weights[shorter] == 0.0 {
            continue;
        }
        if client.abilities().continues() {
            let begun = listed.spelling(&ask.answers[shorter]);
            let request = Request::first_token(&ask.prompt, Some(begun), client.abilities().top_logprobs);
            match client.ask(&request, usage).await {
                Ok(answer) => {
                    let rest = &ask.answers[longer][ask.answers[shorter].len()..];
                    let follows = answer.first_token.map_or(0.0, |tokens| Listed(tokens).exactly(rest));
                    weights[longer] += weights[shorter] * follows;
                    weights[shorter] *= 1.0 - follows;
                    continue;
                }
                // The server was found not to continue a begun answer.
                Err(_) if !client.abilities().continues() => {}
                Err(refusal) => return Err(refusal),
            }
        }
        // If the longer answer is a single token, it would be listed if it were likely.
        if !is_one_token(client, &ask.answers[longer], usage).await? {
            return Err(NoAnswer::Abstention(format!(
                "the tokens of {} do not distinguish {} from {}, and it does not continue an answer; set labeler.remote.evidence = \"votes\" or api = \"completions\"",
                client.judge.url, ask.answers[shorter], ask.answers[longer]
            )));
        }
    }
    Ok(weights)
}

/// Returns whether the model writes `answer` as one token, by asking it to write the answer once.
async fn is_one_token(client: &Client, answer: &str, usage: &mut Usage) -> Reply<bool> {
    if let Some(known) = client.known_token(answer) {
        return Ok(known);
    }
    let prompt = format!("Write the number {answer} and nothing else.\nAnswer:");
    let reply = client.ask(&Request::first_token(&prompt, None, client.abilities().top_logprobs), usage).await?;
    let first = reply.first_token.and_then(|tokens| tokens.first().map(|(token, _)| token.trim_start() == answer));
    client.note_token(answer, first.unwrap_or(false));
    Ok(first.unwrap_or(false))
}

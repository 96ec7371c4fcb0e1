//! A judge behind a server that speaks OpenAI's protocol: completions and chat, log-probabilities or votes.
//!
//! What is decided here is decided by pure parts with tests of their own ([`breaker`], [`evidence`], [`limit`],
//! [`retry`], [`wire`]); [`client`] does the waiting and sending, on a thread that computes nothing.

pub mod breaker;
pub mod budget;
pub mod client;
pub mod evidence;
pub mod identity;
pub mod key;
pub mod limit;
pub mod outage;
pub mod reading;
pub mod retry;
pub mod stats;
pub mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::config::{Evidence, RemoteJudge};
use crate::knob::Knob;
use crate::label::backend::{Alive, Ask, Backend, Decoding, Refusal, Reply, Usage};
use crate::label::shape::Shape;
use crate::seed;
use budget::Budget;
use client::Client;
use key::Key;
use reading::{Listed, split_prefixes, votes};
use stats::RemoteStats;
use wire::Request;

/// Asks a server. Shared by all labeler actors; its limits hold for all of them together.
pub struct Remote {
    client: Arc<Client>,
    /// Whether the server was found to offer no log-probabilities.
    votes_only: AtomicBool,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Remote {
    /// A client for `judge` without a bound on what it may spend. Nothing is sent yet.
    ///
    /// # Errors
    /// An API key that is asked for and not in the environment, or an address that is none.
    pub fn new(judge: RemoteJudge) -> Result<Self> {
        Self::within(judge, None)
    }

    /// A client for `judge` that spends no more than `budget` allows. Nothing is sent yet.
    ///
    /// # Errors
    /// As [`Remote::new`].
    pub fn within(judge: RemoteJudge, budget: Option<Arc<Budget>>) -> Result<Self> {
        let key = judge.api_key_env.as_ref().map(|name| Key::from_env(name, &judge.url)).transpose()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("preceptor-remote")
            .enable_all()
            .build()
            .context("cannot start the thread for remote judges")?;
        let votes_only = AtomicBool::new(judge.evidence == Evidence::Votes);
        Ok(Self { client: Arc::new(Client::new(judge, key, budget)?), votes_only, runtime: Some(runtime) })
    }

    /// Asks the judge one simple question, so that a run does not begin on a judge that refuses or cannot be reached.
    /// Returns a warning where it answers with something else than what was asked for.
    ///
    /// # Errors
    /// The judge refuses, or does not answer within half a minute; see [`Unusable`].
    pub fn probe(&self) -> Result<Option<String>, Unusable> {
        const PATIENCE: Duration = Duration::from_secs(30);
        let judge = &self.client.judge;
        let answers = ["1".to_owned(), "2".to_owned()];
        let prompt = "Which number is larger, 1 or 2? Answer with the number and nothing else.\nAnswer:";
        let votes = judge.evidence == Evidence::Votes;
        let request = if votes {
            Request::vote(prompt, 0)
        } else {
            Request::first_token(prompt, None, self.client.top_logprobs())
        };
        let Some(runtime) = &self.runtime else { return Ok(None) };
        let answer = runtime
            .block_on(self.client.probe(&request, PATIENCE))
            .map_err(|cause| Unusable { words: cause.words, refuses: cause.refuses })?;
        let read = match answer.first_token {
            Some(tokens) => Listed(tokens).weights(&answers).map(drop),
            None if judge.evidence == Evidence::Logprobs => {
                let words = format!(
                    "{} sends no log-probabilities, which labeler.remote.evidence = \"logprobs\" asks for; set it to \"auto\" or \"votes\"",
                    judge.url
                );
                return Err(Unusable { words, refuses: true });
            }
            // One token is too little for some models to answer in words; votes are read from more.
            None if !votes => Ok(()),
            None => reading::votes(&[answer.text], &answers).map(drop),
        };
        Ok(read.err().map(|refusal| {
            format!(
                "the judge at {} did not answer a simple question as asked, and may abstain from all: {refusal}",
                judge.url
            )
        }))
    }

    /// What was sent and what came back, so far.
    pub fn stats(&self) -> &RemoteStats {
        &self.client.stats
    }

    /// Runs `work` for each of `count` questions side by side, and waits for all.
    fn each<T: Send + 'static, F>(&self, count: usize, work: impl Fn(usize) -> F) -> Vec<(Reply<T>, Usage)>
    where
        F: Future<Output = (Reply<T>, Usage)> + Send + 'static,
    {
        let Some(runtime) = &self.runtime else { return Vec::new() };
        let tasks: Vec<_> = (0..count).map(|i| runtime.spawn(work(i))).collect();
        runtime.block_on(async {
            let mut replies = Vec::with_capacity(count);
            for task in tasks {
                // Each task ends within the client's deadline.
                replies.push(task.await.unwrap_or_else(|error| {
                    (Err(Refusal::Failure(format!("the request broke off: {error}"))), Usage::default())
                }));
            }
            replies
        })
    }
}

/// A judge that cannot be used: what came of the question that it was asked before the run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the judge cannot be used: {words}")]
pub struct Unusable {
    /// The address asked, the status, and the server's own sentence.
    pub words: String,
    /// Whether the judge refuses, so that a person has to change something; otherwise it may recover by itself.
    pub refuses: bool,
}

impl Drop for Remote {
    fn drop(&mut self) {
        // What is still in flight is nobody's any more.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Backend for Remote {
    fn identity(&self) -> u64 {
        identity::identity(&self.client.judge)
    }

    fn shape(&self) -> Shape {
        identity::shape(&self.client.judge)
    }

    fn attend(&self, name: &str, alive: &Alive) {
        self.client.attend(name, alive);
    }

    fn waits(&self) -> bool {
        true
    }

    fn reported_model(&self) -> Option<String> {
        self.client.reported_model()
    }

    fn knob(&self) -> Option<Arc<Knob>> {
        Some(Arc::clone(&self.client.knob))
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        let votes_only = self.votes_only.load(Ordering::SeqCst);
        let replies = self.each(asks.len(), |i| {
            let (client, ask) = (Arc::clone(&self.client), asks[i].clone());
            async move {
                let mut usage = Usage::default();
                let reply = weigh_one(&client, &ask, votes_only, &mut usage).await;
                (reply, usage)
            }
        });
        replies
            .into_iter()
            .map(|(reply, taken)| {
                *usage += taken;
                if let Ok((_, true)) = reply
                    && !self.votes_only.swap(true, Ordering::SeqCst)
                {
                    tracing::warn!(
                        "{} offers no log-probabilities; its answers are sampled {} times each instead",
                        self.client.judge.url,
                        self.client.judge.votes
                    );
                }
                reply.map(|(weights, _)| weights)
            })
            .collect()
    }

    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>> {
        let replies = self.each(prompts.len(), |i| {
            let before = prompts[..i].iter().filter(|other| **other == prompts[i]).count() as u64;
            let request = Request {
                prompt: prompts[i].clone(),
                begun: None,
                max_tokens: decoding.max_tokens,
                temperature: decoding.temperature,
                top_k: decoding.top_k,
                top_logprobs: 0,
                // Servers take the seed as a signed number.
                seed: Some((seed::mix(decoding.seed ^ seed::text(&prompts[i]) ^ seed::mix(before))) >> 33),
            };
            let client = Arc::clone(&self.client);
            async move {
                let mut usage = Usage::default();
                let reply = client.ask(&request, &mut usage).await.map(|answer| answer.text);
                (reply, usage)
            }
        });
        replies
            .into_iter()
            .map(|(reply, taken)| {
                *usage += taken;
                reply
            })
            .collect()
    }
}

/// The probabilities of the answers, and whether they are votes for want of log-probabilities.
async fn weigh_one(client: &Client, ask: &Ask, votes_only: bool, usage: &mut Usage) -> Reply<(Vec<f64>, bool)> {
    if !votes_only {
        let request = Request::first_token(&ask.prompt, None, client.top_logprobs());
        let answer = client.ask(&request, usage).await?;
        if let Some(tokens) = answer.first_token {
            let mut listed = Listed(tokens);
            if let Some((space, p)) = listed.space_before(&ask.answers).map(|(space, p)| (space.to_owned(), p)) {
                let request = Request::first_token(&ask.prompt, Some(space.clone()), client.top_logprobs());
                let after = client.ask(&request, usage).await?;
                listed.behind(&space, p, Listed(after.first_token.unwrap_or_default()));
            }
            let weights = listed.weights(&ask.answers)?;
            return Ok((longer(client, ask, &listed, weights, usage).await?, false));
        }
        if client.judge.evidence == Evidence::Logprobs {
            return Err(Refusal::Abstention(format!(
                "{} sent no log-probabilities; set labeler.remote.evidence = \"votes\"",
                client.judge.url
            )));
        }
    }
    let mut texts = Vec::with_capacity(client.judge.votes);
    for vote in 0..client.judge.votes {
        texts.push(client.ask(&Request::vote(&ask.prompt, vote as u64), usage).await?.text);
    }
    Ok((votes(&texts, &ask.answers)?, true))
}

/// Splits the probability of an answer that begins another (`1` and `10`) where the server's tokens cannot tell them
/// apart: asks what comes after the shorter one.
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
        let begun = listed.spelling(&ask.answers[shorter]);
        let request = Request::first_token(&ask.prompt, Some(begun), client.top_logprobs());
        let answer = client.ask(&request, usage).await?;
        let rest = &ask.answers[longer][ask.answers[shorter].len()..];
        let goes_on = answer.first_token.map_or(0.0, |tokens| Listed(tokens).exactly(rest));
        weights[longer] += weights[shorter] * goes_on;
        weights[shorter] *= 1.0 - goes_on;
    }
    Ok(weights)
}

//! Comparisons of a server's log-probabilities with the learner's: of the first version, and of each version handed over.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use preceptor_actors::Snapshot;

use super::canary::{Measured, Taken, Verdict, mean_square};
use super::fleet::Fleet;
use super::http::Fault;
use super::server::{Group, Server};
use super::store::{Content, Stored};
use crate::lm::model::{Decoder, Pack};
use crate::pipeline::generate::Sampled;

/// Greatest difference, as root mean square in nats, of a server's first log-probabilities from the run's. bf16 gives about
/// 0.02; another model gives more than 1.
pub(super) const FIRST: f64 = 0.1;
/// Number of completions of each recent prompt that are sampled from an adapter for the first comparison.
const COMPLETIONS: usize = 4;
/// Maximum number of tokens of each.
const TOKENS: usize = 64;

/// Number of places of each recent completion at which the canary asks an adapter for the most likely tokens.
const PLACES: usize = 4;
/// Number of hand-overs of adapters after which the canary chooses other places.
const REPEATS: u32 = 8;
/// Minimum number of tokens that the canary compares.
const COMPARED: usize = 16;

/// A completion, and tokens whose log-probabilities are compared.
struct Question {
    prompt: Vec<u32>,
    completion: Vec<u32>,
    /// Places in the completion, with the tokens that are asked for there.
    asked: Vec<(usize, Vec<u32>)>,
}

impl Question {
    /// Asks for all tokens of a completion.
    fn all(prompt: Vec<u32>, completion: Vec<u32>) -> Self {
        let asked = completion.iter().enumerate().map(|(place, id)| (place, vec![*id])).collect();
        Self { prompt, completion, asked }
    }

    /// Returns the tokens before each place.
    fn prefixes(&self) -> impl Iterator<Item = Vec<u32>> {
        self.asked.iter().map(|(place, _)| [&self.prompt[..], &self.completion[..*place]].concat())
    }
}

/// Tokens that a server was asked for, with its log-probabilities at temperature 1.
#[derive(Default)]
pub(super) struct Asked {
    questions: Vec<Question>,
    /// One for each token of the questions, in their order.
    told: Vec<f32>,
    /// Number of hand-overs since the questions were chosen.
    repeated: u32,
}

impl Asked {
    /// Returns whether other questions must be chosen before the next hand-over.
    pub(super) fn is_used_up(&self) -> bool {
        self.repeated >= REPEATS || self.told.len() < COMPARED
    }
}

/// Weights that a server is known to compute with, and its log-probabilities under them.
pub(super) struct Verified {
    pub(super) weights: Arc<Decoder>,
    pub(super) version: u64,
    pub(super) asked: Asked,
}

/// Returns the distance of the server's log-probabilities from the policy's, as root mean square in nats.
pub(super) fn distance(fleet: &Fleet, server: &Server, stored: &Stored, policy: &Decoder) -> Result<f64> {
    let (theirs, ours) = match stored.content {
        Content::Adapters => {
            let (questions, theirs) = sample(fleet, server, stored)?;
            (theirs, learner(policy, &questions, fleet.plan.sampling.temperature)?)
        }
        Content::Full => {
            let questions = recent(fleet);
            (score(fleet, server, stored, &questions)?, learner(policy, &questions, 1.0)?)
        }
    };
    Ok(mean_square(&theirs, &ours).sqrt())
}

/// Checks that the log-probabilities of samples are not those at temperature 1 instead of the run's.
pub(super) fn check_temperature(fleet: &Fleet, server: &Server, stored: &Stored, policy: &Decoder) -> Result<()> {
    let (questions, theirs) = sample(fleet, server, stored)?;
    let temperature = fleet.plan.sampling.temperature;
    let distance =
        |temperature| -> Result<f64> { Ok(mean_square(&theirs, &learner(policy, &questions, temperature)?).sqrt()) };
    ensure!(
        distance(temperature)? <= FIRST || distance(1.0)? > FIRST,
        "the log-probabilities of its samples are those at temperature 1, and not at rollout.temperature = {temperature}; start vLLM with --logprobs-mode processed_logprobs"
    );
    Ok(())
}

/// Result of the check of a hand-over.
pub(super) enum Checked {
    /// With the share of the change that the server shows, and its present log-probabilities.
    Taken(f64, Asked),
    /// With the share, and the version that was compared with.
    Undecidable(f64, u64),
    /// With the reason.
    NotTaken(String),
}

/// Checks that the server computes with the weights of `snapshot`.
pub(super) fn check(
    fleet: &Fleet,
    server: &Arc<Server>,
    snapshot: &Snapshot<Decoder>,
    stored: &Stored,
    verified: Option<&Verified>,
) -> Result<Checked> {
    let adapters = stored.content == Content::Adapters;
    let Some(known) = verified.filter(|known| adapters || !known.asked.told.is_empty()) else {
        // Nothing is known of the server: it has just started. Its log-probabilities themselves must be the policy's.
        let distance = distance(fleet, server, stored, &snapshot.value)?;
        return Ok(match distance <= FIRST {
            true => Checked::Taken(1.0, Asked::default()),
            false => Checked::NotTaken(format!("its log-probabilities differ from the policy's by {distance:.3} nats")),
        });
    };
    let (taken, asked) = measure(fleet, server, snapshot, stored, known)?;
    let Some(taken) = taken else { return Ok(Checked::Taken(1.0, asked)) };
    Ok(match taken.verdict() {
        Verdict::Taken => Checked::Taken(taken.share, asked),
        Verdict::Undecidable => Checked::Undecidable(taken.share, known.version),
        Verdict::NotTaken => Checked::NotTaken(format!(
            "it reports version {}, but its log-probabilities changed by {:.2} ± {:.2} of what they should have since version {}",
            snapshot.version, taken.share, taken.error, known.version
        )),
    })
}

/// Measures how much of the change from the weights `known` to `snapshot` the server shows; `None` if the learner's
/// log-probabilities did not change. Returns the server's present log-probabilities, too.
fn measure(
    fleet: &Fleet,
    server: &Arc<Server>,
    snapshot: &Snapshot<Decoder>,
    stored: &Stored,
    known: &Verified,
) -> Result<(Option<Taken>, Asked)> {
    let Asked { questions, told: before, repeated } = &known.asked;
    let after = if questions.is_empty() { Vec::new() } else { ask_again(fleet, server, stored, questions)? };
    let told: Vec<f32> = after.iter().flatten().copied().collect();
    if told.len() >= COMPARED.min(before.len().max(1)) {
        let both = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(&after).filter_map(|(value, after)| after.map(|_| *value)).collect()
        };
        let measured = Measured {
            learner_before: &both(&learner(&known.weights, questions, 1.0)?),
            learner_after: &both(&learner(&snapshot.value, questions, 1.0)?),
            server_before: Some(&both(before)),
            server_after: &told,
        };
        let taken = Taken::measure(&measured);
        return Ok((taken, Asked { questions: answered(questions, &after), told, repeated: repeated + 1 }));
    }
    // The server does not tell the most likely tokens (--max-logprobs may forbid it), so new samples of it are compared.
    let (questions, after) = sample(fleet, server, stored)?;
    let temperature = fleet.plan.sampling.temperature;
    let measured = Measured {
        learner_before: &learner(&known.weights, &questions, temperature)?,
        learner_after: &learner(&snapshot.value, &questions, temperature)?,
        server_before: None,
        server_after: &after,
    };
    Ok((Taken::measure(&measured), Asked::default()))
}

/// Returns those tokens of the questions that have an answer.
fn answered(questions: &[Question], answers: &[Option<f32>]) -> Vec<Question> {
    let mut answers = answers.iter();
    let mut kept = |ids: &[u32]| -> Vec<u32> {
        ids.iter().copied().filter(|_| answers.next().is_some_and(Option::is_some)).collect()
    };
    let question = |question: &Question| Question {
        prompt: question.prompt.clone(),
        completion: question.completion.clone(),
        asked: question.asked.iter().map(|(place, ids)| (*place, kept(ids))).collect(),
    };
    questions.iter().map(question).collect()
}

/// Asks the server for log-probabilities under the version `stored`, which it has: of the tokens of recent completions, or,
/// where it cannot be asked for those, of the most likely tokens at places of recent completions. Empty if the server refuses.
pub(super) fn ask(fleet: &Fleet, server: &Arc<Server>, stored: &Stored) -> Result<Asked> {
    let mut questions = recent(fleet);
    if server.scores_prompts(stored) {
        let told = score(fleet, server, stored, &questions)?;
        return Ok(Asked { questions, told, repeated: REPEATS });
    }
    for question in &mut questions {
        let len = question.completion.len();
        question.asked = (0..PLACES.min(len)).map(|i| (i * len / PLACES.min(len), Vec::new())).collect();
    }
    let answers = match tops(fleet, server, stored, &questions) {
        Err(Fault::Refused(why)) => {
            tracing::debug!("{}: {why}", server.name());
            return Ok(Asked::default());
        }
        answers => answers?,
    };
    let mut told = Vec::new();
    for ((_, ids), top) in questions.iter_mut().flat_map(|question| &mut question.asked).zip(answers) {
        told.extend(top.iter().map(|(_, logprob)| *logprob));
        *ids = top.into_iter().map(|(id, _)| id).collect();
    }
    Ok(Asked { questions, told, repeated: 0 })
}

/// Asks the server `questions` that [`ask`] chose again, under the version `stored`. `None` for a token that is not among
/// the most likely ones any more.
fn ask_again(fleet: &Fleet, server: &Arc<Server>, stored: &Stored, questions: &[Question]) -> Result<Vec<Option<f32>>> {
    if server.scores_prompts(stored) {
        return Ok(score(fleet, server, stored, questions)?.into_iter().map(Some).collect());
    }
    let answers = tops(fleet, server, stored, questions)?;
    let mut all = Vec::new();
    for ((_, ids), top) in questions.iter().flat_map(|question| &question.asked).zip(answers) {
        let of = |id: &u32| top.iter().find(|(known, _)| known == id).map(|(_, logprob)| *logprob);
        all.extend(ids.iter().map(of));
    }
    Ok(all)
}

/// Returns the most likely tokens at each place of the questions, with the server's log-probabilities under the adapter
/// `stored`.
fn tops(
    fleet: &Fleet,
    server: &Arc<Server>,
    stored: &Stored,
    questions: &[Question],
) -> Result<Vec<Vec<(u32, f32)>>, Fault> {
    let one = |prefix: Vec<u32>| {
        let (server, stored) = (Arc::clone(server), stored.clone());
        fleet.runtime.spawn(async move { server.top(&stored, &prefix).await })
    };
    let requests: Vec<_> = questions.iter().flat_map(Question::prefixes).map(one).collect();
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        answers.push(fleet.runtime.block_on(request).map_err(|error| Fault::Down(error.to_string()))??);
    }
    Ok(answers)
}

/// Returns questions for all tokens of recent completions, or of the example if there are none yet.
fn recent(fleet: &Fleet) -> Vec<Question> {
    fleet.samples().into_iter().map(|(prompt, completion)| Question::all(prompt, completion)).collect()
}

/// Returns the server's log-probabilities of the questions' completions, at temperature 1.
fn score(fleet: &Fleet, server: &Server, stored: &Stored, questions: &[Question]) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for Question { prompt, completion, .. } in questions {
        let ids = [prompt.as_slice(), completion].concat();
        let scores = fleet.runtime.block_on(server.score(Some(stored), &ids))?;
        all.extend_from_slice(&scores[prompt.len().saturating_sub(1)..]);
    }
    Ok(all)
}

/// Samples completions of recent prompts with the version `stored`. Returns questions for all their tokens, and the server's
/// log-probabilities at the run's temperature.
fn sample(fleet: &Fleet, server: &Server, stored: &Stored) -> Result<(Vec<Question>, Vec<f32>)> {
    let (mut questions, mut all) = (Vec::new(), Vec::new());
    let max_tokens = fleet.plan.sampling.max_new_tokens.min(TOKENS);
    for (prompt, _) in fleet.samples() {
        let group = Group { n: COMPLETIONS, max_tokens };
        for Sampled { ids, logprobs, .. } in fleet.runtime.block_on(server.generate(stored, &prompt, group))? {
            questions.push(Question::all(prompt.clone(), ids));
            all.extend(logprobs);
        }
    }
    Ok((questions, all))
}

/// Returns the learner's log-probabilities of the tokens that the questions ask for.
fn learner(weights: &Decoder, questions: &[Question], temperature: f64) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for Question { prompt, completion, asked } in questions {
        let hidden = weights.predicting(&Pack::new(prompt, std::slice::from_ref(completion)))?;
        let rows: Vec<u32> = asked.iter().flat_map(|(place, ids)| vec![*place as u32; ids.len()]).collect();
        let targets: Vec<u32> = asked.iter().flat_map(|(_, ids)| ids).copied().collect();
        if targets.is_empty() {
            continue;
        }
        let hidden = hidden.index_select(&Tensor::new(rows, weights.device())?, 0)?;
        all.extend(weights.logprobs_of(&hidden, &targets, temperature)?.0.to_vec1::<f32>()?);
    }
    Ok(all)
}

//! Comparisons of a server's log-probabilities with the learner's: of the first version, and of each version handed over.

use std::sync::Arc;

use anyhow::{Result, ensure};
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
/// Number of completions of each recent prompt that the canary samples from an adapter.
const COMPLETIONS: usize = 4;
/// Maximum number of tokens of each.
const TOKENS: usize = 64;

/// Number of places of each recent completion at which the canary asks an adapter for the most likely tokens.
const PLACES: usize = 8;
/// Minimum number of tokens that the canary compares.
const COMPARED: usize = 16;

/// Prompts, each with completions.
type Samples = Vec<(Vec<u32>, Vec<Vec<u32>>)>;

/// Tokens that a server was asked for, with its log-probabilities of the completions' tokens at temperature 1.
#[derive(Default)]
pub(super) struct Asked {
    samples: Samples,
    server: Vec<f32>,
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
            let (samples, theirs) = sample(fleet, server, stored)?;
            (theirs, learner(policy, &samples, fleet.plan.sampling.temperature)?)
        }
        Content::Full => {
            let samples = recent(fleet);
            (score(fleet, server, stored, &samples)?, learner(policy, &samples, 1.0)?)
        }
    };
    Ok(mean_square(&theirs, &ours).sqrt())
}

/// Checks that the log-probabilities of samples are not those at temperature 1 instead of the run's.
pub(super) fn check_temperature(fleet: &Fleet, server: &Server, stored: &Stored, policy: &Decoder) -> Result<()> {
    let (samples, theirs) = sample(fleet, server, stored)?;
    let temperature = fleet.plan.sampling.temperature;
    let distance =
        |temperature| -> Result<f64> { Ok(mean_square(&theirs, &learner(policy, &samples, temperature)?).sqrt()) };
    ensure!(
        distance(temperature)? <= FIRST || distance(1.0)? > FIRST,
        "the log-probabilities of its samples are those at temperature 1, and not at rollout.temperature = {temperature}; start vLLM with --logprobs-mode processed_logprobs"
    );
    Ok(())
}

/// Result of the check of a hand-over.
pub(super) enum Checked {
    /// With the share of the change that the server shows.
    Taken(f64),
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
    let Some(known) = verified.filter(|known| adapters || !known.asked.server.is_empty()) else {
        // Nothing is known of the server: it has just started. Its log-probabilities themselves must be the policy's.
        let distance = distance(fleet, server, stored, &snapshot.value)?;
        return Ok(match distance <= FIRST {
            true => Checked::Taken(1.0),
            false => Checked::NotTaken(format!("its log-probabilities differ from the policy's by {distance:.3} nats")),
        });
    };
    let Some(taken) = measure(fleet, server, snapshot, stored, known)? else { return Ok(Checked::Taken(1.0)) };
    Ok(match taken.verdict() {
        Verdict::Taken => Checked::Taken(taken.share),
        Verdict::Undecidable => Checked::Undecidable(taken.share, known.version),
        Verdict::NotTaken => Checked::NotTaken(format!(
            "it reports version {}, but its log-probabilities changed by {:.2} ± {:.2} of what they should have since version {}",
            snapshot.version, taken.share, taken.error, known.version
        )),
    })
}

/// Measures how much of the change from the weights `known` to `snapshot` the server shows. `None` if the learner's
/// log-probabilities did not change.
fn measure(
    fleet: &Fleet,
    server: &Arc<Server>,
    snapshot: &Snapshot<Decoder>,
    stored: &Stored,
    known: &Verified,
) -> Result<Option<Taken>> {
    let Asked { samples, server: before } = &known.asked;
    let after = if samples.is_empty() { Vec::new() } else { ask_again(fleet, server, stored, samples)? };
    if after.iter().flatten().count() >= COMPARED.min(before.len().max(1)) {
        let kept = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(&after).filter_map(|(value, after)| after.map(|_| *value)).collect()
        };
        let measured = Measured {
            learner_before: &kept(&learner(&known.weights, samples, 1.0)?),
            learner_after: &kept(&learner(&snapshot.value, samples, 1.0)?),
            server_before: Some(&kept(before)),
            server_after: &after.iter().flatten().copied().collect::<Vec<_>>(),
        };
        return Ok(Taken::measure(&measured));
    }
    // The server does not tell the most likely tokens (--max-logprobs may forbid it), so new samples of it are compared.
    let (samples, after) = sample(fleet, server, stored)?;
    let temperature = fleet.plan.sampling.temperature;
    let measured = Measured {
        learner_before: &learner(&known.weights, &samples, temperature)?,
        learner_after: &learner(&snapshot.value, &samples, temperature)?,
        server_before: None,
        server_after: &after,
    };
    Ok(Taken::measure(&measured))
}

/// Asks the server for log-probabilities under the version `stored`, which it has: of the tokens of recent completions, or,
/// where it cannot be asked for those, of the most likely tokens at places of recent completions. Empty if the server refuses.
pub(super) fn ask(fleet: &Fleet, server: &Arc<Server>, stored: &Stored) -> Result<Asked> {
    let recent = recent(fleet);
    if server.scores_prompts(stored) {
        let server = score(fleet, server, stored, &recent)?;
        return Ok(Asked { samples: recent, server });
    }
    let mut prefixes = Vec::new();
    for (prompt, completions) in &recent {
        for completion in completions {
            let mut places: Vec<usize> = (0..PLACES).map(|i| i * completion.len() / PLACES).collect();
            places.dedup();
            prefixes.extend(places.into_iter().map(|place| [prompt, &completion[..place]].concat()));
        }
    }
    let answers = match tops(fleet, server, stored, &prefixes) {
        Err(Fault::Refused(why)) => {
            tracing::debug!("{}: {why}", server.name());
            return Ok(Asked::default());
        }
        answers => answers?,
    };
    let mut asked = Asked::default();
    for (prefix, top) in prefixes.into_iter().zip(answers) {
        asked.server.extend(top.iter().map(|(_, logprob)| *logprob));
        asked.samples.push((prefix, top.into_iter().map(|(id, _)| vec![id]).collect()));
    }
    Ok(asked)
}

/// Asks the server for the log-probabilities of `samples`, which [`ask`] returned, under the version `stored`. `None` for a
/// token that is not among the most likely ones any more.
fn ask_again(fleet: &Fleet, server: &Arc<Server>, stored: &Stored, samples: &Samples) -> Result<Vec<Option<f32>>> {
    if server.scores_prompts(stored) {
        return Ok(score(fleet, server, stored, samples)?.into_iter().map(Some).collect());
    }
    let prefixes: Vec<Vec<u32>> = samples.iter().map(|(prefix, _)| prefix.clone()).collect();
    let answers = tops(fleet, server, stored, &prefixes)?;
    let mut all = Vec::new();
    for ((_, completions), top) in samples.iter().zip(answers) {
        let of = |id: u32| top.iter().find(|(known, _)| *known == id).map(|(_, logprob)| *logprob);
        all.extend(completions.iter().map(|completion| of(completion[0])));
    }
    Ok(all)
}

/// Returns the most likely tokens after each of `prefixes`, with the server's log-probabilities under the adapter `stored`.
fn tops(
    fleet: &Fleet,
    server: &Arc<Server>,
    stored: &Stored,
    prefixes: &[Vec<u32>],
) -> Result<Vec<Vec<(u32, f32)>>, Fault> {
    let one = |prefix: &Vec<u32>| {
        let (server, stored, prefix) = (Arc::clone(server), stored.clone(), prefix.clone());
        fleet.runtime.spawn(async move { server.top(&stored, &prefix).await })
    };
    let requests: Vec<_> = prefixes.iter().map(one).collect();
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        answers.push(fleet.runtime.block_on(request).map_err(|error| Fault::Down(error.to_string()))??);
    }
    Ok(answers)
}

/// Returns prompts and completions of recent groups, or the example if there are none yet.
fn recent(fleet: &Fleet) -> Samples {
    fleet.samples().into_iter().map(|(prompt, completion)| (prompt, vec![completion])).collect()
}

/// Returns the server's log-probabilities of the samples' completions, at temperature 1.
fn score(fleet: &Fleet, server: &Server, stored: &Stored, samples: &Samples) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (prompt, completions) in samples {
        for completion in completions {
            let ids = [prompt.as_slice(), completion].concat();
            let scores = fleet.runtime.block_on(server.score(Some(stored), &ids))?;
            all.extend_from_slice(&scores[prompt.len().saturating_sub(1)..]);
        }
    }
    Ok(all)
}

/// Samples completions of recent prompts with the version `stored`. Returns prompts and completions, and the server's
/// log-probabilities at the run's temperature.
fn sample(fleet: &Fleet, server: &Server, stored: &Stored) -> Result<(Samples, Vec<f32>)> {
    let (mut samples, mut all) = (Vec::new(), Vec::new());
    let max_tokens = fleet.plan.sampling.max_new_tokens.min(TOKENS);
    for (prompt, _) in fleet.samples() {
        let group = Group { n: COMPLETIONS, max_tokens };
        for Sampled { ids, logprobs, .. } in fleet.runtime.block_on(server.generate(stored, &prompt, group))? {
            samples.push((prompt.clone(), vec![ids]));
            all.extend(logprobs);
        }
    }
    Ok((samples, all))
}

/// Returns the learner's log-probabilities of the samples' completions.
fn learner(weights: &Decoder, samples: &Samples, temperature: f64) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (prompt, completions) in samples {
        let scores = weights.score(&Pack::new(prompt, completions), &[temperature])?;
        all.extend(scores.into_iter().flatten());
    }
    Ok(all)
}

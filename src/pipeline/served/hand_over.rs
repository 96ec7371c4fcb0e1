//! The hand-over of published weights to one server, and the canary that proves it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use preceptor_actors::{Snapshot, SnapshotCell, SnapshotReader};

use super::canary::{Measured, Taken, Verdict, mean_square};
use super::fleet::Fleet;
use super::http::Fault;
use super::server::{Condition, Group, Server};
use super::store::{Content, Stored, Tag, WeightStore};
use crate::lm::model::{Decoder, Pack};
use crate::observe::telemetry;
use crate::pipeline::generate::Sampled;
use crate::status;

/// Time between two looks for new weights.
const LOOK: Duration = Duration::from_millis(10);
/// Time before a server that is down is tried again; it doubles with each failure in a row, up to [`MAX_RETRY`].
const RETRY: Duration = Duration::from_secs(1);
/// Longest time before a server is tried again, and the time after which one that did not take a version is handed it again.
const MAX_RETRY: Duration = Duration::from_secs(15);
/// Time limit of a hand-over.
const LOAD: Duration = Duration::from_secs(600);
/// Greatest difference, as root mean square in nats, of a server's first log-probabilities from the run's. bf16 gives about
/// 0.02; another model gives more than 1.
const FIRST: f64 = 0.1;
/// Difference above which the first comparison is logged as one of precision.
const EXACT: f64 = 1e-3;

/// Number of completions of each recent prompt that the canary samples from an adapter.
const COMPLETIONS: usize = 4;
/// Maximum number of tokens of each.
const TOKENS: usize = 64;

/// Prompts and completions.
type Samples = Vec<(Vec<u32>, Vec<u32>)>;

/// Weights that a server is known to compute with, and its log-probabilities under them.
struct Verified {
    weights: Arc<Decoder>,
    version: u64,
    samples: Samples,
    /// Server's log-probabilities of the samples.
    server: Vec<f32>,
}

/// Hands the first version to `server`, and compares log-probabilities of a text of the data.
///
/// # Errors
/// If the server refuses the weights, or does not compute with them.
pub(super) fn begin(
    fleet: &Arc<Fleet>,
    server: &Server,
    cell: &Arc<SnapshotCell<Decoder>>,
    store: &dyn WeightStore,
) -> Result<()> {
    let snapshot = cell.latest();
    fleet.runtime.block_on(async {
        server.resume().await;
        // Adapters that an earlier process of this run left.
        for name in server.models().await.unwrap_or_default() {
            if Tag::parse(&name).is_some_and(|(run, _)| run == fleet.plan.run) {
                server.unload(&name).await;
            }
        }
    });
    let stored = stored(fleet, &snapshot, store)?;
    fleet.runtime.block_on(server.load(&stored, LOAD))?;
    check_temperature(fleet, server, &stored, &snapshot.value)?;
    let distance = distance(fleet, server, &stored, &snapshot.value)?;
    ensure!(
        distance <= FIRST,
        "its log-probabilities differ from the policy's by {distance:.3} nats (root mean square): it has another base model, or did not take the weights; serve the model of policy.model"
    );
    let precision =
        if distance > EXACT { "; it computes with another precision, which the correction covers" } else { "" };
    status!(
        "server    {} has version {}; log-probabilities within {distance:.1e} of the policy's{precision}",
        server.name(),
        snapshot.version
    );
    server.state().loaded = Some(stored);
    fleet.set(server, Condition::Ready);
    Ok(())
}

/// Returns the distance of the server's log-probabilities from the policy's, as root mean square in nats.
fn distance(fleet: &Fleet, server: &Server, stored: &Stored, policy: &Decoder) -> Result<f64> {
    let (theirs, ours) = match stored.content {
        Content::Adapters => {
            let (samples, theirs) = sample(fleet, server, stored)?;
            (theirs, learner(policy, &samples, fleet.plan.sampling.temperature)?)
        }
        Content::Full => {
            let samples = fleet.samples();
            (score(fleet, server, stored, &samples)?, learner(policy, &samples, 1.0)?)
        }
    };
    Ok(mean_square(&theirs, &ours).sqrt())
}

/// Checks that the log-probabilities of samples are not those at temperature 1 instead of the run's.
fn check_temperature(fleet: &Fleet, server: &Server, stored: &Stored, policy: &Decoder) -> Result<()> {
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

/// Hands new versions to `server` until the fleet stops.
pub(super) fn run(fleet: &Arc<Fleet>, server: &Server, cell: &Arc<SnapshotCell<Decoder>>, store: &dyn WeightStore) {
    let mut reader = cell.reader(server.name());
    let first = cell.latest();
    let mut verified: Option<Verified> = None;
    // The first version was handed over and compared before this thread began.
    if server.state().loaded.as_ref().is_some_and(|stored| stored.tag == tag(fleet, &first)) {
        acknowledge(&mut reader, &first);
        verified =
            Some(Verified { weights: first.value, version: first.version, samples: Vec::new(), server: Vec::new() });
    }
    let (mut retry, mut rejected) = (RETRY, Instant::now());
    while !fleet.stopped.load(Ordering::SeqCst) {
        fleet.end_waiting();
        let condition = server.state().condition.clone();
        if let Condition::Down(_) = condition {
            pause(fleet, retry);
            retry = (2 * retry).min(MAX_RETRY);
            if fleet.runtime.block_on(server.health()).is_ok() {
                fleet.runtime.block_on(server.resume());
                verified = None;
                fleet.set(server, Condition::Starting);
            }
            continue;
        }
        let news = match condition {
            Condition::Starting => Some(cell.latest()),
            // Without another server, the learner publishes no further version until this one takes it.
            Condition::Rejected(_) if rejected.elapsed() >= MAX_RETRY => Some(cell.latest()),
            _ => reader.refresh(),
        };
        let Some(snapshot) = news else {
            unload_unused(fleet, server);
            pause(fleet, LOOK);
            continue;
        };
        match hand_over(fleet, server, &snapshot, store, &mut verified) {
            Ok(()) => {
                retry = RETRY;
                acknowledge(&mut reader, &snapshot);
                unload_unused(fleet, server);
                let used = |version: u64| {
                    fleet.servers.iter().any(|server| {
                        let state = server.state();
                        let loaded = state.loaded.as_ref().is_some_and(|stored| stored.tag.version <= version);
                        loaded || state.loaded.is_none() || state.under_way.contains_key(&version)
                    })
                };
                store.retain(fleet.plan.run, &used);
            }
            Err(Failure::Server(fault)) => fleet.set(server, Condition::Down(fault.to_string())),
            Err(Failure::NotTaken(why)) => {
                // The server is handed the next version, or this one again; until it takes one it gets no prompts.
                acknowledge(&mut reader, &snapshot);
                rejected = Instant::now();
                fleet.set(server, Condition::Rejected(why));
            }
            Err(Failure::Here(error)) => {
                status!("{error:#}; the hand-over to {} is tried again", server.name());
                pause(fleet, RETRY);
            }
        }
    }
    unload_all(fleet, server);
}

/// Removes the adapters of a run that ends, since the server may be used by other runs.
fn unload_all(fleet: &Fleet, server: &Server) {
    let adapters = {
        let mut state = server.state();
        if state.condition != Condition::Ready {
            return;
        }
        std::mem::take(&mut state.adapters)
    };
    for tag in adapters {
        fleet.runtime.block_on(server.unload(&tag.to_string()));
    }
}

enum Failure {
    /// The server failed.
    Server(Fault),
    /// The server answered that it took the weights, and does not compute with them.
    NotTaken(String),
    /// This process cannot write or compute.
    Here(anyhow::Error),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Server(fault)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Fault>() {
            Ok(fault) => Self::Server(fault),
            Err(error) => Self::Here(error),
        }
    }
}

fn hand_over(
    fleet: &Fleet,
    server: &Server,
    snapshot: &Snapshot<Decoder>,
    store: &dyn WeightStore,
    verified: &mut Option<Verified>,
) -> Result<(), Failure> {
    let began = Instant::now();
    // After a hand-over that was not taken, it is unknown which weights the server has.
    let before = Some(server.state()).filter(|state| state.condition == Condition::Ready);
    let before = before.and_then(|state| state.loaded.clone());
    let stored = stored(fleet, snapshot, store)?;
    // The server is asked about the weights that it has before they are replaced.
    if let (Some(known), Some(before)) = (verified.as_mut(), &before)
        && before.content == Content::Full
        && known.version == before.tag.version
    {
        known.samples = fleet.samples();
        known.server = score(fleet, server, before, &known.samples)?;
    }
    server.state().unchecked = true;
    let loaded = fleet.runtime.block_on(server.load(&stored, LOAD)).map_err(anyhow::Error::from);
    let verdict = loaded.and_then(|()| check(fleet, server, snapshot, &stored, verified.as_ref()));
    {
        let mut state = server.state();
        state.unchecked = false;
        if !matches!(verdict, Ok(Checked::Taken(_) | Checked::Undecidable(..))) {
            state.names.remove(&stored.tag.to_string());
        }
    }
    let verdict = verdict?;
    let took = began.elapsed();
    let (share, words) = match verdict {
        Checked::Taken(share) => (Some(share), None),
        Checked::Undecidable(share, version) => (
            Some(share),
            Some(format!(
                "rollout server {}: the change of the weights from version {version} to {} is too small to see in its precision; the next versions are compared with {version}",
                server.name(),
                snapshot.version
            )),
        ),
        Checked::NotTaken(why) => return Err(Failure::NotTaken(why)),
    };
    if let Some(words) = words {
        tracing::info!("{words}");
    } else {
        *verified = Some(Verified {
            weights: Arc::clone(&snapshot.value),
            version: snapshot.version,
            samples: Vec::new(),
            server: Vec::new(),
        });
    }
    telemetry::handed_over(server.name(), took, share);
    {
        let mut state = server.state();
        state.loaded = Some(stored);
        state.hand_over = Some(took);
        state.canary = share.or(state.canary);
        // Names of versions that no completion can have any more.
        let oldest = snapshot.version.saturating_sub(64);
        state.names.retain(|_, version| *version >= oldest);
    }
    fleet.set(server, Condition::Ready);
    fleet.observe(server);
    fleet.admit();
    Ok(())
}

/// Result of the check of a hand-over.
enum Checked {
    /// With the share of the change that the server shows.
    Taken(f64),
    /// With the share, and the version that was compared with.
    Undecidable(f64, u64),
    /// With the reason.
    NotTaken(String),
}

/// Checks that the server computes with the weights of `snapshot`.
fn check(
    fleet: &Fleet,
    server: &Server,
    snapshot: &Snapshot<Decoder>,
    stored: &Stored,
    verified: Option<&Verified>,
) -> Result<Checked> {
    let adapters = stored.content == Content::Adapters;
    let Some(known) = verified.filter(|known| adapters || !known.server.is_empty()) else {
        // Nothing is known of the server: it has just started. Its log-probabilities themselves must be the policy's.
        let distance = distance(fleet, server, stored, &snapshot.value)?;
        return Ok(match distance <= FIRST {
            true => Checked::Taken(1.0),
            false => Checked::NotTaken(format!("its log-probabilities differ from the policy's by {distance:.3} nats")),
        });
    };
    // Some versions of vLLM fail if log-probabilities of prompts are asked of an adapter, so its own samples are compared.
    let (samples, before, after, temperature) = match adapters {
        true => {
            let (samples, after) = sample(fleet, server, stored)?;
            (samples, None, after, fleet.plan.sampling.temperature)
        }
        false => {
            let after = score(fleet, server, stored, &known.samples)?;
            (known.samples.clone(), Some(&known.server), after, 1.0)
        }
    };
    let learner_before = learner(&known.weights, &samples, temperature)?;
    let measured = Measured {
        learner_before: &learner_before,
        learner_after: &learner(&snapshot.value, &samples, temperature)?,
        server_before: before.map(Vec::as_slice),
        server_after: &after,
    };
    let Some(taken) = Taken::measure(&measured) else { return Ok(Checked::Taken(1.0)) };
    Ok(match taken.verdict() {
        Verdict::Taken => Checked::Taken(taken.share),
        Verdict::Undecidable => Checked::Undecidable(taken.share, known.version),
        Verdict::NotTaken => Checked::NotTaken(format!(
            "it reports version {}, but its log-probabilities changed by {:.2} ± {:.2} of what they should have since version {}",
            snapshot.version, taken.share, taken.error, known.version
        )),
    })
}

/// Returns the server's log-probabilities of the samples' completions, at temperature 1.
fn score(fleet: &Fleet, server: &Server, stored: &Stored, samples: &[(Vec<u32>, Vec<u32>)]) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (prompt, completion) in samples {
        let ids = [prompt.as_slice(), completion].concat();
        let scores = fleet.runtime.block_on(server.score(Some(stored), &ids))?;
        all.extend_from_slice(&scores[prompt.len().saturating_sub(1)..]);
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
            samples.push((prompt.clone(), ids));
            all.extend(logprobs);
        }
    }
    Ok((samples, all))
}

/// Returns the learner's log-probabilities of the samples' completions.
fn learner(weights: &Decoder, samples: &[(Vec<u32>, Vec<u32>)], temperature: f64) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (prompt, completion) in samples {
        let scores = weights.score(&Pack::new(prompt, std::slice::from_ref(completion)), &[temperature])?;
        all.extend(scores.into_iter().flatten());
    }
    Ok(all)
}

/// Removes adapters that no request uses and that are older than the server's version.
fn unload_unused(fleet: &Fleet, server: &Server) {
    let unused: Vec<Tag> = {
        let mut state = server.state();
        let Some(current) = state.loaded.as_ref().map(|stored| stored.tag) else { return };
        let under_way = state.under_way.clone();
        let (unused, kept) = std::mem::take(&mut state.adapters)
            .into_iter()
            .partition(|tag| *tag != current && !under_way.contains_key(&tag.version));
        state.adapters = kept;
        unused
    };
    for tag in unused {
        fleet.runtime.block_on(server.unload(&tag.to_string()));
    }
}

/// Stores the weights of `snapshot`. Weights without adapters get initial ones, which change nothing, if adapters are
/// trained: a server's base model stays as it is.
fn stored(fleet: &Fleet, snapshot: &Snapshot<Decoder>, store: &dyn WeightStore) -> Result<Stored> {
    let tag = tag(fleet, snapshot);
    match &fleet.plan.lora {
        Some(lora) if snapshot.value.lora().is_none() => store.put(tag, &snapshot.value.adapted(lora, 0)?.0),
        _ => store.put(tag, &snapshot.value),
    }
}

fn tag(fleet: &Fleet, snapshot: &Snapshot<Decoder>) -> Tag {
    Tag { run: fleet.plan.run, version: snapshot.version, fingerprint: snapshot.fingerprint }
}

/// Records that the server now uses `snapshot`. Its content was compared by the canary, so its fingerprint is that of the
/// publisher.
fn acknowledge(reader: &mut SnapshotReader<Decoder>, snapshot: &Snapshot<Decoder>) {
    reader.acknowledge(snapshot, snapshot.fingerprint);
}

/// Sleeps, unless the fleet stops.
fn pause(fleet: &Fleet, time: Duration) {
    let end = Instant::now() + time;
    while !fleet.stopped.load(Ordering::SeqCst) && Instant::now() < end {
        std::thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
    }
}

//! The hand-over of published weights to one server, and the canary that proves it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use preceptor_actors::{Snapshot, SnapshotCell, SnapshotReader};

use super::compare::{Asked, Checked, FIRST, Verified, ask, check, check_temperature, distance};
use super::fleet::Fleet;
use super::http::Fault;
use super::server::{Condition, Server};
use super::store::{Stored, Tag, WeightStore};
use crate::lm::model::Decoder;
use crate::observe::telemetry;
use crate::status;

/// Time between two looks for new weights.
const LOOK: Duration = Duration::from_millis(10);
/// Time before a server that is down is tried again; it doubles with each failure in a row, up to [`MAX_RETRY`].
const RETRY: Duration = Duration::from_secs(1);
/// Longest time before a server is tried again, and the time after which one that did not take a version is handed it again.
const MAX_RETRY: Duration = Duration::from_secs(15);
/// Difference above which the first comparison is logged as one of precision.
const EXACT: f64 = 1e-3;

/// Time limit of a hand-over.
const LOAD: Duration = Duration::from_secs(600);
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

/// Hands new versions to `server` until the fleet stops.
pub(super) fn run(
    fleet: &Arc<Fleet>,
    server: &Arc<Server>,
    cell: &Arc<SnapshotCell<Decoder>>,
    store: &dyn WeightStore,
) {
    let mut reader = cell.reader(server.name());
    let first = cell.latest();
    let mut verified: Option<Verified> = None;
    // The first version was handed over and compared before this thread began.
    if server.state().loaded.as_ref().is_some_and(|stored| stored.tag == tag(fleet, &first)) {
        acknowledge(&mut reader, &first);
        verified = Some(Verified { weights: first.value, version: first.version, asked: Asked::default() });
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
    server: &Arc<Server>,
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
        && known.version == before.tag.version
        && known.asked.is_used_up()
    {
        known.asked = ask(fleet, server, before)?;
    }
    server.state().unchecked = true;
    let loaded = fleet.runtime.block_on(server.load(&stored, LOAD)).map_err(anyhow::Error::from);
    let verdict = loaded.and_then(|()| check(fleet, server, snapshot, &stored, verified.as_ref()));
    {
        let mut state = server.state();
        state.unchecked = false;
        if !matches!(verdict, Ok(Checked::Taken(..) | Checked::Undecidable(..))) {
            state.names.remove(&stored.tag.to_string());
        }
    }
    let verdict = verdict?;
    let took = began.elapsed();
    let share = match verdict {
        Checked::Taken(share, asked) => {
            *verified = Some(Verified { weights: Arc::clone(&snapshot.value), version: snapshot.version, asked });
            share
        }
        Checked::Undecidable(share, version) => {
            tracing::info!(
                "rollout server {}: the change of the weights from version {version} to {} is too small to see in its precision; the next versions are compared with {version}",
                server.name(),
                snapshot.version
            );
            share
        }
        Checked::NotTaken(why) => return Err(Failure::NotTaken(why)),
    };
    telemetry::handed_over(server.name(), took, Some(share));
    {
        let mut state = server.state();
        state.loaded = Some(stored);
        state.hand_over = Some(took);
        state.canary = Some(share);
        // Names of versions that no completion can have any more.
        let oldest = snapshot.version.saturating_sub(64);
        state.names.retain(|_, version| *version >= oldest);
    }
    fleet.set(server, Condition::Ready);
    fleet.observe(server);
    fleet.admit();
    Ok(())
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

//! A worker that samples completions for a run on another machine.
//!
//! A worker pulls work, samples with its own engine, puts the result into the results' queue and then acknowledges the work.
//! It may join and leave at any moment: work that it does not finish is delivered to another worker.

mod leases;
mod lineage;
mod sampler;

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use preceptor_actors::transport::Transport;

use super::fetch::{StorePlan, WorkerStore};
use super::health::Health;
use super::notices::Notices;
use super::protocol::{OLDEST_PROTOCOL, PROTOCOL, RUN, RunNotice, RunState, is_compatible, shut_out};
use crate::status;
use lineage::Lineage;
pub use sampler::ServersPlan;

/// Time between two signs of life.
pub(super) const PULSE: Duration = Duration::from_secs(5);
/// Time between two looks for new weights and for the run.
const LOOK: Duration = Duration::from_millis(200);
/// Longest wait for work before the worker looks for anything else.
pub(super) const PULL: Duration = Duration::from_millis(500);
/// Time without progress of the engine after which the worker gives no sign of life for its work.
pub(super) const STUCK: Duration = Duration::from_secs(120);

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerPlan {
    /// Name of the run to work for.
    pub run: String,
    /// Name of this worker: letters, digits, `-` and `_`.
    pub name: String,
    /// Where weights are read.
    pub store: StorePlan,
    /// Number of concurrent completions.
    pub slots: usize,
    /// Inference servers that sample; `None` if this process does.
    pub servers: Option<ServersPlan>,
    /// Time to finish work after the worker is told to stop.
    pub drain: Duration,
    /// Time to wait for the run to be announced, after which the worker gives up.
    pub patience: Duration,
    /// Health of the worker, for its probes.
    pub health: Arc<Health>,
}

/// A run and this worker, or its servers, do not suit each other, so that a person has to change one of them.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct Unsuitable(pub anyhow::Error);

/// What a worker did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Number of groups, or answers of judges, whose results were handed over.
    pub groups: u64,
    /// Number of tokens of these groups.
    pub tokens: u64,
    /// Number of groups or questions given back unfinished.
    pub given_back: u64,
    /// Number of bytes of the results.
    pub bytes: u64,
}

/// Works for the run until it ends, or until `stop` is set and the work under way is finished or the time for that is over.
///
/// # Errors
/// If the run's program or model cannot be used, its weights differ from what the coordinator announces, or the worker is
/// shut out. Outages of the transport are waited for.
pub fn work(
    plan: &WorkerPlan,
    device: &Device,
    transport: &dyn Transport,
    notices: &dyn Notices,
    stop: &AtomicBool,
) -> Result<Summary> {
    let mut total = Summary::default();
    let (mut left, mut store) = (None, None);
    loop {
        let Some(notice) = wait_for_run(plan, notices, stop, left)? else { return Ok(total) };
        ensure!(
            notice.samples,
            "the run {} samples without workers; start this one with --role label, or set rollout.engine = \"workers\" in the run's configuration",
            plan.run
        );
        status!("worker    {} works for {}, lineage {:016x}", plan.name, plan.run, notice.lineage);
        let opened = WorkerStore::open(&plan.store, &plan.run, &notice.store, store.take())?;
        let store = store.insert(opened);
        let Some(base) = folder(plan, store, &notice, (&notice.base, &notice.base_sha256), notices, stop)? else {
            left = Some(notice.lineage);
            continue;
        };
        let mut lineage = match Lineage::open(plan, device, &notice, store, &base, stop) {
            Err(_) if stop.load(Ordering::SeqCst) => return Ok(total),
            opened => opened?,
        };
        let ended = lineage.work(transport, notices, stop);
        plan.health.uses(None);
        total.groups += lineage.summary.groups;
        total.tokens += lineage.summary.tokens;
        total.given_back += lineage.summary.given_back;
        total.bytes += lineage.bytes;
        match ended? {
            Ended::Stopped => return Ok(total),
            Ended::Replaced => left = Some(notice.lineage),
        }
    }
}

/// Reason why a worker stops working for a lineage.
pub(super) enum Ended {
    /// The worker is told to stop, or the run has ended.
    Stopped,
    /// The run has another lineage.
    Replaced,
}

/// Waits until the run is announced, with another lineage than `left`. `None` if the worker is told to stop or the run has
/// ended.
pub(super) fn wait_for_run(
    plan: &WorkerPlan,
    notices: &dyn Notices,
    stop: &AtomicBool,
    left: Option<u64>,
) -> Result<Option<RunNotice>> {
    let (mut began, mut told) = (Instant::now(), false);
    while !stop.load(Ordering::SeqCst) {
        plan.health.progressed();
        let found = match notices.get(&plan.run, RUN) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!("{error}");
                None
            }
        };
        if let Some(found) = found {
            let notice: RunNotice = serde_json::from_slice(&found).with_context(|| {
                format!("the notice of the run {} cannot be read; use programs of one version", plan.run)
            })?;
            if !is_compatible(&notice) {
                bail!(
                    "the coordinator of {} (version {}) understands the protocols {} to {}, and this program {OLDEST_PROTOCOL} to {PROTOCOL}; use programs of neighbouring versions",
                    plan.run,
                    notice.program,
                    notice.oldest_protocol,
                    notice.protocol
                );
            }
            match notice.state {
                RunState::Open if Some(notice.lineage) != left => return Ok(Some(notice)),
                // A worker that starts after the run waits for another one of its name.
                RunState::Ended if left.is_some() => return Ok(None),
                RunState::Open | RunState::Ended => {}
                RunState::Paused => began = Instant::now(),
            }
        }
        // A coordinator that was there comes back.
        ensure!(
            left.is_some() || began.elapsed() < plan.patience,
            "no run {} was announced within {} s; start it with rollout.engine or labeler.engine = \"workers\", or correct --run and --join",
            plan.run,
            plan.patience.as_secs()
        );
        if !told {
            status!("worker    waits for the run {}", plan.run);
            told = true;
        }
        std::thread::sleep(LOOK);
    }
    Ok(None)
}

/// Returns whether the work for the lineage of `notice` is over.
///
/// # Errors
/// If the coordinator has shut this worker out.
pub(super) fn is_over(plan: &WorkerPlan, notice: &RunNotice, notices: &dyn Notices) -> Result<Option<Ended>> {
    let asked = notices.get(&plan.run, &shut_out(&plan.name)).and_then(|out| Ok((out, notices.get(&plan.run, RUN)?)));
    let (out, run) = match asked {
        Ok(answers) => answers,
        Err(error) => {
            tracing::warn!("{error}");
            return Ok(None);
        }
    };
    if let Some(why) = out {
        bail!(
            "the coordinator has shut this worker out: {}; restart it under another --name once the cause is mended",
            String::from_utf8_lossy(&why)
        );
    }
    let Some(run) = run else { return Ok(None) };
    let found: RunNotice = serde_json::from_slice(&run)?;
    Ok(match found.state {
        RunState::Ended => {
            status!("worker    the run {} has ended", plan.run);
            Some(Ended::Stopped)
        }
        RunState::Open if found.lineage == notice.lineage => None,
        RunState::Open | RunState::Paused => Some(Ended::Replaced),
    })
}

/// Returns a folder of the run's store, given by its name and the SHA-256 of its list of checksums, once it is here and
/// verified; `None` if the worker is told to stop, or the run has another lineage, before.
///
/// # Errors
/// If the folder is missing or damaged, or the store cannot be read.
pub(super) fn folder(
    plan: &WorkerPlan,
    store: &WorkerStore,
    notice: &RunNotice,
    named: (&str, &str),
    notices: &dyn Notices,
    stop: &AtomicBool,
) -> Result<Option<PathBuf>> {
    let looked = Cell::new(Instant::now());
    let is_over = || {
        plan.health.progressed();
        let looks = looked.get().elapsed() > PULSE;
        if looks {
            looked.set(Instant::now());
        }
        stop.load(Ordering::SeqCst) || looks && !is_current(plan, notices, notice)
    };
    store.folder(named, plan.patience, &is_over)
}

/// Returns whether the run still works under `notice`, as far as the broker answers.
fn is_current(plan: &WorkerPlan, notices: &dyn Notices, notice: &RunNotice) -> bool {
    match notices.get(&plan.run, RUN) {
        Ok(Some(found)) => serde_json::from_slice::<RunNotice>(&found)
            .is_ok_and(|found| found.lineage == notice.lineage && found.state == RunState::Open),
        Ok(None) => true,
        Err(error) => {
            tracing::warn!("{error}");
            true
        }
    }
}

/// Returns the name of this machine.
pub fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Some(name.trim().to_owned()).filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown".into())
}

//! The phases before reinforcement learning: supervised fine-tuning and the warm-up of the reward model.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use candle_core::DType;
use preceptor_actors::{GraphBuilder, Outcome, StageResult, spawn_graph};
use serde_json::{Value, json};

use super::files::RunFiles;
use super::observer::CheckpointSchedule;
use super::resume::AcceptedKeys;
use super::retry::retry_write;
use super::supervise::{Stop, graph_options, run_abandonable, supervise};
use super::{announce, reference, resume};
use crate::config::Config;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::pipeline::learn::TrainState;
use crate::pipeline::reward::trainer::TrainerStep;
use crate::pipeline::reward::warm_up::{NO_PAIR_TRAINED, WarmUpObserver};
use crate::pipeline::setup::Prepared;
use crate::pipeline::sft::SftObserver;
use crate::pipeline::topology::learning::{adam, lora};
use crate::pipeline::topology::{Node, wire_fine_tuning};
use crate::rl::ledger::SharedLedger;
use crate::run::checkpoint::store::Latest;
use crate::run::checkpoint::{
    BestCheckpoint, CheckpointFormat, CheckpointStore, CheckpointWriter, Identity, JudgeContents, OpenedCheckpoint,
    Snapshot,
};
use crate::status;
use crate::util::disk;
use crate::util::exit::Ended;
use crate::util::mutex::lock;
use crate::util::signals::Interrupted;

/// Progress bar and log of a phase.
pub(super) struct PhaseReporter {
    phase: &'static str,
    progress: Progress,
    files: Arc<Mutex<RunFiles>>,
}

impl PhaseReporter {
    fn new(phase: &'static str, unit: &'static str, of: u64, files: &Arc<Mutex<RunFiles>>) -> Self {
        Self { phase, progress: Progress::new(phase, unit, of), files: Arc::clone(files) }
    }

    /// Logs `text` and appends `figures` to `phases.jsonl`.
    fn report(&self, text: &str, mut figures: Value) {
        self.progress.line(text);
        figures["phase"] = json!(self.phase);
        let written = lock(&self.files).append_phase(&figures);
        if let Err(error) = written {
            // A phase does not fail because its figures cannot be written.
            self.progress.line(&format!("{error:#}"));
        }
    }
}

impl WarmUpObserver for PhaseReporter {
    fn group(&mut self, done: u64) {
        self.progress.at(done);
    }

    fn step(&mut self, step: &TrainerStep, (accuracy, pairs): (f64, usize)) {
        let held_out = if pairs == 0 { "none yet".to_owned() } else { format!("{:.1} % of {pairs}", 100.0 * accuracy) };
        self.report(
            &format!(
                "reward model step {:>3}  loss {:.4}  trained {:.1} %  held out {held_out}  gradient {:.3}",
                step.version,
                step.loss,
                100.0 * step.accuracy,
                step.gradient_norm
            ),
            json!({ "step": step.version, "loss": step.loss, "accuracy": step.accuracy, "held_out": accuracy,
                "held_out_pairs": pairs, "gradient_norm": step.gradient_norm }),
        );
    }

    fn done(&mut self, right: f64, pairs: u64) {
        let text = if pairs == 0 {
            "reward model is warmed up; no labeled pair was held out to measure it (reward_model.holdout)".to_owned()
        } else {
            format!("reward model ranks {:.1} % of {pairs} held-out pairs as labeled", 100.0 * right / pairs as f64)
        };
        self.report(&text, json!({ "held_out_right": (pairs > 0).then_some(right), "held_out_pairs": pairs }));
    }
}

/// Folder of unfinished fine-tuning in a run's directory; it has its own checkpoints.
pub(super) const FINE_TUNING: &str = "fine-tuning";

/// Returns whether the run in `run` has an unfinished fine-tuning.
///
/// # Errors
/// If the directory cannot be read.
pub(super) fn is_in_progress(run: &Path) -> Result<bool> {
    disk::exists(&run.join(FINE_TUNING))
}

/// Returns the latest checkpoint of an interrupted fine-tuning of `base`, if there is one, and the damaged checkpoints
/// after it.
///
/// # Errors
/// If checkpoints exist but none is usable, or they were written under another configuration, model or data set.
pub(super) fn resume_fine_tuning(
    config: &Config,
    base: &Identity,
    run: &Path,
    accepted: &AcceptedKeys,
) -> Result<(Option<OpenedCheckpoint>, Vec<PathBuf>)> {
    let Latest { checkpoint: unfinished, damaged } = store(run).latest(|line| status!("{line}"))?;
    if let Some(unfinished) = &unfinished {
        unfinished.check_identity(base)?;
        status!("resuming  {}", unfinished.path().display());
        let place = run.join(FINE_TUNING);
        let changes = resume::compare(unfinished, config, accepted)
            .map_err(|error| anyhow!("{error:#}; or remove {} to fine-tune from the beginning", place.display()))?;
        for change in changes {
            status!("{}", change.line());
        }
    }
    Ok((unfinished, damaged))
}

/// Removes the checkpoints of fine-tuning from `run`, after its result is stored as the reference.
pub(super) fn remove_checkpoints(run: &Path) {
    let path = run.join(FINE_TUNING);
    if path.exists()
        && let Err(error) = std::fs::remove_dir_all(&path)
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

fn store(run: &Path) -> CheckpointStore {
    CheckpointStore::new(&run.join(FINE_TUNING), 1, BestCheckpoint::None)
}

/// Observer of fine-tuning: logs each step and writes checkpoints when they are due.
struct FineTuningObserver {
    reporter: PhaseReporter,
    schedule: CheckpointSchedule,
    writer: CheckpointWriter,
    steps: u64,
}

impl SftObserver for FineTuningObserver {
    fn step(&mut self, state: &TrainState, loss: f64, gradient_norm: f64) {
        let (step, of) = (state.step, self.steps);
        self.reporter.progress.at(step);
        self.reporter.report(
            &format!("fine-tuning {step:>3}/{of}  loss {loss:.4}  gradient {gradient_norm:.3}"),
            json!({ "step": step, "loss": loss, "gradient_norm": gradient_norm }),
        );
        if step < of && self.schedule.is_due(step) && !self.writer.is_busy() {
            self.schedule.failed.store(false, Ordering::SeqCst);
            match self.snapshot(state) {
                Ok(snapshot) => drop(self.writer.submit(snapshot)),
                Err(error) => self.checkpoint_failed(&error),
            }
            self.schedule.last = Instant::now();
        }
    }
}

impl FineTuningObserver {
    /// Takes a snapshot of fine-tuning. The caller holds the lock of `state`.
    fn snapshot(&self, state: &TrainState) -> Result<Snapshot> {
        let files = lock(&self.reporter.files).lengths()?;
        Snapshot::take(state, None, &SharedLedger::default(), files, None)
    }

    /// Writes the last checkpoint of fine-tuning and returns its path. Writes none before the first step, in the middle
    /// of an update of the weights, or while a learner that did not stop holds them.
    fn write_last_checkpoint(
        &self,
        state: &Mutex<TrainState>,
        store: &CheckpointStore,
        format: &CheckpointFormat,
        retry_s: f64,
    ) -> Option<PathBuf> {
        let state = match state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        if state.step == 0 || state.stepping {
            return None;
        }
        match retry_write(retry_s, || store.put(format, &self.snapshot(&state)?)) {
            Ok(written) => Some(written.path),
            Err(error) => {
                status!("{error:#}");
                None
            }
        }
    }

    fn checkpoint_failed(&self, error: &anyhow::Error) {
        telemetry::disk_error();
        self.schedule.failed.store(true, Ordering::SeqCst);
        self.reporter.progress.line(&format!("no checkpoint of fine-tuning: {error:#}; fine-tuning continues"));
    }
}

/// Fine-tunes the policy on the references of the data, starting from `unfinished` if given. The result replaces the
/// policy in `prepared`, and is the reference π_SFT.
///
/// # Errors
/// If fine-tuning fails or is interrupted.
pub(super) async fn fine_tune(
    config: &Arc<Config>,
    prepared: Prepared,
    unfinished: Option<OpenedCheckpoint>,
    files: &Arc<Mutex<RunFiles>>,
    monitor: &Arc<Monitor>,
    stop: &Stop,
) -> Result<Prepared> {
    let mut state = TrainState::new(prepared.policy(), adam(config), None, lora(config).as_ref())?;
    state.place(prepared.devices.learner.clone());
    let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
    if let Some(unfinished) = unfinished {
        unfinished.restore(&mut state, None)?;
    }
    let state = Arc::new(Mutex::new(state));
    let reporter = PhaseReporter::new("supervised fine-tuning", "steps", config.sft.steps, files);
    let (store, progress) = (Arc::new(store(lock(files).dir())), reporter.progress.clone());
    // No label has been bought yet, so there is no judge to compare.
    let policy = (prepared.tokenizer.clone(), prepared.origin.as_str());
    let format = CheckpointFormat::new(config, policy, DType::F32, identity, JudgeContents::new());
    let format = Arc::new(format);
    let failed = Arc::new(AtomicBool::new(false));
    let report = announce(&Arc::new(OnceLock::from(progress.clone())), &failed, monitor, None);
    let writer = CheckpointWriter::start(Arc::clone(&store), Arc::clone(&format), report)?;
    let fine_tuning = FineTuningObserver {
        reporter,
        schedule: CheckpointSchedule::new(config, failed),
        writer,
        steps: config.sft.steps,
    };
    let fine_tuning = Arc::new(Mutex::new(fine_tuning));
    let prepared = Arc::new(prepared);
    let (wired, trained, observer) = (Arc::clone(&prepared), Arc::clone(&state), Arc::clone(&fine_tuning));
    let settings = Arc::clone(config);
    let ended = run(config, "supervised fine-tuning", &progress, monitor, stop, move |builder| {
        let observer: Arc<Mutex<dyn SftObserver>> = observer.clone();
        wire_fine_tuning(builder, &settings, &wired, &trained, &observer);
        Ok(())
    })
    .await;
    let (last, failed) = ((Arc::clone(&fine_tuning), Arc::clone(&state)), ended.is_err());
    let retry_s = config.checkpoint.retry_s;
    let kept = run_abandonable(stop, "the checkpoint of fine-tuning", move || {
        lock(&last.0).writer.finish();
        if failed { lock(&last.0).write_last_checkpoint(&last.1, &store, &format, retry_s) } else { None }
    })
    .await?;
    match (ended, kept) {
        (Ok(()), Some(_)) => {}
        (Err(error), Some(Some(path))) => {
            return Err(with_remedy(error, &format!("--resume continues from {}", path.display())));
        }
        (Err(error), _) => {
            return Err(with_remedy(error, "--resume continues from its last checkpoint, or starts it again"));
        }
        (Ok(()), None) => {
            bail!("stopped before the result of fine-tuning was stored; --resume continues from its last checkpoint")
        }
    }
    let policy = lock(&state).snapshot()?;
    let identity = policy.weights().fingerprint()?;
    let Ok(prepared) = Arc::try_unwrap(prepared) else { bail!("supervised fine-tuning still holds the data") };
    Ok(Prepared { policy: Some(policy), identity, ..prepared })
}

/// Stores the policy that was fine-tuned from `base` as the run's reference. Retries a failed write for
/// `checkpoint.retry_s`.
///
/// # Errors
/// If the policy cannot be written, or a signal interrupts the run. The error names the state from which `--resume`
/// continues.
pub(super) async fn save_reference(
    config: &Arc<Config>,
    base: Identity,
    prepared: Prepared,
    files: &Arc<Mutex<RunFiles>>,
    stop: &Stop,
) -> Result<Prepared> {
    let (settings, shared) = (Arc::clone(config), Arc::clone(files));
    let kept = run_abandonable(stop, "the fine-tuned policy", move || {
        retry_write(settings.checkpoint.retry_s, || reference::save(&settings, &base, &prepared, &mut lock(&shared)))?;
        anyhow::Ok(prepared)
    })
    .await?;
    let Some(kept) = kept else {
        let text = "stopped before the fine-tuned policy was stored; --resume continues from fine-tuning's last checkpoint, or starts it again";
        return Err(Interrupted::new(text).into());
    };
    let kept = kept?;
    if stop.is_requested() {
        let place = reference::directory(lock(files).dir());
        let text = format!("interrupted after supervised fine-tuning; --resume continues from {}", place.display());
        return Err(Interrupted::new(text).into());
    }
    Ok(kept)
}

/// Warms up the reward model, on a file of preferences or on labeled completions of the policy.
///
/// # Errors
/// If the warm-up fails, is interrupted, exhausts the budget, or learns nothing.
pub(super) async fn warm_up(
    node: &Arc<Node>,
    files: &Arc<Mutex<RunFiles>>,
    monitor: &Arc<Monitor>,
    stop: &Stop,
) -> Result<()> {
    let Some(trainer) = node.reward_model.clone() else { return Ok(()) };
    let units = node.warm_up_groups() * node.config.reward_model.epochs;
    let reporter = PhaseReporter::new("reward model warm-up", "groups", units, files);
    let (wired, progress) = (Arc::clone(node), reporter.progress.clone());
    let observer = Arc::new(Mutex::new(reporter));
    run(&node.config, "reward model warm-up", &progress, monitor, stop, move |builder| {
        let observer: Arc<Mutex<dyn WarmUpObserver>> = observer.clone();
        wired.wire_warm_up(builder, &trainer, &observer)
    })
    .await
    .map_err(|error| {
        let more = "--resume starts it again, and buys no stored label a second time";
        let stopped = node.prepared.budget.as_ref().is_some_and(|budget| budget.exhausted());
        let stopped = stopped || format!("{error:#}").contains(NO_PAIR_TRAINED);
        if stopped { Ended::Stopped(format!("{error:#}; {more}")).into() } else { with_remedy(error, more) }
    })
}

/// Appends the remedy `more` to `error`. An interruption remains an [`Interrupted`].
fn with_remedy(error: anyhow::Error, more: &str) -> anyhow::Error {
    match error.downcast::<Interrupted>() {
        Ok(Interrupted { signal, text }) => Interrupted { signal, text: format!("{text}; {more}") }.into(),
        Err(error) => anyhow!("{error:#}; {more}"),
    }
}

/// Runs the graph of a phase to its end.
async fn run(
    config: &Config,
    phase: &'static str,
    progress: &Progress,
    monitor: &Arc<Monitor>,
    stop: &Stop,
    wire: impl Fn(&mut GraphBuilder) -> StageResult<()> + Send + Sync + 'static,
) -> Result<()> {
    monitor.set_phase(phase);
    let graph = spawn_graph(graph_options(config), wire);
    monitor.watch(graph.clone());
    let outcome = supervise(&graph, stop, progress, monitor, None).await;
    progress.finish();
    match outcome {
        // The result of a complete phase is kept even if a signal arrived in the meantime.
        Outcome::Finished => Ok(()),
        _ if stop.is_requested() => Err(Interrupted::new(format!("interrupted during {phase}")).into()),
        Outcome::Failed { stage, error, restarts, .. } => {
            bail!("{phase} ended because {stage} failed ({restarts} restarts): {error}")
        }
        Outcome::Drained | Outcome::Halted => Ok(()),
    }
}

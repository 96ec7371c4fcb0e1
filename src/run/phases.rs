//! What comes before reinforcement learning: supervised fine-tuning, and warming the reward model up.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use candle_core::DType;
use preceptor_actors::{GraphBuilder, Outcome, StageResult, spawn_graph};
use serde_json::{Value, json};

use super::files::RunFiles;
use super::insist::insist;
use super::resume::Accepted;
use super::supervise::{Stop, graph_options, supervise, unless_left};
use super::watcher::Due;
use super::{announce, lock, reference, resume};
use crate::config::Config;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::pipeline::learn::TrainState;
use crate::pipeline::reward::trainer::TrainerStep;
use crate::pipeline::reward::warm_up::{NOTHING_LEARNED, WarmUpObserver};
use crate::pipeline::setup::Prepared;
use crate::pipeline::sft::SftObserver;
use crate::pipeline::topology::learning::{adam, lora};
use crate::pipeline::topology::{Node, wire_fine_tuning};
use crate::rl::ledger::Book;
use crate::run::checkpoint::shelf::Latest;
use crate::run::checkpoint::{
    Best, CheckpointFormat, CheckpointStore, Identity, JudgeContents, Opened, Snapshot, Writer,
};
use crate::say;
use crate::util::disk;
use crate::util::exit::Ended;
use crate::util::signals::Interrupted;

/// Where a phase writes and what it shows.
pub(super) struct Notes {
    phase: &'static str,
    progress: Progress,
    files: Arc<Mutex<RunFiles>>,
}

impl Notes {
    fn new(phase: &'static str, unit: &'static str, of: u64, files: &Arc<Mutex<RunFiles>>) -> Self {
        Self { phase, progress: Progress::new(phase, unit, of), files: Arc::clone(files) }
    }

    /// A line for the terminal, and one of `phases.jsonl`.
    fn tell(&self, text: &str, mut figures: Value) {
        self.progress.line(text);
        figures["phase"] = json!(self.phase);
        let written = lock(&self.files).phase(&figures);
        if let Err(error) = written {
            // The phase's figures are not what it is run for; training goes on without them.
            self.progress.line(&format!("{error:#}"));
        }
    }
}

impl WarmUpObserver for Notes {
    fn group(&mut self, done: u64) {
        self.progress.at(done);
    }

    fn step(&mut self, step: &TrainerStep, (accuracy, pairs): (f64, usize)) {
        let held_out = if pairs == 0 { "none yet".to_owned() } else { format!("{:.1} % of {pairs}", 100.0 * accuracy) };
        self.tell(
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
        self.tell(&text, json!({ "held_out_right": (pairs > 0).then_some(right), "held_out_pairs": pairs }));
    }
}

/// The directory, in the run's, of fine-tuning that is not done: checkpoints of their own.
pub(super) const FINE_TUNING: &str = "fine-tuning";

/// Whether fine-tuning was begun in `run`, and is not done.
///
/// # Errors
/// A directory that cannot be read.
pub(super) fn is_under_way(run: &Path) -> Result<bool> {
    disk::exists(&run.join(FINE_TUNING))
}

/// How far fine-tuning from and on `base` was when it was broken off, and the checkpoints of it that are damaged.
///
/// # Errors
/// Checkpoints of it of which none can be used, or which are of another configuration, model or data.
pub(super) fn resume_fine_tuning(
    config: &Config,
    base: &Identity,
    run: &Path,
    accepted: &Accepted,
) -> Result<(Option<Opened>, Vec<PathBuf>)> {
    let Latest { checkpoint: half, damaged } = shelf(run).latest(|line| say!("{line}"))?;
    if let Some(half) = &half {
        half.suits(base)?;
        say!("resuming  {}", half.path().display());
        let place = run.join(FINE_TUNING);
        let changes = resume::compare(half, config, accepted)
            .map_err(|error| anyhow!("{error:#}; or remove {} to fine-tune from the beginning", place.display()))?;
        for change in changes {
            say!("{}", change.line());
        }
    }
    Ok((half, damaged))
}

/// Fine-tuning is done, and its result is kept in `run`: what was half of it is of no use any more.
pub(super) fn tuned(run: &Path) {
    let path = run.join(FINE_TUNING);
    if path.exists()
        && let Err(error) = std::fs::remove_dir_all(&path)
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

fn shelf(run: &Path) -> CheckpointStore {
    CheckpointStore::new(&run.join(FINE_TUNING), 1, Best::None)
}

/// Fine-tuning under way: told of each step, it shows it, and writes checkpoints when they are due.
struct Tuning {
    notes: Notes,
    due: Due,
    writer: Writer,
    steps: u64,
}

impl SftObserver for Tuning {
    fn step(&mut self, state: &TrainState, loss: f64, gradient_norm: f64) {
        let (step, of) = (state.step, self.steps);
        self.notes.progress.at(step);
        self.notes.tell(
            &format!("fine-tuning {step:>3}/{of}  loss {loss:.4}  gradient {gradient_norm:.3}"),
            json!({ "step": step, "loss": loss, "gradient_norm": gradient_norm }),
        );
        if step < of && self.due.is_due(step) && !self.writer.is_busy() {
            self.due.failed.store(false, Ordering::SeqCst);
            match self.snapshot(state) {
                Ok(snapshot) => drop(self.writer.put(snapshot)),
                Err(error) => self.failed(&error),
            }
            self.due.last = Instant::now();
        }
    }
}

impl Tuning {
    /// Fine-tuning as it is; the caller holds `state`.
    fn snapshot(&self, state: &TrainState) -> Result<Snapshot> {
        let files = lock(&self.notes.files).lengths()?;
        Snapshot::take(state, None, &Book::default(), files, None)
    }

    /// Writes how far it came, unless the weights are half updated or held by a learner that did not stop.
    fn keep(
        &self,
        state: &Mutex<TrainState>,
        shelf: &CheckpointStore,
        form: &CheckpointFormat,
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
        match insist(retry_s, || shelf.put(form, &self.snapshot(&state)?)) {
            Ok(written) => Some(written.path),
            Err(error) => {
                say!("{error:#}");
                None
            }
        }
    }

    fn failed(&self, error: &anyhow::Error) {
        telemetry::disk_error();
        self.due.failed.store(true, Ordering::SeqCst);
        self.notes.progress.line(&format!("no checkpoint of fine-tuning: {error:#}; it goes on"));
    }
}

/// Fine-tunes the policy on the data's references, from the beginning or from `half` of it; the result takes the policy's
/// place, as π_SFT.
pub(super) async fn fine_tune(
    config: &Arc<Config>,
    prepared: Prepared,
    half: Option<Opened>,
    files: &Arc<Mutex<RunFiles>>,
    monitor: &Arc<Monitor>,
    stop: &Stop,
) -> Result<Prepared> {
    let mut state = TrainState::new(prepared.policy(), adam(config), None, lora(config).as_ref())?;
    let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
    if let Some(half) = half {
        half.restore(&mut state, None)?;
    }
    let state = Arc::new(Mutex::new(state));
    let notes = Notes::new("supervised fine-tuning", "steps", config.sft.steps, files);
    let (shelf, progress) = (Arc::new(shelf(lock(files).dir())), notes.progress.clone());
    // No label has been bought yet.
    let policy = (prepared.tokenizer.clone(), prepared.origin.as_str());
    let form = CheckpointFormat::new(config, policy, DType::F32, identity, JudgeContents::new());
    let form = Arc::new(form);
    let failed = Arc::new(AtomicBool::new(false));
    let told = announce(&Arc::new(OnceLock::from(progress.clone())), &failed, monitor);
    let writer = Writer::start(Arc::clone(&shelf), Arc::clone(&form), told)?;
    let tuning = Tuning { notes, due: Due::new(config, failed), writer, steps: config.sft.steps };
    let tuning = Arc::new(Mutex::new(tuning));
    let prepared = Arc::new(prepared);
    let (wired, trained, observer) = (Arc::clone(&prepared), Arc::clone(&state), Arc::clone(&tuning));
    let settings = Arc::clone(config);
    let ended = run(config, "supervised fine-tuning", &progress, monitor, stop, move |builder| {
        let observer: Arc<Mutex<dyn SftObserver>> = observer.clone();
        wire_fine_tuning(builder, &settings, &wired, &trained, &observer);
        Ok(())
    })
    .await;
    let (last, failed) = ((Arc::clone(&tuning), Arc::clone(&state)), ended.is_err());
    let retry_s = config.checkpoint.retry_s;
    let kept = unless_left(stop, "the checkpoint of fine-tuning", move || {
        lock(&last.0).writer.finish();
        if failed { lock(&last.0).keep(&last.1, &shelf, &form, retry_s) } else { None }
    })
    .await?;
    match (ended, kept) {
        (Ok(()), Some(_)) => {}
        (Err(error), Some(Some(path))) => {
            return Err(with(error, &format!("--resume goes on from {}", path.display())));
        }
        (Err(error), _) => return Err(with(error, "--resume goes on from its last checkpoint, or begins it anew")),
        (Ok(()), None) => bail!("left before fine-tuning was kept; --resume goes on from its last checkpoint"),
    }
    let policy = lock(&state).snapshot()?;
    let identity = policy.weights().fingerprint()?;
    let Ok(prepared) = Arc::try_unwrap(prepared) else { bail!("supervised fine-tuning still holds the data") };
    Ok(Prepared { policy: Some(policy), identity, ..prepared })
}

/// Keeps the fine-tuned policy, tuned from and on `base`; where the disk is full, waits for room.
///
/// # Errors
/// Names what cannot be written; an interruption, after which a resumed run begins with what was kept.
pub(super) async fn keep(
    config: &Arc<Config>,
    base: Identity,
    prepared: Prepared,
    files: &Arc<Mutex<RunFiles>>,
    stop: &Stop,
) -> Result<Prepared> {
    let (settings, shared) = (Arc::clone(config), Arc::clone(files));
    let kept = unless_left(stop, "the fine-tuned policy", move || {
        insist(settings.checkpoint.retry_s, || reference::keep(&settings, &base, &prepared, &mut lock(&shared)))?;
        anyhow::Ok(prepared)
    })
    .await?;
    let Some(kept) = kept else {
        let text = "left before the fine-tuned policy was kept; --resume goes on from fine-tuning's last checkpoint, or begins it anew";
        return Err(Interrupted::new(text).into());
    };
    let kept = kept?;
    if stop.asked() {
        let place = reference::place(lock(files).dir());
        let text = format!("interrupted after supervised fine-tuning; --resume goes on from {}", place.display());
        return Err(Interrupted::new(text).into());
    }
    Ok(kept)
}

/// Warms the reward model up: on a file of preferences, or on what the policy writes and the labeler judges.
pub(super) async fn warm_up(
    node: &Arc<Node>,
    files: &Arc<Mutex<RunFiles>>,
    monitor: &Arc<Monitor>,
    stop: &Stop,
) -> Result<()> {
    let Some(trainer) = node.reward_model.clone() else { return Ok(()) };
    let units = node.warm_up_groups() * node.config.reward_model.epochs;
    let notes = Notes::new("reward model warm-up", "groups", units, files);
    let (wired, progress) = (Arc::clone(node), notes.progress.clone());
    let observer = Arc::new(Mutex::new(notes));
    run(&node.config, "reward model warm-up", &progress, monitor, stop, move |builder| {
        let observer: Arc<Mutex<dyn WarmUpObserver>> = observer.clone();
        wired.wire_warm_up(builder, &trainer, &observer)
    })
    .await
    .map_err(|error| {
        let more = "--resume begins it again, and asks for no label again that was kept";
        let stopped = node.prepared.budget.as_ref().is_some_and(|budget| budget.exhausted());
        let stopped = stopped || format!("{error:#}").contains(NOTHING_LEARNED);
        if stopped { Ended::Stopped(format!("{error:#}; {more}")).into() } else { with(error, more) }
    })
}

/// `error` with the remedy `more`; an interruption stays one.
fn with(error: anyhow::Error, more: &str) -> anyhow::Error {
    match error.downcast::<Interrupted>() {
        Ok(Interrupted { signal, text }) => Interrupted { signal, text: format!("{text}; {more}") }.into(),
        Err(error) => anyhow!("{error:#}; {more}"),
    }
}

/// Runs a phase's graph to its end.
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
        // A phase that is complete is kept, though a signal came meanwhile.
        Outcome::Finished => Ok(()),
        _ if stop.asked() => Err(Interrupted::new(format!("interrupted during {phase}")).into()),
        Outcome::Failed { stage, error, restarts, .. } => {
            bail!("{phase} ended since {stage} failed ({restarts} restarts): {error}")
        }
        Outcome::Drained | Outcome::Halted => Ok(()),
    }
}

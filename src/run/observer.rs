//! The observer of learner steps: writes files and checkpoints, sets metrics, updates the progress bar, and halts the
//! graph.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use preceptor_actors::GraphHandle;
use serde_json::Value;

use super::evaluation::{Evaluator, Submission};
use super::files::RunFiles;
use super::guard::Guard;
use super::supervise::Stop;
use super::workers::report_lost;
use crate::config::{Config, WIN_RATE};
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::pipeline::cluster::log::GroupLog;
use crate::pipeline::learn::{Done, Observer};
use crate::pipeline::learn::{StepRecord, TrainState};
use crate::pipeline::reward::RewardTrainer;
use crate::rl::ledger::SharedLedger;
use crate::run::checkpoint::{CheckpointWriter, Snapshot, WinRates};
use crate::status;
use crate::types::Rewarded;
use crate::util::mutex::lock;
use crate::util::process::{resident_bytes, unix_seconds};

/// Pause before a failed checkpoint is retried.
const RETRY: Duration = Duration::from_secs(30);

/// Observer of a training run.
pub(super) struct RunObserver {
    pub(super) files: Arc<Mutex<RunFiles>>,
    pub(super) reward_model: Option<Arc<Mutex<RewardTrainer>>>,
    pub(super) ledger: SharedLedger,
    /// Log of the workers' results, if workers sample.
    pub(super) group_log: Option<Arc<GroupLog>>,
    pub(super) schedule: CheckpointSchedule,
    pub(super) writer: CheckpointWriter,
    /// The evaluator, if the run has evaluations.
    pub(super) evaluator: Option<Evaluator>,
    pub(super) steps: u64,
    pub(super) batch_groups: u64,
    pub(super) monitor: Arc<Monitor>,
    pub(super) progress: Arc<OnceLock<Progress>>,
    pub(super) graph: Arc<OnceLock<GraphHandle>>,
    pub(super) stop: Stop,
    pub(super) began: Instant,
    pub(super) step: u64,
    /// Checks the health of the run.
    pub(super) guard: Guard,
    /// Bound of the configuration that stopped the run.
    pub(super) stopped: Option<String>,
    /// Win rates of the evaluations.
    pub(super) win_rates: WinRates,
    /// Number of evaluations without a higher win rate after which the run ends; 0 for no limit.
    pub(super) patience: u64,
    /// Reason for which the run ends early without a failure: the win rate has stopped rising.
    pub(super) unimproved: Option<String>,
    /// Names of the figures that the mode is meant to raise.
    pub(super) objectives: &'static [&'static str],
    /// Values of each objective by step.
    pub(super) histories: Vec<Vec<f64>>,
}

/// Schedule of checkpoints during training.
pub(super) struct CheckpointSchedule {
    every_steps: u64,
    every: Option<Duration>,
    /// Name of the figure that selects the best checkpoint, unless it is the win rate.
    best: Option<String>,
    /// Whether each evaluated step gets a checkpoint.
    evaluated: bool,
    /// Time of the last checkpoint.
    pub(super) last: Instant,
    /// Values of the figure since the last checkpoint.
    figures: Vec<f64>,
    /// Set if the last checkpoint could not be written.
    pub(super) failed: Arc<AtomicBool>,
}

impl CheckpointSchedule {
    /// Creates the schedule of `config`, starting now. The writer of checkpoints sets `failed`.
    pub(super) fn new(config: &Config, failed: Arc<AtomicBool>) -> Self {
        let minutes = config.checkpoint.every_minutes;
        Self {
            every_steps: config.checkpoint.every_steps,
            every: (minutes > 0.0).then(|| Duration::from_secs_f64(60.0 * minutes)),
            best: config.checkpoint.best.clone().filter(|best| best != WIN_RATE),
            evaluated: config.checkpoint.best.as_deref() == Some(WIN_RATE),
            last: Instant::now(),
            figures: Vec::new(),
            failed,
        }
    }

    pub(super) fn is_due(&self, step: u64) -> bool {
        let since = self.last.elapsed();
        (self.every_steps > 0 && step.is_multiple_of(self.every_steps))
            || self.every.is_some_and(|every| since >= every)
            || (self.failed.load(Ordering::SeqCst) && since >= RETRY)
    }

    /// Returns the mean of the figure over the steps since the last checkpoint.
    pub(super) fn figure(&self) -> Option<f64> {
        let n = self.figures.len() as f64;
        Some(self.figures.iter().sum::<f64>() / n).filter(|mean| mean.is_finite())
    }
}

impl Observer for RunObserver {
    fn group(&mut self, done: u64, _of: u64) {
        if let Some(progress) = self.progress.get() {
            progress.at(self.step * self.batch_groups + done);
        }
    }

    fn step(&mut self, done: Done<'_>, state: &TrainState) -> Result<()> {
        self.step = state.step;
        if let Some(log) = &self.group_log {
            let void = log.published(state.step, done.fingerprint);
            if !void.is_empty() {
                let labels = self.ledger.forget(&void);
                report_lost(void.len() as u64 - labels, labels);
                bail!(
                    "the weights of step {} differ from those of the process before, which sampled {} groups with them or later ones; the groups are sampled again",
                    state.step,
                    void.len()
                );
            }
        }
        let mut record = done.record.clone();
        record.time("run_seconds", self.began.elapsed().as_secs_f64());
        record.time("unix_seconds", unix_seconds());
        if let Some(bytes) = resident_bytes() {
            record.time("resident_bytes", bytes as f64);
        }
        telemetry::step(&record.0);
        telemetry::ledger(&self.ledger.count());
        self.monitor.stepped(Value::Object(record.0.clone()), done.batch);
        let written = self.files().step(&record, done);
        if let Err(error) = written {
            telemetry::disk_error();
            self.log(&format!("{error:#}; training continues"));
        }
        self.check_health(&record, done.batch);
        if let Some(best) = &self.schedule.best {
            self.schedule.figures.push(record.get(best));
        }
        self.histories.resize_with(self.objectives.len(), Vec::new);
        for (name, history) in self.objectives.iter().zip(&mut self.histories) {
            history.push(record.get(name));
        }
        if let Some(progress) = self.progress.get() {
            let text = step_line(&record, self.steps, done.batch, self.win_rates.latest());
            progress.step(&text, &Value::Object(record.0.clone()));
        }
        let submission =
            self.evaluator.as_ref().map_or(Submission::NotDue, |one| one.submit(state.step, state.published()));
        if submission == Submission::Busy {
            self.log(&format!("skipping the evaluation of step {}: the previous one is still running", state.step));
        }
        self.unimproved = self.win_rates.patience_exhausted(self.patience);
        let due = self.schedule.is_due(state.step) || (self.schedule.evaluated && submission == Submission::Accepted);
        if due && state.step < self.steps && !self.writer.is_busy() {
            // A failed checkpoint is retried, and the end of the run writes one.
            if let Err(error) = self.checkpoint(state) {
                telemetry::disk_error();
                self.schedule.failed.store(true, Ordering::SeqCst);
                self.log(&format!("no checkpoint of step {}: {error:#}; training continues", state.step));
            }
            self.schedule.last = Instant::now();
        }
        if (self.stop.is_requested() || self.stopped.is_some() || self.unimproved.is_some())
            && let Some(graph) = self.graph.get()
        {
            graph.halt();
        }
        Ok(())
    }

    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]) {
        let saved = self.files().save_nonfinite(step, batch);
        let text = match saved {
            Ok(path) => format!("its batch is in {}", path.display()),
            Err(error) => format!("its batch could not be saved: {error:#}"),
        };
        self.log(&format!("step {step}: loss or gradient is not finite; the weights are unchanged; {text}"));
    }
}

impl RunObserver {
    /// Checks a step against the bounds of `[guard]`: logs warnings, sets the metrics, and records a reason to stop.
    fn check_health(&mut self, record: &StepRecord, batch: &[Rewarded]) {
        let found = self.guard.step(&record.0, batch);
        for name in Guard::NAMES {
            telemetry::guard(name, self.guard.exceeded(name));
        }
        self.monitor
            .set_health(self.guard.reasons(), Guard::NAMES.into_iter().filter(|name| self.guard.exceeded(name)));
        for warning in &found.warnings {
            self.log(&format!("warning: {warning}"));
        }
        self.stopped = found.stop.or_else(|| self.stopped.take());
    }

    /// Passes a snapshot of the run to the writer.
    fn checkpoint(&mut self, state: &TrainState) -> Result<()> {
        let began = Instant::now();
        let snapshot = self.snapshot(state)?;
        telemetry::snapshot_took(began.elapsed());
        self.schedule.failed.store(false, Ordering::SeqCst);
        if self.writer.submit(snapshot) {
            self.schedule.figures.clear();
        }
        Ok(())
    }

    /// Takes a snapshot of the run. The caller holds the lock of `state`.
    pub(super) fn snapshot(&self, state: &TrainState) -> Result<Snapshot> {
        let files = self.files().lengths()?;
        Snapshot::take(state, self.reward_model.as_deref(), &self.ledger, files, self.schedule.figure())
    }

    /// Takes a snapshot after all pending bytes of the run's files are written.
    pub(super) fn last_snapshot(&self, state: &TrainState) -> Result<Snapshot> {
        self.files().flush()?;
        self.snapshot(state)
    }

    fn files(&self) -> MutexGuard<'_, RunFiles> {
        lock(&self.files)
    }

    fn log(&self, text: &str) {
        if let Some(progress) = self.progress.get() {
            progress.line(text);
        }
    }

    /// Logs the change of each objective from the first to the last quarter of the steps, with standard errors.
    pub(super) fn log_objectives(&self) {
        for (name, history) in self.objectives.iter().zip(&self.histories) {
            let quarter = history.len() / 4;
            if quarter < 2 || history.iter().any(|value| !value.is_finite()) {
                continue;
            }
            let (first, last) = (moments(&history[..quarter]), moments(&history[history.len() - quarter..]));
            let error = first.1.hypot(last.1);
            status!(
                "{:<9} first {quarter} steps {:.3} ± {:.3}, last {quarter} steps {:.3} ± {:.3}: {:+.3} ± {error:.3}",
                match *name {
                    "score/mean" => "score",
                    "judge/mean" => "judge",
                    _ => "margin",
                },
                first.0,
                first.1,
                last.0,
                last.1,
                last.0 - first.0
            );
        }
    }
}

/// Returns the mean and its standard error.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// Formats the log line of a step; `evaluated` is the latest win rate with its step.
fn step_line(record: &StepRecord, steps: u64, batch: &[Rewarded], evaluated: Option<(u64, f64)>) -> String {
    let reasons = || batch.iter().filter_map(|group| group.masked.as_deref());
    let (masked, of) = (reasons().count(), batch.len());
    if masked == of
        && let Some(why) = reasons().next()
    {
        return format!(
            "step {:>3}/{steps}  learned nothing: all {of} groups are masked, the first because {why}",
            record.get("step")
        );
    }
    let objective = if record.0.contains_key("preference/margin") {
        format!(
            "loss {:.4}  margin {:+.3}  agrees {:.1} %",
            record.get("loss/policy"),
            record.get("preference/margin"),
            100.0 * record.get("preference/accuracy"),
        )
    } else {
        format!("score {:+.3}  reward {:+.3}", record.get("score/mean"), record.get("reward/mean"))
    };
    let wins = evaluated.map_or(String::new(), |(step, rate)| format!("  wins {:.1} % (step {step})", 100.0 * rate));
    let kl = record.get("kl/mean");
    let kl = if kl.is_nan() { String::new() } else { format!("  kl {kl:.3}") };
    let left_out = if masked > 0 { format!("  masked {masked} of {of}") } else { String::new() };
    format!(
        "step {:>3}/{steps}  {objective}{wins}{kl}  length {:.1}  entropy {:.2}  gradient {:.2}  lag {:.1}  {:.1} s{left_out}",
        record.get("step"),
        record.get("length/mean"),
        record.get("entropy/mean"),
        record.get("gradient/norm"),
        record.get("staleness/mean"),
        record.get("time/step_seconds"),
    )
}

//! Told of every learner step: writes files, sets metrics, moves the bar, stops the graph when asked to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use preceptor_actors::GraphHandle;
use serde_json::Value;

use super::evaluation::{Evaluator, Put};
use super::files::RunFiles;
use super::guard::Guard;
use super::supervise::Stop;
use crate::config::{Config, WIN_RATE};
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::pipeline::learn::{Done, Observer};
use crate::pipeline::learn::{StepRecord, TrainState};
use crate::pipeline::reward::RewardTrainer;
use crate::rl::ledger::Book;
use crate::run::checkpoint::{Snapshot, WinRates, Writer};
use crate::say;
use crate::types::Rewarded;
use crate::util::process::{resident_bytes, unix_seconds};

/// How long a checkpoint that could not be written waits for its next try.
const RETRY: Duration = Duration::from_secs(30);

/// The observer of a training run.
pub(super) struct RunObserver {
    pub(super) files: Arc<Mutex<RunFiles>>,
    pub(super) reward_model: Option<Arc<Mutex<RewardTrainer>>>,
    pub(super) book: Book,
    pub(super) due: Due,
    pub(super) writer: Writer,
    /// Evaluates, where the run asks for it.
    pub(super) evaluator: Option<Evaluator>,
    pub(super) steps: u64,
    pub(super) batch_groups: u64,
    pub(super) monitor: Arc<Monitor>,
    pub(super) progress: Arc<OnceLock<Progress>>,
    pub(super) graph: Arc<OnceLock<GraphHandle>>,
    pub(super) stop: Stop,
    pub(super) began: Instant,
    pub(super) step: u64,
    /// Whether the run is healthy.
    pub(super) guard: Guard,
    /// Why a bound of the configuration stopped the run, if one did.
    pub(super) stopped: Option<String>,
    /// The win rates of the evaluations.
    pub(super) win_rates: WinRates,
    /// Evaluations without a higher win rate after which the run ends; 0 for never.
    pub(super) patience: u64,
    /// Why the run ends before its last step although nothing is wrong: the win rate does not rise any more.
    pub(super) unimproved: Option<String>,
    /// The figures that the mode is meant to raise.
    pub(super) objectives: &'static [&'static str],
    /// Their course so far: one list for each.
    pub(super) courses: Vec<Vec<f64>>,
}

/// When the next checkpoint is due.
pub(super) struct Due {
    every_steps: u64,
    every: Option<Duration>,
    /// The figure that the best one is chosen by.
    best: Option<String>,
    /// Whether each step that is evaluated has one.
    evaluated: bool,
    /// When the last one was taken.
    pub(super) last: Instant,
    /// Values of the figure since then.
    figures: Vec<f64>,
    /// Whether the last one could not be written.
    pub(super) failed: Arc<AtomicBool>,
}

impl Due {
    /// As `config` says, counted from now; `failed` is set by whoever writes them.
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

    /// Mean of the figure over the steps since the last one.
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
        let mut record = done.record.clone();
        record.time("run_seconds", self.began.elapsed().as_secs_f64());
        record.time("unix_seconds", unix_seconds());
        if let Some(bytes) = resident_bytes() {
            record.time("resident_bytes", bytes as f64);
        }
        telemetry::step(&record.0);
        telemetry::ledger(&self.book.count());
        self.monitor.stepped(Value::Object(record.0.clone()), done.batch);
        let written = self.files().step(&record, done);
        if let Err(error) = written {
            telemetry::disk_error();
            self.say(&format!("{error:#}; training goes on"));
        }
        self.judge_health(&record, done.batch);
        if let Some(best) = &self.due.best {
            self.due.figures.push(record.get(best));
        }
        self.courses.resize_with(self.objectives.len(), Vec::new);
        for (name, course) in self.objectives.iter().zip(&mut self.courses) {
            course.push(record.get(name));
        }
        if let Some(progress) = self.progress.get() {
            let text = line(&record, self.steps, done.batch, self.win_rates.latest());
            progress.step(&text, &Value::Object(record.0.clone()));
        }
        let put = self.evaluator.as_ref().map_or(Put::NotDue, |one| one.put(state.step, state.published()));
        if put == Put::Busy {
            self.say(&format!("step {} is not evaluated: the evaluation before is still under way", state.step));
        }
        self.unimproved = self.win_rates.exhausted(self.patience);
        let due = self.due.is_due(state.step) || (self.due.evaluated && put == Put::Taken);
        if due && state.step < self.steps && !self.writer.is_busy() {
            // Training goes on without it: it is tried again, and the end of the run insists.
            if let Err(error) = self.checkpoint(state) {
                telemetry::disk_error();
                self.due.failed.store(true, Ordering::SeqCst);
                self.say(&format!("no checkpoint of step {}: {error:#}; training goes on", state.step));
            }
            self.due.last = Instant::now();
        }
        if (self.stop.asked() || self.stopped.is_some() || self.unimproved.is_some())
            && let Some(graph) = self.graph.get()
        {
            graph.halt();
        }
        Ok(())
    }

    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]) {
        let saved = self.files().nonfinite(step, batch);
        let text = match saved {
            Ok(path) => format!("its batch is in {}", path.display()),
            Err(error) => format!("its batch could not be saved: {error:#}"),
        };
        self.say(&format!("step {step}: loss or gradient is not finite; the weights stay as they were; {text}"));
    }
}

impl RunObserver {
    /// Holds a step against the bounds of `[guard]`: logs warnings, sets the metrics, and notes why the run has to stop.
    fn judge_health(&mut self, record: &StepRecord, batch: &[Rewarded]) {
        let found = self.guard.step(&record.0, batch);
        for name in Guard::NAMES {
            telemetry::guard(name, self.guard.exceeded(name));
        }
        self.monitor
            .set_health(self.guard.reasons(), Guard::NAMES.into_iter().filter(|name| self.guard.exceeded(name)));
        for warning in &found.warnings {
            self.say(&format!("warning: {warning}"));
        }
        self.stopped = found.stop.or_else(|| self.stopped.take());
    }

    /// Hands a snapshot of the run to the writer.
    fn checkpoint(&mut self, state: &TrainState) -> Result<()> {
        let began = Instant::now();
        let snapshot = self.snapshot(state)?;
        telemetry::snapshot_took(began.elapsed());
        self.due.failed.store(false, Ordering::SeqCst);
        if self.writer.put(snapshot) {
            self.due.figures.clear();
        }
        Ok(())
    }

    /// The run as it is; the caller holds `state`.
    pub(super) fn snapshot(&self, state: &TrainState) -> Result<Snapshot> {
        let files = self.files().lengths()?;
        Snapshot::take(state, self.reward_model.as_deref(), &self.book, files, self.due.figure())
    }

    /// As [`Self::snapshot`], once everything that waits for the run's files is written.
    pub(super) fn last_snapshot(&self, state: &TrainState) -> Result<Snapshot> {
        self.files().flush()?;
        self.snapshot(state)
    }

    fn files(&self) -> MutexGuard<'_, RunFiles> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, text: &str) {
        if let Some(progress) = self.progress.get() {
            progress.line(text);
        }
    }

    /// Says whether the mode's objectives rose: the first quarter of the run against the last, with standard errors.
    pub(super) fn rise(&self) {
        for (name, course) in self.objectives.iter().zip(&self.courses) {
            let quarter = course.len() / 4;
            if quarter < 2 || course.iter().any(|value| !value.is_finite()) {
                continue;
            }
            let (first, last) = (moments(&course[..quarter]), moments(&course[course.len() - quarter..]));
            let error = first.1.hypot(last.1);
            say!(
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

/// Mean and its standard error.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// The line of a step; `evaluated` is the latest win rate with its step.
fn line(record: &StepRecord, steps: u64, batch: &[Rewarded], evaluated: Option<(u64, f64)>) -> String {
    let reasons = || batch.iter().filter_map(|group| group.masked.as_deref());
    let (masked, of) = (reasons().count(), batch.len());
    if masked == of
        && let Some(why) = reasons().next()
    {
        return format!(
            "step {:>3}/{steps}  learned nothing: all {of} groups are masked, the first since {why}",
            record.get("step")
        );
    }
    let goal = if record.0.contains_key("preference/margin") {
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
        "step {:>3}/{steps}  {goal}{wins}{kl}  length {:.1}  entropy {:.2}  gradient {:.2}  lag {:.1}  {:.1} s{left_out}",
        record.get("step"),
        record.get("length/mean"),
        record.get("entropy/mean"),
        record.get("gradient/norm"),
        record.get("staleness/mean"),
        record.get("time/step_seconds"),
    )
}

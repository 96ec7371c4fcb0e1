//! Told of every learner step: writes files, sets metrics, moves the bar, stops the graph when asked to.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::Result;
use preceptor_actors::GraphHandle;
use serde_json::Value;

use super::Stop;
use super::files::RunFiles;
use crate::checkpoint::Checkpoints;
use crate::learn::stage::Observer;
use crate::learn::{StepRecord, TrainState};
use crate::progress::Progress;
use crate::reward::RewardTrainer;
use crate::rollout::Rewarded;
use crate::serve::{NodeState, resident_bytes};
use crate::telemetry;

/// The observer of a training run.
pub(super) struct Watcher {
    pub(super) files: Arc<Mutex<RunFiles>>,
    pub(super) checkpoints: Checkpoints,
    pub(super) reward_model: Option<Arc<Mutex<RewardTrainer>>>,
    pub(super) every: u64,
    pub(super) steps: u64,
    pub(super) batch_groups: u64,
    pub(super) node: Arc<NodeState>,
    pub(super) progress: Arc<OnceLock<Progress>>,
    pub(super) graph: Arc<OnceLock<GraphHandle>>,
    pub(super) stop: Stop,
    pub(super) began: Instant,
    pub(super) step: u64,
    /// The figures that the mode is meant to raise.
    pub(super) objectives: &'static [&'static str],
    /// All steps so far.
    pub(super) records: Vec<StepRecord>,
}

impl Observer for Watcher {
    fn group(&mut self, done: u64, _of: u64) {
        if let Some(progress) = self.progress.get() {
            progress.at(self.step * self.batch_groups + done);
        }
    }

    fn step(&mut self, record: &StepRecord, batch: &[Rewarded], state: &mut TrainState) -> Result<()> {
        self.step = state.step;
        let mut record = record.clone();
        record.time("run_seconds", self.began.elapsed().as_secs_f64());
        if let Some(bytes) = resident_bytes() {
            record.time("resident_bytes", bytes as f64);
        }
        telemetry::step(&record);
        self.files().step(&record, batch)?;
        self.node.stepped(Value::Object(record.0.clone()));
        self.records.push(record.clone());
        self.say(&line(&record, self.steps));
        if self.every > 0 && state.step.is_multiple_of(self.every) && state.step < self.steps {
            // Training goes on without it: the next one is tried, and the end of the run insists.
            match self.checkpoints.write(state, self.reward_model.as_deref()) {
                Ok(path) => self.say(&format!("checkpoint {}", path.display())),
                Err(error) => self.say(&format!("{error:#}; training goes on")),
            }
        }
        if self.stop.asked()
            && let Some(graph) = self.graph.get()
        {
            graph.halt();
        }
        Ok(())
    }

    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]) {
        let text = match self.files().nonfinite(step, batch) {
            Ok(path) => format!("its batch is in {}", path.display()),
            Err(error) => format!("its batch could not be saved: {error:#}"),
        };
        self.say(&format!("step {step}: loss or gradient is not finite; the weights stay as they were; {text}"));
    }
}

impl Watcher {
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
        let quarter = self.records.len() / 4;
        if quarter < 2 {
            return;
        }
        for name in self.objectives {
            let course: Vec<f64> = self.records.iter().map(|record| record.get(name)).collect();
            if course.iter().any(|value| !value.is_finite()) {
                continue;
            }
            let (first, last) = (moments(&course[..quarter]), moments(&course[course.len() - quarter..]));
            let error = first.1.hypot(last.1);
            eprintln!(
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

fn line(record: &StepRecord, steps: u64) -> String {
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
    format!(
        "step {:>3}/{steps}  {goal}  kl {:.3}  length {:.1}  entropy {:.2}  gradient {:.2}  lag {:.1}  {:.1} s",
        record.get("step"),
        record.get("kl/mean"),
        record.get("length/mean"),
        record.get("entropy/mean"),
        record.get("gradient/norm"),
        record.get("staleness/mean"),
        record.get("time/step_seconds"),
    )
}

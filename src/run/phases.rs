//! What comes before reinforcement learning: supervised fine-tuning, and warming the reward model up.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, bail};
use preceptor_actors::{GraphBuilder, Outcome, StageResult, spawn_graph};
use serde_json::{Value, json};

use super::files::RunFiles;
use super::supervise::{Stop, graph_options, supervise};
use crate::config::Config;
use crate::learn::TrainState;
use crate::monitor::Monitor;
use crate::prepare::Prepared;
use crate::progress::Progress;
use crate::reward::trainer::TrainerStep;
use crate::reward::warm_up::WarmUpObserver;
use crate::sft::SftObserver;
use crate::topology::learning::{adam, lora};
use crate::topology::{Node, wire_fine_tuning};

/// Where a phase writes and what it shows.
pub(super) struct Notes {
    phase: &'static str,
    of: u64,
    progress: Progress,
    files: Arc<Mutex<RunFiles>>,
}

impl Notes {
    fn new(phase: &'static str, unit: &'static str, of: u64, files: &Arc<Mutex<RunFiles>>) -> Self {
        Self { phase, of, progress: Progress::new(phase, unit, of), files: Arc::clone(files) }
    }

    /// A line for the terminal, and one of `phases.jsonl`.
    fn tell(&self, text: &str, mut figures: Value) {
        self.progress.line(text);
        figures["phase"] = json!(self.phase);
        let written = self.files.lock().unwrap_or_else(PoisonError::into_inner).phase(&figures);
        if let Err(error) = written {
            // The phase's figures are not what it is run for; training goes on without them.
            self.progress.line(&format!("{error:#}"));
        }
    }
}

impl SftObserver for Notes {
    fn step(&mut self, step: u64, loss: f64, gradient_norm: f64) {
        self.progress.at(step);
        self.tell(
            &format!("fine-tuning {step:>3}/{}  loss {loss:.4}  gradient {gradient_norm:.3}", self.of),
            json!({ "step": step, "loss": loss, "gradient_norm": gradient_norm }),
        );
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
        let share = right / pairs.max(1) as f64;
        self.tell(
            &format!("reward model ranks {:.1} % of {pairs} held-out pairs as labeled", 100.0 * share),
            json!({ "held_out_right": right, "held_out_pairs": pairs }),
        );
    }
}

/// Fine-tunes the policy on the data's references; the result takes the policy's place, as π_SFT.
pub(super) async fn fine_tune(
    config: &Arc<Config>,
    prepared: Prepared,
    files: &Arc<Mutex<RunFiles>>,
    monitor: &Arc<Monitor>,
    stop: &Stop,
) -> Result<Prepared> {
    let state = Arc::new(Mutex::new(TrainState::new(&prepared.policy, adam(config), None, lora(config).as_ref())?));
    let notes = Arc::new(Mutex::new(Notes::new("supervised fine-tuning", "steps", config.sft.steps, files)));
    let prepared = Arc::new(prepared);
    let (wired, trained, obmonitor) = (Arc::clone(&prepared), Arc::clone(&state), notes.clone());
    let settings = Arc::clone(config);
    run(config, "supervised fine-tuning", &notes, monitor, stop, move |builder| {
        let obmonitor: Arc<Mutex<dyn SftObserver>> = obmonitor.clone();
        wire_fine_tuning(builder, &settings, &wired, &trained, &obmonitor);
        Ok(())
    })
    .await?;
    let policy = state.lock().unwrap_or_else(PoisonError::into_inner).snapshot()?;
    let identity = policy.weights().fingerprint()?;
    let Ok(prepared) = Arc::try_unwrap(prepared) else { bail!("supervised fine-tuning still holds the data") };
    Ok(Prepared { policy, identity, ..prepared })
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
    let notes = Arc::new(Mutex::new(Notes::new("reward model warm-up", "groups", units, files)));
    let (wired, obmonitor) = (Arc::clone(node), notes.clone());
    run(&node.config, "reward model warm-up", &notes, monitor, stop, move |builder| {
        let obmonitor: Arc<Mutex<dyn WarmUpObserver>> = obmonitor.clone();
        wired.wire_warm_up(builder, &trainer, &obmonitor)
    })
    .await
}

/// Runs a phase's graph to its end.
async fn run(
    config: &Config,
    phase: &'static str,
    notes: &Arc<Mutex<Notes>>,
    monitor: &Arc<Monitor>,
    stop: &Stop,
    wire: impl Fn(&mut GraphBuilder) -> StageResult<()> + Send + Sync + 'static,
) -> Result<()> {
    monitor.phase(phase);
    let graph = spawn_graph(graph_options(config), wire);
    monitor.watch(graph.clone());
    let progress = notes.lock().unwrap_or_else(PoisonError::into_inner).progress.clone();
    let outcome = supervise(&graph, stop, &progress, monitor, None).await;
    progress.finish();
    match outcome {
        _ if stop.asked() => {
            bail!("interrupted during {phase}, which is not kept by halves; --resume begins it anew")
        }
        Outcome::Failed { stage, error, restarts, .. } => {
            bail!("{phase} ended since {stage} failed ({restarts} restarts): {error}")
        }
        Outcome::Finished | Outcome::Drained | Outcome::Halted => Ok(()),
    }
}

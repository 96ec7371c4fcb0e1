//! The composition root of a training run: files, server, graph, signals, the last checkpoint.

pub mod files;
mod phases;
mod watcher;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use candle_core::DType;
use preceptor_actors::{
    GraphEvent, GraphHandle, GraphOptions, Outcome, RestartPolicy, SnapshotCell, WatchdogPolicy, spawn_graph,
};

use crate::checkpoint::Checkpoints;
use crate::config::{Config, Mode, WeightDtype};
use crate::learn::TrainState;
use crate::prepare::{Prepared, prepare};
use crate::progress::Progress;
use crate::reward::RewardTrainer;
use crate::serve::{NodeState, Token, serve};
use crate::telemetry;
use crate::topology::labelers::labeler;
use crate::topology::learning::{adam, lora, value_model};
use crate::topology::{Node, trainer_plan};
use files::RunFiles;
use watcher::Watcher;

/// How a run ended.
#[derive(Debug)]
pub struct Summary {
    /// Learner steps taken.
    pub steps: u64,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// Whether it was interrupted before its last step.
    pub interrupted: bool,
}

/// Trains as `config` says, into `run_dir` or the configured directory.
///
/// # Errors
/// One error that names what went wrong. Whatever steps were finished before it are in the checkpoint that the
/// error, or the lines before it, name.
pub async fn train(config: Config, run_dir: Option<PathBuf>) -> Result<Summary> {
    let token = Token::from_env(&config.serve)?;
    let files = RunFiles::create(&config, run_dir)?;
    let metrics = telemetry::install()?;
    let node_state = NodeState::new(&config.run.name, metrics);
    if config.serve.enabled {
        let bound = serve(config.serve.listen, token, Arc::clone(&node_state)).await?;
        eprintln!("serving   http://{bound}/metrics  /status  /healthz  /readyz");
    }
    eprintln!("run       {}", files.dir().display());

    node_state.phase("loading models and data");
    let began = Instant::now();
    let (config, prepared) = tokio::task::spawn_blocking(move || {
        let prepared = prepare(&config, true)?;
        anyhow::Ok((config, prepared))
    })
    .await??;
    eprintln!(
        "policy    {} ({:.1} M parameters), {} prompts, ready in {:.1} s",
        prepared.origin,
        prepared.policy.weights().parameters() as f64 / 1e6,
        prepared.data.len(),
        began.elapsed().as_secs_f64()
    );

    let checkpoints = Checkpoints::new(
        files.dir(),
        prepared.tokenizer.clone(),
        if config.checkpoint.dtype == WeightDtype::Bf16 { DType::BF16 } else { DType::F32 },
        config.checkpoint.keep,
    );
    let (config, files, stop) = (Arc::new(config), Arc::new(Mutex::new(files)), Stop::default());
    let prepared = if config.sft.steps > 0 {
        phases::fine_tune(&config, prepared, &files, &node_state, &stop).await?
    } else {
        prepared
    };
    let state = TrainState::new(
        &prepared.policy,
        adam(&config),
        value_model(&config, &prepared.policy)?,
        lora(&config).as_ref(),
    )?;
    let cell = Arc::new(SnapshotCell::new(0, prepared.identity, Arc::clone(&prepared.policy)));
    let reward_model = reward_model(&config, &prepared)?;
    let watcher = Arc::new(Mutex::new(Watcher {
        files: Arc::clone(&files),
        checkpoints,
        reward_model: reward_model.clone(),
        every: config.checkpoint.every_steps,
        steps: config.run.steps,
        batch_groups: config.learner.batch_groups,
        node: Arc::clone(&node_state),
        progress: Arc::new(OnceLock::new()),
        graph: Arc::new(OnceLock::new()),
        stop: stop.clone(),
        began: Instant::now(),
        step: 0,
        objectives: match config.run.mode {
            Mode::Preference => &["preference/margin", "judge/mean"],
            Mode::Distilled => &["score/mean", "judge/mean"],
            Mode::Direct | Mode::Human => &["score/mean"],
        },
        records: Vec::new(),
    }));
    let node = Arc::new(Node {
        prepared,
        state: Arc::new(Mutex::new(state)),
        cell: Arc::clone(&cell),
        observer: watcher.clone(),
        reward_model,
        labelers: Box::new(labeler),
        config: (*config).clone(),
    });
    let _ = node_state.weights.set(cell);
    phases::warm_up(&node, &files, &node_state, &stop).await?;

    let wiring = Arc::clone(&node);
    let progress = Progress::new("training", "groups", config.run.steps * config.learner.batch_groups);
    let graph = {
        let mut watcher = lock(&watcher);
        watcher.began = Instant::now();
        // Set once, here; an error would mean that it is set already.
        let _ = watcher.progress.set(progress.clone());
        let graph = spawn_graph(graph_options(&node.config), move |builder| wiring.wire(builder));
        let _ = watcher.graph.set(graph.clone());
        graph
    };
    node_state.watch(graph.clone());
    node_state.phase("training");
    let outcome = supervise(&graph, &stop, &progress, false).await;
    progress.finish();
    node_state.phase("writing the last checkpoint");
    let concluded = conclude(outcome, &node, &watcher, &stop);
    if let Err(error) = lock(&files).last_metrics(&node_state.metrics_text()) {
        eprintln!("{error:#}");
    }
    concluded
}

/// The reward model that the mode trains, as it starts.
fn reward_model(config: &Config, prepared: &Prepared) -> Result<Option<Arc<Mutex<RewardTrainer>>>> {
    let Some(plan) = trainer_plan(config) else { return Ok(None) };
    let trainer = match &prepared.reward_start {
        Some(start) => RewardTrainer::new(&start.model, start.head.as_ref(), plan, adam(config)),
        None => RewardTrainer::new(&prepared.policy, None, plan, adam(config)),
    };
    Ok(Some(Arc::new(Mutex::new(trainer?))))
}

/// Whether somebody asked the run to stop.
#[derive(Debug, Clone, Default)]
struct Stop(Arc<AtomicBool>);

impl Stop {
    fn asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Asks; says whether somebody had asked before.
    fn ask(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }
}

/// Waits for the end; the first Ctrl-C (or SIGTERM) lets the step finish unless `at_once`, the second does not.
async fn supervise(graph: &GraphHandle, stop: &Stop, progress: &Progress, at_once: bool) -> Outcome {
    let mut events = graph.subscribe();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
    let mut show = tokio::time::interval(Duration::from_secs(1));
    loop {
        let terminated = async {
            match &mut terminate {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = graph.wait() => return outcome,
            _ = tokio::signal::ctrl_c() => interrupt(graph, stop, progress, at_once),
            Some(()) = terminated => interrupt(graph, stop, progress, at_once),
            Ok(event) = events.recv() => tell(&event, progress),
            _ = show.tick() => {
                let report = graph.report();
                if let Some(bottleneck) = &report.bottleneck {
                    progress.message(format!("limit: {}", bottleneck.role));
                }
            }
        }
    }
}

fn interrupt(graph: &GraphHandle, stop: &Stop, progress: &Progress, at_once: bool) {
    if stop.ask() || at_once {
        progress.line("stopping now; the last finished step is kept");
        graph.halt();
    } else {
        progress.line("stopping after this step; press Ctrl-C again to stop at once");
    }
}

fn tell(event: &GraphEvent, progress: &Progress) {
    match event {
        GraphEvent::StageFailed { stage, error, .. } => progress.line(&format!("stage {stage} failed: {error}")),
        GraphEvent::Restarting { incarnation, backoff } => progress.line(&format!(
            "restarting the graph from the last finished step in {:.1} s (incarnation {incarnation})",
            backoff.as_secs_f64()
        )),
        GraphEvent::Stalled { stage, state, for_ } => {
            progress.line(&format!("no progress for {:.0} s: {stage} holds the run ({state})", for_.as_secs_f64()));
        }
        GraphEvent::Recovered { stage } => progress.line(&format!("{stage} goes on")),
        GraphEvent::Started { .. } | GraphEvent::Ended(_) => {}
    }
}

/// Writes the last checkpoint, whatever the outcome, and says how it went.
fn conclude(outcome: Outcome, node: &Node, watcher: &Mutex<Watcher>, stop: &Stop) -> Result<Summary> {
    let state = node.state.try_lock().map_err(|_| anyhow!("the learner did not stop and still holds the weights"));
    let state = match state {
        Ok(state) => state,
        // A panic elsewhere in the learner leaves the weights whole; `stepping` tells when it does not.
        Err(_) if node.state.is_poisoned() => lock(&node.state),
        Err(error) => return Err(error),
    };
    let watcher = lock(watcher);
    let written = if state.stepping {
        Err(anyhow!("the weights are half updated and are not saved; the last checkpoint before stands"))
    } else if state.step == 0 {
        Err(anyhow!("no step was finished, so there is nothing to save"))
    } else {
        watcher.checkpoints.write(&state, node.reward_model.as_deref())
    };
    if let Ok(path) = &written {
        eprintln!("checkpoint {}", path.display());
    }
    match outcome {
        Outcome::Failed { stage, error, restarts, .. } => {
            if let Err(error) = written {
                eprintln!("{error:#}");
            }
            bail!("the run ended at step {} since {stage} failed ({restarts} restarts): {error}", state.step)
        }
        Outcome::Finished | Outcome::Drained | Outcome::Halted => {
            let interrupted = stop.asked() && state.step < node.config.run.steps;
            if !interrupted {
                watcher.rise();
            }
            Ok(Summary { steps: state.step, checkpoint: written?, interrupted })
        }
    }
}

fn graph_options(config: &Config) -> GraphOptions {
    let supervision = &config.supervision;
    GraphOptions {
        restart: RestartPolicy {
            max_restarts: supervision.max_restarts,
            initial_backoff: Duration::from_secs_f64(supervision.backoff_s),
            max_backoff: Duration::from_secs_f64(supervision.max_backoff_s),
            ..RestartPolicy::default()
        },
        watchdog: WatchdogPolicy {
            stall_after: Duration::from_secs_f64(supervision.stall_after_s),
            restart_after: Some(Duration::from_secs_f64(supervision.restart_after_s)),
        },
        halt_grace: Duration::from_secs_f64(supervision.halt_grace_s),
        ..GraphOptions::default()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

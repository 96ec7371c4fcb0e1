//! The composition root of a training run: files, server, graph, signals, checkpoints.

mod conclusion;
mod evaluation;
pub mod files;
mod guard;
pub mod journal;
pub mod log;
mod phases;
mod reference;
pub mod replay;
pub mod resume;
mod rotating;
mod supervise;
mod systemd;
mod tensorboard;
mod watcher;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use preceptor_actors::{SnapshotCell, spawn_graph};

use crate::check;
use crate::checkpoint::{Form, Identity, Lengths, Mirror, Opened, Shelf, Writer, Written, shelf};
use crate::config::{Config, Mode};
use crate::controller::{Controller, Knobs};
use crate::device;
use crate::exit::Ended;
use crate::knob::Knob;
use crate::learn::TrainState;
use crate::ledger::Book;
use crate::monitor::Monitor;
use crate::prepare::{Prepared, budget, prepare_within};
use crate::progress::Progress;
use crate::say;
use crate::serve::{Token, serve, upkeep};
use crate::telemetry;
use crate::topology::labelers::{Instrument, labeler};
use crate::topology::learning::{adam, lora, value_model};
use crate::topology::{Node, reward_trainer};
use conclusion::Conclusion;
use evaluation::{Evaluated, Evaluator};
use files::{RunDir, RunFiles};
use guard::Guard;
use resume::Accepted;
use supervise::{Stop, graph_options, supervise};
use watcher::{Due, Watcher};

/// File of a run's directory that holds what was spent on remote judges so far, where `labeler.max_cost` bounds it.
const JUDGE_COST: &str = "judge-cost.txt";

/// Where a run starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// At the beginning, in a directory of its own.
    Beginning,
    /// At the latest checkpoint of the run, or the beginning where there is none.
    Latest,
    /// At this one.
    Checkpoint(PathBuf),
}

/// How a run ended.
#[derive(Debug)]
pub struct Summary {
    /// Learner steps taken, resumed ones included.
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
pub async fn train(config: Config, run_dir: Option<PathBuf>, from: From, accepted: Accepted) -> Result<Summary> {
    let token = Token::from_env(&config.serve).map_err(refused)?;
    let Start { dir, checkpoint, shelf } = start(&config, run_dir, &from).map_err(refused)?;
    let compared = checkpoint.as_ref().map(|one| resume::compare(one, &config, &accepted)).transpose();
    let mut changes = compared.map_err(refused)?.unwrap_or_default();
    let budget = budget(&config, Some(dir.path().join(JUDGE_COST)))?;
    let monitor = Monitor::new(&config, telemetry::install()?);
    monitor.trace()?;
    upkeep(Arc::clone(&monitor));
    if config.serve.enabled {
        let bound = serve(&config.serve, token, Arc::clone(&monitor)).await?;
        say!("serving   http://{bound}/  /metrics  /status  /healthz  /readyz");
    }
    say!("run       {}", dir.path().display());
    if let Some(checkpoint) = &checkpoint {
        say!("resuming  {}", checkpoint.path().display());
        for change in &changes {
            say!("{}", change.line());
        }
    } else if from == From::Latest && !phases::is_under_way(dir.path()) {
        say!("resuming  no checkpoint yet; the run begins");
    }

    monitor.phase("loading models and data");
    let began = Instant::now();
    let (config, prepared) = tokio::task::spawn_blocking(move || {
        let prepared = prepare_within(&config, true, budget)?;
        anyhow::Ok((config, prepared))
    })
    .await?
    .map_err(refused)?;
    say!(
        "policy    {} ({:.1} M parameters), {} prompts, ready in {:.1} s",
        prepared.origin,
        prepared.policy().weights().parameters() as f64 / 1e6,
        prepared.data.len(),
        began.elapsed().as_secs_f64()
    );

    for line in check::shortages(&config, &prepared)? {
        say!("{line}");
    }
    let judge = resume::judge_contents(&config, &prepared.instruments)?;
    if let Some(checkpoint) = &checkpoint {
        for change in resume::compare_judge(checkpoint, &judge, &accepted).map_err(refused)? {
            say!("{}", change.line());
            changes.push(change);
        }
        for key in accepted.unused(&changes) {
            say!("accepted  {key}: nothing to accept, it is as it was");
        }
    }
    monitor.on(prepared.policy().device());
    let (config, stop) = (Arc::new(config), Stop::default());
    // What a phase wrote stays if the phase is not gone through again.
    let base = Identity { reference: prepared.identity, data: prepared.data.identity() };
    let fine_tuned = reference::find(&config, &base, dir.path())?;
    let half_tuned = if fine_tuned.is_none() { phases::half_tuned(&config, dir.path(), &accepted)? } else { None };
    let of_phases = |phases| Lengths { phases, ..Lengths::default() };
    let lengths = match (&checkpoint, &fine_tuned, &half_tuned) {
        (Some(checkpoint), _, _) => checkpoint.lengths(),
        (None, Some(reference), _) => of_phases(reference.phases),
        (None, None, Some(half)) => of_phases(half.lengths().phases),
        (None, None, None) => Lengths::default(),
    };
    let mut files = RunFiles::open(&config, dir, lengths, checkpoint.as_ref().map_or(0, Opened::step))?;
    let mut guard = Guard::new(config.guard.clone(), config.learner.batch_groups);
    monitor.recall(files.metrics()?.inspect(|record| guard.recall(record)));
    if let Some(checkpoint) = &checkpoint {
        files.accepted(checkpoint.step(), &changes)?;
    }
    if checkpoint.is_none() || !changes.is_empty() {
        files.configured(&config)?;
    }
    let files = Arc::new(Mutex::new(files));
    let prepared = match fine_tuned {
        Some(reference) => reference.take(&config, prepared)?,
        None if config.sft.steps > 0 => {
            let prepared = phases::fine_tune(&config, prepared, half_tuned, &files, &monitor, &stop).await?;
            reference::keep(&config, &base, &prepared, &mut lock(&files))?;
            prepared
        }
        None => prepared,
    };
    if config.sft.steps > 0 {
        phases::tuned(lock(&files).dir());
        let (dir, shelf) = (lock(&files).dir().to_owned(), Arc::clone(&shelf));
        // While the run goes on. Nobody waits for it: its end looks whether it is there.
        tokio::task::spawn_blocking(move || reference::copy(&dir, &shelf));
    }
    let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
    let mut state = TrainState::new(
        prepared.policy(),
        adam(&config),
        value_model(&config, prepared.policy())?,
        lora(&config).as_ref(),
    )?;
    let reward_model = reward_trainer(&config, &prepared)?.map(|trainer| Arc::new(Mutex::new(trainer)));
    let book = match &checkpoint {
        None => Book::default(),
        Some(checkpoint) => {
            checkpoint.suits(&identity)?;
            let ledger = checkpoint.restore(&mut state, reward_model.as_deref())?;
            // Only now that nothing can refuse it any more.
            for later in shelf.supersede(checkpoint.step())? {
                say!("set aside {}", later.display());
            }
            Book::new(ledger)
        }
    };
    let resumed = checkpoint.map(|checkpoint| checkpoint.step());
    if let Some(step) = resumed
        && step >= config.run.steps
    {
        say!("the run has its {} steps already; raise run.steps to go on", config.run.steps);
    }
    let start = state.step;
    let published = Arc::clone(state.published());
    let fingerprint = published.weights().fingerprint()?;
    let cell = Arc::new(SnapshotCell::new(start, fingerprint, published));
    let dtype = device::dtype(config.checkpoint.dtype);
    let form = Arc::new(Form::new(&config, prepared.tokenizer.clone(), dtype, identity, judge));
    let (progress, failed) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
    let writer = Writer::start(Arc::clone(&shelf), Arc::clone(&form), announce(&progress, &failed, &monitor))?;
    let evaluator = {
        let (progress, monitor) = (Arc::clone(&progress), Arc::clone(&monitor));
        let dir = lock(&files).dir().to_owned();
        Evaluator::start(&config, &prepared, &dir, start, move |told| announce_evaluation(told, &progress, &monitor))?
    };
    let watcher = Arc::new(Mutex::new(Watcher {
        files: Arc::clone(&files),
        evaluator,
        reward_model: reward_model.clone(),
        book: book.clone(),
        due: Due::new(&config, failed),
        writer,
        steps: config.run.steps,
        batch_groups: config.learner.batch_groups,
        monitor: Arc::clone(&monitor),
        progress,
        graph: Arc::new(OnceLock::new()),
        stop: stop.clone(),
        began: Instant::now(),
        step: start,
        guard,
        stopped: None,
        objectives: match config.run.mode {
            Mode::Preference => &["preference/margin", "judge/mean"],
            Mode::Distilled => &["score/mean", "judge/mean"],
            Mode::Direct | Mode::Human => &["score/mean"],
        },
        courses: Vec::new(),
    }));
    let knobs = if config.controller.enabled { knobs(&config, &prepared) } else { Knobs::default() };
    let mut prepared = prepared;
    if !config.reward.reference {
        // What it starts from is gone with the first version that follows it.
        prepared.policy = None;
    }
    let node = Arc::new(Node {
        prepared: Arc::new(prepared),
        state: Arc::new(Mutex::new(state)),
        book,
        cell: Arc::clone(&cell),
        observer: watcher.clone(),
        reward_model,
        labelers: Box::new(labeler),
        knobs: knobs.clone(),
        config: (*config).clone(),
    });
    monitor.training(cell, node.book.clone());
    if resumed.is_none() && node.reward_model.is_some() {
        phases::warm_up(&node, &files, &monitor, &stop).await?;
        // What the warm-up cost is not paid again.
        let snapshot = lock(&watcher).snapshot(&lock(&node.state));
        match snapshot.and_then(|snapshot| shelf.put(&form, &snapshot)) {
            Ok(written) => monitor.checkpointed(written.took, written.bytes),
            Err(error) => {
                telemetry::disk_error();
                lock(&watcher).due.failed.store(true, Ordering::SeqCst);
                say!("{error:#}; training goes on, and it is tried again");
            }
        }
    }

    let wiring = Arc::clone(&node);
    let progress = Progress::new("training", "groups", config.run.steps * config.learner.batch_groups);
    progress.at(start * config.learner.batch_groups);
    let graph = {
        let mut watcher = lock(&watcher);
        watcher.began = Instant::now();
        watcher.due.last = Instant::now();
        // Set once, here; an error would mean that it is set already.
        let _ = watcher.progress.set(progress.clone());
        let graph = spawn_graph(graph_options(&node.config), move |builder| wiring.wire(builder));
        let _ = watcher.graph.set(graph.clone());
        graph
    };
    monitor.watch(graph.clone());
    monitor.phase("training");
    systemd::ready();
    let drain = Duration::from_secs_f64(config.supervision.drain_s);
    if config.controller.enabled {
        let every = Duration::from_secs_f64(config.controller.every_s);
        monitor.controlled(Controller::new(knobs, every, config.rollout.group_size));
    }
    let outcome = supervise(&graph, &stop, &progress, &monitor, Some(drain)).await;
    progress.finish();
    systemd::stopping();
    monitor.phase("writing the last checkpoint");
    let written = Arc::default();
    let conclusion =
        Conclusion { node, watcher, shelf, form, stop: stop.clone(), monitor: Arc::clone(&monitor), written };
    let concluded = conclusion.conclude(outcome).await;
    monitor.finish().await;
    if let Err(error) = lock(&files).last_metrics(&monitor.metrics_text()) {
        say!("{error:#}");
    }
    concluded
}

/// An error from before the first step: the run was refused.
fn refused(error: anyhow::Error) -> anyhow::Error {
    Ended::Refused(error).into()
}

/// Where a run is written, and what it goes on from.
struct Start {
    dir: RunDir,
    checkpoint: Option<Opened>,
    shelf: Arc<Shelf>,
}

fn start(config: &Config, run_dir: Option<PathBuf>, from: &From) -> Result<Start> {
    let mirror = config.checkpoint.mirror.as_deref().map(Mirror::open).transpose()?;
    let shelf = |dir: &RunDir| {
        let keep = &config.checkpoint;
        Arc::new(Shelf::new(dir.path(), keep.keep, keep.best.is_some()).mirrored(mirror))
    };
    match from {
        From::Beginning => {
            let dir = RunDir::create(config, run_dir)?;
            Ok(Start { shelf: shelf(&dir), checkpoint: None, dir })
        }
        From::Latest => {
            let dir = RunDir::resume(config, run_dir)?;
            let shelf = shelf(&dir);
            // What is being fine-tuned here has no use for what came of it elsewhere.
            let reference = if phases::is_under_way(dir.path()) {
                None
            } else {
                shelf.bring_beside(&reference::place(dir.path()))?
            };
            for brought in shelf.bring()?.into_iter().chain(reference) {
                say!("brought   {}", brought.display());
            }
            let checkpoint = shelf.latest(|line| say!("{line}"))?;
            Ok(Start { dir, checkpoint, shelf })
        }
        From::Checkpoint(path) => {
            // It stands in `checkpoints` of the run that it belongs to.
            let path = std::path::absolute(path)?;
            let of = path.parent().filter(|dir| dir.ends_with("checkpoints")).and_then(Path::parent);
            let of = of.filter(|_| shelf::step(&path).is_some()).with_context(|| {
                format!("{} is no checkpoint of a run, such as runs/NAME/checkpoints/step-000050", path.display())
            })?;
            if of.ends_with(phases::FINE_TUNING) {
                bail!("{} is a checkpoint of fine-tuning under way, with which --resume alone goes on", path.display());
            }
            let dir = RunDir::resume(config, Some(run_dir.unwrap_or_else(|| of.to_owned())))?;
            if std::path::absolute(dir.path())? != of {
                bail!(
                    "{} is a checkpoint of the run in {}, not in {}",
                    path.display(),
                    of.display(),
                    dir.path().display()
                );
            }
            let shelf = shelf(&dir);
            let checkpoint = Opened::open(&path)?;
            Ok(Start { dir, checkpoint: Some(checkpoint), shelf })
        }
    }
}

/// What an online controller turns: sequences side by side from a group up, requests to the first server that judges.
fn knobs(config: &Config, prepared: &Prepared) -> Knobs {
    let asked = prepared.instruments.iter().find_map(|instrument| match instrument {
        Instrument::Asked(backend) => backend.knob(),
        Instrument::Model(_) | Instrument::Embedder(_) => None,
    });
    let rollout = Knob::new(config.rollout.group_size, config.rollout.slots);
    Knobs { rollout: Some(Arc::new(rollout)), labeler: asked }
}

/// What is said and counted of a checkpoint that was written in the background.
fn announce(
    progress: &Arc<OnceLock<Progress>>,
    failed: &Arc<AtomicBool>,
    monitor: &Arc<Monitor>,
) -> impl Fn(&Result<Written>) + Send + 'static {
    let (progress, failed, monitor) = (Arc::clone(progress), Arc::clone(failed), Arc::clone(monitor));
    move |written| {
        let text = match written {
            Ok(written) => {
                monitor.checkpointed(written.took, written.bytes);
                format!("checkpoint {}", written.path.display())
            }
            Err(error) => {
                telemetry::disk_error();
                failed.store(true, Ordering::SeqCst);
                format!("{error:#}; training goes on, and it is tried again")
            }
        };
        match progress.get() {
            Some(progress) => progress.line(&text),
            None => say!("{text}"),
        }
    }
}

/// What is said and shown of an evaluation.
fn announce_evaluation(told: Result<Evaluated>, progress: &OnceLock<Progress>, monitor: &Monitor) {
    let text = match told {
        Ok(Evaluated { step, win_rate, lengths }) => match win_rate.value {
            Some(rate) => {
                monitor.evaluated(step, rate);
                format!(
                    "win rate of step {step} over the first weights: {:.1} % ({:.1} to {:.1}) of {} held-out prompts, in {:.1} tokens for {:.1}",
                    100.0 * rate,
                    100.0 * win_rate.low,
                    100.0 * win_rate.high,
                    win_rate.count,
                    lengths[0],
                    lengths[1]
                )
            }
            None => format!("step {step} is not evaluated: the labeler gave no verdict on any held-out prompt"),
        },
        Err(error) => format!("{error:#}; training goes on"),
    };
    match progress.get() {
        Some(progress) => progress.line(&text),
        None => say!("{text}"),
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

//! The composition root of a training run: files, server, graph, signals, checkpoints.

mod begin;
pub mod checkpoint;
mod conclusion;
pub mod controller;
mod evaluation;
pub mod files;
mod guard;
mod insist;
pub mod journal;
pub mod log;
mod open;
mod phases;
mod reference;
pub mod replay;
pub mod resume;
mod rewind;
mod rotating;
mod supervise;
mod systemd;
mod tensorboard;
mod watcher;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use preceptor_actors::{Outcome, SnapshotCell, spawn_graph};

use crate::config::{Config, Mode};
use crate::lm::precision;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::serve::{Token, serve, upkeep};
use crate::observe::telemetry;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::setup::{Prepared, budget, prepare_within};
use crate::pipeline::topology::Node;
use crate::pipeline::topology::labelers::labeler;
use crate::run::checkpoint::{CheckpointFormat, CheckpointStore, Identity, Opened, WinRates, Writer, Written};
use crate::run::controller::{AdjustableLimits, Controller};
use crate::say;
use crate::tools::check;
use crate::util::exit::refusal;
use crate::util::limit::AdjustableLimit;
use crate::util::signals::{self, Interrupted};
use conclusion::Conclusion;
use evaluation::{Evaluated, Evaluator};
use guard::Guard;
use open::Learning;
use resume::Accepted;
use supervise::{Stop, graph_options, supervise, unless_interrupted, unless_left};
use watcher::{Due, RunObserver};

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
    /// The number of the signal that interrupted it before its last step.
    pub interrupted: Option<i32>,
}

/// Trains as `config` says, into `run_dir` or the configured directory.
///
/// # Errors
/// One error that names what went wrong. Whatever steps were finished before it are in the checkpoint that the
/// error, or the lines before it, name.
pub async fn train(config: Config, run_dir: Option<PathBuf>, from: From, accepted: Accepted) -> Result<Summary> {
    let _deferred = signals::defer();
    let token = Token::from_env(&config.serve).map_err(refusal)?;
    let stop = Stop::default();
    let dir = open::hold(&config, run_dir, &from).map_err(refusal)?;
    let budget = budget(&config, Some(dir.path().join(JUDGE_COST))).map_err(refusal)?;
    let monitor = Monitor::new(&config, telemetry::install()?);
    monitor.trace()?;
    upkeep(Arc::clone(&monitor));
    if config.serve.enabled {
        let bound = serve(&config.serve, token, Arc::clone(&monitor)).await?;
        say!("serving   http://{bound}/  /metrics  /status  /healthz  /readyz");
    }
    say!("run       {}", dir.path().display());
    monitor.phase("opening the run");
    let (settings, win_rates) = (config.clone(), WinRates::default());
    let begins = from == From::Latest;
    let course = win_rates.clone();
    let open = move || open::open(&settings, dir, &from, course);
    let start = unless_interrupted("opening the run", open).await.map_err(refusal)?;
    let mut config = config;
    if config.data.date.is_none() {
        config.data.date = begin::date(start.dir.path(), start.checkpoint.as_ref()).map_err(refusal)?;
    }
    let compared = start.checkpoint.as_ref().map(|one| resume::compare(one, &config, &accepted)).transpose();
    let mut changes = compared.map_err(refusal)?.unwrap_or_default();
    if let Some(checkpoint) = &start.checkpoint {
        say!("resuming  {}", checkpoint.path().display());
        for change in &changes {
            say!("{}", change.line());
        }
    } else if begins && !phases::is_under_way(start.dir.path())? {
        say!("resuming  no checkpoint yet; the run begins");
    }

    monitor.phase("loading models and data");
    let began = Instant::now();
    let (config, prepared) = unless_interrupted("loading models and data", move || {
        let prepared = prepare_within(&config, true, budget)?;
        Ok((config, prepared))
    })
    .await
    .map_err(refusal)?;
    say!(
        "policy    {} ({:.1} M parameters), {} prompts, ready in {:.1} s",
        prepared.origin,
        prepared.policy().weights().parameters() as f64 / 1e6,
        prepared.data.len(),
        began.elapsed().as_secs_f64()
    );

    for line in check::shortages(&config, &prepared).map_err(refusal)? {
        say!("{line}");
    }
    let judge = resume::judge_contents(&config, &prepared)?;
    if let Some(checkpoint) = &start.checkpoint {
        for change in resume::compare_judge(checkpoint, &judge, &accepted).map_err(refusal)? {
            say!("{}", change.line());
            changes.push(change);
        }
        for key in accepted.unused(&changes) {
            say!("accepted  {key}: nothing to accept, it is as it was");
        }
    }
    monitor.on(prepared.policy().device());
    let config = Arc::new(config);
    let base = Identity { reference: prepared.identity, data: prepared.data.identity() };
    // Whatever can refuse the run does so before its directory is changed.
    let (settings, origin) = (Arc::clone(&config), base.clone());
    let (start, tuned, prepared, restored) = unless_interrupted("restoring the run", move || {
        let tuned = open::tuned(&settings, &origin, &start, &accepted)?;
        let prepared = match &tuned.reference {
            Some(reference) => reference.take(&settings, prepared)?,
            None => prepared,
        };
        let restores = |checkpoint: &Opened| open::learning(&settings, &prepared, Some(checkpoint));
        let restored = start.checkpoint.as_ref().map(restores).transpose()?;
        Ok((start, tuned, prepared, restored))
    })
    .await
    .map_err(refusal)?;
    let (shelf, resumed) = (Arc::clone(&start.shelf), start.checkpoint.as_ref().map(Opened::step));
    let mut files = start.files(&config, &tuned)?;
    let mut guard = Guard::new(config.guard.clone(), config.learner.batch_groups);
    monitor.recall(files.metrics()?.inspect(|record| guard.recall(record)));
    if let Some(step) = resumed {
        files.accepted(step, &changes)?;
    }
    if resumed.is_none() || !changes.is_empty() {
        files.configured(&config)?;
    }
    let files = Arc::new(Mutex::new(files));
    let prepared = if config.sft.steps > 0 && tuned.reference.is_none() {
        let tuned = phases::fine_tune(&config, prepared, tuned.half, &files, &monitor, &stop).await?;
        phases::keep(&config, base, tuned, &files, &stop).await?
    } else {
        prepared
    };
    if config.sft.steps > 0 {
        phases::tuned(lock(&files).dir());
        let (dir, shelf) = (lock(&files).dir().to_owned(), Arc::clone(&shelf));
        // While the run goes on. Nobody waits for it: its end looks whether it is there.
        tokio::task::spawn_blocking(move || reference::copy(&dir, &shelf));
    }
    let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
    let Learning { state, reward_model, book } = match restored {
        Some(restored) => restored,
        None => open::learning(&config, &prepared, None)?,
    };
    if let Some(step) = resumed
        && step >= config.run.steps
    {
        say!("the run has its {} steps already; raise run.steps to go on", config.run.steps);
    }
    let start = state.step;
    let published = Arc::clone(state.published());
    let fingerprint = published.weights().fingerprint()?;
    let cell = Arc::new(SnapshotCell::new(start, fingerprint, published));
    let dtype = precision::dtype(config.checkpoint.dtype);
    let form = Arc::new(CheckpointFormat::new(
        &config,
        (prepared.tokenizer.clone(), &prepared.origin),
        dtype,
        identity,
        judge,
    ));
    let (progress, failed) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
    let writer = Writer::start(Arc::clone(&shelf), Arc::clone(&form), announce(&progress, &failed, &monitor))?;
    let evaluator = {
        let (progress, monitor) = (Arc::clone(&progress), Arc::clone(&monitor));
        let dir = lock(&files).dir().to_owned();
        let tell = move |told| announce_evaluation(told, &progress, &monitor);
        Evaluator::start(&config, &prepared, &dir, start, win_rates.clone(), tell)?
    };
    win_rates.known().into_iter().for_each(|(step, rate)| monitor.evaluated(step, rate));
    let unimproved = win_rates.exhausted(config.evaluation.patience).filter(|_| start < config.run.steps);
    let watcher = Arc::new(Mutex::new(RunObserver {
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
        win_rates,
        patience: config.evaluation.patience,
        unimproved,
        objectives: match config.run.mode {
            Mode::Preference => &["preference/margin", "judge/mean"],
            Mode::Distilled => &["score/mean", "judge/mean"],
            Mode::Direct | Mode::Human => &["score/mean"],
        },
        courses: Vec::new(),
    }));
    let knobs = if config.controller.enabled { knobs(&config, &prepared) } else { AdjustableLimits::default() };
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
    let written: Arc<OnceLock<PathBuf>> = Arc::default();
    if resumed.is_none() && node.reward_model.is_some() {
        phases::warm_up(&node, &files, &monitor, &stop).await?;
        // What the warm-up cost is not paid again.
        let (watcher, node, shelf, form) = (watcher.clone(), Arc::clone(&node), Arc::clone(&shelf), Arc::clone(&form));
        let (written, failing) = (Arc::clone(&written), Arc::clone(&monitor));
        let work = move || warmed_up(&watcher, &node, &shelf, &form, &failing).map(|path| written.set(path));
        unless_left(&stop, "the checkpoint of the warm-up", work).await?;
    }
    let ended = lock(&watcher).unimproved.is_some();
    if stop.asked() || ended {
        let conclusion = Conclusion { node, watcher, shelf, form, stop, monitor: Arc::clone(&monitor), written };
        return if ended {
            conclusion.conclude(Outcome::Finished).await
        } else {
            before_training(conclusion, resumed).await
        };
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
    let written: Arc<OnceLock<PathBuf>> = Arc::default();
    let drain = Duration::from_secs_f64(config.supervision.drain_s);
    if config.controller.enabled {
        let every = Duration::from_secs_f64(config.controller.every_s);
        monitor.controlled(Controller::new(knobs, every, config.rollout.group_size));
    }
    let outcome = supervise(&graph, &stop, &progress, &monitor, Some(drain)).await;
    progress.finish();
    systemd::stopping();
    monitor.phase("writing the last checkpoint");
    let conclusion =
        Conclusion { node, watcher, shelf, form, stop: stop.clone(), monitor: Arc::clone(&monitor), written };
    let concluded = conclusion.conclude(outcome).await;
    monitor.finish().await;
    if let Err(error) = lock(&files).last_metrics(&monitor.metrics_text()) {
        say!("{error:#}");
    }
    concluded
}

/// Writes the checkpoint of a reward model that was warmed up. If that fails, training continues and the checkpoint is tried again.
fn warmed_up(
    watcher: &Mutex<RunObserver>,
    node: &Node,
    shelf: &CheckpointStore,
    form: &CheckpointFormat,
    monitor: &Monitor,
) -> Option<PathBuf> {
    let snapshot = lock(watcher).snapshot(&lock(&node.state));
    match snapshot.and_then(|snapshot| shelf.put(form, &snapshot)) {
        Ok(written) => {
            monitor.checkpointed(written.took, written.bytes);
            Some(written.path)
        }
        Err(error) => {
            telemetry::disk_error();
            lock(watcher).due.failed.store(true, Ordering::SeqCst);
            say!("{error:#}; training goes on, and it is tried again");
            None
        }
    }
}

/// Ends a run that was interrupted before its graph started. Only a warm-up leaves something to keep.
async fn before_training(conclusion: Conclusion, resumed: Option<u64>) -> Result<Summary> {
    if resumed.is_none() && conclusion.node.reward_model.is_some() {
        return conclusion.conclude(Outcome::Halted).await;
    }
    let kept = match resumed {
        Some(step) => format!("its checkpoint of step {step} stands, and --resume goes on from it"),
        None => "there is nothing to keep yet, and --resume begins the run".to_owned(),
    };
    Err(Interrupted::new(format!("interrupted before training; {kept}")).into())
}

/// What an online controller turns: sequences side by side from a group up, requests to the first server that judges.
fn knobs(config: &Config, prepared: &Prepared) -> AdjustableLimits {
    let asked = prepared.instruments.iter().find_map(|instrument| match instrument {
        JudgeBackend::Asked(backend) => backend.knob(),
        JudgeBackend::Model(_) | JudgeBackend::Cached { .. } | JudgeBackend::Embedder(_) => None,
    });
    let rollout = AdjustableLimit::new(config.rollout.group_size, config.rollout.slots);
    AdjustableLimits { rollout: Some(Arc::new(rollout)), labeler: asked }
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
        Ok(Evaluated { step, win_rate, lengths, without: [abstained, failed], failure }) => {
            let why = failure.map_or(String::new(), |failure| format!(": {failure}"));
            let without = match (abstained, failed) {
                (0, 0) => String::new(),
                _ => format!("; the judge abstained on {abstained} more and failed on {failed}{why}"),
            };
            match win_rate.value {
                Some(rate) => {
                    monitor.evaluated(step, rate);
                    format!(
                        "win rate of step {step} over the first weights: {:.1} % ({:.1} to {:.1}) of {} held-out prompts, with {:.1} tokens against {:.1}{without}",
                        100.0 * rate,
                        100.0 * win_rate.low,
                        100.0 * win_rate.high,
                        win_rate.count,
                        lengths[0],
                        lengths[1]
                    )
                }
                None => format!("step {step} has no win rate: no verdict on any held-out prompt{without}"),
            }
        }
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

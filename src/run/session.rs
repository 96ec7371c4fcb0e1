//! A training run as six steps: open its directory, load models and data, fine-tune, assemble the graph's parts, warm the
//! reward model up, train. Each step takes what the step before it made.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use preceptor_actors::{Outcome, SnapshotCell, spawn_graph};

use super::conclusion::Conclusion;
use super::evaluation::Evaluator;
use super::files::RunFiles;
use super::guard::Guard;
use super::open::{self, Learning, Start, Tuned};
use super::resume::{self, Accepted, Change};
use super::supervise::{Stop, graph_options, supervise, unless_interrupted, unless_left};
use super::watcher::{Due, RunObserver};
use super::{From, Summary, announce, announce_evaluation, begin, lock, phases, reference, systemd};
use crate::config::{Config, Mode};
use crate::lm::precision;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::serve::{Token, serve, upkeep};
use crate::observe::telemetry;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::remote::budget::Budget;
use crate::pipeline::setup::{Prepared, budget, prepare_with_budget};
use crate::pipeline::topology::{LabelerFactory, Node};
use crate::run::checkpoint::{CheckpointFormat, CheckpointStore, Identity, JudgeContents, Opened, WinRates, Writer};
use crate::run::controller::{AdjustableLimits, Controller};
use crate::say;
use crate::tools::check;
use crate::util::exit::refusal;
use crate::util::limit::AdjustableLimit;
use crate::util::signals::Interrupted;

/// File of a run's directory that holds what was spent on remote judges so far, where `labeler.max_cost` bounds it.
const JUDGE_COST: &str = "judge-cost.txt";

/// A run whose directory is locked and whose checkpoint, if it resumes one, is verified. Nothing in the directory has changed.
pub(super) struct OpenedRun {
    config: Config,
    accepted: Accepted,
    stop: Stop,
    monitor: Arc<Monitor>,
    budget: Option<Arc<Budget>>,
    win_rates: WinRates,
    start: Start,
    /// Differences of the configuration from the checkpoint's.
    changes: Vec<Change>,
}

impl OpenedRun {
    /// Locks the run's directory, starts the node's server, and finds and verifies the checkpoint to resume.
    ///
    /// # Errors
    /// A directory that cannot be used, a checkpoint that cannot be resumed under `config`, an address that is in use.
    pub(super) async fn open(
        mut config: Config,
        run_dir: Option<PathBuf>,
        from: From,
        accepted: Accepted,
    ) -> Result<Self> {
        let token = Token::from_env(&config.serve).map_err(refusal)?;
        let stop = Stop::default();
        let dir = open::hold(&config, run_dir, &from).map_err(refusal)?;
        let budget = budget(&config, Some(dir.path().join(JUDGE_COST))).map_err(refusal)?;
        let monitor = Monitor::new(&config, telemetry::install()?);
        monitor.start_tracing()?;
        upkeep(Arc::clone(&monitor));
        if config.serve.enabled {
            let bound = serve(&config.serve, token, Arc::clone(&monitor)).await?;
            say!("serving   http://{bound}/  /metrics  /status  /healthz  /readyz");
        }
        say!("run       {}", dir.path().display());
        monitor.set_phase("opening the run");
        let (settings, win_rates) = (config.clone(), WinRates::default());
        let begins = from == From::Latest;
        let known_rates = win_rates.clone();
        let open = move || open::open(&settings, dir, &from, known_rates);
        let start = unless_interrupted("opening the run", open).await.map_err(refusal)?;
        if config.data.date.is_none() {
            config.data.date = begin::date(start.dir.path(), start.checkpoint.as_ref()).map_err(refusal)?;
        }
        let compared = start.checkpoint.as_ref().map(|one| resume::compare(one, &config, &accepted)).transpose();
        let changes = compared.map_err(refusal)?.unwrap_or_default();
        if let Some(checkpoint) = &start.checkpoint {
            say!("resuming  {}", checkpoint.path().display());
            for change in &changes {
                say!("{}", change.line());
            }
        } else if begins && !phases::is_under_way(start.dir.path())? {
            say!("resuming  no checkpoint yet; the run begins");
        }
        Ok(Self { config, accepted, stop, monitor, budget, win_rates, start, changes })
    }

    /// Loads models and data, and restores the learner from the checkpoint. Whatever can refuse the run does so here; the
    /// run's files are changed last.
    ///
    /// # Errors
    /// A model, data set, judge or checkpoint that cannot be used.
    pub(super) async fn load(self) -> Result<LoadedRun> {
        let Self { config, accepted, stop, monitor, budget, win_rates, start, mut changes } = self;
        monitor.set_phase("loading models and data");
        let began = Instant::now();
        let (config, prepared) = unless_interrupted("loading models and data", move || {
            let prepared = prepare_with_budget(&config, true, budget)?;
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
        monitor.set_device(prepared.policy().device());
        let config = Arc::new(config);
        let base = Identity { reference: prepared.identity, data: prepared.data.identity() };
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
        let (store, resumed) = (Arc::clone(&start.shelf), start.checkpoint.as_ref().map(Opened::step));
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
        Ok(LoadedRun {
            config,
            stop,
            monitor,
            win_rates,
            base,
            judge,
            store,
            resumed,
            files,
            guard,
            tuned,
            restored,
            prepared,
        })
    }
}

/// A run whose models and data are loaded, and whose files are open.
pub(super) struct LoadedRun {
    config: Arc<Config>,
    stop: Stop,
    monitor: Arc<Monitor>,
    win_rates: WinRates,
    /// The policy before fine-tuning, and the data.
    base: Identity,
    judge: JudgeContents,
    store: Arc<CheckpointStore>,
    /// Step of the checkpoint that is resumed.
    resumed: Option<u64>,
    files: Arc<Mutex<RunFiles>>,
    guard: Guard,
    /// The state of supervised fine-tuning.
    tuned: Tuned,
    /// The learner's state, restored from the checkpoint.
    restored: Option<Learning>,
    prepared: Prepared,
}

impl LoadedRun {
    /// Fine-tunes the policy on the data's references, where the configuration asks for it and no earlier process has done it.
    ///
    /// # Errors
    /// A failure or an interruption of fine-tuning; its last checkpoint is named.
    pub(super) async fn fine_tune(mut self) -> Result<Self> {
        if self.config.sft.steps == 0 {
            return Ok(self);
        }
        if self.tuned.reference.is_none() {
            let (config, files, stop) = (&self.config, &self.files, &self.stop);
            let unfinished = self.tuned.half.take();
            let tuned = phases::fine_tune(config, self.prepared, unfinished, files, &self.monitor, stop).await?;
            self.prepared = phases::keep(config, self.base.clone(), tuned, files, stop).await?;
        }
        phases::tuned(lock(&self.files).dir());
        let (dir, store) = (lock(&self.files).dir().to_owned(), Arc::clone(&self.store));
        // Runs while the policy learns. The end of the run checks that the copy exists.
        tokio::task::spawn_blocking(move || reference::copy(&dir, &store));
        Ok(self)
    }

    /// Makes the parts of the training graph: the learner's state, the checkpoint writer, the evaluator, the observer.
    /// `labelers` makes the labeler of each labeler actor.
    ///
    /// # Errors
    /// A learner that does not fit into memory; a thread that cannot be started.
    pub(super) fn assemble(self, labelers: Box<LabelerFactory>) -> Result<Session> {
        let Self {
            config, stop, monitor, win_rates, judge, store, resumed, files, guard, restored, mut prepared, ..
        } = self;
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
        let policy = (prepared.tokenizer.clone(), prepared.origin.as_str());
        let format = Arc::new(CheckpointFormat::new(&config, policy, dtype, identity, judge));
        let (progress, failed) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
        let writer = Writer::start(Arc::clone(&store), Arc::clone(&format), announce(&progress, &failed, &monitor))?;
        let evaluator = {
            let (progress, monitor) = (Arc::clone(&progress), Arc::clone(&monitor));
            let dir = lock(&files).dir().to_owned();
            let tell = move |told| announce_evaluation(told, &progress, &monitor);
            Evaluator::start(&config, &prepared, &dir, start, win_rates.clone(), tell)?
        };
        win_rates.known().into_iter().for_each(|(step, rate)| monitor.evaluated(step, rate));
        let unimproved = win_rates.exhausted(config.evaluation.patience).filter(|_| start < config.run.steps);
        let observer = Arc::new(Mutex::new(RunObserver {
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
        let limits =
            if config.controller.enabled { adjustable_limits(&config, &prepared) } else { AdjustableLimits::default() };
        if !config.reward.reference {
            // The initial weights are freed with the first version that replaces them.
            prepared.policy = None;
        }
        let node = Arc::new(Node {
            prepared: Arc::new(prepared),
            state: Arc::new(Mutex::new(state)),
            book,
            cell: Arc::clone(&cell),
            observer: observer.clone(),
            reward_model,
            labelers,
            limits: limits.clone(),
            config: (*config).clone(),
        });
        monitor.set_training(cell, node.book.clone());
        let warmed_up = Arc::default();
        Ok(Session { config, stop, monitor, store, resumed, files, start, format, observer, node, limits, warmed_up })
    }
}

/// A run that is ready to train.
pub(super) struct Session {
    config: Arc<Config>,
    stop: Stop,
    monitor: Arc<Monitor>,
    store: Arc<CheckpointStore>,
    /// Step of the checkpoint that is resumed.
    resumed: Option<u64>,
    files: Arc<Mutex<RunFiles>>,
    /// Step that training starts from.
    start: u64,
    format: Arc<CheckpointFormat>,
    observer: Arc<Mutex<RunObserver>>,
    node: Arc<Node>,
    limits: AdjustableLimits,
    /// The checkpoint of the warm-up, once it is written.
    warmed_up: Arc<OnceLock<PathBuf>>,
}

impl Session {
    /// Warms the reward model of a new run up, and writes a checkpoint of it, so that its labels are not bought again.
    ///
    /// # Errors
    /// A failure or an interruption of the warm-up.
    pub(super) async fn warm_up(&self) -> Result<()> {
        if self.resumed.is_some() || self.node.reward_model.is_none() {
            return Ok(());
        }
        phases::warm_up(&self.node, &self.files, &self.monitor, &self.stop).await?;
        let (observer, node, monitor) = (Arc::clone(&self.observer), Arc::clone(&self.node), Arc::clone(&self.monitor));
        let (store, format) = (Arc::clone(&self.store), Arc::clone(&self.format));
        let written = Arc::clone(&self.warmed_up);
        let write = move || {
            let path = write_warmed_up(&observer, &node, &store, &format, &monitor);
            path.map(|path| written.set(path))
        };
        unless_left(&self.stop, "the checkpoint of the warm-up", write).await?;
        Ok(())
    }

    /// Trains until the last step, a signal, a limit or a failure, and writes the last checkpoint.
    ///
    /// # Errors
    /// The failure that ended training; an interruption; a last checkpoint that cannot be written.
    pub(super) async fn train(self) -> Result<Summary> {
        if lock(&self.observer).unimproved.is_some() {
            return self.conclusion(Arc::clone(&self.warmed_up)).conclude(Outcome::Finished).await;
        }
        if self.stop.asked() {
            return self.interrupted().await;
        }
        let steps = self.config.run.steps;
        let progress = Progress::new("training", "groups", steps * self.config.learner.batch_groups);
        progress.at(self.start * self.config.learner.batch_groups);
        let graph = {
            let wiring = Arc::clone(&self.node);
            let mut observer = lock(&self.observer);
            observer.began = Instant::now();
            observer.due.last = Instant::now();
            // Each is set once, here; an error would mean that it is set already.
            let _ = observer.progress.set(progress.clone());
            let graph = spawn_graph(graph_options(&self.node.config), move |builder| wiring.wire(builder));
            let _ = observer.graph.set(graph.clone());
            graph
        };
        self.monitor.watch(graph.clone());
        self.monitor.set_phase("training");
        systemd::ready();
        let drain = Duration::from_secs_f64(self.config.supervision.drain_s);
        if self.config.controller.enabled {
            let every = Duration::from_secs_f64(self.config.controller.every_s);
            let controller = Controller::new(self.limits.clone(), every, self.config.rollout.group_size);
            self.monitor.set_controller(controller);
        }
        let outcome = supervise(&graph, &self.stop, &progress, &self.monitor, Some(drain)).await;
        progress.finish();
        systemd::stopping();
        self.monitor.set_phase("writing the last checkpoint");
        let concluded = self.conclusion(Arc::default()).conclude(outcome).await;
        self.monitor.finish().await;
        if let Err(error) = lock(&self.files).last_metrics(&self.monitor.metrics_text()) {
            say!("{error:#}");
        }
        concluded
    }

    /// The end of the run; `written` holds the path of its last checkpoint, once that is written.
    fn conclusion(&self, written: Arc<OnceLock<PathBuf>>) -> Conclusion {
        Conclusion {
            node: Arc::clone(&self.node),
            watcher: Arc::clone(&self.observer),
            shelf: Arc::clone(&self.store),
            form: Arc::clone(&self.format),
            stop: self.stop.clone(),
            monitor: Arc::clone(&self.monitor),
            written,
        }
    }

    /// Ends a run that was interrupted before its graph started. Only a warm-up leaves anything to keep.
    async fn interrupted(&self) -> Result<Summary> {
        if self.resumed.is_none() && self.node.reward_model.is_some() {
            return self.conclusion(Arc::clone(&self.warmed_up)).conclude(Outcome::Halted).await;
        }
        let kept = match self.resumed {
            Some(step) => format!("its checkpoint of step {step} is unchanged, and --resume continues from it"),
            None => "there is nothing to keep yet, and --resume begins the run".to_owned(),
        };
        Err(Interrupted::new(format!("interrupted before training; {kept}")).into())
    }
}

/// Writes the checkpoint of a reward model that was warmed up. If that fails, training continues and the checkpoint is tried
/// again.
fn write_warmed_up(
    observer: &Mutex<RunObserver>,
    node: &Node,
    store: &CheckpointStore,
    format: &CheckpointFormat,
    monitor: &Monitor,
) -> Option<PathBuf> {
    let snapshot = lock(observer).snapshot(&lock(&node.state));
    match snapshot.and_then(|snapshot| store.put(format, &snapshot)) {
        Ok(written) => {
            monitor.checkpointed(written.took, written.bytes);
            Some(written.path)
        }
        Err(error) => {
            telemetry::disk_error();
            lock(observer).due.failed.store(true, Ordering::SeqCst);
            say!("{error:#}; training continues, and it is tried again");
            None
        }
    }
}

/// Returns the limits that an online controller adjusts: sequences sampled concurrently, from one group up to
/// `rollout.slots`, and concurrent requests to the first judge on a server.
fn adjustable_limits(config: &Config, prepared: &Prepared) -> AdjustableLimits {
    let asked = prepared.backends.iter().find_map(|judge| match judge {
        JudgeBackend::Asked(backend) => backend.knob(),
        JudgeBackend::Model(_) | JudgeBackend::Cached { .. } | JudgeBackend::Embedder(_) => None,
    });
    let rollout = AdjustableLimit::new(config.rollout.group_size, config.rollout.slots);
    AdjustableLimits { rollout: Some(Arc::new(rollout)), labeler: asked }
}

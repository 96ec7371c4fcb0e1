//! A training run in six steps: open the directory, load models and data, fine-tune, assemble the parts of the graph,
//! warm up the reward model, train. Each step consumes the result of the previous one.

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
use super::observer::{CheckpointSchedule, RunObserver};
use super::open::{self, FineTuning, LearnerParts, StartState};
use super::resume::{self, AcceptedKeys, Change};
use super::servers::HandOver;
use super::supervise::{Stop, graph_options, run_abandonable, run_interruptible, supervise};
use super::workers::{self, CheckpointedLog, Workers};
use super::{StartFrom, Summary, announce, announce_evaluation, begin, phases, reference, systemd};
use crate::config::{Config, Mode};
use crate::lm::precision;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::serve::{Token, serve, upkeep};
use crate::observe::telemetry;
use crate::pipeline::cluster::Nats;
use crate::pipeline::cluster::log::GroupLog;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::remote::budget::Budget;
use crate::pipeline::served::Fleet;
use crate::pipeline::setup::{Prepared, budget, prepare_with_budget};
use crate::pipeline::topology::{LabelerFactory, Node, connect};
use crate::run::checkpoint::{
    CheckpointFormat, CheckpointStore, CheckpointWriter, Identity, JudgeContents, OpenedCheckpoint, WinRates,
};
use crate::run::controller::{AdjustableLimits, Controller};
use crate::status;
use crate::tools::check;
use crate::util::exit::refusal;
use crate::util::limit::AdjustableLimit;
use crate::util::mutex::lock;
use crate::util::signals::Interrupted;

/// File in a run's directory with the amount spent on remote judges; written if `labeler.max_cost` is set.
const JUDGE_COST: &str = "judge-cost.txt";

/// A run whose directory is locked and whose checkpoint, if it has one, is verified. No file of the run has changed.
pub(super) struct OpenedRun {
    config: Config,
    accepted: AcceptedKeys,
    stop: Stop,
    monitor: Arc<Monitor>,
    budget: Option<Arc<Budget>>,
    win_rates: WinRates,
    start: StartState,
    /// Differences between the configuration and that of the checkpoint.
    changes: Vec<Change>,
}

impl OpenedRun {
    /// Locks the run's directory, starts the HTTP server, and finds and verifies the checkpoint to resume from.
    ///
    /// # Errors
    /// If the directory cannot be used, the checkpoint cannot be resumed under `config`, or the address is in use.
    pub(super) async fn open(
        mut config: Config,
        run_dir: Option<PathBuf>,
        from: StartFrom,
        accepted: AcceptedKeys,
    ) -> Result<Self> {
        let token = Token::from_env(&config.serve).map_err(refusal)?;
        let stop = Stop::default();
        let dir = open::lock_directory(&config, run_dir, &from).map_err(refusal)?;
        let budget = budget(&config, Some(dir.path().join(JUDGE_COST))).map_err(refusal)?;
        let monitor = Monitor::new(&config, telemetry::install()?);
        monitor.start_tracing()?;
        upkeep(Arc::clone(&monitor));
        if config.serve.enabled {
            let bound = serve(&config.serve, token, Arc::clone(&monitor)).await?;
            status!("serving   http://{bound}/  /metrics  /status  /healthz  /readyz");
        }
        status!("run       {}", dir.path().display());
        monitor.set_phase("opening the run");
        let (settings, win_rates) = (config.clone(), WinRates::default());
        let is_latest = from == StartFrom::Latest;
        let rates = win_rates.clone();
        let open = move || open::open(&settings, dir, &from, rates);
        let start = run_interruptible("opening the run", open).await.map_err(refusal)?;
        if config.data.date.is_none() {
            config.data.date = begin::template_date(start.dir.path(), start.checkpoint.as_ref()).map_err(refusal)?;
        }
        let compared = start.checkpoint.as_ref().map(|one| resume::compare(one, &config, &accepted)).transpose();
        let changes = compared.map_err(refusal)?.unwrap_or_default();
        if let Some(checkpoint) = &start.checkpoint {
            status!("resuming  {}", checkpoint.path().display());
            for change in &changes {
                status!("{}", change.line());
            }
        } else if is_latest && !phases::is_in_progress(start.dir.path())? {
            status!("resuming  no checkpoint yet; the run starts at step 0");
        }
        Ok(Self { config, accepted, stop, monitor, budget, win_rates, start, changes })
    }

    /// Loads models and data, and restores the learner from the checkpoint. All checks that can refuse the run are made
    /// before its files are changed.
    ///
    /// # Errors
    /// If a model, data set, judge or checkpoint cannot be used.
    pub(super) async fn load(self) -> Result<LoadedRun> {
        let Self { config, accepted, stop, monitor, budget, win_rates, start, mut changes } = self;
        monitor.set_phase("loading models and data");
        let began = Instant::now();
        let (config, prepared) = run_interruptible("loading models and data", move || {
            let prepared = prepare_with_budget(&config, true, budget)?;
            Ok((config, prepared))
        })
        .await
        .map_err(refusal)?;
        status!(
            "policy    {} ({:.1} M parameters), {} prompts, ready in {:.1} s",
            prepared.origin,
            prepared.policy().weights().parameters() as f64 / 1e6,
            prepared.data.len(),
            began.elapsed().as_secs_f64()
        );
        for line in check::shortages(&config, &prepared).map_err(refusal)? {
            status!("{line}");
        }
        let judge = resume::judge_contents(&config, &prepared)?;
        if let Some(checkpoint) = &start.checkpoint {
            for change in resume::compare_judge(checkpoint, &judge, &accepted).map_err(refusal)? {
                status!("{}", change.line());
                changes.push(change);
            }
            for key in accepted.unused(&changes) {
                status!("accepted  {key}: nothing to accept, the value is unchanged");
            }
        }
        monitor.set_device(prepared.policy().device());
        let config = Arc::new(config);
        let base = Identity { reference: prepared.identity, data: prepared.data.identity() };
        let (settings, origin) = (Arc::clone(&config), base.clone());
        let (start, fine_tuning, prepared, restored) = run_interruptible("restoring the run", move || {
            let fine_tuning = open::fine_tuning(&settings, &origin, &start, &accepted)?;
            let prepared = match &fine_tuning.reference {
                Some(reference) => reference.load_into(&settings, prepared)?,
                None => prepared,
            };
            let restores = |checkpoint: &OpenedCheckpoint| open::learner(&settings, &prepared, Some(checkpoint));
            let restored = start.checkpoint.as_ref().map(restores).transpose()?;
            Ok((start, fine_tuning, prepared, restored))
        })
        .await
        .map_err(refusal)?;
        let dir = start.dir.path().to_owned();
        let settings = Arc::clone(&config);
        let (prepared, fleet, nats) = run_interruptible("connecting to the rollout servers", move || {
            let nats = workers::connect(&settings)?;
            let fleet = connect(&settings, &prepared, &dir)?;
            Ok((prepared, fleet, nats))
        })
        .await
        .map_err(refusal)?;
        let (store, resumed) = (Arc::clone(&start.store), start.checkpoint.as_ref().map(OpenedCheckpoint::step));
        let mut files = start.files(&config, &fine_tuning)?;
        let mut guard = Guard::new(config.guard.clone(), config.learner.batch_groups);
        monitor.recall(files.metrics()?.inspect(|record| guard.recall(record)));
        if let Some(step) = resumed {
            files.record_accepted(step, &changes)?;
        }
        if resumed.is_none() || !changes.is_empty() {
            files.record_config(&config)?;
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
            fine_tuning,
            restored,
            prepared,
            fleet,
            nats,
        })
    }
}

/// A run whose models and data are loaded, and whose files are open.
pub(super) struct LoadedRun {
    config: Arc<Config>,
    stop: Stop,
    monitor: Arc<Monitor>,
    win_rates: WinRates,
    /// Identity of the policy before fine-tuning, and of the data.
    base: Identity,
    judge: JudgeContents,
    store: Arc<CheckpointStore>,
    /// Step of the checkpoint that is resumed.
    resumed: Option<u64>,
    files: Arc<Mutex<RunFiles>>,
    guard: Guard,
    /// Results of an earlier fine-tuning.
    fine_tuning: FineTuning,
    /// The learner's state, restored from the checkpoint.
    restored: Option<LearnerParts>,
    prepared: Prepared,
    /// Servers that sample, if any do.
    fleet: Option<Arc<Fleet>>,
    /// Connection to the broker of the workers that sample, if any do.
    nats: Option<Nats>,
}

impl LoadedRun {
    /// Fine-tunes the policy on the references of the data, if the configuration asks for it and no earlier process has
    /// done it.
    ///
    /// # Errors
    /// If fine-tuning fails or is interrupted. The error names its last checkpoint.
    pub(super) async fn fine_tune(mut self) -> Result<Self> {
        if self.config.sft.steps == 0 {
            return Ok(self);
        }
        if self.fine_tuning.reference.is_none() {
            let (config, files, stop) = (&self.config, &self.files, &self.stop);
            let unfinished = self.fine_tuning.unfinished.take();
            let tuned = phases::fine_tune(config, self.prepared, unfinished, files, &self.monitor, stop).await?;
            self.prepared = phases::save_reference(config, self.base.clone(), tuned, files, stop).await?;
        }
        phases::remove_checkpoints(lock(&self.files).dir());
        let (dir, store) = (lock(&self.files).dir().to_owned(), Arc::clone(&self.store));
        // Runs while the policy trains; the end of the run copies again if this fails.
        tokio::task::spawn_blocking(move || reference::mirror(&dir, &store));
        Ok(self)
    }

    /// Creates the parts of the training graph: the learner's state, the checkpoint writer, the evaluator and the
    /// observer. `labelers` creates the labeler of each labeler actor.
    ///
    /// # Errors
    /// If the learner does not fit into memory, or a thread cannot be started.
    pub(super) fn assemble(self, labelers: Box<LabelerFactory>) -> Result<Session> {
        let Self {
            config,
            stop,
            monitor,
            win_rates,
            judge,
            store,
            resumed,
            files,
            guard,
            restored,
            mut prepared,
            fleet,
            nats,
            ..
        } = self;
        let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
        let LearnerParts { state, reward_model, ledger } = match restored {
            Some(restored) => restored,
            None => open::learner(&config, &prepared, None)?,
        };
        if let Some(step) = resumed
            && step >= config.run.steps
        {
            status!("the run already has its {} steps; raise run.steps to continue", config.run.steps);
        }
        let start = state.step;
        let published = Arc::clone(state.published());
        let fingerprint = published.weights().fingerprint()?;
        let cell = Arc::new(SnapshotCell::new(start, fingerprint, published));
        let group_log = workers::open_log(&config, lock(&files).dir(), start, fingerprint, &ledger).map_err(refusal)?;
        let dtype = precision::dtype(config.checkpoint.dtype);
        let policy = (prepared.tokenizer.clone(), prepared.origin.as_str());
        let format = Arc::new(CheckpointFormat::new(&config, policy, dtype, identity, judge));
        let (progress, failed) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
        let shortened = group_log.clone().map(|log| CheckpointedLog {
            log,
            store: Arc::clone(&store),
            keep: config.checkpoint.keep,
            batch: config.learner.batch_groups,
        });
        let report = announce(&progress, &failed, &monitor, shortened);
        let writer = CheckpointWriter::start(Arc::clone(&store), Arc::clone(&format), report)?;
        let evaluator = {
            let (progress, monitor) = (Arc::clone(&progress), Arc::clone(&monitor));
            let dir = lock(&files).dir().to_owned();
            let report = move |evaluated| announce_evaluation(evaluated, &progress, &monitor);
            Evaluator::start(&config, &prepared, &dir, start, win_rates.clone(), report)?
        };
        win_rates.all().into_iter().for_each(|(step, rate)| monitor.evaluated(step, rate));
        let unimproved = win_rates.patience_exhausted(config.evaluation.patience).filter(|_| start < config.run.steps);
        let observer = Arc::new(Mutex::new(RunObserver {
            files: Arc::clone(&files),
            evaluator,
            reward_model: reward_model.clone(),
            ledger: ledger.clone(),
            group_log: group_log.clone(),
            schedule: CheckpointSchedule::new(&config, failed),
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
            histories: Vec::new(),
        }));
        let limits =
            if config.controller.enabled { adjustable_limits(&config, &prepared) } else { AdjustableLimits::default() };
        if !config.reward.reference {
            // Only adapters still need the initial weights, which they share.
            prepared.policy = None;
        }
        let node = Arc::new(Node {
            prepared: Arc::new(prepared),
            state: Arc::new(Mutex::new(state)),
            ledger,
            cell: Arc::clone(&cell),
            observer: observer.clone(),
            reward_model,
            labelers,
            limits: limits.clone(),
            fleet,
            coordinator: OnceLock::new(),
            config: (*config).clone(),
        });
        monitor.set_training(cell, node.ledger.clone());
        if let Some(fleet) = &node.fleet {
            monitor.set_servers(Arc::clone(fleet));
        }
        let warmed_up = Arc::default();
        Ok(Session {
            config,
            stop,
            monitor,
            store,
            resumed,
            files,
            start,
            format,
            observer,
            node,
            limits,
            warmed_up,
            hand_over: None,
            nats,
            group_log,
            workers: None,
        })
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
    /// Step at which training starts.
    start: u64,
    format: Arc<CheckpointFormat>,
    observer: Arc<Mutex<RunObserver>>,
    node: Arc<Node>,
    limits: AdjustableLimits,
    /// Directory of the checkpoint after the warm-up, once it is written.
    warmed_up: Arc<OnceLock<PathBuf>>,
    /// Hand-over of weights to servers, if they sample.
    hand_over: Option<HandOver>,
    /// Connection to the workers' broker until the coordinator starts.
    nats: Option<Nats>,
    group_log: Option<Arc<GroupLog>>,
    /// Coordinator of the workers that sample, if any do.
    workers: Option<Workers>,
}

impl Session {
    /// Hands the current weights to the servers that sample, if any, and compares their log-probabilities with the policy's;
    /// or announces them to the workers that sample.
    ///
    /// # Errors
    /// If a server does not take the weights, or has another model; or if the workers' broker is not available.
    pub(super) async fn connect(&mut self) -> Result<()> {
        let dir = lock(&self.files).dir().to_owned();
        self.hand_over = HandOver::start(&self.config, &self.node, &dir).await?;
        if let Some(nats) = self.nats.take() {
            let log = self.group_log.clone();
            self.workers = Some(Workers::start(&self.config, &self.node, &self.monitor, nats, log, dir).await?);
            if let Some(coordinator) = self.node.coordinator.get() {
                self.monitor.set_workers(Arc::clone(coordinator));
            }
        }
        Ok(())
    }

    /// Warms up the reward model of a new run and writes a checkpoint, so that its labels are not paid for again.
    ///
    /// # Errors
    /// If the warm-up fails or is interrupted.
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
        run_abandonable(&self.stop, "the checkpoint of the warm-up", write).await?;
        Ok(())
    }

    /// Trains until the last step, a signal, a limit or a failure, and writes the last checkpoint.
    ///
    /// # Errors
    /// If training failed, was interrupted before it started, was stopped by a limit, or the last checkpoint cannot be
    /// written.
    pub(super) async fn train(self) -> Result<Summary> {
        if lock(&self.observer).unimproved.is_some() {
            self.end_workers();
            return self.conclusion(Arc::clone(&self.warmed_up)).conclude(Outcome::Finished).await;
        }
        if self.stop.is_requested() {
            return self.interrupted().await;
        }
        let steps = self.config.run.steps;
        let progress = Progress::new("training", "groups", steps * self.config.learner.batch_groups);
        progress.at(self.start * self.config.learner.batch_groups);
        let graph = {
            let wiring = Arc::clone(&self.node);
            let mut observer = lock(&self.observer);
            observer.began = Instant::now();
            observer.schedule.last = Instant::now();
            // Both cells are set here only, so `set` cannot fail.
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
        if let Err(error) = lock(&self.files).write_final_metrics(&self.monitor.metrics_text()) {
            status!("{error:#}");
        }
        if concluded.as_ref().is_ok_and(|summary| summary.interrupted.is_none()) {
            self.end_workers();
        }
        concluded
    }

    /// Tells the workers, if any, that the run needs them no more.
    fn end_workers(&self) {
        if let Some(workers) = &self.workers {
            workers.end();
        }
    }

    /// Returns the conclusion of the run. `written` holds the path of its last checkpoint, once that is written.
    fn conclusion(&self, written: Arc<OnceLock<PathBuf>>) -> Conclusion {
        Conclusion {
            node: Arc::clone(&self.node),
            observer: Arc::clone(&self.observer),
            store: Arc::clone(&self.store),
            format: Arc::clone(&self.format),
            stop: self.stop.clone(),
            monitor: Arc::clone(&self.monitor),
            written,
        }
    }

    /// Ends a run that was interrupted before its graph started. Writes a checkpoint only if a warm-up was completed.
    async fn interrupted(&self) -> Result<Summary> {
        if self.resumed.is_none() && self.node.reward_model.is_some() {
            return self.conclusion(Arc::clone(&self.warmed_up)).conclude(Outcome::Halted).await;
        }
        let kept = match self.resumed {
            Some(step) => format!("its checkpoint of step {step} is unchanged, and --resume continues from it"),
            None => "there is nothing to keep yet, and --resume starts the run".to_owned(),
        };
        Err(Interrupted::new(format!("interrupted before training; {kept}")).into())
    }
}

/// Writes a checkpoint after the warm-up of the reward model. If that fails, training continues and the checkpoint is
/// retried.
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
            lock(observer).schedule.failed.store(true, Ordering::SeqCst);
            status!("{error:#}; training continues, and the checkpoint is retried");
            None
        }
    }
}

/// Returns the limits that the online controller adjusts: concurrent sequences per rollout actor, from one group up to
/// `rollout.slots`, and concurrent requests to the first judge on a server.
fn adjustable_limits(config: &Config, prepared: &Prepared) -> AdjustableLimits {
    let remote = prepared.backends.iter().find_map(|judge| match judge {
        JudgeBackend::Asked(backend) => backend.concurrency_limit(),
        JudgeBackend::Model(_)
        | JudgeBackend::Cached { .. }
        | JudgeBackend::OnWorkers { .. }
        | JudgeBackend::Embedder(_) => None,
    });
    let rollout = AdjustableLimit::new(config.rollout.group_size, config.rollout.slots);
    AdjustableLimits { rollout: Some(Arc::new(rollout)), labeler: remote }
}

//! The observable state of a running node, for metrics, the live page and the terminal view.
//!
//! A [`Monitor`] receives events from the run and samples the graph every second. Any thread may read it. The training
//! threads never wait for a reader for longer than it takes to copy a small state.

pub mod diagnosis;
pub mod history;
pub mod samples;
mod window;

use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use candle_core::Device;
use metrics_exporter_prometheus::PrometheusHandle;
use preceptor_actors::{GraphHandle, GraphReport, RoleShare, SnapshotCell};
use serde_json::{Map, Value, json};

use crate::config::{Choice, Config};
use crate::lm::model::Decoder;
use crate::observe::telemetry::{self, RunInfo, TOTALS};
use crate::observe::traces::Tracer;
use crate::pipeline::cluster::Coordinator;
use crate::pipeline::served::{Fleet, ServerReport};
use crate::rl::ledger::SharedLedger;
use crate::run::controller::{Adjustment, Controller, Pressure};
use crate::types::Rewarded;
use crate::util::device::{self, Memory};
use crate::util::mutex::lock;
use crate::util::process;
use diagnosis::{Diagnosis, diagnose};
use history::History;
use samples::Samples;
use window::{Observation, Window};

/// Maximum number of reasons for masked groups that `/status` lists.
const MAX_REASONS: usize = 5;

/// The weights of a run as its HTTP server offers them to workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedWeights {
    /// Folder with a folder for each version.
    pub folder: PathBuf,
    /// Number of the run in the names of its versions.
    pub run: u32,
    /// Names of the folders of the models that do not change: the base model and the judges of workers.
    pub models: Vec<String>,
}

/// The observable state of a node.
pub struct Monitor {
    config: Config,
    metrics: PrometheusHandle,
    began: SystemTime,
    /// The graph of the current phase, once it has been started.
    graph: Mutex<Option<GraphHandle>>,
    device: OnceLock<Device>,
    weights: OnceLock<Arc<SnapshotCell<Decoder>>>,
    ledger: OnceLock<SharedLedger>,
    servers: OnceLock<Arc<Fleet>>,
    workers: OnceLock<Arc<Coordinator>>,
    published: OnceLock<PublishedWeights>,
    phase: Mutex<String>,
    last_step: Mutex<Value>,
    window: Mutex<Window>,
    history: Mutex<History>,
    samples: Mutex<Samples>,
    checkpoint: Mutex<Option<Checkpointed>>,
    health: Mutex<Health>,
    controller: Mutex<Option<Controlled>>,
    tracer: Mutex<Option<Tracer>>,
}

/// The online controller, with the observations since its last adjustment.
struct Controlled {
    controller: Controller,
    window: Window,
    /// Successful and failed exchanges with remote judges at the last adjustment.
    exchanges: [u64; 2],
}

/// The masked groups and exceeded bounds of a run.
#[derive(Default)]
struct Health {
    /// Reasons for masked groups with their counts, the most frequent first.
    masked: Vec<(String, u64)>,
    /// Names of the bounds of `[guard]` that are exceeded.
    exceeded: Vec<&'static str>,
}

/// The last checkpoint.
struct Checkpointed {
    at: Instant,
    took: Duration,
    bytes: u64,
}

impl Monitor {
    /// Creates the monitor of a node that is starting, and publishes the run's metadata as metrics.
    pub fn new(config: &Config, metrics: PrometheusHandle) -> Arc<Self> {
        let monitor = Self {
            config: config.clone(),
            metrics,
            began: SystemTime::now(),
            graph: Mutex::default(),
            device: OnceLock::new(),
            weights: OnceLock::new(),
            ledger: OnceLock::new(),
            servers: OnceLock::new(),
            workers: OnceLock::new(),
            published: OnceLock::new(),
            phase: Mutex::new("starting".into()),
            last_step: Mutex::new(Value::Null),
            window: Mutex::default(),
            history: Mutex::default(),
            samples: Mutex::default(),
            checkpoint: Mutex::default(),
            health: Mutex::default(),
            controller: Mutex::default(),
            tracer: Mutex::default(),
        };
        telemetry::run(&RunInfo {
            run: &config.run.name,
            mode: config.run.mode.word(),
            algorithm: config.learner.algorithm.word(),
            labeler: monitor.labeler(),
            steps: config.run.steps,
            eta: config.learner.eta,
        });
        Arc::new(monitor)
    }

    fn labeler(&self) -> &'static str {
        match &self.config.labeler.methods[..] {
            [] => "none",
            [method] if !self.config.labeler.methods.panel => method.kind.word(),
            _ => "panel",
        }
    }

    /// Sets the name of the current phase.
    pub fn set_phase(&self, phase: &str) {
        phase.clone_into(&mut lock(&self.phase));
    }

    /// Sets the graph of stages whose times and queues are observed.
    pub fn watch(&self, graph: GraphHandle) {
        lock(&self.window).clear();
        let mut tracer = lock(&self.tracer);
        let before = lock(&self.graph).replace(graph);
        if let (Some(tracer), Some(before)) = (tracer.as_mut(), before) {
            tracer.ended(&before);
        }
    }

    /// Sets the policy's device. Later calls have no effect.
    pub fn set_device(&self, device: &Device) {
        // An error means that it is set already.
        let _ = self.device.set(device.clone());
    }

    /// Sets the published weights and the ledger. Later calls have no effect.
    pub fn set_training(&self, weights: Arc<SnapshotCell<Decoder>>, ledger: SharedLedger) {
        // An error means that it is set already.
        let _ = (self.weights.set(weights), self.ledger.set(ledger));
    }

    /// Sets the servers that sample for the run. Later calls have no effect.
    pub fn set_servers(&self, servers: Arc<Fleet>) {
        // An error means that they are set already.
        let _ = self.servers.set(servers);
    }

    /// Sets the coordinator of the workers that sample for the run. Later calls have no effect.
    pub fn set_workers(&self, coordinator: Arc<Coordinator>) {
        // An error means that it is set already.
        let _ = self.workers.set(coordinator);
    }

    /// Sets the weights that the HTTP server offers to workers. Later calls have no effect.
    pub fn set_published_weights(&self, weights: PublishedWeights) {
        // An error means that they are set already.
        let _ = self.published.set(weights);
    }

    /// Returns the weights that the HTTP server offers to workers; `None` if there are none yet.
    pub fn published_weights(&self) -> Option<PublishedWeights> {
        self.published.get().cloned()
    }

    /// Returns the state of each server or worker that samples. Empty if this process samples.
    fn servers(&self) -> Vec<ServerReport> {
        let workers = self.workers.get().map(|coordinator| coordinator.roster.report());
        workers.or_else(|| self.servers.get().map(|fleet| fleet.report())).unwrap_or_default()
    }

    fn diagnose(&self, shares: &[RoleShare]) -> Option<Diagnosis> {
        let found = diagnose(shares, &self.config, process::cores(), &self.servers())?;
        let missing = self.workers.get().and_then(|coordinator| coordinator.missing());
        Some(missing.map_or(found.clone(), |headline| Diagnosis { headline, settings: Vec::new(), ..found }))
    }

    /// Adds the records of steps taken before this process began to the history.
    pub fn recall(&self, records: impl Iterator<Item = Map<String, Value>>) {
        let mut history = lock(&self.history);
        for record in records {
            history.push(&Value::Object(record));
        }
    }

    /// Records a learner step with its metrics `record`, and samples of its batch.
    pub fn stepped(&self, record: Value, batch: &[Rewarded]) {
        lock(&self.history).push(&record);
        if let Some(group) = batch.first() {
            lock(&self.samples).push(samples::lines(&record["step"], group));
        }
        *lock(&self.last_step) = record;
    }

    /// Records the win rate of a step's weights over the initial ones.
    pub fn evaluated(&self, step: u64, win_rate: f64) {
        telemetry::win_rate(win_rate);
        lock(&self.history).evaluated(step, win_rate);
    }

    /// Records a written checkpoint, with the time it took and its size.
    pub fn checkpointed(&self, took: Duration, bytes: u64) {
        telemetry::checkpoint(took, bytes);
        *lock(&self.checkpoint) = Some(Checkpointed { at: Instant::now(), took, bytes });
    }

    /// Records the reasons for masked groups with their counts, most frequent first, and the exceeded bounds of
    /// `[guard]`.
    pub fn set_health(&self, masked: Vec<(&str, u64)>, exceeded: impl Iterator<Item = &'static str>) {
        let masked = masked.into_iter().take(MAX_REASONS).map(|(why, count)| (why.to_owned(), count)).collect();
        *lock(&self.health) = Health { masked, exceeded: exceeded.collect() };
    }

    /// Samples the graph. To be called about once a second.
    pub fn sample(&self) {
        // The lock is held while the graph is read, so that the tracer never reads a graph after `ended`.
        let mut tracer = lock(&self.tracer);
        let Some(graph) = lock(&self.graph).clone() else { return };
        if let Some(tracer) = tracer.as_mut() {
            tracer.read(&graph);
        }
        drop(tracer);
        let seen = Observation::now(graph.report());
        if let Some(controlled) = lock(&self.controller).as_mut() {
            controlled.window.push(seen.clone());
        }
        lock(&self.window).push(seen);
    }

    /// Starts to send traces, if the environment names a collector.
    ///
    /// # Errors
    /// If the collector cannot be used.
    pub fn start_tracing(&self) -> Result<()> {
        *lock(&self.tracer) = Tracer::start(&self.config.run.name)?;
        Ok(())
    }

    /// Sends the remaining traces. To be called after the last graph has ended.
    pub async fn finish(&self) {
        let tracer = lock(&self.tracer).take();
        if let Some(mut tracer) = tracer {
            if let Some(graph) = &*lock(&self.graph) {
                tracer.ended(graph);
            }
            tracer.finish().await;
        }
    }

    /// Sets the online controller that [`Self::run_controller`] runs.
    pub fn set_controller(&self, controller: Controller) {
        *lock(&self.controller) = Some(Controlled { controller, window: Window::default(), exchanges: exchanges() });
    }

    /// Lets the controller adjust the concurrency limits, if one is set and its interval has passed. Returns the
    /// changes.
    pub fn run_controller(&self) -> Vec<Adjustment> {
        let mut controlled = lock(&self.controller);
        let Some(Controlled { controller, window, exchanges: before }) = controlled.as_mut() else { return Vec::new() };
        let shares = window.shares();
        if !controller.is_due() || shares.is_empty() {
            return Vec::new();
        }
        let now = exchanges();
        let since = [now[0] - before[0], now[1] - before[1]];
        *before = now;
        // Observations from before an adjustment must not be attributed to it.
        window.clear();
        controller.adjust(Pressure { shares: &shares, exchanges: since })
    }

    /// Returns whether reading the node's state requires a token.
    pub fn is_guarded(&self) -> bool {
        self.config.serve.token_env.is_some()
    }

    /// Returns a report of the current graph, or `None` before the first one is started.
    pub fn report(&self) -> Option<GraphReport> {
        lock(&self.graph).as_ref().map(GraphHandle::report)
    }

    /// Returns the bottleneck of the last minute, or `None` if it is not known yet.
    pub fn diagnosis(&self) -> Option<Diagnosis> {
        let shares = lock(&self.window).shares();
        self.diagnose(&shares)
    }

    /// Returns the training rate and the bottleneck as a short text. Empty if the bottleneck is not known yet.
    pub fn line(&self) -> String {
        let (shares, rates) = {
            let window = lock(&self.window);
            (window.shares(), window.rates())
        };
        let Some(diagnosis) = self.diagnose(&shares) else { return String::new() };
        let bottleneck =
            diagnosis.role.map_or_else(|| "none".into(), |role| format!("{role} {:.0} %", 100.0 * diagnosis.share));
        format!("{:.0} tokens/s, bottleneck: {bottleneck}", rates.trained_tokens_per_s)
    }

    /// Returns the response of `/metrics`, in Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        let report = self.report();
        let acks = self.weights.get().map(|cell| cell.acks()).unwrap_or_default();
        let shares = lock(&self.window).shares();
        let limiting = self.diagnose(&shares).and_then(|diagnosis| diagnosis.role);
        let process = telemetry::graph::Process { usage: process::usage(), card: self.card() };
        let graph = telemetry::graph::render(report.as_ref(), &shares, limiting.as_deref(), &acks, process);
        format!("{}{graph}", self.metrics.render())
    }

    /// Returns the response of `/status`.
    pub fn status(&self) -> Value {
        let (shares, rates, window_s) = {
            let window = lock(&self.window);
            (window.shares(), window.rates(), window.length().as_secs_f64())
        };
        let report = self.report();
        let Config { run, learner, rollout, .. } = &self.config;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
        json!({
            "run": run.name,
            "program": concat!("preceptor ", env!("CARGO_PKG_VERSION")),
            "phase": lock(&self.phase).clone(),
            "incarnation_started": self.began.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            "plan": {
                "mode": run.mode.word(), "algorithm": learner.algorithm.word(), "labeler": self.labeler(),
                "steps": run.steps, "batch_groups": learner.batch_groups, "group_size": rollout.group_size,
                "eta": learner.eta, "engine": rollout.engine.word(),
            },
            "last_step": *lock(&self.last_step),
            "weights": self.weights.get().map(|cell| cell.acks()),
            "ledger": self.ledger.get().map(|ledger| ledger.count()),
            "faults": {
                "restarts": report.as_ref().map_or(0, |report| report.restarts),
                "nonfinite_steps": count(&TOTALS.nonfinite),
                "masked_groups": count(&TOTALS.masked),
                "disk_errors": count(&TOTALS.disk_errors),
            },
            "judges_away": telemetry::judge_outages().into_iter().map(|(url, time, why, refuses)| json!({
                "url": url, "seconds": time.as_secs(), "why": why, "refuses": refuses,
            })).collect::<Vec<_>>(),
            "servers": self.servers(),
            "health": {
                "masked": lock(&self.health).masked.iter()
                    .map(|(why, count)| json!({ "why": why, "groups": count })).collect::<Vec<_>>(),
                "exceeded": lock(&self.health).exceeded,
            },
            "graph": report,
            "window_s": window_s,
            "diagnosis": self.diagnose(&shares),
            "roles": shares,
            "rates": rates,
            "checkpoint": lock(&self.checkpoint).as_ref().map(|last| json!({
                "age_s": last.at.elapsed().as_secs_f64(), "took_s": last.took.as_secs_f64(), "bytes": last.bytes,
            })),
            "controller": lock(&self.controller).as_ref().map(|controlled| controlled.controller.to_json()),
            "memory": {
                "resident_bytes": process::resident_bytes(),
                "device": self.card().into_iter().collect::<Vec<_>>(),
            },
        })
    }

    /// Returns the memory usage of the policy's GPU, if it is on one.
    fn card(&self) -> Option<Memory> {
        self.device.get().and_then(device::memory)
    }

    /// Returns the response of `/history`.
    pub fn history(&self) -> Value {
        lock(&self.history).to_json()
    }

    /// Returns the response of `/samples`: the last recorded groups, newest first.
    pub fn samples(&self) -> Value {
        lock(&self.samples).to_json()
    }

    /// Moves the samples of histograms into their buckets. Between two calls, the recorder keeps every sample.
    pub fn upkeep(&self) {
        self.metrics.run_upkeep();
    }
}

/// Returns the numbers of successful and of failed exchanges with remote judges so far.
fn exchanges() -> [u64; 2] {
    [TOTALS.judged.load(Relaxed), TOTALS.refused.load(Relaxed)]
}

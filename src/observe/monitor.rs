//! What a running node knows of itself, for all who look: metrics, the live page, the terminal.
//!
//! A [`Monitor`] is told what happens and looks at the graph every second. It is read by any thread, and nobody who
//! trains waits for a reader.

pub mod diagnosis;
pub mod history;
pub mod samples;
mod window;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use candle_core::Device;
use metrics_exporter_prometheus::PrometheusHandle;
use preceptor_actors::{GraphHandle, GraphReport, SnapshotCell};
use serde_json::{Map, Value, json};

use crate::config::{Choice, Config};
use crate::lm::model::Decoder;
use crate::observe::telemetry::{self, RunInfo, TOTALS};
use crate::observe::traces::Tracer;
use crate::rl::ledger::Book;
use crate::run::controller::{Controller, Move, Pressure};
use crate::types::Rewarded;
use crate::util::device::{self, Memory};
use crate::util::process;
use diagnosis::{Diagnosis, diagnose};
use history::History;
use samples::Samples;
use window::{Observation, Window};

/// Most reasons for masked groups that `/status` lists.
const MOST_REASONS: usize = 5;

/// A node, looked at.
pub struct Monitor {
    config: Config,
    metrics: PrometheusHandle,
    began: SystemTime,
    /// The graph of the present phase, once there is one.
    graph: Mutex<Option<GraphHandle>>,
    device: OnceLock<Device>,
    weights: OnceLock<Arc<SnapshotCell<Decoder>>>,
    book: OnceLock<Book>,
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

/// The online controller, and what was seen since it looked last.
struct Controlled {
    controller: Controller,
    window: Window,
    /// Exchanges with remote judges until then.
    exchanges: [u64; 2],
}

/// The masked groups and exceeded bounds of a run.
#[derive(Default)]
struct Health {
    /// Why groups were masked, the most frequent reason first.
    masked: Vec<(String, u64)>,
    /// Bounds of `[guard]` that are exceeded.
    exceeded: Vec<&'static str>,
}

/// The last checkpoint.
struct Checkpointed {
    at: Instant,
    took: Duration,
    bytes: u64,
}

impl Monitor {
    /// Of a node that is starting.
    pub fn new(config: &Config, metrics: PrometheusHandle) -> Arc<Self> {
        let monitor = Self {
            config: config.clone(),
            metrics,
            began: SystemTime::now(),
            graph: Mutex::default(),
            device: OnceLock::new(),
            weights: OnceLock::new(),
            book: OnceLock::new(),
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

    /// Says what the node is doing.
    pub fn phase(&self, phase: &str) {
        phase.clone_into(&mut lock(&self.phase));
    }

    /// The graph to look at from now on.
    pub fn watch(&self, graph: GraphHandle) {
        lock(&self.window).clear();
        let mut tracer = lock(&self.tracer);
        let before = lock(&self.graph).replace(graph);
        if let (Some(tracer), Some(before)) = (tracer.as_mut(), before) {
            tracer.ended(&before);
        }
    }

    /// The device that the policy is on; told once.
    pub fn on(&self, device: &Device) {
        // Told twice, the first holds.
        let _ = self.device.set(device.clone());
    }

    /// The published weights, and where the run's groups stand; told once.
    pub fn training(&self, weights: Arc<SnapshotCell<Decoder>>, book: Book) {
        // Told twice, the first holds.
        let _ = (self.weights.set(weights), self.book.set(book));
    }

    /// Steps that were taken before this process began.
    pub fn recall(&self, records: impl Iterator<Item = Map<String, Value>>) {
        let mut history = lock(&self.history);
        for record in records {
            history.push(&Value::Object(record));
        }
    }

    /// A step was taken, with these figures, from this batch.
    pub fn stepped(&self, record: Value, batch: &[Rewarded]) {
        lock(&self.history).push(&record);
        if let Some(group) = batch.first() {
            lock(&self.samples).push(samples::lines(&record["step"], group));
        }
        *lock(&self.last_step) = record;
    }

    /// The weights of a step were judged against the first ones.
    pub fn evaluated(&self, step: u64, win_rate: f64) {
        telemetry::win_rate(win_rate);
        lock(&self.history).evaluated(step, win_rate);
    }

    /// A checkpoint was written.
    pub fn checkpointed(&self, took: Duration, bytes: u64) {
        telemetry::checkpoint(took, bytes);
        *lock(&self.checkpoint) = Some(Checkpointed { at: Instant::now(), took, bytes });
    }

    /// Takes in why groups were masked so far, with how many of them, and which bounds of `[guard]` are exceeded.
    pub fn health(&self, masked: Vec<(&str, u64)>, exceeded: impl Iterator<Item = &'static str>) {
        let masked = masked.into_iter().take(MOST_REASONS).map(|(why, count)| (why.to_owned(), count)).collect();
        *lock(&self.health) = Health { masked, exceeded: exceeded.collect() };
    }

    /// Looks at the graph; to be called about once a second.
    pub fn look(&self) {
        // Held until the graph is looked at, so that none is looked at after it was taken leave of.
        let mut tracer = lock(&self.tracer);
        let Some(graph) = lock(&self.graph).clone() else { return };
        if let Some(tracer) = tracer.as_mut() {
            tracer.see(&graph);
        }
        drop(tracer);
        let seen = Observation::now(graph.report());
        if let Some(controlled) = lock(&self.controller).as_mut() {
            controlled.window.push(seen.clone());
        }
        lock(&self.window).push(seen);
    }

    /// Sends traces of what it sees from now on, where somebody named a collector.
    ///
    /// # Errors
    /// A collector that cannot be used.
    pub fn trace(&self) -> Result<()> {
        *lock(&self.tracer) = Tracer::start(&self.config.run.name)?;
        Ok(())
    }

    /// Sends what is left to send; to be called once the last graph has ended.
    pub async fn finish(&self) {
        let tracer = lock(&self.tracer).take();
        if let Some(mut tracer) = tracer {
            if let Some(graph) = &*lock(&self.graph) {
                tracer.ended(graph);
            }
            tracer.finish().await;
        }
    }

    /// Has this controller look from now on.
    pub fn controlled(&self, controller: Controller) {
        *lock(&self.controller) = Some(Controlled { controller, window: Window::default(), exchanges: exchanges() });
    }

    /// Has the controller look, if there is one and it is due.
    pub fn control(&self) -> Vec<Move> {
        let mut controlled = lock(&self.controller);
        let Some(Controlled { controller, window, exchanges: before }) = controlled.as_mut() else { return Vec::new() };
        let shares = window.shares();
        if !controller.is_due() || shares.is_empty() {
            return Vec::new();
        }
        let now = exchanges();
        let since = [now[0] - before[0], now[1] - before[1]];
        *before = now;
        // What was before a move says nothing of what it did.
        window.clear();
        controller.look(Pressure { shares: &shares, exchanges: since })
    }

    /// Returns whether reading what the node knows takes a token.
    pub fn is_guarded(&self) -> bool {
        self.config.serve.token_env.is_some()
    }

    /// The graph as it is.
    pub fn report(&self) -> Option<GraphReport> {
        lock(&self.graph).as_ref().map(GraphHandle::report)
    }

    /// What limits the run now, from what was seen of the last minute.
    pub fn diagnosis(&self) -> Option<Diagnosis> {
        diagnose(&lock(&self.window).shares(), &self.config, process::cores())
    }

    /// The rate and what limits, in a few words.
    pub fn line(&self) -> String {
        let (shares, rates) = {
            let window = lock(&self.window);
            (window.shares(), window.rates())
        };
        let Some(found) = diagnose(&shares, &self.config, process::cores()) else { return String::new() };
        let limit =
            found.role.map_or_else(|| "nothing alone".into(), |role| format!("{role} {:.0} %", 100.0 * found.share));
        format!("{:.0} tokens/s, limit: {limit}", rates.trained_tokens_per_s)
    }

    /// What `/metrics` answers.
    pub fn metrics_text(&self) -> String {
        let report = self.report();
        let acks = self.weights.get().map(|cell| cell.acks()).unwrap_or_default();
        let shares = lock(&self.window).shares();
        let limiting = diagnose(&shares, &self.config, process::cores()).and_then(|diagnosis| diagnosis.role);
        let process = telemetry::graph::Process { usage: process::usage(), card: self.card() };
        let graph = telemetry::graph::render(report.as_ref(), &shares, limiting.as_deref(), &acks, process);
        format!("{}{graph}", self.metrics.render())
    }

    /// What `/status` answers.
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
                "eta": learner.eta,
            },
            "last_step": *lock(&self.last_step),
            "weights": self.weights.get().map(|cell| cell.acks()),
            "ledger": self.book.get().map(|book| book.count()),
            "faults": {
                "restarts": report.as_ref().map_or(0, |report| report.restarts),
                "nonfinite_steps": count(&TOTALS.nonfinite),
                "masked_groups": count(&TOTALS.masked),
                "disk_errors": count(&TOTALS.disk_errors),
            },
            "judges_away": telemetry::judges_away().into_iter().map(|(url, time, why, refuses)| json!({
                "url": url, "seconds": time.as_secs(), "why": why, "refuses": refuses,
            })).collect::<Vec<_>>(),
            "health": {
                "masked": lock(&self.health).masked.iter()
                    .map(|(why, count)| json!({ "why": why, "groups": count })).collect::<Vec<_>>(),
                "exceeded": lock(&self.health).exceeded,
            },
            "graph": report,
            "window_s": window_s,
            "diagnosis": diagnose(&shares, &self.config, process::cores()),
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

    /// Memory of the card that the policy is on, if it is on one.
    fn card(&self) -> Option<Memory> {
        self.device.get().and_then(device::memory)
    }

    /// What `/history` answers.
    pub fn history(&self) -> Value {
        lock(&self.history).to_json()
    }

    /// What `/samples` answers: the last groups that were written down, newest first.
    pub fn samples(&self) -> Value {
        lock(&self.samples).to_json()
    }

    /// Folds what histograms have gathered into their buckets: between two times they keep every sample.
    pub fn upkeep(&self) {
        self.metrics.run_upkeep();
    }
}

/// Exchanges with remote judges so far that ended well, and those that did not.
fn exchanges() -> [u64; 2] {
    [TOTALS.judged.load(Relaxed), TOTALS.refused.load(Relaxed)]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

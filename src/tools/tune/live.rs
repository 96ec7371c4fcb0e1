//! Measurements on this machine: runs the configured graph for a while, without writing files.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use preceptor_actors::{GraphHandle, GraphOptions, Outcome, RestartPolicy, SnapshotCell, StageReport, spawn_graph};

use super::plan::Plan;
use super::{Facts, Machine, Measured, Role};
use crate::config::Config;
use crate::pipeline::generate::MAX_SLOTS;
use crate::pipeline::learn::{Done, Observer, TrainState};
use crate::pipeline::setup::Prepared;
use crate::pipeline::topology::labelers::labeler;
use crate::pipeline::topology::learning::{adam, lora, value_model};
use crate::pipeline::topology::{Node, reward_trainer};
use crate::rl::ledger::SharedLedger;
use crate::run::controller::AdjustableLimits;
use crate::tools::check;
use crate::types::Rewarded;
use crate::util::device;
use crate::util::mutex::lock;
use crate::util::process;
use crate::util::signals::{self, Interrupted};

/// Minimum number of measured steps.
const MIN_STEPS: usize = 2;

/// Maximum share of the free memory that a plan is estimated to need, since the estimate is approximate.
const SHARE: f64 = 0.8;

/// The machine that the program runs on. It measures a plan by running the configured graph with it.
pub struct Live {
    config: Config,
    prepared: Arc<Prepared>,
    least: Duration,
    /// Free memory before the first measurement, in bytes, if known.
    room: Option<u64>,
    runtime: tokio::runtime::Runtime,
}

impl Live {
    /// Creates the machine for `config`, whose models and data are `prepared`. Each measurement takes at least the time
    /// `least` and a few steps.
    ///
    /// # Errors
    /// If the runtime cannot be started.
    pub fn new(config: &Config, prepared: Prepared, least: Duration) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let room = device::available_bytes(prepared.policy().device());
        Ok(Self { config: config.clone(), prepared: Arc::new(prepared), least, room, runtime })
    }

    /// Returns the largest micro-batch of the learner that fits into memory, in completions; zero is a complete group.
    fn micro_batch(&self) -> usize {
        let configured = Plan::of(&self.config);
        let halves = std::iter::successors(Some(configured.group_size / 2), |n| Some(n / 2));
        let mut sizes = std::iter::once(0).chain(halves.take_while(|n| *n > 0));
        sizes.find(|n| self.fits(&Plan { micro_batch: *n, ..configured.clone() })).unwrap_or(configured.micro_batch)
    }
}

impl Machine for Live {
    fn facts(&self) -> Facts {
        let methods = &self.config.labeler.methods;
        Facts {
            cores: process::cores(),
            group_size: self.config.rollout.group_size,
            batch: self.config.learner.batch_groups,
            labels_here: methods.iter().any(|method| method.remote.is_none()),
            labels: self.config.needs_labels(),
            max_slots: MAX_SLOTS,
            max_replicas: if self.prepared.policy().device().is_cpu() && self.config.learner.devices.is_empty() {
                usize::try_from(self.config.learner.batch_groups).unwrap_or(usize::MAX)
            } else {
                1
            },
            micro_batch: self.micro_batch(),
        }
    }

    fn fits(&self, plan: &Plan) -> bool {
        let mut config = self.config.clone();
        plan.put(&mut config);
        match (self.room, check::memory_bytes(&config, &self.prepared)) {
            (Some(room), Ok(bytes)) => bytes <= SHARE * room as f64,
            _ => true,
        }
    }

    fn measure(&mut self, plan: &Plan) -> Result<Measured> {
        let mut config = self.config.clone();
        plan.put(&mut config);
        // `Watch` halts the run after enough steps.
        config.run.steps = u64::MAX / 2 / plan.batch;
        let prepared = &self.prepared;
        let value = value_model(&config, prepared.policy())?;
        let mut state = TrainState::new(prepared.policy(), adam(&config), value, lora(&config).as_ref())?;
        state.place(prepared.devices.learner.clone());
        let published = Arc::clone(state.published());
        let cell = SnapshotCell::new(0, published.weights().fingerprint()?, published);
        // The first steps are skipped, because their groups began while the pipeline was still empty.
        let skip = 1 + plan.eta as usize;
        let watch = Watch { skip, least: self.least, graph: OnceLock::new(), marks: Vec::new(), reports: None };
        let watch = Arc::new(Mutex::new(watch));
        let node = Node {
            state: Arc::new(Mutex::new(state)),
            cell: Arc::new(cell),
            observer: watch.clone(),
            ledger: SharedLedger::default(),
            limits: AdjustableLimits::default(),
            reward_model: reward_trainer(&config, prepared)?.map(|trainer| Arc::new(Mutex::new(trainer))),
            fleet: None,
            coordinator: std::sync::OnceLock::new(),
            labelers: Box::new(labeler),
            prepared: Arc::clone(prepared),
            config,
        };
        let options = GraphOptions { restart: RestartPolicy::never(), ..GraphOptions::default() };
        let graph = {
            // The lock is held until the handle is set, so that no step is observed before.
            let watching = lock(&watch);
            let _runtime = self.runtime.enter();
            let graph = spawn_graph(options, move |builder| node.wire(builder));
            let _ = watching.graph.set(graph.clone());
            graph
        };
        let _deferred = signals::defer();
        let outcome = self.runtime.block_on(async {
            tokio::select! {
                outcome = graph.wait() => anyhow::Ok(outcome),
                _ = signals::after(0) => {
                    graph.halt();
                    graph.wait().await;
                    Err(Interrupted::new("interrupted; nothing was changed").into())
                }
            }
        })?;
        if let Outcome::Failed { stage, error, .. } = outcome {
            bail!("{stage} failed during the measurement: {error}");
        }
        let watch = lock(&watch);
        watch.measured(plan.batch)
    }
}

/// Records the times at which steps end, and halts the graph after enough of them.
struct Watch {
    skip: usize,
    least: Duration,
    graph: OnceLock<GraphHandle>,
    marks: Vec<Instant>,
    /// Stage reports at the beginning and at the end of the measurement.
    reports: Option<(Vec<StageReport>, Vec<StageReport>)>,
}

impl Watch {
    fn measured(&self, batch: u64) -> Result<Measured> {
        let Some((first, last)) = &self.reports else { bail!("no step ended during the measurement") };
        let steps = self.marks.len() - self.skip;
        let seconds = (self.marks[self.marks.len() - 1] - self.marks[self.skip - 1]).as_secs_f64();
        ensure!(seconds > 0.0, "the clock did not advance during the measurement");
        let groups = steps as f64 * batch as f64;
        let work = |role: Role| {
            let busy = |stages: &[StageReport]| -> f64 {
                stages.iter().filter(|stage| stage.role == role.name()).map(|stage| stage.busy_s).sum()
            };
            (busy(last) - busy(first)) / groups
        };
        Ok(Measured { groups_per_s: groups / seconds, work_s: Role::ALL.map(work) })
    }
}

impl Observer for Watch {
    fn group(&mut self, _done: u64, _of: u64) {}

    fn step(&mut self, _done: Done<'_>, _state: &TrainState) -> Result<()> {
        let Some(graph) = self.graph.get() else { return Ok(()) };
        self.marks.push(Instant::now());
        let stages = graph.report().stages;
        if self.marks.len() <= self.skip {
            self.reports = Some((stages, Vec::new()));
            return Ok(());
        }
        let long = self.marks[self.skip - 1].elapsed() >= self.least && self.marks.len() >= self.skip + MIN_STEPS;
        if let Some((_, last)) = &mut self.reports {
            *last = stages;
        }
        if long {
            graph.halt();
        }
        Ok(())
    }

    fn nonfinite(&mut self, _step: u64, _batch: &[Rewarded]) {}
}

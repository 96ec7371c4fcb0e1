//! The workers of a run: the connection to their broker, the log of their results, and the announcement of weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use candle_core::DType;
use preceptor_actors::transport::TransportError;

use super::supervise::run_interruptible;
use crate::config::{Choice, Config, EngineKind, WeightsPlace};
use crate::observe::monitor::{Monitor, PublishedWeights};
use crate::pipeline::cluster::log::{GroupLog, Start};
use crate::pipeline::cluster::protocol::{Bounds, LoraNotice, RunState, SamplingNotice};
use crate::pipeline::cluster::{BucketStore, Coordinator, CoordinatorPlan, Nats, NatsPlan, put_base, put_judges};
use crate::pipeline::served::{FolderStore, WeightStore};
use crate::pipeline::topology::learning::lora;
use crate::pipeline::topology::{Node, admission, sampling};
use crate::rl::ledger::SharedLedger;
use crate::run::checkpoint::{CheckpointStore, store};
use crate::status;
use crate::util::bucket::Bucket;
use crate::util::exit::refusal;
use crate::util::seed;

/// Time to wait for a broker that cannot be reached, such as one that starts at the same time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Folder of a run with the log of its workers' results.
const LOG: &str = "groups";

/// Connects to the broker of the run's workers; `None` if the run has none.
///
/// # Errors
/// If the broker cannot be used.
pub(super) fn connect(config: &Config) -> Result<Option<Nats>> {
    if !config.has_workers() {
        return Ok(None);
    }
    let cluster = &config.cluster;
    let plan = NatsPlan {
        url: cluster.nats.clone().context("cluster.nats is missing")?,
        ca: cluster.tls_ca.clone(),
        certificate: cluster.tls_certificate.clone().zip(cluster.tls_key.clone()),
        name: format!("coordinator of {}", run_name(config)),
    };
    Nats::connect_within(&plan, PATIENCE, &AtomicBool::new(false)).map(Some)
}

/// Opens the log of the workers' results in the directory `run`, and adds to `ledger` what it has for a run that begins at
/// `step` with weights of this fingerprint. `None` if the run has no workers.
///
/// # Errors
/// If the log cannot be read or written.
pub(super) fn open_log(
    config: &Config,
    run: &Path,
    step: u64,
    fingerprint: u64,
    ledger: &SharedLedger,
) -> Result<Option<Arc<GroupLog>>> {
    if config.rollout.engine != EngineKind::Workers {
        return Ok(None);
    }
    let start = Start { step, fingerprint, batch: config.learner.batch_groups };
    let (log, restored) = GroupLog::open(&run.join(LOG), start)?;
    ledger.restore(&restored.groups);
    if !restored.groups.is_empty() {
        status!("workers   {} groups of {LOG}/ are continued", restored.groups.len());
    }
    if restored.labels_lost + restored.rollouts_lost > 0 {
        report_lost(restored.rollouts_lost, restored.labels_lost);
    }
    let log = Arc::new(log);
    ledger.log_to(Arc::clone(&log) as _);
    Ok(Some(log))
}

/// Tells how many groups are given up, because weights sampled them that the run does not have any more.
pub(super) fn report_lost(rollouts: u64, labels: u64) {
    crate::observe::telemetry::labels_lost(labels);
    status!(
        "workers   {} groups are sampled again, {labels} of them with labels: weights sampled them that this run does not have",
        rollouts + labels
    );
}

/// A log that is shortened after each checkpoint.
pub(super) struct CheckpointedLog {
    pub(super) log: Arc<GroupLog>,
    pub(super) store: Arc<CheckpointStore>,
    /// Number of the latest checkpoints that are kept.
    pub(super) keep: usize,
    /// Number of groups in a step.
    pub(super) batch: u64,
}

impl CheckpointedLog {
    /// Keeps what a run needs that is restored from any of the latest checkpoints.
    pub(super) fn checkpointed(&self) {
        let kept = match self.store.all() {
            Ok(kept) => kept,
            Err(error) => return status!("warning: {error:#}; the log of groups grows until it can be shortened"),
        };
        let oldest = kept.iter().rev().take(self.keep).filter_map(|path| store::step(path)).min();
        self.log.checkpointed(oldest.unwrap_or(0) * self.batch);
    }
}

fn run_name(config: &Config) -> &str {
    config.cluster.run.as_deref().unwrap_or(&config.run.name)
}

/// The workers' coordinator. It tells them to wait for the next one when it is dropped.
pub(super) struct Workers(Arc<Coordinator>);

impl Workers {
    /// Announces the run and the published weights of `node` at the broker, and begins to take results. The server of `monitor`
    /// offers the weights from then on. `run` is the run's directory.
    ///
    /// # Errors
    /// If the weights cannot be stored, or the broker is not available.
    pub(super) async fn start(
        config: &Arc<Config>,
        node: &Arc<Node>,
        monitor: &Arc<Monitor>,
        nats: Nats,
        log: Option<Arc<GroupLog>>,
        run: PathBuf,
    ) -> Result<Self> {
        let (config, node, monitor) = (Arc::clone(config), Arc::clone(node), Arc::clone(monitor));
        let start = move || -> Result<Arc<Coordinator>> {
            let (weights, name) = (&node.cell.latest().value, run_name(&config).to_owned());
            let store = Store::open(&config, &run, weights.dtype())?;
            let samples = config.rollout.engine == EngineKind::Workers;
            // Before the first step the published weights have no adapters yet.
            let adapters = lora(&config).map(|(lora, _)| lora);
            let base = match samples {
                true => put_base(&*store.writer, weights, &node.prepared.tokenizer, adapters.is_some())?,
                false => Default::default(),
            };
            let judges = match &node.prepared.worker_judges {
                Some(judges) => put_judges(judges, &*store.writer, config.policy.matmul_precision.word())?,
                None => Vec::new(),
            };
            let place = run.canonicalize().unwrap_or(run);
            let tag = seed::text(&place.to_string_lossy()) as u32;
            let models = judges.iter().map(|judge| judge.name.clone()).chain([base.0.clone()]).collect();
            monitor.set_published_weights(PublishedWeights { folder: store.folder, run: tag, models });
            let plan = CoordinatorPlan {
                tag,
                lineage: new_lineage(),
                admission: admission(&config),
                sampling: notice(&config, &node),
                bounds: Bounds { rows: weights.config().vocab_size, max_new_tokens: config.rollout.max_new_tokens },
                lora: adapters.map(|lora| LoraNotice {
                    rank: lora.rank,
                    alpha: lora.alpha,
                    targets: lora.targets.clone(),
                }),
                group_size: config.rollout.group_size,
                slowest: config.cluster.slowest,
                part: config.cluster.part.unwrap_or(config.rollout.group_size),
                lease: Duration::from_secs_f64(config.cluster.lease_s),
                store: store.place.clone(),
                base,
                samples,
                judges,
                run: name,
            };
            let roles = [(samples, ""), (!plan.judges.is_empty(), " --role label")];
            for (_, role) in roles.iter().filter(|(used, _)| *used) {
                status!(
                    "workers   start them with: preceptor worker --join {} --run {}{role}",
                    config.cluster.nats.as_deref().unwrap_or_default(),
                    plan.run
                );
            }
            if config.serve.enabled && !config.serve.listen.ip().is_loopback() {
                let token =
                    config.serve.token_env.as_deref().map_or(String::new(), |name| format!(" --token-env {name}"));
                status!(
                    "workers   where {} cannot be read, add: --store http://NODE:{}/weights{token}",
                    plan.store,
                    config.serve.listen.port()
                );
            }
            let nats = Arc::new(nats);
            let coordinator = retried(|| {
                Coordinator::start(plan.clone(), Arc::clone(&nats) as _, Arc::clone(&nats) as _, log.clone())
            })?;
            retried(|| coordinator.open(&node.cell, Arc::clone(&store.writer)))?;
            if let Some(judges) = &node.prepared.worker_judges {
                retried(|| coordinator.open_judges(&judges.pool))?;
            }
            // It is set here only.
            let _ = node.coordinator.set(Arc::clone(&coordinator));
            Ok(coordinator)
        };
        let coordinator = run_interruptible("announcing the run to its workers", start).await.map_err(refusal)?;
        Ok(Self(coordinator))
    }

    /// Tells the workers that the run has all its steps.
    pub(super) fn end(&self) {
        self.0.stop(RunState::Ended);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.0.stop(RunState::Paused);
    }
}

/// Store of the weights for workers.
struct Store {
    writer: Arc<dyn WeightStore>,
    /// Folder of this machine to which weights are written.
    folder: PathBuf,
    /// The store as workers may see it.
    place: String,
}

impl Store {
    /// Opens the store that `cluster.store` names. The weights are written to a folder in any case: an object store gets
    /// copies of those in the directory `run`.
    fn open(config: &Config, run: &Path, dtype: DType) -> Result<Self> {
        const SETTING: &str = "cluster.store";
        let place = config.cluster.store.as_deref().map(WeightsPlace::parse).transpose().map_err(|why| anyhow!(why))?;
        let folder = match &place {
            Some(WeightsPlace::Folder(folder)) => folder.clone(),
            _ => run.join("cluster"),
        };
        let local = FolderStore::new(&folder, None, None, dtype).context(SETTING)?;
        let folder = local.folder().to_owned();
        Ok(match place {
            Some(WeightsPlace::Bucket(url)) => {
                let writer = Arc::new(BucketStore::new(local, Bucket::open(&url, SETTING)?));
                Self { writer, folder, place: url }
            }
            _ => {
                let place = local.seen_as().display().to_string();
                Self { writer: Arc::new(local), folder, place }
            }
        })
    }
}

/// Tries `work` again while the broker is not available, for as long as a broker is waited for.
fn retried<T>(work: impl Fn() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    loop {
        let error = match work() {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let is_away = matches!(error.downcast_ref(), Some(TransportError::Unavailable(_) | TransportError::Unknown(_)));
        if !is_away || began.elapsed() > PATIENCE {
            return Err(error);
        }
        status!("workers   {error:#}; it is tried again");
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn notice(config: &Config, node: &Node) -> SamplingNotice {
    let (own, rollout) = (sampling(config, &node.prepared.tokenizer), &config.rollout);
    SamplingNotice {
        temperature: own.temperature,
        top_k: own.top_k,
        top_p: own.top_p,
        min_p: own.min_p,
        repetition_penalty: own.repetition_penalty,
        max_new_tokens: own.max_new_tokens,
        vocabulary: own.vocabulary,
        eos: own.eos,
        stop: rollout.stop.clone(),
        in_flight: rollout.update == crate::config::UpdateMode::InFlight,
        weights: rollout.weights.word().to_owned(),
        kernels_for: Some(rollout.slots),
        corrects: Some(config.tolerates_off_policy()),
        longest_prompt: node.prepared.data.longest(),
    }
}

/// Returns the number of a lineage, which differs from those of earlier starts of the run.
fn new_lineage() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

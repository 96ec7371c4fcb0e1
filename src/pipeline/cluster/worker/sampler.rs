//! The sampler of a worker: its own engine, or inference servers on its machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::DType;
use preceptor_actors::{Admission, SnapshotCell, StageResult};

use super::super::fetch::own_folder;
use super::super::protocol::{RunNotice, Work};
use super::{Unsuitable, WorkerPlan};
use crate::config::EngineKind;
use crate::lm::model::{Decoder, Lora, ModelConfig};
use crate::lm::source::ResolveOptions;
use crate::lm::tokens::Tokenizer;
use crate::pipeline::generate::local::LocalEngine;
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::stage::{RolloutEngine, SampledGroup};
use crate::pipeline::served::{
    Content, Fleet, FleetPlan, FolderStore, SUMS, ServedEngine, Stored, Tag, WeightStore, is_away, listed,
};
use crate::status;
use crate::types::Prompt;
use crate::util::mutex::lock;
use crate::util::seed;

/// Time limits of a request for completions: this, and [`TOKEN_TIMEOUT`] for each token. They are the defaults of
/// `rollout.timeout_s` and `rollout.token_timeout_s`.
const TIMEOUT: Duration = Duration::from_secs(300);
const TOKEN_TIMEOUT: Duration = Duration::from_millis(250);
/// Time without any usable server after which the worker ends, the default of `rollout.outage_s`.
const OUTAGE: Duration = Duration::from_secs(600);
/// Time between two attempts to reach a server at the start.
const RETRY: Duration = Duration::from_secs(1);
/// Text whose log-probabilities under the run's weights are compared with those of a server.
const EXAMPLE: &str = "The library was built on the site of an old mill. Its reading room looks out on the river, and \
    the walls are lined with maps that show how the course of the water changed over three hundred years.";

/// Inference servers on a worker's machine that sample in its place.
#[derive(Debug, Clone)]
pub struct ServersPlan {
    /// Kind of all servers: vLLM or SGLang.
    pub kind: EngineKind,
    /// URLs of the servers.
    pub servers: Vec<String>,
    /// Environment variable with the servers' API key.
    pub api_key_env: Option<String>,
    /// Folder for the weights that servers are handed, which they must be able to read; `None` for `served` in the cache of
    /// the program.
    pub folder: Option<PathBuf>,
    /// Refuses servers of versions that were not tested.
    pub check_version: bool,
}

/// Sampler of a worker's completions.
pub(super) enum Sampler {
    /// Engine of this process.
    Own(Box<LocalEngine>),
    /// Inference servers.
    Served(ServedEngine, Arc<Fleet>),
}

impl Sampler {
    /// Begins a piece of work, for which there are weights that are new enough.
    ///
    /// # Errors
    /// If the prompt does not fit the model's context.
    pub(super) fn submit(&mut self, work: &Work) -> Result<()> {
        match self {
            Self::Own(engine) => engine.submit(&Prompt::new(work.seq, "", work.ids.clone()), work.seeds.clone()),
            Self::Served(engine, _) => {
                engine.submit_from(work.seq, work.ids.clone().into(), work.seeds.len(), work.min_version);
                Ok(())
            }
        }
    }

    fn engine(&self) -> &dyn RolloutEngine {
        match self {
            Self::Own(engine) => &**engine,
            Self::Served(engine, _) => engine,
        }
    }

    /// Samples for a short time; returns the pieces of work whose completions have all ended.
    ///
    /// # Errors
    /// If the weights or the servers cannot be used.
    pub(super) fn advance(&mut self) -> StageResult<Vec<SampledGroup>> {
        match self {
            Self::Own(engine) => engine.advance(),
            Self::Served(engine, _) => engine.advance(),
        }
    }

    pub(super) fn accepts(&self) -> bool {
        self.engine().accepts()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.engine().is_idle()
    }

    pub(super) fn used(&self) -> usize {
        self.engine().used()
    }

    pub(super) fn free(&self) -> usize {
        self.engine().free()
    }
}

/// The inference servers of a worker, from their connection until the worker stops.
pub(super) struct Servers {
    fleet: Arc<Fleet>,
    store: Arc<Handed>,
    slots: usize,
    /// Time for which a server that is away is waited for.
    patience: Duration,
    /// Published weights, once there are some.
    cell: Option<Arc<SnapshotCell<Decoder>>>,
    /// Thread that hands over the first version, and the time at which it was first begun.
    begun: Option<JoinHandle<Result<()>>>,
    since: Instant,
    _lock: std::fs::File,
}

impl Servers {
    /// Connects to the servers, and compares their model with that of the run. Servers that cannot be reached are waited for,
    /// for as long as the worker's patience, until `stop` is set.
    ///
    /// # Errors
    /// If the run's sampling or its learner does not allow for servers, or a server does not suit the run; the error names
    /// the remedy.
    pub(super) fn connect(
        plan: &ServersPlan,
        worker: &WorkerPlan,
        notice: &RunNotice,
        config: &ModelConfig,
        of_run: (&Sampling, &Tokenizer),
        stop: &AtomicBool,
    ) -> Result<Self> {
        let (began, mut told) = (Instant::now(), false);
        loop {
            worker.health.progressed();
            let error = match Self::try_connect(plan, worker, notice, config, of_run) {
                Ok(servers) => return Ok(servers),
                Err(error) => error,
            };
            if !is_away(&error) {
                return Err(Unsuitable(error).into());
            }
            if began.elapsed() >= worker.patience || stop.load(Ordering::SeqCst) {
                return Err(error);
            }
            if !told {
                status!("waiting   {error:#}; it is tried again for {} s", worker.patience.as_secs());
                told = true;
            }
            std::thread::sleep(RETRY);
        }
    }

    fn try_connect(
        plan: &ServersPlan,
        worker: &WorkerPlan,
        notice: &RunNotice,
        config: &ModelConfig,
        (sampling, tokenizer): (&Sampling, &Tokenizer),
    ) -> Result<Self> {
        let run = &worker.run;
        let word = if plan.kind == EngineKind::Sglang { "sglang" } else { "vllm" };
        let restricted = [
            ("rollout.top_k", sampling.top_k.is_some()),
            ("rollout.top_p", sampling.top_p.is_some()),
            ("rollout.min_p", sampling.min_p.is_some()),
            ("rollout.repetition_penalty", sampling.repetition_penalty != 1.0),
        ];
        if let Some((key, _)) = restricted.iter().find(|(_, set)| *set) {
            bail!(
                "the run has {key}, which is not available with --engine {word}: the servers' log-probabilities would be those of the restricted distribution; remove it from the run's configuration, or start this worker without --engine"
            );
        }
        let corrects = notice.sampling.corrects.with_context(|| {
            format!("the node of the run {run} is of an earlier version, which does not say whether its learner corrects for the log-probabilities of servers; use programs of one version")
        })?;
        ensure!(
            corrects,
            "the learner of the run {run} does not correct for the log-probabilities of --engine {word}, which differ slightly from its own; set learner.correction = \"tis\" in its configuration, or start this worker without --engine"
        );
        let folder = plan.folder.clone().unwrap_or_else(|| ResolveOptions::default().cache_dir.join("served"));
        let (folder, lock) = own_folder(&folder.join(run), "--weights-dir")?;
        let store = FolderStore::new(&folder, None, None, DType::F32)?;
        let lora = notice.lora.as_ref();
        let example = tokenizer.encode(EXAMPLE)?;
        ensure!(
            example.len() >= 2,
            "the run's tokenizer has no tokens for an English text, by which servers are checked"
        );
        let plan = FleetPlan {
            kind: plan.kind,
            servers: plan.servers.clone(),
            api_key_env: plan.api_key_env.clone(),
            sampling: sampling.clone(),
            rows: config.vocab_size,
            timeout: TIMEOUT,
            token_timeout: TOKEN_TIMEOUT,
            outage: OUTAGE,
            outage_key: "",
            in_flight: notice.sampling.in_flight,
            lora: lora.map(|of| Lora { rank: of.rank, alpha: of.alpha, targets: of.targets.clone() }),
            run: seed::text(run) as u32,
            // Each piece of work has the oldest version that it may start with.
            admission: Admission { eta: 0, batch: 1 },
            check_version: plan.check_version,
            longest_prompt: notice.sampling.longest_prompt,
            example,
        };
        let fleet = Fleet::connect(plan, &|text| tokenizer.encode(text))?;
        let store = Arc::new(Handed { store, fetched: Mutex::default() });
        let (slots, patience) = (worker.slots, worker.patience);
        Ok(Self { fleet, store, slots, patience, cell: None, begun: None, since: Instant::now(), _lock: lock })
    }

    /// Notes that the weights of `version` are in the folder `dir`, as adapters or as all weights.
    pub(super) fn fetched(&self, version: u64, dir: &Path, adapters: bool) {
        lock(&self.store.fetched).insert(version, (dir.to_owned(), adapters));
    }

    /// Begins to hand the weights in `cell` over.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn begin(&mut self, cell: &Arc<SnapshotCell<Decoder>>) -> Result<()> {
        (self.cell, self.since) = (Some(Arc::clone(cell)), Instant::now());
        self.hand_over_first(Duration::ZERO)
    }

    fn hand_over_first(&mut self, pause: Duration) -> Result<()> {
        let Some(cell) = self.cell.clone() else { return Ok(()) };
        let (fleet, store) = (Arc::clone(&self.fleet), Arc::clone(&self.store));
        let begin = move || {
            std::thread::sleep(pause);
            fleet.start(&cell, store)
        };
        self.begun = Some(std::thread::Builder::new().name("first-hand-over".into()).spawn(begin)?);
        Ok(())
    }

    /// Returns the engine, once, when all servers have the first version. A server that is away is tried again for as long as
    /// the worker's patience.
    ///
    /// # Errors
    /// If a server does not take the version, computes other log-probabilities with it, or is away for too long.
    pub(super) fn engine(&mut self) -> Result<Option<Sampler>> {
        let Some(begun) = self.begun.take_if(|begun| begun.is_finished()) else { return Ok(None) };
        let ended =
            begun.join().map_err(|_| anyhow!("internal error: the thread that hands weights to servers panicked"))?;
        match ended {
            Ok(()) => {
                let engine = ServedEngine::new(Arc::clone(&self.fleet), self.slots, false);
                Ok(Some(Sampler::Served(engine, Arc::clone(&self.fleet))))
            }
            Err(error) if is_away(&error) && self.since.elapsed() < self.patience => {
                status!("waiting   {error:#}; it is tried again");
                self.hand_over_first(RETRY)?;
                Ok(None)
            }
            // A disk may have space later.
            Err(error) if is_away(&error) || error.chain().any(|cause| cause.is::<std::io::Error>()) => Err(error),
            Err(error) => Err(Unsuitable(error).into()),
        }
    }

    /// Checks that a server was usable within the last ten minutes.
    ///
    /// # Errors
    /// If none was.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            !self.fleet.is_out(),
            "no rollout server could be used for {} s: {}",
            OUTAGE.as_secs(),
            self.fleet.reasons()
        );
        Ok(())
    }

    /// Returns the newest version that a server has.
    pub(super) fn version(&self) -> Option<u64> {
        self.fleet.version()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.fleet.stop();
        // Two hand-overs to one server at the same time could leave it with other weights than it names.
        if let Some(begun) = self.begun.take()
            && begun.join().is_err()
        {
            tracing::error!("internal error: the thread that hands weights to servers panicked");
        }
    }
}

/// Store of the weights that servers are handed: the files that the worker has fetched, in a folder from which nobody removes
/// a version while a server reads it.
struct Handed {
    store: FolderStore,
    /// Folders of the versions that the worker has fetched, and whether they have adapters.
    fetched: Mutex<BTreeMap<u64, (PathBuf, bool)>>,
}

impl WeightStore for Handed {
    fn put(&self, tag: Tag, weights: &Decoder) -> Result<Stored> {
        let adapters = weights.lora().is_some();
        let from = lock(&self.fetched).get(&tag.version).cloned();
        // If adapters are trained, servers get adapters also where the run has announced all weights.
        let Some((from, _)) = from.filter(|(_, of_adapters)| *of_adapters == adapters) else {
            return self.store.put(tag, weights);
        };
        let name = tag.to_string();
        // The run, or this worker, removes versions that newer ones have replaced.
        let Ok(sha256) = self.store.put_folder(&name, &|dir| link(&from, dir)) else {
            return self.store.put(tag, weights);
        };
        let location = self.store.seen_as().join(&name).display().to_string();
        let content = if adapters { Content::Adapters } else { Content::Full };
        Ok(Stored { tag, location, content, sha256 })
    }

    fn put_folder(&self, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<String> {
        self.store.put_folder(name, fill)
    }

    fn retain(&self, run: u32, is_used: &dyn Fn(u64) -> bool) {
        lock(&self.fetched).retain(|version, _| is_used(*version));
        self.store.retain(run, is_used);
    }
}

/// Links the files in the list of checksums of the folder `from` into `to`, or copies them where the file system cannot link.
///
/// # Errors
/// If a file is missing: the folder may be removed at any moment.
fn link(from: &Path, to: &Path) -> Result<()> {
    let list = from.join(SUMS);
    let sums = std::fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    for (_, name) in listed(&sums)? {
        let (file, target) = (from.join(name), to.join(name));
        if std::fs::hard_link(&file, &target).is_err() {
            std::fs::copy(&file, &target).with_context(|| format!("cannot copy {}", file.display()))?;
        }
    }
    Ok(())
}

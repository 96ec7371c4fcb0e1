//! The work of a worker for one lineage of a run: pulling, sampling, handing over.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use kernels::Format;
use preceptor_actors::SnapshotCell;
use preceptor_actors::transport::{Transport, TransportError};

use super::super::coordinator::QueueNames;
use super::super::fetch::WorkerStore;
use super::super::notices::Notices;
use super::super::protocol::{
    Answer, Done, Pulse, RunNotice, WEIGHTS, WeightsNotice, Work, decode, encode, rest, result_id,
};
use super::leases::Leases;
use super::sampler::{Sampler, Servers};
use super::{Ended, LOOK, PULL, PULSE, Summary, Unsuitable, WorkerPlan, host, is_over};
use crate::config::{Choice, RolloutWeights};
use crate::lm::model::{Decoder, Lora, ModelConfig, Weights};
use crate::lm::source::ModelFiles;
use crate::lm::tokens::Tokenizer;
use crate::observe::telemetry::worker as telemetry;
use crate::pipeline::generate::local::{LocalEngine, LocalPlan};
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::stop::Stop;
use crate::status;

/// Number of decode steps from which on their time is a measure of the pace.
const PACED_STEPS: u64 = 20;

/// The work for one lineage of a run.
pub(super) struct Lineage<'a> {
    plan: &'a WorkerPlan,
    notice: RunNotice,
    names: QueueNames,
    device: Device,
    config: ModelConfig,
    /// Weights of the base model, for adapters.
    base: Option<Weights>,
    store: &'a WorkerStore,
    cell: Option<Arc<SnapshotCell<Decoder>>>,
    engine: Option<Sampler>,
    /// Inference servers, if they sample. They are stopped after the engine.
    servers: Option<Servers>,
    sampling: Sampling,
    /// Reduced-precision format of the weights for sampling.
    format: Option<Format>,
    /// Fingerprints of the versions that were used.
    versions: HashMap<u64, u64>,
    /// Work that needs newer weights than there are.
    held: Vec<Work>,
    /// Work under way.
    open: HashMap<u64, Work>,
    leases: Arc<Leases>,
    pub(super) summary: Summary,
    completions: u64,
    pub(super) bytes: u64,
    /// Decode steps since the last sign of life, and the time that they took.
    steps: (u64, Duration),
    /// Tokens per second of one completion.
    pace: Option<f64>,
    /// Reason why the worker is to take no work; empty if it may.
    rests: String,
    /// Version that the worker's health shows.
    shown: Option<u64>,
    /// Time of the last pull that found no work.
    found_none: Option<Instant>,
}

impl<'a> Lineage<'a> {
    /// `dir` is the folder of the run's base model.
    pub(super) fn open(
        plan: &'a WorkerPlan,
        device: &Device,
        notice: &RunNotice,
        store: &'a WorkerStore,
        dir: &Path,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let config = ModelConfig::from_directory(dir)?;
        let tokenizer = Tokenizer::from_files(&ModelFiles::Directory(dir.to_owned()))?;
        let base = notice.lora.is_some().then(|| read(dir, &config, device)).transpose()?;
        let given = &notice.sampling;
        let sampling = Sampling {
            repetition_penalty: given.repetition_penalty,
            temperature: given.temperature,
            top_k: given.top_k,
            top_p: given.top_p,
            min_p: given.min_p,
            max_new_tokens: given.max_new_tokens,
            vocabulary: given.vocabulary,
            eos: given.eos.clone(),
            stop: Stop::new(&given.stop, &tokenizer).map(Arc::new),
        };
        let word = RolloutWeights::WORDS.iter().find(|(word, _)| *word == given.weights);
        let format = match word
            .with_context(|| format!("this program does not know weights of the format {}", given.weights))?
            .1
        {
            RolloutWeights::F32 => None,
            RolloutWeights::Bf16 => Some(Format::Bf16),
            RolloutWeights::Q8 => Some(Format::Q8),
        };
        if plan.slots < notice.group_size {
            let why = anyhow::anyhow!(
                "--slots {} is less than the {} completions of a piece of work (rollout.group_size of the run, or cluster.part)",
                plan.slots,
                notice.group_size
            );
            return Err(Unsuitable(why).into());
        }
        let about = (&sampling, &tokenizer);
        let servers = match &plan.servers {
            Some(servers) => Some(Servers::connect(servers, plan, notice, &config, about, stop)?),
            None => None,
        };
        Ok(Self {
            plan,
            names: QueueNames::of(&plan.run, notice.lineage),
            notice: notice.clone(),
            device: device.clone(),
            config,
            base,
            store,
            cell: None,
            engine: None,
            servers,
            sampling,
            format,
            versions: HashMap::new(),
            held: Vec::new(),
            open: HashMap::new(),
            leases: Arc::default(),
            summary: Summary::default(),
            completions: 0,
            bytes: 0,
            steps: (0, Duration::ZERO),
            pace: None,
            rests: String::new(),
            shown: None,
            found_none: None,
        })
    }

    pub(super) fn work(
        &mut self,
        transport: &dyn Transport,
        notices: &dyn Notices,
        stop: &AtomicBool,
    ) -> Result<Ended> {
        let (leases, lease) = (Arc::clone(&self.leases), Duration::from_millis(self.notice.lease_ms));
        let keeper = std::thread::Builder::new().name("leases".into()).spawn(move || leases.keep(lease))?;
        let ended = self.work_until_end(transport, notices, stop);
        self.leases.end();
        if keeper.join().is_err() {
            tracing::error!("internal error: the thread that extends leases panicked");
        }
        self.leases.numbers().into_iter().for_each(|seq| self.give_back(seq));
        if matches!(ended, Ok(Ended::Stopped)) {
            self.pulse(notices, true)?;
        }
        ended
    }

    fn work_until_end(&mut self, transport: &dyn Transport, notices: &dyn Notices, stop: &AtomicBool) -> Result<Ended> {
        let (mut pulsed, mut looked) = (None::<Instant>, None::<Instant>);
        let mut drain = None::<Instant>;
        let mut results = Vec::new();
        loop {
            let used = self.engine.as_ref().map_or(0, Sampler::used);
            self.plan.health.working([self.open.len(), self.held.len()], [used, self.plan.slots]);
            if drain.is_none() && stop.load(Ordering::SeqCst) {
                status!("worker    finishes {} groups within {} s", self.open.len(), self.plan.drain.as_secs());
                drain = Some(Instant::now());
                self.held.clear();
            }
            if drain
                .is_some_and(|began| self.open.is_empty() && results.is_empty() || began.elapsed() > self.plan.drain)
            {
                return Ok(Ended::Stopped);
            }
            if pulsed.is_none_or(|at| at.elapsed() > PULSE) {
                pulsed = Some(Instant::now());
                self.measure();
                self.pulse(notices, false)?;
                if let Some(ended) = is_over(self.plan, &self.notice, notices)? {
                    return Ok(ended);
                }
                self.rests = match notices.get(&self.plan.run, &rest(&self.plan.name)) {
                    Ok(why) => String::from_utf8_lossy(&why.unwrap_or_default()).into_owned(),
                    Err(_) => String::new(),
                };
            }
            let behind = !self.held.is_empty() || self.engine.is_none();
            if looked.is_none_or(|at| at.elapsed() > if behind { LOOK / 4 } else { LOOK }) {
                looked = Some(Instant::now());
                self.follow(notices)?;
                self.begin_engine()?;
                self.begin_held()?;
            }
            if drain.is_none() && self.cell.is_some() && !self.pull(transport)? {
                // The queue may be gone, because the run has another coordinator.
                pulsed = None;
            }
            results.extend(self.advance()?);
            results = self.hand_over(transport, results)?;
            if self.open.is_empty() && (self.engine.is_none() || !self.held.is_empty()) {
                std::thread::sleep(LOOK / 4);
            }
        }
    }

    /// Loads the announced weights if they are newer than those in use.
    fn follow(&mut self, notices: &dyn Notices) -> Result<()> {
        let found = match notices.get(&self.plan.run, WEIGHTS) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            Err(error) => {
                tracing::warn!("{error}");
                return Ok(());
            }
        };
        let notice: WeightsNotice =
            serde_json::from_slice(&found).context("the notice of the weights cannot be read")?;
        if notice.lineage == self.notice.lineage {
            self.plan.health.announced(notice.version);
        }
        let newest = self.cell.as_ref().map(|cell| cell.latest().version);
        if notice.lineage != self.notice.lineage || newest.is_some_and(|newest| notice.version <= newest) {
            return Ok(());
        }
        let Some((notice, dir)) = self.store.follow(notice)? else { return Ok(()) };
        let model = match self.load(&notice, &dir) {
            Ok(model) => model,
            // A newer version may have replaced it meanwhile.
            Err(error) if !dir.exists() => {
                tracing::warn!("version {} is no longer there: {error:#}", notice.version);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.versions.insert(notice.version, notice.fingerprint);
        match &self.servers {
            Some(servers) => servers.fetched(notice.version, &dir, notice.adapters),
            None => self.plan.health.uses(Some(notice.version)),
        }
        if let Some(cell) = &self.cell {
            cell.publish(notice.version, notice.fingerprint, Arc::new(model));
            return Ok(());
        }
        let cell = Arc::new(SnapshotCell::new(notice.version, notice.fingerprint, Arc::new(model)));
        match &mut self.servers {
            Some(servers) => servers.begin(&cell)?,
            None => {
                let plan = LocalPlan {
                    slots: self.plan.slots,
                    kernels_for: self.notice.sampling.kernels_for.unwrap_or(self.plan.slots),
                    in_flight: self.notice.sampling.in_flight,
                    format: self.format,
                    device: self.device.clone(),
                };
                let engine = LocalEngine::new(cell.reader(&self.plan.name), &self.sampling, plan);
                self.engine = Some(Sampler::Own(Box::new(engine)));
            }
        }
        self.cell = Some(cell);
        Ok(())
    }

    /// Takes up servers that have the first version, and notes the version in use. Gives the work back that waits for servers of
    /// which none is usable.
    ///
    /// # Errors
    /// If the servers refuse the first version, or none was usable for too long.
    fn begin_engine(&mut self) -> Result<()> {
        let Some(servers) = &mut self.servers else {
            return Ok(());
        };
        if let Some(engine) = servers.engine()? {
            self.engine = Some(engine);
        }
        servers.check()?;
        let newest = servers.version();
        if newest.is_none() {
            for work in std::mem::take(&mut self.held) {
                self.give_back(work.seq);
            }
        }
        if self.shown != newest {
            self.shown = newest;
            self.plan.health.uses(newest);
        }
        Ok(())
    }

    /// Gives work back that was not begun, so that another worker gets it at once.
    fn give_back(&mut self, seq: u64) {
        let Some(lease) = self.leases.remove(seq) else { return };
        self.summary.given_back += 1;
        telemetry::given_back();
        if let Err(error) = lease.give_back() {
            tracing::debug!("work cannot be given back: {error}");
        }
    }

    fn load(&self, notice: &WeightsNotice, dir: &Path) -> Result<Decoder> {
        let model = match (&self.base, &self.notice.lora) {
            (Some(base), Some(lora)) if notice.adapters => {
                let lora = Lora { rank: lora.rank, alpha: lora.alpha, targets: lora.targets.clone() };
                let mut weights = base.clone();
                weights.0.extend(Lora::read(dir, &self.device)?.0);
                Decoder::with_adapters(&self.config, &weights, Some(&lora))?
            }
            _ => Decoder::new(&self.config, &read(dir, &self.config, &self.device)?)?,
        };
        let fingerprint = model.weights().fingerprint()?;
        ensure!(
            fingerprint == notice.fingerprint,
            "the weights in {} have the fingerprint {fingerprint:016x}, and the coordinator announced {:016x}; use programs of one version",
            dir.display(),
            notice.fingerprint
        );
        Ok(model)
    }

    /// Returns the newest version that completions can be sampled with.
    fn newest(&self) -> Option<u64> {
        match &self.servers {
            Some(servers) => servers.version(),
            None => self.cell.as_ref().map(|cell| cell.latest().version),
        }
    }

    /// Measures the pace of the last seconds, if enough steps were made.
    fn measure(&mut self) {
        if let Some(Sampler::Served(_, fleet)) = &self.engine {
            self.pace = fleet.pace();
            return;
        }
        let (steps, took) = self.steps;
        if steps >= PACED_STEPS {
            self.pace = Some(steps as f64 / took.as_secs_f64().max(1e-9));
            self.steps = (0, Duration::ZERO);
        }
    }

    /// Pulls as much work as there is room for. Returns false if the queue does not answer.
    fn pull(&mut self, transport: &dyn Transport) -> Result<bool> {
        let Some(engine) = &self.engine else { return Ok(true) };
        if !self.rests.is_empty() {
            if engine.is_idle() {
                std::thread::sleep(PULL);
            }
            return Ok(true);
        }
        let held: usize = self.held.iter().map(|work| work.seeds.len()).sum();
        let is_served = matches!(engine, Sampler::Served(..));
        if is_served && self.newest().is_none() {
            if engine.is_idle() {
                std::thread::sleep(LOOK);
            }
            return Ok(true);
        }
        // An engine in this process takes the time of a decode step between two pulls.
        if is_served && !engine.is_idle() && self.found_none.is_some_and(|at| at.elapsed() < LOOK / 4) {
            return Ok(true);
        }
        let room = engine.free().saturating_sub(held) / self.notice.group_size.max(1);
        if room == 0 || !engine.accepts() {
            return Ok(true);
        }
        let wait = if engine.is_idle() && self.held.is_empty() { PULL } else { Duration::ZERO };
        let leases = match transport.pull(&self.names.work, room, wait) {
            Ok(leases) => leases,
            Err(TransportError::Unavailable(why)) => {
                tracing::warn!("{why}");
                if wait > Duration::ZERO {
                    std::thread::sleep(wait);
                }
                return Ok(false);
            }
            // The coordinator removes the queue when the run ends.
            Err(TransportError::Unknown(_)) => {
                std::thread::sleep(LOOK);
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        self.found_none = leases.is_empty().then(Instant::now);
        for lease in leases {
            let work = match decode::<Work>(lease.body()) {
                Ok(work) if work.lineage == self.notice.lineage => work,
                Ok(work) => bail!("internal error: group {} is of another lineage", work.seq),
                Err(error) => bail!("work of the run cannot be read: {error:#}"),
            };
            // A second delivery of work that this worker has: the lease had expired.
            let known = self.open.contains_key(&work.seq) || self.held.iter().any(|held| held.seq == work.seq);
            self.leases.hold(work.seq, lease);
            if !known {
                self.held.push(work);
            }
        }
        self.begin_held()?;
        Ok(true)
    }

    /// Begins the work for which the weights are new enough.
    fn begin_held(&mut self) -> Result<()> {
        let (Some(newest), Some(engine)) = (self.newest(), &mut self.engine) else { return Ok(()) };
        for work in std::mem::take(&mut self.held) {
            if work.min_version > newest || !engine.accepts() {
                self.held.push(work);
                continue;
            }
            engine.submit(&work)?;
            self.open.insert(work.seq, work);
        }
        Ok(())
    }

    /// Runs the engine for a step; returns the completed groups' results.
    fn advance(&mut self) -> Result<Vec<Done>> {
        let Some(engine) = self.engine.as_mut().filter(|engine| !engine.is_idle()) else {
            self.leases.rests();
            return Ok(Vec::new());
        };
        let began = Instant::now();
        let ended = engine.advance().map_err(|error| anyhow::anyhow!("{error}"))?;
        self.steps = (self.steps.0 + 1, self.steps.1 + began.elapsed());
        self.leases.progressed();
        let mut done = Vec::new();
        for (seq, sampled) in ended {
            self.open.remove(&seq);
            let mut completions = Vec::with_capacity(sampled.len());
            for one in sampled {
                let finish = one.finish.context("internal error: a completion ended without a reason")?;
                completions.push(Answer { ids: one.ids, logprobs: one.logprobs, versions: one.versions, finish });
            }
            let used = |version: &u64| completions.iter().any(|answer: &Answer| answer.versions.contains(version));
            let mut fingerprints: Vec<_> =
                self.versions.iter().filter(|(version, _)| used(version)).map(|(v, f)| (*v, *f)).collect();
            fingerprints.sort_unstable();
            done.push(Done {
                lineage: self.notice.lineage,
                seq,
                worker: self.plan.name.clone(),
                fingerprints,
                completions,
            });
        }
        Ok(done)
    }

    /// Hands results over, and acknowledges their work; returns those that must be handed over later.
    fn hand_over(&mut self, transport: &dyn Transport, results: Vec<Done>) -> Result<Vec<Done>> {
        let mut later = Vec::new();
        for done in results {
            let body = encode(&done)?;
            // Of the work and not of the group, which may be offered again after its first result was dropped.
            let of = self.leases.delivery(done.seq);
            let (of, deliveries) = of.unwrap_or_else(|| (done.seq.to_string(), 1));
            let id = result_id(&of, &self.plan.name, deliveries);
            match transport.offer(&self.names.results, &id, &body) {
                Ok(_) => {
                    self.summary.groups += 1;
                    let completions = done.completions.len() as u64;
                    let tokens = done.completions.iter().map(|answer| answer.ids.len() as u64).sum();
                    self.completions += completions;
                    self.summary.tokens += tokens;
                    self.bytes += body.len() as u64;
                    telemetry::handed_over(completions, tokens, body.len() as u64);
                    if let Some(lease) = self.leases.remove(done.seq)
                        && let Err(error) = lease.acknowledge()
                    {
                        // It is delivered again, and its second result is dropped.
                        tracing::debug!("the work on group {} cannot be acknowledged: {error}", done.seq);
                    }
                }
                Err(TransportError::Unavailable(why) | TransportError::Unknown(why)) => {
                    tracing::warn!("the result of group {} is handed over later: {why}", done.seq);
                    later.push(done);
                }
                Err(TransportError::Full { .. }) => later.push(done),
                Err(error) => bail!("the result of group {} cannot be handed over: {error}", done.seq),
            }
        }
        if !later.is_empty() {
            std::thread::sleep(LOOK);
        }
        Ok(later)
    }

    /// Returns the reason of a wait for `weights`, with the failure that prevents it from getting them, if there is one.
    fn waits_for(&self, weights: &str) -> String {
        match self.store.trouble() {
            None => format!("waits for {weights}"),
            Some(why) => format!("waits for {weights}, and {why}"),
        }
    }

    /// Gives a sign of life; the last one if the worker `leaves`.
    fn pulse(&self, notices: &dyn Notices, leaves: bool) -> Result<()> {
        let of_servers = match &self.engine {
            Some(Sampler::Served(_, fleet)) => fleet.reasons_of_wait(),
            _ => String::new(),
        };
        let waits = match (self.newest(), self.held.iter().map(|work| work.min_version).min()) {
            _ if !of_servers.is_empty() => of_servers,
            (None, _) if self.cell.is_some() => "hands the first weights to its servers".into(),
            (None, _) => self.waits_for("weights"),
            (Some(newest), Some(needed)) if self.open.is_empty() && needed > newest => {
                self.waits_for(&format!("version {needed}"))
            }
            _ if self.open.is_empty() => self.rests.clone(),
            _ => String::new(),
        };
        let pulse = Pulse {
            pace: self.pace,
            role: "rollout".into(),
            program: env!("CARGO_PKG_VERSION").into(),
            host: host(),
            version: self.newest(),
            used: self.engine.as_ref().map_or(0, Sampler::used),
            slots: self.plan.slots,
            completions: self.completions,
            tokens: self.summary.tokens,
            bytes: self.bytes,
            waits,
            leaves,
        };
        if let Err(error) = notices.tell(&self.plan.run, &self.plan.name, &serde_json::to_vec(&pulse)?) {
            tracing::warn!("{error}");
        }
        Ok(())
    }
}

/// Reads all weights in `dir` that the model has.
fn read(dir: &Path, config: &ModelConfig, device: &Device) -> Result<Weights> {
    let mut weights = Weights::read_directory(dir, device)?;
    if config.tied {
        weights.0.remove("lm_head.weight");
    }
    Ok(weights)
}

//! The coordinator of a run whose completions are sampled by workers on other machines.
//!
//! The coordinator alone holds the gate, the ledger, the order of rewards and the learner. It offers work, takes results,
//! and announces weights. Work carries the oldest version that it may begin with, ⌊n/B⌋ − η for group n, which is a function
//! of the number alone: a repeated delivery, a repeated offer and a restore change nothing.

mod plan;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use crossbeam::channel::{Receiver, Sender, bounded};
use preceptor_actors::SnapshotCell;
use preceptor_actors::transport::{Lease, Transport, TransportError};

use super::log::GroupLog;
use super::notices::Notices;
use super::protocol::{
    Done, OLDEST_PROTOCOL, PROTOCOL, RUN, RunNotice, RunState, WEIGHTS, WeightsNotice, Work, decode, encode, is_redone,
    rest, shut_out,
};
use super::roster::{LABEL, REFUSALS, Roster};
use crate::lm::model::Decoder;
use crate::observe::telemetry;
use crate::pipeline::generate::Sampled;
use crate::pipeline::served::{Content, Tag, WeightStore};
use crate::status;
use crate::util::mutex::lock;
use plan::limits;
pub use plan::{CoordinatorPlan, QueueNames, put_base};

/// Time between two looks for new weights, and for results that can be taken no further.
const LOOK: Duration = Duration::from_millis(10);
/// Longest wait for a result before the coordinator looks for its end.
const PULL: Duration = Duration::from_millis(500);
/// Number of results that are taken at once.
const MOST: usize = 16;

/// Numbers of results since the coordinator started.
#[derive(Debug, Default)]
pub struct Counts {
    /// Results that were taken.
    pub taken: AtomicU64,
    /// Results of a group that was taken before.
    pub repeated: AtomicU64,
    /// Results that were refused as impossible, or of weights that this lineage does not have.
    pub refused: AtomicU64,
    /// Work that was offered again because the broker no longer had it.
    pub offered_again: AtomicU64,
}

/// A result whose lease lasts until it is recorded.
pub struct Arrived {
    /// Number of the group.
    pub seq: u64,
    /// The completions.
    pub sampled: Vec<Sampled>,
    /// The lease of the result.
    pub lease: Box<dyn Lease>,
}

/// Coordinator of a run.
pub struct Coordinator {
    pub(super) plan: CoordinatorPlan,
    pub(super) transport: Arc<dyn Transport>,
    notices: Arc<dyn Notices>,
    /// Log in which groups are durable before their results are acknowledged.
    log: Option<Arc<GroupLog>>,
    pub(super) names: QueueNames,
    /// Fingerprints of the versions of this lineage.
    versions: Mutex<BTreeMap<u64, u64>>,
    /// Number of groups submitted so far.
    submissions: AtomicU64,
    /// Work that was offered and has no result yet.
    open: Mutex<HashMap<u64, Open>>,
    /// The workers that gave signs of life.
    pub roster: Roster,
    /// Numbers of results.
    pub counts: Counts,
    arrivals: (Sender<Arrived>, Receiver<Arrived>),
    stopped: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Store of the weights while the threads run.
    store: Mutex<Option<Arc<dyn WeightStore>>>,
    /// Last failure of the transport, while it lasts.
    outage: Mutex<Option<String>>,
}

struct Open {
    work: Work,
    /// Number of this submission. A restarted graph submits a group again whose earlier result may be gone.
    submission: u64,
    /// Number of times that the work was offered; 0 until the first offer succeeds.
    offers: u64,
    /// True if a result was taken that is not recorded yet.
    taken: bool,
}

impl Coordinator {
    /// Creates the queues of a new lineage and removes those of the lineage before, whose work and results do not count any
    /// more. With `log`, results are acknowledged when their groups are durable in it.
    ///
    /// # Errors
    /// If the transport is not available.
    pub fn start(
        plan: CoordinatorPlan,
        transport: Arc<dyn Transport>,
        notices: Arc<dyn Notices>,
        log: Option<Arc<GroupLog>>,
    ) -> Result<Arc<Self>> {
        notices.open(&plan.run)?;
        if let Some(earlier) = notices.get(&plan.run, RUN)? {
            let earlier: RunNotice = serde_json::from_slice(&earlier)
                .with_context(|| format!("the notice of the run {} on the broker is damaged", plan.run))?;
            let names = QueueNames::of(&plan.run, earlier.lineage);
            for queue in names.all() {
                transport.remove(queue)?;
            }
        }
        let names = QueueNames::of(&plan.run, plan.lineage);
        let [work, results] = limits(&plan);
        transport.create(&names.work, work)?;
        transport.create(&names.results, results)?;
        Ok(Arc::new(Self {
            plan,
            transport,
            notices,
            log,
            names,
            versions: Mutex::default(),
            submissions: AtomicU64::new(0),
            open: Mutex::default(),
            roster: Roster::default(),
            counts: Counts::default(),
            arrivals: bounded(4 * MOST),
            stopped: AtomicBool::new(false),
            threads: Mutex::default(),
            store: Mutex::default(),
            outage: Mutex::default(),
        }))
    }

    /// Announces the run and begins to take results. If workers sample, it announces the weights in `cell` and each new
    /// version, which `store` keeps for them.
    ///
    /// # Errors
    /// If the weights cannot be stored, or the transport is not available.
    pub fn open(self: &Arc<Self>, cell: &Arc<SnapshotCell<Decoder>>, store: Arc<dyn WeightStore>) -> Result<()> {
        if self.plan.samples {
            self.announce(&cell.latest(), &*store)?;
        }
        *lock(&self.store) = Some(Arc::clone(&store));
        self.notice(RunState::Open)?;
        telemetry::broker(true);
        let coordinator = Arc::clone(self);
        self.spawn("collect", move || coordinator.collect())?;
        if !self.plan.samples {
            return Ok(());
        }
        let mut reader = cell.reader("workers");
        let coordinator = Arc::clone(self);
        let publish = move || {
            while !coordinator.stopped.load(Ordering::SeqCst) {
                let Some(snapshot) = reader.refresh() else {
                    std::thread::sleep(LOOK);
                    continue;
                };
                // A version that cannot be announced now is announced later, unless a newer one replaces it.
                while let Err(error) = coordinator.announce(&snapshot, &*store) {
                    if coordinator.stopped.load(Ordering::SeqCst) {
                        return;
                    }
                    coordinator.failed(&format!("cannot announce version {}: {error:#}", snapshot.version));
                    std::thread::sleep(PULL);
                    if coordinator.stopped.load(Ordering::SeqCst) {
                        return;
                    }
                }
                reader.acknowledge(&snapshot, snapshot.fingerprint);
            }
        };
        self.spawn("announce", publish)
    }

    /// Starts a thread that ends when the coordinator stops.
    pub(super) fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        lock(&self.threads).push(std::thread::Builder::new().name(name.into()).spawn(work)?);
        Ok(())
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    fn notice(&self, state: RunState) -> Result<()> {
        let plan = &self.plan;
        let notice = RunNotice {
            protocol: PROTOCOL,
            oldest_protocol: OLDEST_PROTOCOL,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            lineage: plan.lineage,
            state,
            base: plan.base.0.clone(),
            base_sha256: plan.base.1.clone(),
            store: plan.store.clone(),
            sampling: plan.sampling.clone(),
            lora: plan.lora.clone(),
            group_size: plan.group_size.min(plan.part),
            lease_ms: u64::try_from(plan.lease.as_millis()).unwrap_or(u64::MAX),
            samples: plan.samples,
            judges: plan.judges.clone(),
        };
        Ok(self.notices.set(&plan.run, RUN, &serde_json::to_vec(&notice)?)?)
    }

    fn announce(&self, snapshot: &preceptor_actors::Snapshot<Decoder>, store: &dyn WeightStore) -> Result<()> {
        let (version, fingerprint) = (snapshot.version, snapshot.fingerprint);
        let stored = store.put(Tag { run: self.plan.tag, version, fingerprint }, &snapshot.value)?;
        lock(&self.versions).insert(version, fingerprint);
        let notice = WeightsNotice {
            lineage: self.plan.lineage,
            version,
            fingerprint,
            name: stored.tag.to_string(),
            sha256: stored.sha256,
            adapters: stored.content == Content::Adapters,
        };
        self.notices.set(&self.plan.run, WEIGHTS, &serde_json::to_vec(&notice)?)?;
        // A worker may still be reading one of the two before.
        store.retain(self.plan.tag, &|kept| kept + 2 >= version);
        Ok(())
    }

    /// Ends the threads and tells workers that the run has ended, or that they are to wait for its next coordinator.
    pub fn stop(&self, state: RunState) {
        self.stopped.store(true, Ordering::SeqCst);
        if let Some(store) = lock(&self.store).take() {
            store.cancel();
        }
        let threads = std::mem::take(&mut *lock(&self.threads));
        if threads.is_empty() {
            // It was never open, or has stopped.
            return;
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("internal error: a thread of the coordinator panicked");
            }
        }
        if self.is_replaced() {
            return;
        }
        if let Err(error) = self.notice(state) {
            // The broker is away: each further request would wait for its time limit.
            return tracing::warn!("cannot tell the workers how the run ended: {error:#}");
        }
        for queue in self.names.all() {
            if let Err(error) = self.transport.remove(queue) {
                tracing::warn!("cannot remove the queue {queue}: {error}");
            }
        }
    }

    /// Returns the oldest version that group `seq` may begin with: ⌊seq/B⌋ − η.
    pub(super) fn min_version(&self, seq: u64) -> u64 {
        self.plan.admission.min_version(seq)
    }

    /// Offers the work on a group. If the transport is not available, it is offered later.
    pub(super) fn submit(&self, work: Work) {
        let seq = work.seq;
        let submission = self.submissions.fetch_add(1, Ordering::Relaxed);
        lock(&self.open).insert(seq, Open { work, submission, offers: 0, taken: false });
        self.offer_open();
    }

    /// Offers the work that could not be offered before.
    pub(super) fn offer_open(&self) {
        let mut open = lock(&self.open);
        let mut waiting: Vec<&mut Open> = open.values_mut().filter(|open| open.offers == 0).collect();
        waiting.sort_by_key(|open| open.work.seq);
        for open in waiting {
            if !self.offer(open) {
                break;
            }
        }
    }

    fn offer(&self, open: &mut Open) -> bool {
        let id = format!("{:016x}-{}-{}-{}", self.plan.lineage, open.work.seq, open.submission, open.offers);
        let body = match encode(&open.work) {
            Ok(body) => body,
            Err(error) => {
                self.failed(&format!("{error:#}"));
                return false;
            }
        };
        match self.transport.offer(&self.names.work, &id, &body) {
            Ok(_) => {
                open.offers += 1;
                self.recovered();
                true
            }
            Err(error) => {
                self.failed(&error.to_string());
                false
            }
        }
    }

    /// Returns the next result, waiting up to `wait`.
    pub(super) fn next(&self, wait: Duration) -> Option<Arrived> {
        self.arrivals.1.recv_timeout(wait).ok()
    }

    /// Removes a result whose group is recorded, once the record is durable.
    pub(super) fn recorded(self: &Arc<Self>, seq: u64, lease: Box<dyn Lease>) {
        lock(&self.open).remove(&seq);
        match &self.log {
            None => self.acknowledge(lease),
            Some(log) => {
                let coordinator = Arc::clone(self);
                log.when_durable(Box::new(move || coordinator.acknowledge(lease)));
            }
        }
    }

    /// Forgets the work of an engine that ends.
    pub(super) fn forget(&self, seqs: impl IntoIterator<Item = u64>) {
        let mut open = lock(&self.open);
        seqs.into_iter().for_each(|seq| drop(open.remove(&seq)));
    }

    /// Takes results until the coordinator stops.
    fn collect(&self) {
        let mut looked = Instant::now();
        while !self.stopped.load(Ordering::SeqCst) {
            if let Ok(told) = self.notices.heard(&self.plan.run) {
                self.roster.hear(told);
            }
            for (worker, why) in self.roster.rests(self.plan.slowest) {
                if let Err(error) = self.notices.set(&self.plan.run, &rest(&worker), why.as_bytes()) {
                    self.failed(&error.to_string());
                }
            }
            match self.transport.pull(&self.names.results, MOST, PULL) {
                Ok(leases) => {
                    self.recovered();
                    for lease in leases {
                        self.take(lease);
                    }
                }
                Err(error) => {
                    self.failed(&error.to_string());
                    std::thread::sleep(PULL);
                    // A broker that lost its data has no queues.
                    if let TransportError::Unknown(_) = error {
                        self.create_again();
                    }
                }
            }
            if looked.elapsed() >= self.plan.lease {
                looked = Instant::now();
                self.offer_lost();
            }
        }
    }

    /// Creates the queues again after the broker has lost its data, unless another coordinator has taken the run over.
    fn create_again(&self) {
        if self.is_replaced() {
            self.stopped.store(true, Ordering::SeqCst);
            return self.failed("another coordinator has taken the run over; this one takes no further results");
        }
        for (queue, limits) in [&self.names.work, &self.names.results].into_iter().zip(limits(&self.plan)) {
            if let Err(error) = self.transport.create(queue, limits) {
                self.failed(&error.to_string());
                return;
            }
        }
        if let Err(error) =
            self.notices.open(&self.plan.run).map_err(Into::into).and_then(|()| self.notice(RunState::Open))
        {
            self.failed(&format!("{error:#}"));
        }
    }

    /// Returns whether the notice of the run is that of another coordinator.
    pub(super) fn is_replaced(&self) -> bool {
        match self.notices.get(&self.plan.run, RUN) {
            Ok(Some(notice)) => {
                serde_json::from_slice::<RunNotice>(&notice).is_ok_and(|notice| notice.lineage != self.plan.lineage)
            }
            Ok(None) => false,
            Err(error) => {
                self.failed(&error.to_string());
                false
            }
        }
    }

    /// Offers work again that neither of the queues has: the broker lost it. Work that a worker has is never offered again,
    /// however long it takes, since a race between workers would favour short completions.
    fn offer_lost(&self) {
        let depth = |queue: &str| self.transport.depth(queue);
        let (Ok(work), Ok(results)) = (depth(&self.names.work), depth(&self.names.results)) else { return };
        if work.waiting + work.leased + results.waiting + results.leased > 0 || !self.arrivals.1.is_empty() {
            return;
        }
        let mut open = lock(&self.open);
        let lost: Vec<&mut Open> = open.values_mut().filter(|open| open.offers > 0 && !open.taken).collect();
        if lost.is_empty() {
            return;
        }
        status!("workers   the broker has lost the work on {} groups; it is offered again", lost.len());
        for open in lost {
            self.counts.offered_again.fetch_add(1, Ordering::Relaxed);
            telemetry::offered_again();
            if !self.offer(open) {
                break;
            }
        }
    }

    /// Takes one result: checks it, and passes it to the engine with its lease.
    fn take(&self, lease: Box<dyn Lease>) {
        let done = match decode::<Done>(lease.body()) {
            Ok(done) => done,
            Err(error) => return self.refuse(lease, "unknown", &format!("{error:#}")),
        };
        let (seq, worker) = (done.seq, done.worker.clone());
        if self.roster.is_shut_out(&worker) {
            return self.refuse(lease, &worker, "it was shut out");
        }
        if done.lineage != self.plan.lineage {
            return self.refuse(lease, &worker, &format!("work {seq}: it is of another lineage"));
        }
        let open = lock(&self.open).get(&seq).map(|open| (open.taken, open.work.clone()));
        match open {
            // It waits to be recorded. If that fails, the result is delivered again.
            Some((true, _)) => return,
            None => {
                self.counts.repeated.fetch_add(1, Ordering::Relaxed);
                telemetry::worker_result("repeated");
                return self.acknowledge(lease);
            }
            Some((false, work)) => {
                let checked = done.check(&work, &self.plan.bounds).and_then(|()| self.check_versions(&done));
                if let Err(error) = checked {
                    return self.refuse(lease, &worker, &format!("work {seq}: {error:#}"));
                }
            }
        }
        if let Some(open) = lock(&self.open).get_mut(&seq) {
            open.taken = true;
        }
        self.counts.taken.fetch_add(1, Ordering::Relaxed);
        telemetry::worker_result("taken");
        let tokens = done.completions.iter().map(|answer| answer.ids.len() as u64).sum();
        telemetry::worker_completions(is_redone(lease.id()), done.completions.len() as u64, tokens);
        self.roster.taken(&worker);
        let mut arrived = Arrived { seq, sampled: done.into_sampled(), lease };
        while let Err(refused) = self.arrivals.0.send_timeout(arrived, PULL) {
            arrived = refused.into_inner();
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            // The engine is behind; the result stays ours meanwhile.
            if let Err(error) = arrived.lease.extend() {
                tracing::debug!("cannot extend the lease of a result: {error}");
            }
        }
    }

    fn check_versions(&self, done: &Done) -> Result<()> {
        let versions = lock(&self.versions);
        for (version, fingerprint) in &done.fingerprints {
            let own = versions.get(version);
            ensure!(
                own == Some(fingerprint),
                "its version {version} has the fingerprint {fingerprint:016x}, and this run's {}",
                own.map_or("does not exist".to_owned(), |own| format!("{own:016x}"))
            );
        }
        Ok(())
    }

    /// Refuses a result: it is removed, and its work is offered again.
    fn refuse(&self, lease: Box<dyn Lease>, worker: &str, why: &str) {
        telemetry::worker_result("refused");
        self.refused(worker, why);
        if let Ok(done) = decode::<Done>(lease.body())
            && let Some(open) = lock(&self.open).get_mut(&done.seq)
            && done.lineage == self.plan.lineage
        {
            self.offer(open);
        }
        self.acknowledge(lease);
    }

    /// Tells that a result of `worker` was refused, and shuts the worker out after several.
    pub(super) fn refused(&self, worker: &str, why: &str) {
        self.counts.refused.fetch_add(1, Ordering::Relaxed);
        status!("workers   a result of {worker} is refused: {why}");
        if self.roster.refused(worker, why) {
            status!("workers   {worker} is shut out after {REFUSALS} refused results");
            if let Err(error) = self.notices.set(&self.plan.run, &shut_out(worker), why.as_bytes()) {
                self.failed(&error.to_string());
            }
        }
    }

    pub(super) fn acknowledge(&self, lease: Box<dyn Lease>) {
        // A result that is delivered again is known then.
        if let Err(error) = lease.acknowledge() {
            tracing::debug!("cannot acknowledge a result: {error}");
        }
    }

    /// Returns what the run has no worker for, with the remedy, if that is so.
    pub fn missing(&self) -> Option<String> {
        let roles = [(self.plan.samples, "rollout", "samples"), (!self.plan.judges.is_empty(), LABEL, "labels")];
        let missing = roles.into_iter().find(|(used, role, _)| *used && self.roster.reason_of_wait(role).is_none());
        missing.map(|(_, role, does)| {
            let run = &self.plan.run;
            format!("no worker {does}; start one with: preceptor worker --join ADDRESS --run {run} --role {role}")
        })
    }

    /// Returns why no work is done, if that is so.
    pub fn reasons_of_wait(&self) -> String {
        if let Some(why) = self.outage() {
            return why;
        }
        if let Some(why) = self.log.as_ref().and_then(|log| log.failure()) {
            return why;
        }
        self.roster.reason_of_wait("rollout").unwrap_or_else(|| {
            format!("waits for workers; start one with: preceptor worker --join ADDRESS --run {}", self.plan.run)
        })
    }

    /// Returns the last failure of the transport, while it lasts.
    pub(super) fn outage(&self) -> Option<String> {
        lock(&self.outage).clone()
    }

    pub(super) fn failed(&self, why: &str) {
        let mut outage = lock(&self.outage);
        if outage.is_none() {
            status!("workers   {why}; it is tried again");
        }
        *outage = Some(why.to_owned());
        telemetry::broker(false);
    }

    pub(super) fn recovered(&self) {
        if lock(&self.outage).take().is_some() {
            status!("workers   the broker answers again");
            telemetry::broker(true);
        }
    }
}

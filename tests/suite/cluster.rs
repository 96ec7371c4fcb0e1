//! Tests of workers: the rules of a transport, and workers that sample for a coordinator, die, and lie.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use preceptor::lm::model::{Decoder, Lora, Weights};
use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::cluster::coordinator::QueueNames;
use preceptor::pipeline::cluster::protocol::{
    Bounds, Done, LoraNotice, RunNotice, RunState, SamplingNotice, Work, decode, encode,
};
use preceptor::pipeline::cluster::worker::Summary;
use preceptor::pipeline::cluster::{
    ClusterEngine, Coordinator, CoordinatorPlan, Health, MemoryNotices, Nats, NatsPlan, Notices, StorePlan, WorkerPlan,
    put_base, work,
};
use preceptor::pipeline::generate::Sampled;
use preceptor::pipeline::generate::local::{LocalEngine, LocalPlan};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::stage::RolloutEngine;
use preceptor::pipeline::served::{FolderStore, WeightStore};
use preceptor::types::Prompt;
use preceptor_actors::transport::{Depth, Lease, MemoryTransport, Offered, QueueLimits, Transport, TransportError};
use preceptor_actors::{Admission, SnapshotCell};

use crate::common::{PATIENCE, byte_policy};

/// Lease of the tests, which must pass for work to be delivered again.
const LEASE: Duration = Duration::from_secs(5);

fn limits(messages: usize) -> QueueLimits {
    QueueLimits { lease: LEASE, messages, bytes: 1000 }
}

/// Returns the identifiers of leased messages.
fn ids(leases: &[Box<dyn Lease>]) -> Vec<&str> {
    leases.iter().map(|lease| lease.id()).collect()
}

/// Checks the rules that every transport follows.
fn conforms(transport: &dyn Transport) {
    let error = transport.pull("none", 1, Duration::ZERO).err().unwrap();
    assert_eq!(error, TransportError::Unknown("none".into()));
    transport.create("q", limits(4)).unwrap();
    assert!(transport.pull("q", 4, Duration::ZERO).unwrap().is_empty());

    // Messages are delivered in order, each to one worker, and once for each identifier.
    for (id, expected) in [("a", Offered::Accepted), ("b", Offered::Accepted), ("a", Offered::Duplicate)] {
        assert_eq!(transport.offer("q", id, id.as_bytes()).unwrap(), expected);
    }
    assert_eq!(transport.depth("q").unwrap(), Depth { waiting: 2, leased: 0 });
    let first = transport.pull("q", 1, PATIENCE).unwrap();
    assert_eq!((ids(&first), first[0].body(), first[0].deliveries()), (vec!["a"], "a".as_bytes(), 1));
    let second = transport.pull("q", 4, PATIENCE).unwrap();
    assert_eq!(ids(&second), ["b"]);
    assert_eq!(transport.depth("q").unwrap(), Depth { waiting: 0, leased: 2 });

    // An acknowledged message does not come again, nor is it accepted again.
    first.into_iter().next().unwrap().acknowledge().unwrap();
    assert_eq!(transport.offer("q", "a", b"a").unwrap(), Offered::Duplicate);
    // One that is given back comes at once, one that was dropped when its lease has expired.
    second.into_iter().next().unwrap().give_back().unwrap();
    let again = transport.pull("q", 4, PATIENCE).unwrap();
    assert_eq!((ids(&again), again[0].deliveries()), (vec!["b"], 2));
    drop(again);
    let expired = transport.pull("q", 4, PATIENCE).unwrap();
    assert_eq!((ids(&expired), expired[0].deliveries()), (vec!["b"], 3));

    // A lease that is extended in time does not expire. A machine that paused meanwhile proves nothing.
    let kept = loop {
        let held = transport.pull("q", 4, Duration::ZERO).unwrap().into_iter().next();
        let held = held.unwrap_or_else(|| transport.pull("q", 4, PATIENCE).unwrap().remove(0));
        let (began, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
        while began.elapsed() < 2 * LEASE {
            std::thread::sleep(LEASE / 10);
            if held.extend().is_err() {
                longest = LEASE;
                break;
            }
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        let delivered = transport.pull("q", 4, Duration::ZERO).unwrap();
        if longest < LEASE / 2 {
            assert!(delivered.is_empty(), "{:?}", ids(&delivered));
            break held;
        }
    };
    kept.acknowledge().unwrap();
    assert_eq!(transport.depth("q").unwrap(), Depth::default());

    // A queue refuses what is too much.
    for id in ["c", "d", "e", "f"] {
        transport.offer("q", id, b"x").unwrap();
    }
    let error = transport.offer("q", "g", b"x").unwrap_err();
    assert_eq!(error, TransportError::Full { queue: "q".into(), limit: 4 });
    let error = transport.offer("q", "h", &[0; 1001]).unwrap_err();
    assert_eq!(error, TransportError::TooLarge { queue: "q".into(), bytes: 1001, limit: 1000 });
    transport.remove("q").unwrap();
    transport.remove("q").unwrap();
    assert!(transport.offer("q", "i", b"x").is_err());
}

/// Checks the rules that every notice board follows.
fn notices_conform(notices: &dyn Notices) {
    assert_eq!(notices.get("board", "key").unwrap(), None);
    notices.open("board").unwrap();
    assert_eq!(notices.get("board", "key").unwrap(), None);
    notices.set("board", "key", b"1").unwrap();
    notices.set("board", "key", b"2").unwrap();
    notices.set("board", "other", b"3").unwrap();
    assert_eq!(notices.get("board", "key").unwrap().unwrap(), b"2");
    assert!(notices.heard("board").unwrap().is_empty());
    notices.tell("board", "worker-1", b"here").unwrap();
    let began = Instant::now();
    loop {
        let heard = notices.heard("board").unwrap();
        if !heard.is_empty() {
            assert_eq!(heard, [("worker-1".to_owned(), b"here".to_vec())]);
            break;
        }
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_transport_in_memory_follows_the_rules() {
    conforms(&MemoryTransport::default());
    notices_conform(&MemoryNotices::default());
}

/// NATS server of one test.
struct Broker {
    child: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Broker {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Command::new("nats-server");
        server.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"]).arg(dir.path());
        let child = server.stderr(Stdio::null()).spawn().expect("nats-server must be installed for this test");
        Self { child, url: format!("nats://127.0.0.1:{port}"), _dir: dir }
    }

    fn connect(&self) -> Nats {
        let began = Instant::now();
        loop {
            match Nats::connect(&NatsPlan { url: self.url.clone(), name: "test".into(), ..NatsPlan::default() }) {
                Ok(nats) => return nats,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{error:#}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs nats-server: cargo test --release --test suite nats -- --ignored"]
fn nats_follows_the_rules_of_a_transport() {
    let broker = Broker::start();
    conforms(&broker.connect());
    notices_conform(&broker.connect());
}

#[test]
#[ignore = "needs nats-server: cargo test --release --test suite nats -- --ignored"]
fn a_connection_to_nats_tells_that_it_is_lost() {
    let mut broker = Broker::start();
    let nats = broker.connect();
    let link = nats.link();
    assert!(link.load(Ordering::SeqCst));
    broker.child.kill().unwrap();
    let began = Instant::now();
    while link.load(Ordering::SeqCst) {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Number of completions of a group.
pub(crate) const GROUP: usize = 3;
/// Number of concurrent completions whose kernels are used. An engine of [`GROUP`] slots would use others.
const KERNELS_FOR: usize = 32;

/// A run with a coordinator and its workers.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) model: Decoder,
    transport: Arc<dyn Transport>,
    pub(crate) notices: Arc<dyn Notices>,
    cell: Arc<SnapshotCell<Decoder>>,
    pub(crate) coordinator: Arc<Coordinator>,
    engine: ClusterEngine,
}

/// A worker on a thread.
pub(crate) struct Worker {
    stop: Arc<AtomicBool>,
    pub(crate) thread: JoinHandle<anyhow::Result<Summary>>,
}

impl Worker {
    pub(crate) fn end(self) -> anyhow::Result<Summary> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

fn sampling() -> Sampling {
    let tokenizer = Tokenizer::bytes();
    Sampling {
        temperature: 0.9,
        max_new_tokens: 12,
        vocabulary: tokenizer.vocab_size(),
        eos: tokenizer.eos_ids().to_vec(),
        ..Sampling::default()
    }
}

impl Cluster {
    pub(crate) fn start(transport: Arc<dyn Transport>, notices: Arc<dyn Notices>, lora: Option<&Lora>) -> Self {
        Self::start_in_parts(transport, notices, lora, GROUP)
    }

    /// Starts a run whose pieces of work have up to `part` completions.
    fn start_in_parts(
        transport: Arc<dyn Transport>,
        notices: Arc<dyn Notices>,
        lora: Option<&Lora>,
        part: usize,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_, model) = byte_policy(dir.path(), 5);
        Self::restored(dir, model, (transport, notices), lora, 1, part)
    }

    fn restored(
        dir: tempfile::TempDir,
        model: Decoder,
        (transport, notices): (Arc<dyn Transport>, Arc<dyn Notices>),
        lora: Option<&Lora>,
        lineage: u64,
        part: usize,
    ) -> Self {
        let store = FolderStore::new(&dir.path().join("weights"), None, None, DType::F32).unwrap();
        let place = store.seen_as().display().to_string();
        Self::with_store((dir, model), (transport, notices), lora, (lineage, part), (Arc::new(store), place))
    }

    /// Starts a run whose weights are in a store that is announced as the given place, with up to `part` completions in a
    /// piece of work.
    pub(crate) fn with_store(
        (dir, model): (tempfile::TempDir, Decoder),
        (transport, notices): (Arc<dyn Transport>, Arc<dyn Notices>),
        lora: Option<&Lora>,
        (lineage, part): (u64, usize),
        (store, place): (Arc<dyn WeightStore>, String),
    ) -> Self {
        let base = put_base(&*store, &model, &Tokenizer::bytes(), lora.is_some()).unwrap();
        let own = sampling();
        let plan = CoordinatorPlan {
            run: "test".into(),
            tag: 7,
            lineage,
            admission: Admission { eta: 1, batch: 2 },
            sampling: SamplingNotice {
                temperature: own.temperature,
                top_k: own.top_k,
                top_p: own.top_p,
                min_p: own.min_p,
                repetition_penalty: own.repetition_penalty,
                max_new_tokens: own.max_new_tokens,
                vocabulary: own.vocabulary,
                eos: own.eos.clone(),
                stop: Vec::new(),
                in_flight: true,
                weights: "f32".into(),
                kernels_for: Some(KERNELS_FOR),
                corrects: Some(true),
                longest_prompt: 16,
            },
            bounds: Bounds { rows: model.config().vocab_size, max_new_tokens: own.max_new_tokens },
            lora: lora.map(|lora| LoraNotice { rank: lora.rank, alpha: lora.alpha, targets: lora.targets.clone() }),
            group_size: GROUP,
            part,
            slowest: 3.0,
            lease: LEASE,
            store: place,
            base,
            samples: true,
            judges: Vec::new(),
        };
        let coordinator = Coordinator::start(plan, Arc::clone(&transport), Arc::clone(&notices), None).unwrap();
        let fingerprint = model.weights().fingerprint().unwrap();
        let cell = Arc::new(SnapshotCell::new(0, fingerprint, Arc::new(model.clone())));
        coordinator.open(&cell, store).unwrap();
        let engine = ClusterEngine::new(Arc::clone(&coordinator), 64, false);
        Self { dir, model, transport, notices, cell, coordinator, engine }
    }

    pub(crate) fn worker(&self, name: &str) -> Worker {
        self.worker_with(name, StorePlan::default(), Arc::default())
    }

    pub(crate) fn worker_with(&self, name: &str, store: StorePlan, health: Arc<Health>) -> Worker {
        self.start_worker(WorkerPlan {
            run: "test".into(),
            name: name.into(),
            store,
            slots: GROUP,
            servers: None,
            drain: PATIENCE,
            patience: PATIENCE,
            health,
        })
    }

    pub(crate) fn start_worker(&self, plan: WorkerPlan) -> Worker {
        let (transport, notices) = (Arc::clone(&self.transport), Arc::clone(&self.notices));
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let run = move || work(&plan, &Device::Cpu, &*transport, &*notices, &flag);
        Worker { stop, thread: std::thread::spawn(run) }
    }

    pub(crate) fn publish(&self, version: u64, model: &Decoder) {
        self.cell.publish(version, model.weights().fingerprint().unwrap(), Arc::new(model.clone()));
    }

    pub(crate) fn submit(&mut self, seqs: impl IntoIterator<Item = u64>) {
        seqs.into_iter().for_each(|seq| self.engine.submit(&prompt(seq), seeds(seq)).unwrap());
    }

    /// Returns the name of the base model's folder.
    pub(crate) fn coordinator_base(&self) -> String {
        let notice = self.notices.get("test", "run").unwrap().unwrap();
        serde_json::from_slice::<RunNotice>(&notice).unwrap().base
    }

    /// Waits for `count` groups, and records them.
    pub(crate) fn take(&mut self, count: usize) -> BTreeMap<u64, Vec<Sampled>> {
        let (mut all, began) = (BTreeMap::new(), Instant::now());
        while all.len() < count {
            assert!(
                began.elapsed() < PATIENCE,
                "{} of {count} groups: {}",
                all.len(),
                self.coordinator.reasons_of_wait()
            );
            for (seq, sampled) in self.engine.advance().unwrap() {
                self.engine.recorded(seq);
                assert!(all.insert(seq, sampled).is_none(), "group {seq} came twice");
            }
        }
        all
    }

    /// Waits until nothing is in the queues.
    pub(crate) fn drained(&self) {
        let names = QueueNames::of("test", 1);
        let began = Instant::now();
        let left = |queue: &str| self.transport.depth(queue).unwrap();
        while (left(&names.work), left(&names.results)) != (Depth::default(), Depth::default()) {
            assert!(began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.coordinator.stop(RunState::Ended);
    }
}

pub(crate) fn prompt(seq: u64) -> Prompt {
    Prompt::new(seq, "", (0..4 + seq as u32 % 5).map(|i| 60 + i + seq as u32).collect::<Vec<u32>>())
}

fn seeds(seq: u64) -> Vec<u64> {
    (0..GROUP as u64).map(|k| 1000 * seq + k).collect()
}

/// Samples the groups in this process, one after another, with one version of the weights.
pub(crate) fn expected(
    model: &Decoder,
    version: u64,
    seqs: impl IntoIterator<Item = u64>,
) -> BTreeMap<u64, Vec<Sampled>> {
    let fingerprint = model.weights().fingerprint().unwrap();
    let cell = Arc::new(SnapshotCell::new(version, fingerprint, Arc::new(model.clone())));
    let plan = LocalPlan { slots: GROUP, kernels_for: KERNELS_FOR, in_flight: true, format: None, device: Device::Cpu };
    let mut engine = LocalEngine::new(cell.reader("expected"), &sampling(), plan);
    let mut all = BTreeMap::new();
    for seq in seqs {
        engine.submit(&prompt(seq), seeds(seq)).unwrap();
        while !engine.is_idle() {
            all.extend(engine.advance().unwrap());
        }
    }
    all
}

/// Returns the model with other weights.
pub(crate) fn changed(model: &Decoder) -> Decoder {
    let change = |tensor: &Tensor| tensor.affine(1.02, 0.001).unwrap();
    let weights = Weights(model.weights().0.iter().map(|(name, tensor)| (name.clone(), change(tensor))).collect());
    Decoder::new(model.config(), &weights).unwrap()
}

fn samples_as_one_process(transport: Arc<dyn Transport>, notices: Arc<dyn Notices>) {
    let mut cluster = Cluster::start(transport, notices, None);
    let workers = [cluster.worker("a"), cluster.worker("b")];
    cluster.submit(0..4);
    assert_eq!(cluster.take(4), expected(&cluster.model, 0, 0..4));
    // Group 6 is trained at version 3 and must begin with version 2 at least.
    cluster.submit(6..8);
    let next = changed(&cluster.model);
    cluster.publish(1, &next);
    let newest = changed(&next);
    cluster.publish(2, &newest);
    assert_eq!(cluster.take(2), expected(&newest, 2, 6..8));
    cluster.drained();
    let groups: u64 = workers.into_iter().map(|worker| worker.end().unwrap().groups).sum();
    // On a machine that paused, work may have been done twice; it counts once.
    assert!(groups >= 6);
    assert_eq!(cluster.coordinator.counts.taken.load(Ordering::SeqCst), 6);
}

#[test]
fn workers_sample_the_same_bits_as_one_process() {
    samples_as_one_process(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()));
}

#[test]
#[ignore = "needs nats-server: cargo test --release --test suite nats -- --ignored"]
fn workers_on_nats_sample_the_same_bits_as_one_process() {
    let broker = Broker::start();
    samples_as_one_process(Arc::new(broker.connect()), Arc::new(broker.connect()));
}

#[test]
fn workers_with_adapters_sample_the_same_bits_as_one_process() {
    let lora = Lora { rank: 2, alpha: 4.0, targets: vec!["q_proj".into(), "down_proj".into()] };
    let mut cluster =
        Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), Some(&lora));
    let (adapted, params) = cluster.model.adapted(&lora, 3).unwrap();
    for (seed, (_, var)) in params.iter().enumerate() {
        let noise = (var.as_tensor().ones_like().unwrap() * (0.1 * (1.0 + seed as f64 % 3.0))).unwrap();
        var.set(&noise).unwrap();
    }
    let adapted = adapted.snapshot().unwrap();
    cluster.publish(1, &adapted);
    let worker = cluster.worker("a");
    cluster.submit(4..6);
    assert_eq!(cluster.take(2), expected(&adapted, 1, 4..6));
    worker.end().unwrap();
}

/// Pulls work as a worker does, and returns its lease.
fn pull(cluster: &Cluster) -> Box<dyn Lease> {
    cluster.transport.pull(&QueueNames::of("test", 1).work, 1, PATIENCE).unwrap().remove(0)
}

#[test]
fn the_work_of_a_worker_that_dies_is_done_by_another() {
    let mut cluster = Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), None);
    cluster.submit(0..2);
    // A worker takes the work and is never heard of again.
    drop([pull(&cluster), pull(&cluster)]);
    let worker = cluster.worker("a");
    assert_eq!(cluster.take(2), expected(&cluster.model, 0, 0..2));
    cluster.drained();
    assert!(worker.end().unwrap().groups >= 2);
}

/// Completions of one group come from several workers, in any order, and one worker dies.
#[test]
fn a_group_is_sampled_in_parts_by_several_workers() {
    let (transport, notices) = (Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()));
    let mut cluster = Cluster::start_in_parts(transport, notices, None, 2);
    cluster.submit(0..4);
    assert_eq!(cluster.transport.depth(&QueueNames::of("test", 1).work).unwrap().waiting, 8);
    drop([pull(&cluster), pull(&cluster), pull(&cluster)]);
    let workers = ["a", "b"].map(|name| cluster.worker(name));
    let found = cluster.take(4);
    assert_eq!(found, expected(&cluster.model, 0, 0..4), "the last bits do not depend on what is computed in one pass");
    cluster.drained();
    let done: u64 = workers.map(|worker| worker.end().unwrap().groups).iter().sum();
    assert!(done >= 8, "{done}");
}

/// A restarted graph submits a group again whose result came when no engine waited for it.
#[test]
fn a_group_whose_result_was_dropped_is_sampled_again_at_once() {
    let mut cluster = Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), None);
    cluster.submit([0]);
    cluster.engine = ClusterEngine::new(Arc::clone(&cluster.coordinator), 64, false);
    let worker = cluster.worker("a");
    let began = Instant::now();
    while cluster.coordinator.counts.repeated.load(Ordering::SeqCst) == 0 {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    cluster.submit([0]);
    assert_eq!(cluster.take(1), expected(&cluster.model, 0, [0]));
    assert_eq!(cluster.coordinator.counts.offered_again.load(Ordering::SeqCst), 0);
    worker.end().unwrap();
}

#[test]
fn a_worker_that_is_told_to_stop_finishes_its_work_and_leaves() {
    let mut cluster = Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), None);
    let first = cluster.worker("a");
    cluster.submit(0..3);
    let mut all = cluster.take(1);
    first.end().unwrap();
    let second = cluster.worker("b");
    let left = 3 - all.len();
    all.extend(cluster.take(left));
    assert_eq!(all, expected(&cluster.model, 0, 0..3));
    second.end().unwrap();
}

#[test]
fn impossible_results_are_refused_and_their_worker_is_shut_out() {
    let mut cluster = Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), None);
    cluster.submit([0]);
    let results = QueueNames::of("test", 1).results;
    let right = |work: &Work| {
        let done = expected(&cluster.model, 0, [work.seq]).remove(&work.seq).unwrap();
        let fingerprint = cluster.model.weights().fingerprint().unwrap();
        Done {
            lineage: 1,
            seq: work.seq,
            worker: "liar".into(),
            fingerprints: vec![(0, fingerprint)],
            completions: done
                .into_iter()
                .map(|one| preceptor::pipeline::cluster::protocol::Answer {
                    ids: one.ids,
                    logprobs: one.logprobs,
                    versions: one.versions,
                    finish: one.finish.unwrap(),
                })
                .collect(),
        }
    };
    type Lie = fn(&mut Done);
    let lies: [Lie; 3] = [
        |done| done.fingerprints[0].1 ^= 1,
        |done| done.completions[1].logprobs[0] = f32::INFINITY,
        |done| done.lineage = 2,
    ];
    for (i, lie) in lies.into_iter().enumerate() {
        let lease = pull(&cluster);
        let mut done = right(&decode::<Work>(lease.body()).unwrap());
        lie(&mut done);
        cluster.transport.offer(&results, &format!("lie-{i}"), &encode(&done).unwrap()).unwrap();
        // The work on another lineage is not offered again, since nobody knows whether it was lost.
        if done.lineage == 1 {
            lease.acknowledge().unwrap()
        } else {
            lease.give_back().unwrap()
        }
        let began = Instant::now();
        while cluster.coordinator.counts.refused.load(Ordering::SeqCst) <= i as u64 {
            assert!(began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    // What the shut-out worker sends now does not count, even if it is right; another worker does the work.
    let lease = pull(&cluster);
    let done = right(&decode::<Work>(lease.body()).unwrap());
    cluster.transport.offer(&results, "late", &encode(&done).unwrap()).unwrap();
    lease.acknowledge().unwrap();
    assert!(cluster.notices.get("test", "out-liar").unwrap().is_some());
    let error = cluster.worker("liar").thread.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("shut this worker out"), "{error}");
    let honest = cluster.worker("honest");
    assert_eq!(cluster.take(1), expected(&cluster.model, 0, [0]));
    honest.end().unwrap();
}

#[test]
fn workers_follow_a_restored_run_and_leave_when_it_ends() {
    let (transport, notices) = (Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()));
    let mut cluster = Cluster::start(transport.clone(), notices.clone(), None);
    let worker = cluster.worker("a");
    cluster.submit([0]);
    cluster.take(1);
    // The coordinator dies without a word; its successor restores the run.
    let dir = tempfile::tempdir().unwrap();
    let (_, model) = byte_policy(dir.path(), 6);
    let mut restored = Cluster::restored(dir, model, (transport, notices), None, 2, GROUP);
    assert_eq!(
        cluster.transport.pull(&QueueNames::of("test", 1).work, 1, Duration::ZERO).err(),
        Some(TransportError::Unknown("test.0000000000000001.rollout".into())),
        "the queues of the lineage before are removed"
    );
    restored.submit([1]);
    assert_eq!(restored.take(1), expected(&restored.model, 0, [1]));
    restored.coordinator.stop(RunState::Ended);
    assert!(worker.thread.join().unwrap().unwrap().groups >= 2);
    assert!(Path::new(restored.dir.path()).exists() && cluster.dir.path().exists());
}

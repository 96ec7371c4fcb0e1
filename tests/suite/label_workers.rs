//! Tests of workers that hold the weights of a run's judges: their answers, deaths and lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use preceptor::lm::source::{Candidate, ModelRef, ResolveOptions};
use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::cluster::coordinator::QueueNames;
use preceptor::pipeline::cluster::protocol::{Bounds, LabelDone, LabelWork, RunState, SamplingNotice, decode, encode};
use preceptor::pipeline::cluster::worker::Summary;
use preceptor::pipeline::cluster::{
    Coordinator, CoordinatorPlan, MemoryNotices, Notices, StorePlan, WorkerPlan, judge, put_judges, work,
};
use preceptor::pipeline::label::backend::{Ask, Backend, Decoding, NoAnswer, Usage};
use preceptor::pipeline::label::embedding::{Embedding, Encoder};
use preceptor::pipeline::label::likelihood::TokenJudge;
use preceptor::pipeline::label::local::{Judge, Local};
use preceptor::pipeline::label::workers::questions::LabelAnswer;
use preceptor::pipeline::label::workers::{TemplateSettings, WorkerJudge, WorkerJudges};
use preceptor::pipeline::served::FolderStore;
use preceptor_actors::transport::{Lease, MemoryTransport, Transport};
use preceptor_actors::{Admission, SnapshotCell};

use crate::common::{PATIENCE, byte_policy};

/// A run whose judges are on workers.
struct Run {
    _dir: tempfile::TempDir,
    transport: Arc<MemoryTransport>,
    notices: Arc<MemoryNotices>,
    coordinator: Arc<Coordinator>,
    /// A language model as workers hold it, and the same in this process.
    language: (Arc<WorkerJudge>, Local),
    /// A sentence encoder as workers hold it, and the same in this process.
    encoder: (Arc<WorkerJudge>, Embedding),
}

impl Run {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_, model) = byte_policy(dir.path(), 5);
        let fingerprint = model.weights().fingerprint().unwrap();
        let own = Judge { model: Arc::new(model), tokenizer: Tokenizer::bytes(), identity: fingerprint, chat: false };
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert");
        let files = ModelRef(vec![Candidate::Path(fixture)]);
        let (embedding, from): (Embedding, PathBuf) =
            Embedding::load_from(&files, &Device::Cpu, &ResolveOptions::default()).unwrap();
        let judges = WorkerJudges::default();
        let language = judges.language(own.clone(), TemplateSettings::default());
        let encoder = judges.encoder(&embedding, from);
        let store = FolderStore::new(&dir.path().join("weights"), None, None, DType::F32).unwrap();
        let plan = CoordinatorPlan {
            run: "test".into(),
            tag: 7,
            lineage: 1,
            admission: Admission { eta: 1, batch: 2 },
            sampling: SamplingNotice {
                temperature: 1.0,
                top_k: None,
                top_p: None,
                min_p: None,
                repetition_penalty: 1.0,
                max_new_tokens: 8,
                vocabulary: 259,
                eos: Vec::new(),
                stop: Vec::new(),
                in_flight: false,
                weights: "f32".into(),
                kernels_for: None,
                corrects: None,
                longest_prompt: 0,
            },
            bounds: Bounds { rows: 259, max_new_tokens: 8 },
            lora: None,
            group_size: 2,
            part: 2,
            slowest: 0.0,
            lease: Duration::from_secs(5),
            store: store.seen_as().display().to_string(),
            base: Default::default(),
            samples: false,
            judges: put_judges(&judges, &store, "highest").unwrap(),
        };
        let (transport, notices) = (Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()));
        let coordinator =
            Coordinator::start(plan, Arc::clone(&transport) as _, Arc::clone(&notices) as _, None).unwrap();
        let cell = Arc::new(SnapshotCell::new(0, fingerprint, Arc::clone(&own.model)));
        coordinator.open(&cell, Arc::new(store)).unwrap();
        coordinator.open_judges(&judges.pool).unwrap();
        let (language, encoder) = ((language, Local::new(own)), (encoder, embedding));
        Self { _dir: dir, transport, notices, coordinator, language, encoder }
    }

    fn plan(name: &str) -> WorkerPlan {
        let (run, name) = ("test".into(), name.into());
        let (store, health) = (StorePlan::default(), Arc::default());
        WorkerPlan { run, name, store, slots: 8, servers: None, drain: PATIENCE, patience: PATIENCE, health }
    }

    fn worker(&self, name: &str) -> Worker {
        let (transport, notices) = (Arc::clone(&self.transport), Arc::clone(&self.notices));
        let stop = Arc::new(AtomicBool::new(false));
        let (plan, flag) = (Self::plan(name), Arc::clone(&stop));
        let run = move || {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            judge(&plan, &Device::Cpu, &pool, &*transport, &*notices, &flag)
        };
        Worker { stop, thread: std::thread::spawn(run) }
    }

    /// Asks the judge on workers for probabilities on another thread.
    fn weigh(&self, asks: Vec<Ask>) -> JoinHandle<Vec<Result<Vec<f64>, NoAnswer>>> {
        let judge = Arc::clone(&self.language.0);
        std::thread::spawn(move || judge.weigh(&asks, &mut Usage::default()))
    }

    /// Pulls a question as a worker does.
    fn pull(&self) -> (Box<dyn Lease>, LabelWork) {
        let questions = QueueNames::of("test", 1).questions;
        let lease = self.transport.pull(&questions, 1, PATIENCE).unwrap().remove(0);
        let work = decode(lease.body()).unwrap();
        (lease, work)
    }

    /// Answers a question as the worker `liar`.
    fn answer(&self, name: &str, (lease, work): (Box<dyn Lease>, LabelWork), lineage: u64, answer: LabelAnswer) {
        let done = LabelDone { lineage, id: work.id, worker: "liar".into(), answer };
        self.transport.offer(&QueueNames::of("test", 1).answers, name, &encode(&done).unwrap()).unwrap();
        lease.acknowledge().unwrap();
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.coordinator.stop(RunState::Ended);
    }
}

/// A worker on a thread.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Summary>>,
}

impl Worker {
    fn end(self) -> anyhow::Result<Summary> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

fn asks() -> Vec<Ask> {
    let ask = |text: &str| Ask {
        prompt: format!("Rate this: {text}\nRating="),
        answers: ["1", "2", "10"].map(String::from).into(),
    };
    ["a cat", "a dog that barks", "a cat"].map(ask).into()
}

#[test]
fn workers_answer_the_same_bits_as_one_process() {
    let run = Run::start();
    let worker = run.worker("a");
    let ((away, here), (encoder, own)) = (&run.language, &run.encoder);
    assert_eq!((Backend::identity(&**away), away.shape()), (Backend::identity(here), here.shape()));
    for warmed in [false, true] {
        if warmed {
            // A template's common beginning is computed once. Both sides have it then.
            let examples = ["A", "zebra"].map(|text| format!("Rate this: {text}\nRating="));
            away.warm(&examples).unwrap();
            Backend::warm(here, &examples).unwrap();
        }
        let (mut used, mut expected) = (Usage::default(), Usage::default());
        assert_eq!(away.weigh(&asks(), &mut used), here.weigh(&asks(), &mut expected));
        assert_eq!((used, used.requests), (expected, 3));
    }
    let decoding = Decoding { max_tokens: 6, temperature: 0.8, top_k: Some(40), seed: 3 };
    let prompts = ["a", "b", "a"].map(String::from);
    let (mut used, mut expected) = (Usage::default(), Usage::default());
    assert_eq!(away.write(&prompts, &decoding, &mut used), here.write(&prompts, &decoding, &mut expected));
    assert_eq!(used, expected);
    let (prompt, completions): (&[u32], [&[u32]; 2]) = (&[70, 71, 72], [&[80, 81], &[82]]);
    assert_eq!(
        away.logprobs(prompt, &completions, &[1.0, 0.7]).unwrap(),
        here.judge().logprobs(prompt, &completions, &[1.0, 0.7]).unwrap()
    );
    let texts = ["a cat sits", "dogs bark"];
    assert_eq!(encoder.embed(&texts).unwrap(), own.embedder.embed(&texts).unwrap());
    assert!(worker.end().unwrap().groups >= 5);
}

#[test]
fn the_question_of_a_worker_that_dies_is_answered_by_another() {
    let run = Run::start();
    let asked = run.weigh(asks());
    // A worker takes the question and is never heard of again.
    drop(run.pull());
    let worker = run.worker("a");
    assert_eq!(asked.join().unwrap(), run.language.1.weigh(&asks(), &mut Usage::default()));
    worker.end().unwrap();
}

#[test]
fn impossible_answers_are_refused_and_their_worker_is_shut_out() {
    let run = Run::start();
    let asked = run.weigh(asks());
    let weighed = |weights: Vec<f64>| LabelAnswer::Weighed(vec![Ok(weights); 3], Usage::default());
    run.answer("1", run.pull(), 1, weighed(vec![0.9, 0.9, 0.9]));
    run.answer("2", run.pull(), 1, LabelAnswer::Embedded(vec![vec![1.0]]));
    let (lease, work) = run.pull();
    run.transport
        .offer(
            &QueueNames::of("test", 1).answers,
            "3",
            &encode(&LabelDone { lineage: 2, id: work.id, worker: "liar".into(), answer: weighed(vec![0.1; 3]) })
                .unwrap(),
        )
        .unwrap();
    let began = Instant::now();
    while run.coordinator.counts.refused.load(Ordering::SeqCst) < 3 {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(run.notices.get("test", "out-liar").unwrap().is_some());
    // A right answer of the worker does not count any more.
    run.answer("4", (lease, work), 1, weighed(vec![0.1; 3]));
    while run.coordinator.counts.refused.load(Ordering::SeqCst) < 4 {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    let error = run.worker("liar").thread.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("shut this worker out"), "{error}");
    let honest = run.worker("honest");
    assert_eq!(asked.join().unwrap(), run.language.1.weigh(&asks(), &mut Usage::default()));
    honest.end().unwrap();
}

#[test]
fn a_question_that_three_workers_cannot_answer_fails_with_its_cause() {
    let run = Run::start();
    let asked = run.weigh(asks());
    for name in ["1", "2", "3"] {
        run.answer(name, run.pull(), 1, LabelAnswer::Failed("out of memory".into()));
    }
    let replies = asked.join().unwrap();
    let expected = NoAnswer::Failure("3 workers could not answer, the last because out of memory".into());
    assert_eq!(replies, vec![Err(expected); 3]);
    assert_eq!(run.coordinator.counts.refused.load(Ordering::SeqCst), 0, "it is not a lie");
}

#[test]
fn a_waiting_labeler_gives_signs_of_life_and_stops_when_its_graph_is_halted() {
    let run = Run::start();
    let (noted, halted) = (Arc::new(std::sync::Mutex::new(String::new())), Arc::new(AtomicBool::new(false)));
    let (notes, flag) = (Arc::clone(&noted), Arc::clone(&halted));
    let alive = move |text: &str| {
        text.clone_into(&mut notes.lock().unwrap());
        !flag.load(Ordering::SeqCst)
    };
    Backend::register_liveness(&*run.language.0, "label-0", &(Arc::new(alive) as _));
    let asked = run.weigh(asks());
    let began = Instant::now();
    assert!(run.coordinator.missing().unwrap().starts_with("no worker labels"));
    while !noted.lock().unwrap().contains("--role label") {
        assert!(began.elapsed() < PATIENCE, "{}", noted.lock().unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
    // An evaluation asks outside of the graph, and goes on when that is halted.
    let (outside, expected) = (run.language.0.outside_graph(), run.language.1.weigh(&asks(), &mut Usage::default()));
    let evaluated = std::thread::spawn(move || outside.weigh(&asks(), &mut Usage::default()));
    halted.store(true, Ordering::SeqCst);
    let Err(NoAnswer::Failure(why)) = &asked.join().unwrap()[0] else { panic!() };
    assert!(why.contains("halted"), "{why}");
    let worker = run.worker("a");
    assert_eq!(evaluated.join().unwrap(), expected);
    while run.coordinator.missing().is_some() {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    worker.end().unwrap();
}

#[test]
fn workers_refuse_a_run_that_has_no_work_for_their_role() {
    let run = Run::start();
    let stop = AtomicBool::new(false);
    let error = work(&Run::plan("a"), &Device::Cpu, &*run.transport, &*run.notices, &stop).unwrap_err().to_string();
    assert!(error.contains("samples without workers") && error.contains("--role label"), "{error}");
    let mut notice: serde_json::Value =
        serde_json::from_slice(&run.notices.get("test", "run").unwrap().unwrap()).unwrap();
    notice.as_object_mut().unwrap().remove("judges");
    run.notices.set("test", "run", notice.to_string().as_bytes()).unwrap();
    let error = run.worker("b").thread.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("labeler.engine"), "{error}");
}

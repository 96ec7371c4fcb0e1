//! Tests of workers whose completions an inference server on their machine samples.

use std::collections::BTreeMap;
use std::sync::Arc;

use preceptor::config::EngineKind;
use preceptor::lm::model::{Decoder, Lora, Pack};
use preceptor::pipeline::cluster::protocol::RunNotice;
use preceptor::pipeline::cluster::worker::ServersPlan;
use preceptor::pipeline::cluster::{MemoryNotices, StorePlan, WorkerPlan};
use preceptor::pipeline::generate::Sampled;
use preceptor_actors::transport::MemoryTransport;

use crate::cluster::{Cluster, GROUP, Worker, changed, expected, prompt};
use crate::common::{PATIENCE, byte_policy};
use crate::fake_engine::{FakeEngine, Kind, Options};

const TEMPERATURE: f64 = 0.9;

fn cluster(lora: Option<&Lora>) -> Cluster {
    Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), lora)
}

fn lora() -> Lora {
    Lora { rank: 2, alpha: 4.0, targets: vec!["q_proj".into(), "down_proj".into()] }
}

/// Starts a server of the run's base model, or of one with other weights.
fn server(cluster: &Cluster, kind: Kind, other: bool) -> FakeEngine {
    let dir = cluster.dir.path().join(if other { "other" } else { "base" });
    std::fs::create_dir_all(&dir).unwrap();
    FakeEngine::start(Options::new(kind, &byte_policy(&dir, if other { 6 } else { 5 }).0))
}

/// Starts a worker whose completions `server` samples.
fn worker(cluster: &Cluster, server: &FakeEngine, kind: EngineKind) -> Worker {
    cluster.start_worker(WorkerPlan {
        run: "test".into(),
        name: "a".into(),
        store: StorePlan::default(),
        slots: 2 * GROUP,
        servers: Some(ServersPlan {
            kind,
            servers: vec![server.url()],
            api_key_env: None,
            folder: Some(cluster.dir.path().join("served")),
            check_version: true,
        }),
        drain: PATIENCE,
        patience: PATIENCE,
        health: Arc::default(),
    })
}

/// Checks that the completions have the log-probabilities of `model`, and its version for each token.
#[track_caller]
fn sampled_by(model: &Decoder, version: u64, groups: &BTreeMap<u64, Vec<Sampled>>) {
    for (seq, group) in groups {
        assert_eq!(group.len(), GROUP);
        for one in group {
            assert!(one.versions.iter().all(|of| *of == version), "group {seq}: {:?}", one.versions);
            let pack = Pack::new(&prompt(*seq).ids, std::slice::from_ref(&one.ids));
            let expected = model.score(&pack, &[TEMPERATURE]).unwrap().remove(0);
            for (found, expected) in one.logprobs.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-4, "group {seq}: {found} and {expected}");
            }
        }
    }
}

fn follows_the_weights(kind: (Kind, EngineKind), lora: Option<&Lora>, versions: &dyn Fn(&Decoder) -> [Decoder; 2]) {
    let mut cluster = cluster(lora);
    let server = server(&cluster, kind.0, false);
    let worker = worker(&cluster, &server, kind.1);
    cluster.submit(0..4);
    let groups = cluster.take(4);
    sampled_by(&cluster.model, 0, &groups);
    // Group 6 is trained at version 3 and must begin with version 2 at least.
    cluster.submit(6..8);
    let [first, second] = versions(&cluster.model);
    cluster.publish(1, &first);
    cluster.publish(2, &second);
    sampled_by(&second, 2, &cluster.take(2));
    cluster.drained();
    let summary = worker.end().unwrap();
    assert!(summary.groups >= 6 && summary.given_back == 0, "{summary:?}");
    assert!(server.adapters().is_empty(), "a worker that leaves takes its adapters from the server");
}

#[test]
fn a_server_of_a_worker_gets_all_weights_of_each_version() {
    let versions = |model: &Decoder| [changed(model), changed(&changed(model))];
    follows_the_weights((Kind::Vllm, EngineKind::Vllm), None, &versions);
    follows_the_weights((Kind::Sglang, EngineKind::Sglang), None, &versions);
}

#[test]
fn a_server_of_a_worker_gets_the_adapters_of_each_version() {
    let versions = |model: &Decoder| {
        [0.05, 0.1].map(|size| {
            let (adapted, params) = model.adapted(&lora(), 3).unwrap();
            for (seed, (_, var)) in params.iter().enumerate() {
                let noise = (var.as_tensor().ones_like().unwrap() * (size * (1.0 + seed as f64 % 3.0))).unwrap();
                var.set(&noise).unwrap();
            }
            adapted.snapshot().unwrap()
        })
    };
    follows_the_weights((Kind::Vllm, EngineKind::Vllm), Some(&lora()), &versions);
}

#[test]
fn a_worker_waits_for_a_server_that_is_started_again() {
    let mut cluster = cluster(None);
    let server = server(&cluster, Kind::Vllm, false);
    server.kill();
    let worker = worker(&cluster, &server, EngineKind::Vllm);
    cluster.submit(0..2);
    server.restart();
    cluster.take(2);
    server.kill();
    cluster.submit(2..4);
    server.restart();
    let groups = cluster.take(2);
    sampled_by(&cluster.model, 0, &groups);
    worker.end().unwrap();
}

#[test]
fn work_for_which_no_server_is_usable_goes_to_another_worker() {
    let mut cluster = cluster(None);
    let server = server(&cluster, Kind::Vllm, false);
    let worker = worker(&cluster, &server, EngineKind::Vllm);
    cluster.submit(0..2);
    cluster.take(2);
    // The hand-over of the next version fails while nothing is under way.
    server.kill();
    let next = changed(&cluster.model);
    cluster.publish(1, &next);
    cluster.submit(4..6);
    let other = cluster.worker("b");
    let groups = cluster.take(2);
    assert_eq!(groups, expected(&next, 1, 4..6));
    other.end().unwrap();
    worker.end().unwrap();
}

#[test]
fn a_run_or_a_server_that_does_not_allow_for_the_other_is_refused() {
    type Change = fn(&mut RunNotice);
    let changes: [(Change, &str); 3] = [
        (|notice| notice.sampling.corrects = Some(false), "set learner.correction = \"tis\""),
        (|notice| notice.sampling.top_p = Some(0.9), "the run has rollout.top_p"),
        (|notice| notice.sampling.longest_prompt = 5000, "its context has 512 tokens"),
    ];
    for (change, words) in changes {
        let cluster = cluster(None);
        let mut notice: RunNotice =
            serde_json::from_slice(&cluster.notices.get("test", "run").unwrap().unwrap()).unwrap();
        change(&mut notice);
        cluster.notices.set("test", "run", &serde_json::to_vec(&notice).unwrap()).unwrap();
        let server = server(&cluster, Kind::Vllm, false);
        let error = worker(&cluster, &server, EngineKind::Vllm).thread.join().unwrap().unwrap_err();
        assert!(format!("{error:#}").contains(words), "{error:#}");
    }
    let cluster = cluster(Some(&lora()));
    let server = server(&cluster, Kind::Vllm, true);
    let error = worker(&cluster, &server, EngineKind::Vllm).thread.join().unwrap().unwrap_err();
    assert!(format!("{error:#}").contains("it has another base model"), "{error:#}");
}

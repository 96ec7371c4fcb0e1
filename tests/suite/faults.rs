//! Tests of failing actors: the graph is rebuilt from the last finished step, and every group is trained once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use kernels::AdamWConfig;
use preceptor::config::Config;
use preceptor::pipeline::label::{Labeler, Labels};
use preceptor::pipeline::learn::TrainState;
use preceptor::pipeline::learn::value::ValueModel;
use preceptor::pipeline::learn::{Done, Observer};
use preceptor::pipeline::setup::Prepared;
use preceptor::pipeline::topology::Node;
use preceptor::rl::ledger::{Ledger, SharedLedger};
use preceptor::run::controller::AdjustableLimits;
use preceptor::types::{Group, Rewarded, Verdict};
use preceptor_actors::{GraphOptions, Outcome, RestartPolicy, SnapshotCell, spawn_graph};

use crate::common::config;

/// A labeler that prefers short answers, and fails in the configured way.
struct Scripted {
    fault: Fault,
    struck: Arc<AtomicBool>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Panics once, at this group.
    Panic(u64),
    /// Fails once at this group; the retry succeeds.
    Once(u64),
    /// Fails at this group every time.
    Always(u64),
}

impl Labeler for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn model(&self) -> u64 {
        0
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        let seq = group.prompt.seq;
        match self.fault {
            Fault::Panic(at) if at == seq && !self.struck.swap(true, Ordering::SeqCst) => panic!("the judge fell over"),
            Fault::Once(at) if at == seq && !self.struck.swap(true, Ordering::SeqCst) => {
                anyhow::bail!("the judge is busy")
            }
            Fault::Always(at) if at == seq => anyhow::bail!("the judge is gone"),
            _ => {}
        }
        let scores = group.completions.iter().map(|one| Verdict::Label(-(one.ids.len() as f64))).collect();
        Ok(Labels { scores, ..Labels::default() })
    }
}

/// Observer that records the groups that were trained or masked at each step.
#[derive(Default)]
struct Seen {
    trained: Vec<u64>,
    masked: Vec<u64>,
    figures: Vec<f64>,
    /// The first group that was trained.
    first: Option<Rewarded>,
}

struct Notes(Arc<Mutex<Seen>>);

impl Observer for Notes {
    fn group(&mut self, _done: u64, _of: u64) {}

    fn step(&mut self, done: Done<'_>, _state: &TrainState) -> Result<()> {
        let mut seen = self.0.lock().unwrap();
        seen.first.get_or_insert_with(|| done.batch[0].clone());
        for group in done.batch {
            let list = if group.masked.is_some() { &mut seen.masked } else { &mut seen.trained };
            list.push(group.group.prompt.seq);
        }
        seen.figures.push(done.record.get("loss/policy"));
        Ok(())
    }

    fn nonfinite(&mut self, _step: u64, _batch: &[Rewarded]) {}
}

fn offline(dir: &Path) -> Config {
    let data = dir.join("data.jsonl");
    let lines: String = (0..6).map(|i| format!("{{\"prompt\": \"number {i}\"}}\n")).collect();
    std::fs::write(&data, lines).unwrap();
    let overrides = [
        format!("data.path=\"{}\"", data.display()),
        "run.steps=4".into(),
        "learner.batch_groups=2".into(),
        "learner.eta=0".into(),
        "learner.warmup_steps=0".into(),
        "rollout.group_size=3".into(),
        "rollout.slots=4".into(),
        "rollout.max_new_tokens=6".into(),
    ];
    preceptor::config::load(&config("offline.toml"), &overrides).unwrap_or_else(|errors| panic!("{errors}"))
}

/// Creates a node for four steps of two groups, with a labeler that has `fault`.
fn node(dir: &Path, fault: Fault, seen: &Arc<Mutex<Seen>>) -> Node {
    let config = offline(dir);
    let prepared = preceptor::pipeline::setup::prepare(&config, false).unwrap();
    let value = ValueModel::new(prepared.policy(), false, AdamWConfig::default()).unwrap();
    let struck = Arc::new(AtomicBool::new(false));
    let labelers = move |_: &Config, _: &Prepared| -> Result<Box<dyn Labeler>> {
        Ok(Box::new(Scripted { fault, struck: Arc::clone(&struck) }))
    };
    Node {
        state: Arc::new(Mutex::new(
            TrainState::new(prepared.policy(), AdamWConfig::default(), Some(value), None).unwrap(),
        )),
        cell: Arc::new(SnapshotCell::new(0, prepared.identity, Arc::clone(prepared.policy()))),
        observer: Arc::new(Mutex::new(Notes(Arc::clone(seen)))),
        ledger: SharedLedger::default(),
        limits: AdjustableLimits::default(),
        reward_model: None,
        fleet: None,
        coordinator: std::sync::OnceLock::new(),
        labelers: Box::new(labelers),
        prepared: Arc::new(prepared),
        config,
    }
}

/// Runs such a node. Returns its outcome, the recorded groups, and the number of restarts.
fn run(fault: Fault) -> (Outcome, Seen, u32) {
    let dir = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (outcome, restarts) = drive(node(dir.path(), fault, &seen));
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    (outcome, seen, restarts)
}

fn drive(node: Node) -> (Outcome, u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let restart = RestartPolicy { initial_backoff: Duration::from_millis(1), ..RestartPolicy::default() };
        let graph = spawn_graph(GraphOptions { restart, ..GraphOptions::default() }, move |builder| node.wire(builder));
        (graph.wait().await, graph.report().restarts)
    })
}

#[test]
fn a_panicking_labeler_costs_a_restart_and_no_group() {
    let (outcome, undisturbed, _) = run(Fault::None);
    assert_eq!(outcome, Outcome::Finished);
    let (outcome, seen, restarts) = run(Fault::Panic(5));
    assert_eq!(outcome, Outcome::Finished);
    assert_eq!(restarts, 1);
    assert_eq!(seen.trained, (0..8).collect::<Vec<_>>());
    // After the last finished step the run continues as if nothing had happened.
    assert_eq!(seen.figures, undisturbed.figures);
}

#[test]
fn a_failed_verdict_is_retried_and_never_leaves_the_labeler() {
    let (outcome, seen, restarts) = run(Fault::Once(3));
    assert_eq!((outcome, restarts), (Outcome::Finished, 0));
    assert_eq!((seen.trained.len(), seen.masked.len()), (8, 0));
    let dir = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let node = node(dir.path(), Fault::Always(3), &seen);
    let ledger = node.ledger.clone();
    let (outcome, restarts) = drive(node);
    let Outcome::Failed { error, .. } = outcome else { panic!("{outcome:?}") };
    assert!(error.contains("group 3 got no verdict: the judge is gone"), "{error}");
    assert!(restarts > 0, "a local judge may succeed after the graph is rebuilt");
    let seen = seen.lock().unwrap();
    assert_eq!((&seen.trained[..], &seen.masked[..]), (&[0, 1][..], &[][..]), "the batch of the failed group waits");
    assert_eq!(ledger.count().generated, 1, "the failed group keeps its completions");
}

#[test]
fn a_token_of_weights_newer_than_the_learners_is_refused() {
    let (_, seen, _) = run(Fault::None);
    let mut group = seen.first.unwrap();
    group.group.completions[0].versions[0] = 7;
    let mut ledger = Ledger::default();
    ledger.admit(0);
    ledger.rewarded(&group).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = node(dir.path(), Fault::None, &Arc::default());
    node.ledger = SharedLedger::new(ledger);
    let (outcome, _) = drive(node);
    let Outcome::Failed { error, fatal: true, .. } = outcome else { panic!("{outcome:?}") };
    assert!(error.contains("group 0 has a token of version 7, and the learner is at version 0"), "{error}");
}

#[test]
fn a_learner_that_never_stops_ends_the_run_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path(), Fault::None, &Arc::default());
    let state = Arc::clone(&node.state);
    // Simulates a learner that hangs in the middle of its work.
    let _held = state.lock().unwrap();
    let (outcome, _) = drive(node);
    let Outcome::Failed { error, fatal: true, .. } = outcome else { panic!("{outcome:?}") };
    assert!(error.contains("still holds the weights"), "{error}");
}

/// Runs the program with a fault at one of [`preceptor::util::failpoints::POINTS`].
fn with_fault(dir: &Path, fault: &str, overrides: &[&str]) -> std::process::Output {
    let mut command = crate::common::preceptor(dir);
    command.arg("train").arg(config("offline.toml")).args(["--run-dir", "run"]).args(crate::common::small());
    command.args(overrides.iter().flat_map(|one| ["--set", one])).args(["--set", "supervision.backoff_s=0.01"]);
    command.env("FAILPOINTS", fault).output().unwrap()
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_device_that_runs_out_of_memory_continues_with_smaller_micro_batches() {
    // In the middle of the second step's groups, once with one step per batch and once within a batch of several steps.
    for (overrides, fault) in [
        (&["run.steps=3"][..], "learn.forward=6*off->2*return(CUDA_ERROR_OUT_OF_MEMORY)->off"),
        (
            &["run.steps=3", "learner.algorithm=ppo", "learner.epochs=2", "learner.minibatches=2"],
            "learn.forward=15*off->1*return(out of memory)->off",
        ),
    ] {
        let overrides = [overrides, &["learner.eta=0"]].concat();
        let (dir, uninterrupted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let output = with_fault(dir.path(), fault, &overrides);
        let text = crate::common::stderr(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("ran out of memory with 4 completions at a time; the batch continues with 2"), "{text}");
        assert!(!text.contains("restarting"), "{text}");
        assert_eq!(text.contains("continues with 1"), fault.contains("2*return"), "{text}");
        assert!(crate::common::train(uninterrupted.path(), &overrides).status.success());
        let figures = |dir: &Path| -> Vec<(f64, u64)> {
            let steps = crate::common::metrics(&dir.join("run"));
            let of = |step: &serde_json::Value| {
                (step["gradient/norm"].as_f64().unwrap(), step["completions"].as_u64().unwrap())
            };
            steps.iter().map(of).collect()
        };
        let (broken, uninterrupted) = (figures(dir.path()), figures(uninterrupted.path()));
        assert_eq!(broken.len(), 3);
        for ((a, n), (b, m)) in broken.iter().zip(&uninterrupted).take(2) {
            assert_eq!(n, m);
            assert!((a - b).abs() < 1e-3 * b, "nothing is counted twice: {a} against {b}");
        }
    }
    // If a single completion is too much, it is an ordinary error.
    let dir = tempfile::tempdir().unwrap();
    let output = with_fault(dir.path(), "learn.forward=return(out of memory)", &["supervision.max_restarts=1"]);
    let text = crate::common::stderr(&output);
    assert!(!output.status.success() && text.contains("learn failed (1 restarts): out of memory"), "{text}");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_reward_model_that_fails_between_learning_and_its_ledger_entry_learns_nothing_twice() {
    let overrides =
        ["run.mode=distilled", "learner.eta=0", "reward_model.batch_pairs=3", "reward_model.warm_up_groups=4"];
    let uninterrupted = tempfile::tempdir().unwrap();
    assert!(crate::common::train(uninterrupted.path(), &overrides).status.success());
    let metrics = |dir: &Path| crate::common::metrics(&dir.join("run"));
    // Two pairs per group and three per step: one of two consecutive groups leads to a step.
    for before in [5, 6] {
        let dir = tempfile::tempdir().unwrap();
        let output = with_fault(dir.path(), &format!("reward.learn={before}*off->1*return(lost)->off"), &overrides);
        let text = crate::common::stderr(&output);
        assert!(output.status.success() && text.contains("restarting the graph"), "{text}");
        assert_eq!(metrics(dir.path()), metrics(uninterrupted.path()));
    }
}

#[test]
fn paid_labels_survive_a_restart_of_the_graph() {
    let dir = tempfile::tempdir().unwrap();
    // The reward actor fails twice while it holds a labeled group, with others queued behind it.
    let overrides = ["labeler.type=direct", "learner.eta=2", "run.steps=4"];
    let output = with_fault(dir.path(), "reward.enter=4*off->2*return(broken)->off", &overrides);
    let text = crate::common::stderr(&output);
    assert!(output.status.success() && text.matches("restarting the graph").count() == 2, "{text}");
    let scraped = std::fs::read_to_string(dir.path().join("run/metrics.prom")).unwrap();
    let labels: u64 = scraped
        .lines()
        .filter(|line| line.starts_with("preceptor_labels_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert_eq!(labels, 4 * 4 * 4, "{text}");
}

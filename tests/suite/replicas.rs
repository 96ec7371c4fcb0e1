//! Tests of replicas of the learner: the gradient of a batch does not depend on their number but by rounding.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::{Device, Tensor};
use kernels::AdamWConfig;
use preceptor::config::Config;
use preceptor::pipeline::learn::replicas::Layout;
use preceptor::pipeline::learn::stage::{Learn, LearnPlan};
use preceptor::pipeline::learn::{Done, Observer, TrainState};
use preceptor::pipeline::setup::{Prepared, prepare};
use preceptor::pipeline::topology::learning::{adam, algorithm, learn_plan, lora, value_model};
use preceptor::run::journal::{Entry, Journal, Step};
use preceptor::types::Rewarded;
use preceptor_actors::{
    Admission, AdmissionGate, GraphOptions, Item, Outcome, SnapshotCell, Source, StageContext, StageResult, StageSpec,
    spawn_graph,
};
use serde_json::Value;

use crate::common::{config, preceptor, small, stderr, train, training};

/// Source of recorded groups.
struct Recorded(std::vec::IntoIter<Rewarded>);

impl Source for Recorded {
    type Out = Rewarded;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Rewarded>>> {
        let item =
            |body: Rewarded| Item { seq: body.group.prompt.seq, incarnation: ctx.incarnation(), version: 0, body };
        Ok(self.0.next().map(item))
    }
}

/// Number of replicas of the learner.
#[derive(Debug, Clone, Copy)]
enum Replicas {
    /// They share the weights.
    Shared(usize),
    /// Each has a copy, as on a device of its own.
    Copies(usize),
}

use Replicas::{Copies, Shared};

struct Silent;

impl Observer for Silent {
    fn group(&mut self, _done: u64, _of: u64) {}

    fn step(&mut self, _done: Done<'_>, _state: &TrainState) -> Result<()> {
        Ok(())
    }

    fn nonfinite(&mut self, _step: u64, _batch: &[Rewarded]) {}
}

/// Returns the groups that a run of `overrides` trained on, and its configuration.
fn recorded(dir: &Path, overrides: &[&str]) -> (Config, Vec<Rewarded>) {
    let output = train(dir, overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let groups = Journal::open(&dir.join("run")).unwrap().filter_map(|entry| match entry.unwrap() {
        Entry::Step(Step { batch, .. }) => Some(batch),
        _ => None,
    });
    let all: Vec<String> = small()
        .filter(|one| *one != "--set")
        .map(str::to_owned)
        .chain(overrides.iter().map(|one| (*one).to_owned()))
        .collect();
    let config = preceptor::config::load(&config("offline.toml"), &all).unwrap_or_else(|errors| panic!("{errors}"));
    (config, groups.flatten().collect())
}

/// Trains on `groups` with `replicas` replicas and `batch` groups per step, and returns the state.
fn learn(config: &Config, prepared: &Prepared, groups: &[Rewarded], batch: u64, replicas: Replicas) -> TrainState {
    let policy = prepared.policy();
    let value = value_model(config, policy).unwrap();
    let mut state = TrainState::new(policy, adam(config), value, lora(config).as_ref()).unwrap();
    let replicas = match replicas {
        Replicas::Shared(count) => count,
        Replicas::Copies(count) => {
            state.place(vec![Device::Cpu; count]);
            count
        }
    };
    let state = Arc::new(Mutex::new(state));
    let cell = Arc::new(SnapshotCell::new(0, prepared.identity, Arc::clone(policy)));
    let plan = LearnPlan { batch_groups: batch, layout: Layout { replicas, threads: 1 }, ..learn_plan(config) };
    let (shared, source, config) = (Arc::clone(&state), groups.to_vec(), config.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(async {
        let graph = spawn_graph(GraphOptions::default(), move |builder| {
            let (out, rewarded) = builder.edge("rewarded", 2);
            builder.source(StageSpec::new("recorded"), Recorded(source.clone().into_iter()), out);
            let gate = Arc::new(AdmissionGate::new(Admission { eta: 0, batch: u64::MAX / 2 }, 0, 0));
            let (state, cell) = (Arc::clone(&shared), Arc::clone(&cell));
            let observer = Arc::new(Mutex::new(Silent));
            let learn = Learn::new(state, algorithm(&config), plan.clone(), cell, gate, observer);
            builder.sink(StageSpec::new("learn").threads(replicas), learn, rewarded);
            Ok(())
        });
        graph.wait().await
    });
    assert_eq!(outcome, Outcome::Finished);
    // The graph has ended, and with it all other owners but the closure that wires it.
    let mut guard = state.lock().unwrap();
    let empty = TrainState::new(policy, AdamWConfig::default(), None, None).unwrap();
    std::mem::replace(&mut *guard, empty)
}

/// Returns all elements of tensors, in order of their names.
fn elements(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Vec<f64> {
    let mut all: Vec<(String, Tensor)> = tensors.into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let values = all.iter().flat_map(|(_, tensor)| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    values.map(f64::from).collect()
}

/// Returns ‖a − b‖ / ‖b‖.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// Variants of training: full weights, adapters, a value model with several steps per batch, and micro-batches.
const VARIANTS: [&[&str]; 4] = [
    &[],
    &["policy.lora={ rank = 4 }"],
    &["learner.algorithm=ppo", "learner.value_model=model", "learner.epochs=2", "learner.minibatches=2"],
    &["learner.micro_batch=1"],
];

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn the_gradient_of_a_batch_does_not_depend_on_the_number_of_replicas() {
    for variant in VARIANTS.iter().filter(|variant| !variant.contains(&"learner.epochs=2")) {
        let dir = tempfile::tempdir().unwrap();
        let (config, groups) = recorded(dir.path(), &[*variant, &["learner.eta=0", "run.steps=2"]].concat());
        let prepared = prepare(&config, false).unwrap();
        let gradient = |replicas: Replicas| {
            // One group is missing, so that the step is not taken and the sums remain.
            let state = learn(&config, &prepared, &groups[..4], 5, replicas);
            assert_eq!(state.step, 0);
            state.reduce().unwrap();
            let sums = state.sums[0].lock().unwrap();
            elements(sums[0].copies().unwrap())
        };
        let one = gradient(Shared(1));
        assert!(one.iter().any(|value| *value != 0.0));
        for replicas in [Shared(2), Shared(3), Shared(4), Copies(2)] {
            let apart = distance(&gradient(replicas), &one);
            println!("{variant:?}, {replicas:?}: the gradient differs by {apart:.1e}");
            assert!(apart <= 1e-6, "{variant:?}, {replicas:?}: {apart}");
        }
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn training_with_replicas_leads_to_the_same_weights() {
    for variant in VARIANTS {
        let dir = tempfile::tempdir().unwrap();
        let more = ["learner.eta=0", "run.steps=20", "learner.lr=1e-5", "learner.warmup_steps=2"];
        let (config, groups) = recorded(dir.path(), &[variant, &more[..]].concat());
        let prepared = prepare(&config, false).unwrap();
        let change = |replicas: Replicas| {
            let state = learn(&config, &prepared, &groups, 4, replicas);
            assert_eq!(state.step, 20);
            let before: HashMap<String, Tensor> = prepared.policy().weights().0.clone().into_iter().collect();
            let change = state.published().weights().0.iter().map(|(name, after)| {
                let change = match before.get(name) {
                    Some(before) => (after - before).unwrap(),
                    None => after.clone(),
                };
                (name.clone(), change)
            });
            elements(change.collect::<Vec<_>>())
        };
        let one = change(Shared(1));
        for replicas in [Shared(2), Shared(4), Copies(3)] {
            let several = change(replicas);
            assert_eq!(several, change(replicas), "{replicas:?} gives the same bits each time");
            let apart = distance(&several, &one);
            println!("{variant:?}, {replicas:?}: 20 steps differ by {apart:.1e}");
            assert!(apart <= 1e-3, "{variant:?}, {replicas:?}: {apart}");
        }
    }
}

#[test]
fn a_run_with_replicas_is_resumed_with_another_number_and_replayed_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let short = ["run.steps=2", "learner.replicas=2"];
    let output = train(dir.path(), &short);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut resumed = training(dir.path(), &["run.steps=4", "learner.replicas=3"]);
    let output = resumed.arg("--resume").output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("learner.replicas"), "the change is told: {text}");
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn devices_of_replicas_are_checked_and_a_run_on_copies_is_replayed_exactly() {
    let dir = tempfile::tempdir().unwrap();
    for (overrides, words) in [
        (&["learner.devices=[\"cuda:0\", \"cuda:1\"]"][..], "the first replica uses the policy's device"),
        (&["learner.devices=[\"cpu\", \"cpu\"]", "learner.replicas=3"], "remove learner.replicas"),
        (&["policy.device=cuda:0", "learner.replicas=2"], "set learner.devices"),
        (&["learner.devices=[\"cpu\", \"cuda:0\"]"], "learner.devices = \"cuda:0\""),
    ] {
        let output = train(dir.path(), overrides);
        assert_eq!(output.status.code(), Some(2), "{overrides:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{overrides:?}: {}", stderr(&output));
    }
    let output = train(dir.path(), &["learner.devices=[\"cpu\", \"cpu\"]", "sft.steps=3", "sft.batch=3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn fine_tuning_with_replicas_leads_to_the_same_loss() {
    let losses = |replicas: &str| -> Vec<f64> {
        let dir = tempfile::tempdir().unwrap();
        let output = train(dir.path(), &["sft.steps=6", "sft.batch=5", "sft.lr=1e-3", "run.steps=1", replicas]);
        assert!(output.status.success(), "{}", stderr(&output));
        let phases = std::fs::read_to_string(dir.path().join("run/phases.jsonl")).unwrap();
        phases.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
    };
    let one = losses("learner.replicas=1");
    assert_eq!(one.len(), 6);
    for (a, b) in losses("learner.replicas=2").iter().zip(&one) {
        assert!((a - b).abs() <= 1e-5 * b, "{a} against {b}");
    }
}

#[test]
fn a_reward_model_warmed_up_with_replicas_has_the_same_loss() {
    let pairs = format!("reward_model.pairs=\"{}\"", config("data/preferences-summaries.jsonl").display());
    let losses = |replicas: &str| -> Vec<f64> {
        let dir = tempfile::tempdir().unwrap();
        let more = ["reward_model.epochs=2", "reward_model.batch_pairs=5", "reward_model.holdout=0.3", "run.steps=1"];
        let output = train(dir.path(), &[&["run.mode=human", pairs.as_str(), replicas], &more[..]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let phases = std::fs::read_to_string(dir.path().join("run/phases.jsonl")).unwrap();
        let lines = phases.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter_map(|line| line["loss"].as_f64()).collect()
    };
    let one = losses("learner.replicas=1");
    assert!(one.len() > 3, "{one:?}");
    for replicas in ["learner.replicas=2", "learner.replicas=3"] {
        let several = losses(replicas);
        assert_eq!(several.len(), one.len());
        assert!(
            several.iter().zip(&one).all(|(a, b)| (a - b).abs() <= 1e-5 * b),
            "{replicas}: {several:?} and {one:?}"
        );
    }
}

//! Helpers shared by the tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use preceptor::lm::model::{Decoder, ModelConfig, Weights, export};
use preceptor::lm::tokens::Tokenizer;
use serde_json::Value;

/// Maximum time that a test waits for an event that must occur. No assertion depends on how soon it occurs.
pub const PATIENCE: Duration = Duration::from_secs(180);

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name)
}

pub fn max_abs_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Writes a byte-level model of random weights to `dir/policy`. Returns its path and the model.
pub fn byte_policy(dir: &Path, seed: u64) -> (PathBuf, Decoder) {
    let tokenizer = Tokenizer::bytes();
    let config = ModelConfig {
        context: 1024,
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_ids().to_vec(),
        ..ModelConfig::tiny(tokenizer.vocab_size())
    };
    let weights = Weights::scratch(&config, 0.2, seed, &Device::Cpu).unwrap();
    let path = dir.join("policy");
    std::fs::create_dir_all(&path).unwrap();
    export::write(&path, &config, &weights, DType::F32).unwrap();
    tokenizer.save(&path).unwrap();
    (path, Decoder::new(&config, &weights).unwrap())
}

/// Returns the program's command, to be started in `dir`.
pub fn preceptor(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_preceptor"));
    command.current_dir(dir);
    command
}

/// Returns the command of a small offline training run in `dir/run` with a few overrides and no server.
pub fn training(dir: &Path, overrides: &[&str]) -> Command {
    let mut command = preceptor(dir);
    command.arg("train").arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
    command.args(overrides.iter().flat_map(|one| ["--set", one]));
    command
}

/// Executes such a run to its end.
pub fn train(dir: &Path, overrides: &[&str]) -> Output {
    training(dir, overrides).output().unwrap()
}

/// Resumes such a run to its end.
pub fn resume(dir: &Path, overrides: &[&str]) -> Output {
    training(dir, overrides).arg("--resume").output().unwrap()
}

/// Overrides that shorten the offline run to seconds.
pub fn small() -> impl Iterator<Item = &'static str> {
    [
        "run.steps=4",
        "serve.enabled=false",
        "learner.batch_groups=4",
        "rollout.group_size=4",
        "rollout.slots=8",
        "rollout.max_new_tokens=12",
    ]
    .into_iter()
    .flat_map(|one| ["--set", one])
}

/// Returns the steps of a run's `metrics.jsonl`, without time-dependent values.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut step: Value = serde_json::from_str(line).unwrap();
            step.as_object_mut().unwrap().retain(|name, _| !name.starts_with("time/"));
            step
        })
        .collect()
}

/// Waits until `holds` is true, for as long as a busy machine may need.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for this: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Copies the directory `from` to `to`, which is created.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(&path, &to).unwrap();
        }
    }
}

/// Returns the numbers of the trained groups, in order, from the journal of `run`.
pub fn trained(run: &Path) -> Vec<u64> {
    let mut seqs = Vec::new();
    for entry in preceptor::run::journal::Journal::open(run).unwrap() {
        if let preceptor::run::journal::Entry::Step(step) = entry.unwrap() {
            seqs.extend(step.batch.iter().map(|group| group.group.prompt.seq));
        }
    }
    seqs
}

/// Compares the file at `name` with `text`, or writes it if `PRECEPTOR_WRITE` is set.
#[track_caller]
pub fn is_generated(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("PRECEPTOR_WRITE").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(there == text, "{name} is not what the program generates; write it again with PRECEPTOR_WRITE=1");
}

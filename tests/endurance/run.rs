//! Helpers that run the real program.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use preceptor::run::checkpoint::{BestCheckpoint, CheckpointStore};
use preceptor::run::journal::{Entry, Journal};
use serde_json::Value;

/// Returns the program's command: the binary built with the trial, or the one that `PRECEPTOR_PROGRAM` names, so that a
/// long trial is not disturbed by the next build.
pub fn program() -> Command {
    Command::new(std::env::var_os("PRECEPTOR_PROGRAM").unwrap_or_else(|| env!("CARGO_BIN_EXE_preceptor").into()))
}

/// Returns `preceptor train` of the offline configuration in `dir/NAME`, without a server, with steps of a few
/// hundredths of a second.
pub fn train(dir: &Path, name: &str, overrides: &[String]) -> Command {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/offline.toml");
    let mut command = program();
    command.current_dir(dir).arg("train").arg(config).args(["--run-dir", name]);
    let small = [
        "serve.enabled=false",
        "learner.batch_groups=2",
        "rollout.group_size=4",
        "rollout.slots=8",
        "rollout.max_new_tokens=8",
    ];
    command.args(small.into_iter().chain(overrides.iter().map(String::as_str)).flat_map(|one| ["--set", one]));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Runs the command to its end.
pub fn to_the_end(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::piped()).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "the program failed: {text}");
    Ok(text)
}

/// Returns the numbers of the trained groups, step by step, from the run's journal.
pub fn trained(run: &Path) -> Result<Vec<u64>> {
    let mut seqs = Vec::new();
    for entry in Journal::open(run)? {
        if let Entry::Step(step) = entry? {
            seqs.extend(step.batch.iter().map(|group| group.group.prompt.seq));
        }
    }
    Ok(seqs)
}

/// Returns the steps of `metrics.jsonl` without time-dependent values.
pub fn metrics(run: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let steps = text.lines().map(|line| {
        let mut step: Value = serde_json::from_str(line)?;
        step.as_object_mut().context("a step is an object")?.retain(|name, _| !name.starts_with("time/"));
        Ok(step)
    });
    steps.collect()
}

/// Returns a fingerprint of every file below `dir`, including its name; for a link, of its target.
pub fn fingerprint(dir: &Path) -> Result<u64> {
    let (mut all, mut open) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_symlink() {
                all.push(format!("{} -> {}", path.display(), std::fs::read_link(&path)?.display()));
            } else if path.is_dir() {
                open.push(path);
            } else {
                all.push(format!("{} {:08x}", path.display(), crc32fast::hash(&std::fs::read(&path)?)));
            }
        }
    }
    all.sort();
    Ok(preceptor::util::seed::text(&all.join("\n")))
}

/// Returns the names of a run's checkpoints, oldest first.
pub fn checkpoints(run: &Path) -> Result<Vec<String>> {
    let all = CheckpointStore::new(run, 1000, BestCheckpoint::None).all()?;
    Ok(all.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
}

/// Returns the last checkpoint of a run.
pub fn last_checkpoint(run: &Path) -> Result<PathBuf> {
    let store = CheckpointStore::new(run, 1000, BestCheckpoint::None);
    store.all()?.pop().with_context(|| format!("{} has no checkpoint", run.display()))
}

/// A random generator whose sequence depends only on the seed.
pub struct Random(pub u64);

impl Random {
    /// Returns the next random number in [0, 1).
    pub fn share(&mut self) -> f64 {
        self.0 = preceptor::util::seed::mix(self.0);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

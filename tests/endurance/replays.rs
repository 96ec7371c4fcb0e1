//! Repeated replays of an asynchronous run with two rollout actors.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::run::{last_checkpoint, metrics, program, to_the_end, train};

pub fn trial(count: u32, steps: u64) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let overrides =
        [&format!("run.steps={steps}"), "learner.eta=4", "rollout.workers=2"].map(|one: &str| one.to_owned());
    to_the_end(&mut train(dir.path(), "run", &overrides))?;
    let run = dir.path().join("run");
    let about: Value = serde_json::from_str(&std::fs::read_to_string(last_checkpoint(&run)?.join("preceptor.json"))?)?;
    let weights = about["policy"].as_str().context("a checkpoint has its policy's fingerprint")?;
    let stale = metrics(&run)?.iter().filter_map(|step| step["staleness/max"].as_u64()).max().unwrap_or_default();
    for _ in 0..count {
        let output = program().current_dir(dir.path()).args(["replay", "run"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            text == format!("{steps} steps, weights {weights}, as in the run\n"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(format!(
        "replays: {count} of {steps} steps at eta 4 (staleness up to {stale}) with two rollout actors, each at weights {weights}"
    ))
}

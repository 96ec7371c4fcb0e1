//! Effect of staleness on each algorithm: the offline task at several bounds η, with several seeds, as a table.
//!
//! ```text
//! cargo bench --bench staleness
//! ```
//!
//! Every run uses the real program. The queues are long enough for the rollouts to run ahead as far as η allows; the table
//! has the measured age of the tokens. The score is the judge's mean over the last fifteen steps.

use std::path::Path;
use std::process::Command;

use preceptor::rl::algo::advantage::moments;
use serde_json::Value;

const ETAS: [u64; 4] = [0, 1, 4, 16];
const SEEDS: u64 = 3;
/// Quantile of Student's t distribution for three samples, two-sided 95 %.
const T: f64 = 4.303;
/// Number of last steps that are averaged.
const LAST: usize = 15;

const ALGORITHMS: [(&str, &[&str]); 4] = [
    ("Online DPO", &["run.mode=preference", "learner.algorithm=online-dpo", "labeler.pairs=all"]),
    ("RLOO, TIS", &["learner.algorithm=rloo"]),
    ("PPO, decoupled", &["learner.algorithm=ppo", "learner.epochs=2", "learner.correction=decoupled"]),
    ("PPO, naive", &["learner.algorithm=ppo", "learner.epochs=2", "learner.correction=none"]),
];

fn main() {
    // Only `cargo bench` measures; `cargo test --benches` has nothing to check here.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!("| algorithm | {} |", ETAS.map(|eta| format!("η = {eta}")).join(" | "));
    println!("|---|{}", "---|".repeat(ETAS.len()));
    for (name, overrides) in ALGORITHMS {
        let cells: Vec<String> = ETAS.iter().map(|eta| cell(overrides, *eta)).collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
}

/// Returns the table cell with the mean score, its interval over seeds, and the mean age of the tokens.
fn cell(overrides: &[&str], eta: u64) -> String {
    let runs: Vec<[f64; 2]> = (0..SEEDS).map(|seed| run(overrides, eta, seed)).collect();
    let (score, std) = moments(runs.iter().map(|run| run[0]));
    let age = moments(runs.iter().map(|run| run[1])).0;
    format!("{score:.2} ± {:.2} (age {age:.1})", T * std / (SEEDS as f64).sqrt())
}

/// Trains one run. Returns the judge's mean score over the last steps, and the mean age of their tokens in versions.
fn run(overrides: &[&str], eta: u64, seed: u64) -> [f64; 2] {
    let dir = tempfile::tempdir().expect("a folder for the run");
    let mut settings: Vec<String> = overrides.iter().map(|one| (*one).to_owned()).collect();
    settings.extend([format!("learner.eta={eta}"), format!("run.seed={seed}"), "serve.enabled=false".into()]);
    settings.extend(["rollout", "labeler", "reward"].map(|section| format!("{section}.capacity=256")));
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/offline.toml");
    let output = Command::new(env!("CARGO_BIN_EXE_preceptor"))
        .arg("train")
        .arg(config)
        .arg("--run-dir")
        .arg(dir.path().join("run"))
        .args(settings.iter().flat_map(|one| ["--set", one]))
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{settings:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(dir.path().join("run/metrics.jsonl")).expect("the run's metrics");
    let steps: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    let mean = |name: &str| {
        let values: Vec<f64> =
            steps.iter().rev().take(LAST).map(|step| step[name].as_f64().unwrap_or(f64::NAN)).collect();
        moments(values.iter().copied()).0
    };
    [mean("judge/mean"), mean("staleness/mean")]
}

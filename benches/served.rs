//! Rollouts on inference servers: the cost of a completion to the node, and the share that a run reaches of the speed of
//! several servers.
//!
//! ```text
//! cargo bench --bench served             # --completions 4000 --steps 30
//! ```
//!
//! The servers are the fake ones of the tests. For the cost, a server answers each request with an answer that it computed
//! before; measured is the processor time of the threads that send requests and read answers, from Linux's scheduler. For the
//! share, `preceptor train` runs on four servers of known speeds.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::DType;
use preceptor::config::EngineKind;
use preceptor::lm::model::{Decoder, Lora};
use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::stage::RolloutEngine;
use preceptor::pipeline::served::{Fleet, FleetPlan, FolderStore, ServedEngine};
use preceptor::types::Prompt;
use preceptor_actors::{Admission, SnapshotCell};
use serde_json::Value;

#[path = "../tests/suite/common.rs"]
#[allow(dead_code)]
mod common;

#[path = "../tests/suite"]
#[allow(dead_code, unused_imports)]
mod suite {
    pub mod fake_engine;
}

use suite::fake_engine::{FakeEngine, Kind, Options};

/// Speeds of the servers of the second measurement, in tokens per second.
const SPEEDS: [f64; 4] = [100.0, 200.0, 200.0, 400.0];

fn main() {
    // Only `cargo bench` measures; `cargo test --benches` has nothing to check here.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (model, decoder) = common::byte_policy(dir.path(), 1);
    let decoder = Arc::new(decoder);
    for tokens in [16, 64, 256] {
        cost(dir.path(), &model, &decoder, tokens, number("--completions", 4000));
    }
    share(dir.path(), &model, number("--steps", 30));
}

/// Returns the value of a command-line option, or `default`.
fn number(name: &str, default: usize) -> usize {
    let arguments: Vec<String> = std::env::args().collect();
    let at = arguments.iter().position(|argument| argument == name);
    at.map_or(default, |at| arguments[at + 1].parse().unwrap())
}

fn server(model: &Path, slots: usize) -> FakeEngine {
    FakeEngine::start(Options { max_model_len: 1024, max_num_seqs: slots, ..Options::new(Kind::Vllm, model) })
}

/// Measures the processor time of a completion of `tokens` tokens.
fn cost(dir: &Path, model: &Path, decoder: &Arc<Decoder>, tokens: usize, completions: usize) {
    const GROUP: usize = 8;
    let server = server(model, 64);
    let tokenizer = Tokenizer::bytes();
    let prompt = tokenizer.encode("A prompt of a few words, as long as those of the tests are.").unwrap();
    let plan = FleetPlan {
        kind: EngineKind::Vllm,
        servers: vec![server.url()],
        api_key_env: None,
        sampling: Sampling { max_new_tokens: tokens, vocabulary: tokenizer.vocab_size(), ..Sampling::default() },
        rows: decoder.config().vocab_size,
        timeout: Duration::from_secs(300),
        token_timeout: Duration::ZERO,
        outage: Duration::from_secs(60),
        outage_key: "rollout.outage_s",
        in_flight: true,
        lora: Some(Lora { rank: 4, alpha: 8.0, targets: vec!["q_proj".into(), "v_proj".into()] }),
        run: 1,
        admission: Admission { eta: 1, batch: 8 },
        check_version: true,
        longest_prompt: prompt.len(),
        example: prompt.clone(),
    };
    let fleet = Fleet::connect(plan, &|text| tokenizer.encode(text)).unwrap();
    let cell = Arc::new(SnapshotCell::new(0, 1, Arc::clone(decoder)));
    let store = FolderStore::new(&dir.join("weights"), None, None, DType::F32).unwrap();
    fleet.start(&cell, Arc::new(store)).unwrap();
    server.faults(|faults| faults.repeats_answers = true);
    let mut engine = ServedEngine::new(Arc::clone(&fleet), 16 * GROUP, true);
    let prompt = |seq| Prompt {
        seq,
        epoch: 0,
        row: 0,
        text: "".into(),
        ids: prompt.clone().into(),
        blank: Arc::from([]),
        reference: None,
    };
    let (mut sent, mut ended) = (0, 0);
    let (mut began, mut before) = (Instant::now(), processor_time());
    let warm_up = completions / 10;
    let mut measured = false;
    while ended < completions + warm_up {
        while engine.free() >= GROUP && sent < completions + warm_up {
            engine.submit(&prompt(sent as u64), vec![0; GROUP]).unwrap();
            sent += GROUP;
        }
        let groups = engine.advance().unwrap_or_else(|error| panic!("{error}"));
        ended += groups.iter().map(|(_, group)| group.len()).sum::<usize>();
        if !measured && ended >= warm_up {
            (began, before, measured) = (Instant::now(), processor_time(), true);
        }
    }
    let (took, used) = (began.elapsed(), processor_time() - before);
    let each = used.as_secs_f64() / completions as f64;
    println!(
        "{tokens:>4} tokens: {:6.1} µs of processor time per completion, {:5.2} µs per token: one core reads {:8.0} tokens/s; {:.0} completions/s by the clock, with the fake server on the same cores",
        1e6 * each,
        1e6 * each / tokens as f64,
        tokens as f64 / each,
        completions as f64 / took.as_secs_f64()
    );
    fleet.stop();
}

/// Returns the processor time of this thread and of the fleet's, which are called `servers`.
fn processor_time() -> Duration {
    let of = |task: &Path| {
        let text = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        Duration::from_nanos(text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0))
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let servers =
        tasks.filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == "servers"));
    servers.map(|task| of(&task)).sum::<Duration>() + of(Path::new("/proc/thread-self"))
}

/// Runs a training on servers of [`SPEEDS`], and prints the share of the sum of their speeds that the run reaches.
fn share(dir: &Path, model: &Path, steps: usize) {
    let servers = SPEEDS.map(|speed| {
        let server = server(model, 64);
        server.faults(|faults| faults.tokens_per_second = Some(speed));
        server
    });
    let urls: Vec<String> = servers.iter().map(|server| format!("\"{}\"", server.url())).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_preceptor"));
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/offline.toml");
    command.arg("train").arg(configs).arg("--run-dir").arg(dir.join("run"));
    let overrides = [
        format!("policy.model=\"{}\"", model.display()),
        "policy.lora={ rank = 4 }".into(),
        "rollout.engine=vllm".into(),
        format!("rollout.servers=[{}]", urls.join(", ")),
        "rollout.slots=128".into(),
        "rollout.group_size=8".into(),
        "rollout.max_new_tokens=32".into(),
        "learner.batch_groups=8".into(),
        "learner.eta=4".into(),
        format!("run.steps={steps}"),
        "serve.enabled=false".into(),
    ];
    command.args(overrides.iter().flat_map(|one| ["--set", one]));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // The first steps fill the pipeline, and in the last η the servers have nothing left to sample.
    let records = &records[8..records.len() - 6];
    let time = |record: &Value| record["time/run_seconds"].as_f64().unwrap();
    let tokens: f64 = records[1..].iter().map(|record| record["tokens"].as_f64().unwrap()).sum();
    let speed = tokens / (time(&records[records.len() - 1]) - time(&records[0]));
    let sum: f64 = SPEEDS.iter().sum();
    println!(
        "servers of {SPEEDS:?} tokens/s: the run trains on {speed:.0} tokens/s, {:.1} % of their sum",
        100.0 * speed / sum
    );
}

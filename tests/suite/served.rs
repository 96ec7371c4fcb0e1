//! Tests of rollouts on inference servers, with a fake server that samples with the weights it is handed.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{byte_policy, preceptor, stderr, trained, training};
use crate::fake_engine::{FakeEngine, Kind, Options, Versions};
use crate::running::Running;

/// Writes a byte-level model to `dir/policy`.
fn policy(dir: &Path, seed: u64) -> PathBuf {
    byte_policy(dir, seed).0
}

fn server(model: &Path) -> FakeEngine {
    FakeEngine::start(Options { max_model_len: 1024, ..Options::new(Kind::Vllm, model) })
}

/// Overrides of a run that samples on `servers`.
fn served(dir: &Path, servers: &[&FakeEngine]) -> Vec<String> {
    let urls: Vec<String> = servers.iter().map(|server| format!("\"{}\"", server.url())).collect();
    vec![
        format!("policy.model=\"{}\"", dir.join("policy").display()),
        "rollout.engine=vllm".into(),
        format!("rollout.servers=[{}]", urls.join(", ")),
        "rollout.slots=16".into(),
        "rollout.outage_s=20".into(),
    ]
}

const LORA: &str = "policy.lora={ rank = 4 }";

fn run(dir: &Path, overrides: &[String], more: &[&str]) -> Output {
    let overrides: Vec<&str> = overrides.iter().map(String::as_str).chain(more.iter().copied()).collect();
    training(dir, &overrides).output().unwrap()
}

/// Returns the groups of samples.jsonl and the records of metrics.jsonl.
fn records(dir: &Path, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("run").join(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn succeeded(dir: &Path, output: &Output) -> String {
    let text = stderr(output);
    assert!(output.status.success(), "{text}");
    assert_eq!(records(dir, "metrics.jsonl").len(), 4, "{text}");
    assert_eq!(trained(&dir.join("run")), (0..16).collect::<Vec<u64>>(), "each group is trained on once");
    text
}

#[track_caller]
fn replayed(dir: &Path) {
    let output = preceptor(dir).args(["replay", "run"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn adapters_are_handed_to_servers_and_the_run_is_replayed_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let (a, b) = (server(&model), server(&model));
    let output = run(dir.path(), &served(dir.path(), &[&a, &b]), &[LORA]);
    let text = succeeded(dir.path(), &output);
    assert!(text.contains("has version 0; log-probabilities within"), "{text}");
    for server in [&a, &b] {
        assert!(server.generated_tokens() > 0, "both servers sample");
        assert_eq!(server.adapters(), Vec::<String>::new(), "the run leaves no adapters on a server");
    }
    for record in records(dir.path(), "metrics.jsonl") {
        assert!(record["staleness/max"].as_f64().unwrap() <= 1.0, "{record}");
    }
    replayed(dir.path());
}

#[test]
fn all_weights_are_handed_to_a_server_in_the_middle_of_completions() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let a = server(&model);
    let output = run(dir.path(), &served(dir.path(), &[&a]), &[]);
    succeeded(dir.path(), &output);
    assert!(a.weight_version().starts_with("policy-"), "{}", a.weight_version());
    assert!(!a.is_paused());
    replayed(dir.path());
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_server_that_ignores_new_weights_is_caught_by_its_first_hand_over() {
    for (bf16, more) in [(false, &[LORA][..]), (true, &[LORA]), (false, &[]), (true, &[])] {
        let dir = tempfile::tempdir().unwrap();
        let model = policy(dir.path(), 1);
        let (good, bad) = (server(&model), server(&model));
        for server in [&good, &bad] {
            server.faults(|faults| faults.bf16 = bf16);
        }
        let settings = served(dir.path(), &[&good, &bad]);
        let overrides: Vec<&str> = settings.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let mut running = Running::start(training(dir.path(), &overrides));
        running.says("has version 0");
        running.says("has version 0");
        bad.faults(|faults| faults.ignores_handover = true);
        let (status, text) = running.end();
        assert!(status.success(), "{text}");
        let line = format!("rollout server {} gets no prompts: it reports version ", bad.url());
        let caught = text.split(&line).nth(1).unwrap_or_else(|| panic!("bf16 {bf16}, {more:?}: {text}"));
        let version = caught.split(',').next().unwrap();
        // The first version after the initial one is caught.
        let requests = bad.requests();
        let handed = requests
            .iter()
            .filter(|request| ["/v1/load_lora_adapter", "/collective_rpc"].contains(&request.path.as_str()));
        let second = handed.map(|request| request.body.to_string()).nth(1).unwrap();
        assert!(second.contains(&format!("-{version}-")), "bf16 {bf16}, {more:?}: {second}: {text}");
        assert!(!text.contains(&format!("rollout server {} gets no prompts", good.url())), "bf16 {bf16}: {text}");
    }
}

#[test]
fn a_server_that_is_killed_loses_no_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let a = server(&model);
    let settings = served(dir.path(), &[&a]);
    let overrides: Vec<&str> = settings.iter().map(String::as_str).chain([LORA]).collect();
    let mut running = Running::start(training(dir.path(), &overrides));
    running.says("step   1/4");
    a.kill();
    running.says("is down");
    a.restart();
    let (status, text) = running.end();
    // A quick run may have needed the server only for prompts that it had answered already.
    assert!(status.success(), "{text}");
    assert_eq!(records(dir.path(), "metrics.jsonl").len(), 4, "{text}");
    assert_eq!(trained(&dir.path().join("run")), (0..16).collect::<Vec<u64>>(), "each group is trained on once");
    replayed(dir.path());
}

#[test]
fn two_runs_train_adapters_on_one_server() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = policy(one.path(), 1);
    policy(two.path(), 1);
    let a = server(&model);
    let run = |dir: &Path, seed: &str| {
        let settings = served(dir, &[&a]);
        let overrides: Vec<&str> = settings.iter().map(String::as_str).chain([LORA, seed]).collect();
        training(dir, &overrides).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let runs = [(one.path(), "run.seed=1"), (two.path(), "run.seed=2")].map(|(dir, seed)| (dir, run(dir, seed)));
    for (dir, child) in runs {
        succeeded(dir, &child.wait_with_output().unwrap());
        replayed(dir);
    }
    let names = a.requests().into_iter().filter(|request| request.path == "/v1/load_lora_adapter");
    let runs: std::collections::BTreeSet<String> =
        names.map(|request| request.body["lora_name"].as_str().unwrap()[..15].to_owned()).collect();
    assert_eq!(runs.len(), 2, "each run has names of its own: {runs:?}");
}

#[test]
fn a_run_without_any_server_ends_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let a = server(&model);
    let settings = served(dir.path(), &[&a]);
    let overrides: Vec<&str> = settings.iter().map(String::as_str).chain([LORA, "rollout.outage_s=2"]).collect();
    let mut running = Running::start(training(dir.path(), &overrides));
    running.says("step   1/4");
    a.kill();
    let (status, text) = running.end();
    assert!(!status.success(), "{text}");
    assert!(text.contains("no rollout server could be used for 2 s") && text.contains(&a.url()), "{text}");
    a.restart();
    let output = run(dir.path(), &settings, &[LORA, "rollout.outage_s=20"]);
    assert!(!output.status.success(), "a run's directory is not used twice");
    let mut resumed = training(dir.path(), &overrides);
    let output = resumed.arg("--resume").output().unwrap();
    succeeded(dir.path(), &output);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn answers_that_cannot_be_trained_on_are_sampled_again() {
    let old = |version: &str| Versions::Always(version.to_owned());
    type Break = Box<dyn Fn(&mut crate::fake_engine::Faults)>;
    let cases: Vec<(&str, &str, Break)> = vec![
        ("log-probabilities of", LORA, Box::new(|faults| faults.short_logprobs = true)),
        ("not a number", LORA, Box::new(|faults| faults.bad_logprob = Some(Value::Null))),
        ("but the model has", LORA, Box::new(|faults| faults.foreign_ids = true)),
        ("does not tell the versions", "", Box::new(|faults| faults.versions = Versions::Missing)),
        ("spans of versions cover", "", Box::new(|faults| faults.versions = Versions::Gap)),
        ("which are not of this run", "", Box::new(move |faults| faults.versions = old("default"))),
        (
            "which another run handed",
            "",
            Box::new(|faults| faults.versions = Versions::Always("policy-00000001-0-00000002".into())),
        ),
    ];
    for (words, more, fault) in cases {
        let dir = tempfile::tempdir().unwrap();
        let model = policy(dir.path(), 1);
        let a = server(&model);
        let settings = served(dir.path(), &[&a]);
        let overrides: Vec<&str> =
            settings.iter().map(String::as_str).chain((!more.is_empty()).then_some(more)).collect();
        let mut running = Running::start(training(dir.path(), &overrides));
        running.says("has version 0");
        a.faults(|faults| fault(faults));
        running.says(words);
        a.faults(|faults| *faults = crate::fake_engine::Faults::default());
        let (status, text) = running.end();
        assert!(status.success(), "{words}: {text}");
        assert_eq!(records(dir.path(), "metrics.jsonl").len(), 4, "{words}: {text}");
        assert!(text.contains("completions were lost with failed requests after about"), "{words}: {text}");
    }
}

#[test]
fn a_resumed_run_forces_the_server_to_its_version() {
    for more in [&[LORA][..], &[]] {
        let dir = tempfile::tempdir().unwrap();
        let model = policy(dir.path(), 1);
        let a = server(&model);
        let settings = served(dir.path(), &[&a]);
        let short: Vec<&str> = more.iter().copied().chain(["run.steps=2", "checkpoint.every_steps=1"]).collect();
        let output = run(dir.path(), &settings, &short);
        assert!(output.status.success(), "{}", stderr(&output));
        let overrides: Vec<&str> = settings.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let mut from = training(dir.path(), &overrides);
        let output = from.arg("--resume=run/checkpoints/step-000001").output().unwrap();
        let text = succeeded(dir.path(), &output);
        assert!(text.contains("has version 1"), "{text}");
        replayed(dir.path());
    }
}

#[test]
fn a_slow_hand_over_makes_no_token_older_than_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let (quick, slow) = (server(&model), server(&model));
    slow.faults(|faults| faults.handover_delay = Duration::from_millis(700));
    let output = run(dir.path(), &served(dir.path(), &[&quick, &slow]), &[LORA, "learner.eta=2"]);
    succeeded(dir.path(), &output);
    for record in records(dir.path(), "metrics.jsonl") {
        assert!(record["staleness/max"].as_f64().unwrap() <= 2.0, "{record}");
    }
}

#[test]
fn a_server_that_does_not_suit_the_run_is_refused_before_the_first_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let other = tempfile::tempdir().unwrap();
    let foreign = policy(other.path(), 2);
    type Break = fn(&mut crate::fake_engine::Faults);
    let cases: [(&Path, &str, Break); 5] = [
        (&model, "it is vLLM 0.31.2, and this program was tested with vLLM 0.32", |faults| {
            faults.program_version = Some("0.31.2");
        }),
        (&model, "its tokenizer encodes", |faults| faults.tokens = Some(vec![1, 2])),
        (&model, "--enable-scale-out", |faults| faults.no_scale_out = true),
        (&model, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", |faults| faults.no_lora_updates = true),
        (&foreign, "log-probabilities differ from the policy's", |_| {}),
    ];
    for (model, words, fault) in cases {
        let a = server(model);
        a.faults(fault);
        let output = run(dir.path(), &served(dir.path(), &[&a]), &[LORA]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{words}: {text}");
        assert!(text.contains(words) && text.contains(&a.url()), "{words}: {text}");
        let _ = std::fs::remove_dir_all(dir.path().join("run"));
    }
    let a = server(&model);
    let settings = served(dir.path(), &[&a]);
    let check = || {
        let mut command = preceptor(dir.path());
        command.arg("check").arg(crate::common::config("offline.toml"));
        command.args(settings.iter().flat_map(|one| ["--set", one])).output().unwrap()
    };
    let output = check();
    assert!(String::from_utf8_lossy(&output.stdout).contains("servers     1 answer"), "{}", stderr(&output));
    a.kill();
    let output = check();
    assert!(output.status.code() == Some(2) && stderr(&output).contains("does not answer"), "{}", stderr(&output));
    let short = FakeEngine::start(Options { max_model_len: 64, ..Options::new(Kind::Vllm, &model) });
    let output = run(dir.path(), &served(dir.path(), &[&short]), &[LORA]);
    assert!(stderr(&output).contains("--max-model-len"), "{}", stderr(&output));
}

#[test]
fn the_key_is_sent_and_never_logged() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let options = Options {
        max_model_len: 1024,
        api_key: Some("a-secret-of-servers".into()),
        ..Options::new(Kind::Vllm, &model)
    };
    let a = FakeEngine::start(options);
    let settings = served(dir.path(), &[&a]);
    let overrides: Vec<&str> =
        settings.iter().map(String::as_str).chain([LORA, "rollout.api_key_env=SERVED_KEY"]).collect();
    let output = training(dir.path(), &overrides).env("SERVED_KEY", "wrong").output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("401"), "{}", stderr(&output));
    let _ = std::fs::remove_dir_all(dir.path().join("run"));
    let output = training(dir.path(), &overrides).env("SERVED_KEY", "a-secret-of-servers").output().unwrap();
    let text = succeeded(dir.path(), &output);
    assert!(!text.contains("a-secret-of-servers"), "{text}");
    for file in walk(&dir.path().join("run")) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(19).any(|part| part == b"a-secret-of-servers"), "{}", file.display());
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn sglang_servers_sample_by_their_documented_protocol() {
    for more in [&[LORA][..], &[]] {
        let dir = tempfile::tempdir().unwrap();
        let model = policy(dir.path(), 1);
        let a = FakeEngine::start(Options { max_model_len: 1024, ..Options::new(Kind::Sglang, &model) });
        let mut settings = served(dir.path(), &[&a]);
        settings.push("rollout.engine=sglang".into());
        let output = run(dir.path(), &settings, more);
        succeeded(dir.path(), &output);
        replayed(dir.path());
    }
}

#[test]
fn requests_name_what_the_run_needs() {
    let dir = tempfile::tempdir().unwrap();
    let model = policy(dir.path(), 1);
    let a = server(&model);
    let output = run(dir.path(), &served(dir.path(), &[&a]), &[LORA, "rollout.stop=[\"\\n\\n\"]"]);
    succeeded(dir.path(), &output);
    let requests = a.requests();
    let generated = requests.iter().filter(|request| request.path == "/inference/v1/generate");
    let bodies: Vec<&Value> =
        generated.map(|request| &request.body).filter(|body| body["sampling_params"]["n"] == 4).collect();
    assert!(!bodies.is_empty());
    for body in bodies {
        let sampling = &body["sampling_params"];
        assert_eq!((&sampling["logprobs"], &sampling["ignore_eos"]), (&json!(0), &json!(true)), "{body}");
        assert_eq!((&sampling["stop"], &body["output_mode"]), (&json!(["\n\n"]), &json!("text")), "{body}");
        assert!(body["cache_salt"].as_str().unwrap().starts_with("policy-"), "{body}");
    }
}

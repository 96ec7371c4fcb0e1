//! Tests of the complete node: runs of the real program on the offline configuration.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Instant;

use serde_json::{Value, json};

use crate::common::{PATIENCE, byte_policy, config, metrics, preceptor, small, stderr, train, wait_until};

#[test]
fn a_synchronous_run_is_a_function_of_its_configuration() {
    let (a, b, c) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one = train(a.path(), &["learner.eta=0"]);
    assert!(one.status.success(), "{}", stderr(&one));
    // With more actors, groups finish in another order; the metrics must be the same.
    let many = ["learner.eta=0", "rollout.workers=2", "labeler.workers=2"];
    for (dir, overrides) in [(&b, &["learner.eta=0"][..]), (&c, &many[..])] {
        let other = train(dir.path(), overrides);
        assert!(other.status.success(), "{}", stderr(&other));
        assert_eq!(metrics(&a.path().join("run")), metrics(&dir.path().join("run")));
    }
    let steps = metrics(&a.path().join("run"));
    assert_eq!(steps.len(), 4);
    for step in &steps {
        let ratio = step["ratio/max"].as_f64().unwrap();
        assert!(ratio < 1.0 + 1e-4, "on-policy, yet the ratio of learner to behaviour reaches {ratio}");
        assert_eq!(step["staleness/max"], 0);
    }
    let other_seed = tempfile::tempdir().unwrap();
    assert!(train(other_seed.path(), &["learner.eta=0", "run.seed=1"]).status.success());
    assert_ne!(steps, metrics(&other_seed.path().join("run")));
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_run_in_half_precision_is_near_one_in_single_precision() {
    let mode = ["run.mode=distilled", "learner.eta=0", "reward_model.batch_pairs=3", "reward_model.warm_up_groups=4"];
    let (single, half) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (dir, dtype) in [(&single, "policy.dtype=f32"), (&half, "policy.dtype=bf16")] {
        let output = train(dir.path(), &[&mode[..], &[dtype]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let weights = |dir: &tempfile::TempDir| -> Vec<u32> {
        let path = dir.path().join("run/checkpoints/step-000004/model.safetensors");
        let tensors = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
        let values = tensors.values().flat_map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        values.map(f32::to_bits).collect()
    };
    // Single precision has bits that half precision lacks.
    assert!(weights(&single).iter().any(|bits| bits & 0xffff != 0));
    assert!(weights(&half).iter().all(|bits| bits & 0xffff == 0));
    let [single, half] = [single, half].map(|dir| metrics(&dir.path().join("run")));
    let of = |step: &Value, name: &str| step[name].as_f64().unwrap_or_else(|| panic!("no {name} in {step}"));
    for (single, half) in single.iter().zip(&half) {
        // Sampling and training compute log-probabilities in two ways, both in half precision.
        let (ratio, farthest) = (of(half, "ratio/mean"), of(half, "ratio/max"));
        assert!((ratio - 1.0).abs() < 0.02 && farthest < 1.2, "ratios are {ratio} in the mean, up to {farthest}");
        let (got, want) = (of(half, "entropy/mean"), of(single, "entropy/mean"));
        assert!((got / want - 1.0).abs() < 0.05, "entropy {got} against {want}");
        assert!(of(half, "gradient/norm") > 0.0);
    }
}

/// Sampling and training run matmuls at the configured precision. On a processor without a tile unit that is always
/// full precision.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_run_with_reduced_matmul_precision_is_near_one_with_full_precision() {
    let mode = ["learner.eta=0", "rollout.slots=32"];
    let runs = ["highest", "high", "medium"].map(|precision| {
        let dir = tempfile::tempdir().unwrap();
        let precision = format!("policy.matmul_precision={precision}");
        let output = train(dir.path(), &[&mode[..], &[precision.as_str()]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        metrics(&dir.path().join("run"))
    });
    let of = |step: &Value, name: &str| step[name].as_f64().unwrap_or_else(|| panic!("no {name} in {step}"));
    for (less, bound) in [(1, 1e-4), (2, 5e-3)] {
        assert_eq!(runs[less] == runs[0], !kernels::has_tile_unit());
        // Both sample nearly the same tokens in the first step; later ones use different weights.
        let (got, want) = (of(&runs[less][0], "entropy/mean"), of(&runs[0][0], "entropy/mean"));
        assert!((got / want - 1.0).abs() < bound, "entropy {got} against {want}");
        for step in &runs[less] {
            let (ratio, farthest) = (of(step, "ratio/mean"), of(step, "ratio/max"));
            assert!(
                (ratio - 1.0).abs() < bound && farthest < 1.0 + 10.0 * bound,
                "ratios are {ratio}, up to {farthest}"
            );
        }
    }
}

#[test]
fn actors_on_the_policys_own_device_change_nothing() {
    let mode = ["run.mode=distilled", "learner.eta=0", "reward_model.batch_pairs=3", "reward_model.warm_up_groups=4"];
    let placed = ["rollout.workers=2", "rollout.devices=[\"cpu\"]", "labeler.device=cpu", "reward_model.device=cpu"];
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (dir, overrides) in [(&a, &mode[..]), (&b, &[&mode[..], &placed].concat())] {
        let output = train(dir.path(), overrides);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(metrics(&a.path().join("run")), metrics(&b.path().join("run")));
}

/// If the KL coefficient is zero, a run without a reference learns the same and measures no KL to it.
#[test]
fn without_a_reference_nothing_else_changes() {
    let mode = ["learner.eta=0", "learner.algorithm=grpo", "reward.kl_coef=0"];
    let [with, without] = ["reward.reference=true", "reward.reference=false"].map(|reference| {
        let dir = tempfile::tempdir().unwrap();
        let output = train(dir.path(), &[&mode[..], &[reference]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("  kl "), reference.ends_with("true"), "{}", stderr(&output));
        metrics(&dir.path().join("run"))
    });
    assert_eq!(with.len(), without.len());
    for (mut with, without) in with.into_iter().zip(without) {
        for name in ["kl/mean", "kl/token", "kl/reference"] {
            assert!(with[name].is_number() && without[name].is_null(), "{name}: {with} and {without}");
            with[name] = serde_json::Value::Null;
        }
        assert_eq!(with, without);
    }
}

#[test]
fn a_synchronous_run_with_a_reward_model_is_a_function_of_its_configuration() {
    let mode = ["run.mode=distilled", "learner.eta=0", "reward_model.batch_pairs=3", "reward_model.warm_up_groups=4"];
    let many = [&mode[..], &["rollout.workers=2", "labeler.workers=2"]].concat();
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (dir, overrides) in [(&a, &mode[..]), (&b, &many[..])] {
        let output = train(dir.path(), overrides);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(metrics(&a.path().join("run")), metrics(&b.path().join("run")));
    let phases = |dir: &tempfile::TempDir| std::fs::read_to_string(dir.path().join("run/phases.jsonl")).unwrap();
    assert_eq!(phases(&a), phases(&b));
}

#[test]
fn an_asynchronous_run_stays_within_its_staleness_bound_and_drops_nothing() {
    for (update, eta) in [("in-flight", 1), ("between-groups", 3)] {
        let dir = tempfile::tempdir().unwrap();
        let overrides =
            [&format!("learner.eta={eta}"), &format!("rollout.update={update}"), "rollout.workers=2", "run.steps=8"];
        let output = train(dir.path(), &overrides.map(|one| one as &str));
        assert!(output.status.success(), "{}", stderr(&output));
        let steps = metrics(&dir.path().join("run"));
        let trained: u64 = steps.iter().map(|step| step["completions"].as_u64().unwrap()).sum();
        assert_eq!(trained, 8 * 4 * 4, "every completion is trained on once");
        let stalest = steps.iter().map(|step| step["staleness/max"].as_u64().unwrap()).max().unwrap();
        assert!((1..=eta).contains(&stalest), "staleness of {stalest} under a bound of {eta}");
    }
}

#[test]
fn the_papers_algorithm_and_the_direct_labeler_run_too() {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["labeler.type=direct", "learner.algorithm=rloo", "run.steps=2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let samples = std::fs::read_to_string(dir.path().join("run/samples.jsonl")).unwrap();
    for line in samples.lines() {
        let sample: Value = serde_json::from_str(line).unwrap();
        let score = sample["verdict"]["label"].as_f64();
        // A random judge may give the ratings almost no probability, which is an abstention and masks the group.
        assert!(
            score.is_some_and(|s| (-1.0..=1.0).contains(&s)) || sample["verdict"]["abstention"].is_string(),
            "{line}"
        );
        assert_eq!(sample["labeler"], "direct");
    }
}

/// Algorithms, epochs over a batch, corrections and baselines in many combinations.
#[test]
fn every_algorithm_trains_with_its_configuration() {
    for (updates, overrides) in [
        (4, &["algorithm=ppo", "epochs=2", "minibatches=2", "value_model=model", "correction=decoupled"][..]),
        (2, &["algorithm=grpo", "epochs=2", "clip_high=0.28", "average=token-mean", "entropy_coef=0.01"]),
        (1, &["algorithm=grpo", "advantage_std=false", "average=constant", "mask_ratio=3", "schedule=cosine"]),
        (3, &["algorithm=rloo", "clip=0.2", "minibatches=3", "correction=tis-sequence", "whiten_rewards=true"]),
        (1, &["algorithm=reinforce", "value_model=model", "whiten_advantages=true"]),
        (1, &["algorithm=ppo", "correction=none", "eta=3"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut overrides: Vec<String> = overrides.iter().map(|one| format!("learner.{one}")).collect();
        overrides.push(format!("reward.kl={}", if updates == 2 { "loss" } else { "reward" }));
        overrides.push("run.steps=3".into());
        let output = train(dir.path(), &overrides.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(output.status.success(), "{overrides:?}: {}", stderr(&output));
        let steps = metrics(&dir.path().join("run"));
        assert_eq!(steps.len(), 3);
        for step in &steps {
            let number = |name: &str| step[name].as_f64().unwrap_or_else(|| panic!("{name} in {step}"));
            assert_eq!(step["updates"], updates, "{overrides:?}");
            assert!(number("gradient/norm") > 0.0 && number("loss/policy").is_finite(), "{overrides:?}: {step}");
            assert!((0.0..=1.0 + 1e-9).contains(&number("ratio/effective")), "{step}");
            assert!(number("ratio/p05") <= number("ratio/p50") && number("ratio/p50") <= number("ratio/p95"));
            let histogram = step["staleness/histogram"].as_array().unwrap();
            assert_eq!(histogram.iter().map(|count| count.as_u64().unwrap()).sum::<u64>(), step["tokens"]);
        }
        assert_eq!(steps[0]["length/drift"], 1.0);
        let scraped = std::fs::read_to_string(dir.path().join("run/metrics.prom")).unwrap();
        let tokens: u64 = steps.iter().map(|step| step["tokens"].as_u64().unwrap()).sum();
        assert!(scraped.contains(&format!("preceptor_token_staleness_count {tokens}\n")), "{scraped}");
        // In the second epoch over the first batch, the policy has moved from the reference.
        if updates == 2 {
            assert!(steps[0]["loss/kl"].as_f64().unwrap() > 0.0, "{}", steps[0]);
        }
    }
}

#[test]
fn a_completion_ends_at_a_stop_string() {
    let dir = tempfile::tempdir().unwrap();
    // A random policy samples every byte equally often.
    let stop: Vec<String> = ('a'..='t').map(|c| format!("\"{c}\"")).collect();
    let stop = format!("rollout.stop=[{}]", stop.join(", "));
    let sampling = [&stop, "rollout.top_p=0.95", "rollout.repetition_penalty=1.1", "run.steps=2"];
    let output = train(dir.path(), &sampling);
    assert!(output.status.success(), "{}", stderr(&output));
    let samples = std::fs::read_to_string(dir.path().join("run/samples.jsonl")).unwrap();
    let mut stopped = 0;
    for line in samples.lines() {
        let sample: Value = serde_json::from_str(line).unwrap();
        let text = sample["completion"].as_str().unwrap();
        assert!(!text.contains(|c| ('a'..='t').contains(&c)), "{line}");
        stopped += usize::from(sample["finish"] == "stop");
    }
    assert!(stopped > 0, "{samples}");
}

/// A file's first prompt has the completions that it has alone, and the file is in the order of its prompts.
#[test]
fn a_file_of_prompts_is_completed_with_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = byte_policy(dir.path(), 3);
    let model = model.to_str().unwrap();
    let texts: Vec<String> = (0..20).map(|i| format!("Prompt {i}")).collect();
    let rows: String = texts.iter().map(|text| json!({ "prompt": text }).to_string() + "\n").collect();
    std::fs::write(dir.path().join("prompts.jsonl"), rows).unwrap();
    let sampling = ["--samples", "2", "--seed", "5", "--max-new-tokens", "6"];
    let generate = |arguments: &[&str]| {
        preceptor(dir.path()).args(["generate", model]).args(arguments).args(sampling).output().unwrap()
    };
    let output = generate(&["--input", "prompts.jsonl", "--output", "out.jsonl"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let parsed = |text: &str| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>();
    let found = parsed(&std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap());
    let prompts: Vec<&str> = found.iter().map(|line| line["prompt"].as_str().unwrap()).collect();
    assert_eq!(prompts, texts.iter().flat_map(|text| [text.as_str(); 2]).collect::<Vec<_>>());
    let alone = parsed(&String::from_utf8(generate(&["Prompt 0", "--json"]).stdout).unwrap());
    for (alone, found) in alone.iter().zip(&found) {
        assert_eq!(
            [&alone["ids"], &alone["text"], &alone["finish"]],
            [&found["ids"], &found["text"], &found["finish"]]
        );
    }
    let output = generate(&["--input", "prompts.jsonl", "--output", "none/out.jsonl"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot write none/out.jsonl, because its directory does not exist"));
    std::fs::write(dir.path().join("prompts.jsonl"), "{\"text\": 1}\n").unwrap();
    let output = generate(&["--input", "prompts.jsonl", "--output", "out.jsonl"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

/// A step has four groups of four completions.
#[test]
fn samples_have_as_many_groups_of_each_step_as_configured() {
    for (groups, lines) in [("1", 8), ("3", 24), ("0", 32), ("9", 32)] {
        let dir = tempfile::tempdir().unwrap();
        let output = train(dir.path(), &["run.steps=2", &format!("run.samples_groups={groups}")]);
        assert!(output.status.success(), "{}", stderr(&output));
        let samples = std::fs::read_to_string(dir.path().join("run/samples.jsonl")).unwrap();
        assert_eq!(samples.lines().count(), lines, "{groups}");
    }
}

#[test]
fn the_last_checkpoint_generates_and_scores() {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["run.steps=2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let checkpoint = dir.path().join("run/checkpoints/step-000002");
    assert!(stderr(&output).contains("run/checkpoints/step-000002"), "{}", stderr(&output));
    for file in
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "value_model/model.safetensors"]
    {
        assert!(checkpoint.join(file).exists(), "{file} is missing");
    }
    let ask = |arguments: &[&str]| -> Value {
        let output = preceptor(dir.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let model = checkpoint.to_str().unwrap();
    let generated =
        ask(&["generate", model, "--prompt-ids", "72,101,108", "--greedy", "--max-new-tokens", "7", "--json"]);
    let ids: Vec<String> = generated["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert!(!ids.is_empty() && ids.len() <= 7);
    // Scoring must agree with the log-probabilities reported by generation.
    let scored = ask(&["score", model, "--prompt-ids", "72,101,108", "--completion-ids", &ids.join(","), "--json"]);
    assert_eq!(scored["ids"], generated["ids"]);
    let list = |value: &Value| -> Vec<f64> {
        value["logprobs"].as_array().unwrap().iter().map(|p| p.as_f64().unwrap()).collect()
    };
    for (a, b) in list(&scored).into_iter().zip(list(&generated)) {
        assert!((a - b).abs() < 1e-4);
    }
}

#[test]
fn the_node_answers_and_an_interrupt_keeps_the_training_progress() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = preceptor(dir.path())
        .arg("train")
        .arg(config("offline.toml"))
        .args(["--run-dir", "run"])
        .args(small())
        .args(["--set", "run.steps=100000", "--set", "serve.enabled=true", "--set", "serve.listen=127.0.0.1:0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = child.stderr.take().unwrap();
    let (sender, lines) = std::sync::mpsc::sync_channel(10_000);
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = errors.read(&mut buffer) {
            text.push_str(&String::from_utf8_lossy(&buffer[..n]));
            // The receiver may have gone already.
            let _ = sender.try_send(text.clone());
        }
        text
    });
    let wait = |what: &str| -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect(what);
            if text.contains(what) {
                return text;
            }
        }
    };
    let text = wait("step   2/");
    let address = text.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    let get = |path: &str| -> String {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{path}: {text}");
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    };
    let scraped = get("/metrics");
    for name in [
        "preceptor_step ",
        "preceptor_stage_busy_seconds_total{stage=\"learn\"",
        "preceptor_weight_lag{worker=\"rollout-0\"}",
    ] {
        assert!(scraped.contains(name), "{name} is not in\n{scraped}");
    }
    assert!(scraped.contains("preceptor_weight_fingerprint_ok{worker=\"rollout-0\"} 1"), "{scraped}");
    get("/healthz");
    get("/readyz");
    let status: Value = serde_json::from_str(&get("/status")).unwrap();
    assert_eq!(status["phase"], "training");
    wait_until("at η = 1 generation overlaps learning", || {
        let status: Value = serde_json::from_str(&get("/status")).unwrap();
        let spans = status["graph"]["timeline"].as_array().unwrap();
        let of = |stage: &str| -> Vec<(f64, f64)> {
            let spans = spans.iter().filter(|span| span["stage"] == stage);
            spans.map(|span| (span["start_s"].as_f64().unwrap(), span["end_s"].as_f64().unwrap())).collect()
        };
        of("learn").iter().any(|l| of("rollout-0").iter().any(|r| r.0 < l.1 && l.0 < r.1))
    });

    let interrupted = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let ended = child.wait().unwrap();
    let text = reader.join().unwrap();
    assert_eq!(ended.code(), Some(130), "128 + SIGINT: {text}");
    let checkpoint = text.lines().find_map(|line| line.strip_prefix("checkpoint ")).expect("the checkpoint is named");
    assert!(dir.path().join(checkpoint).join("model.safetensors").exists());
    let steps = metrics(&dir.path().join("run")).len();
    assert!(checkpoint.ends_with(&format!("step-{steps:06}")), "{checkpoint} after {steps} steps");
}

#[test]
fn every_mode_runs_and_reports_its_training_data() {
    let pairs = config("data/preferences-summaries.jsonl");
    let human = format!("reward_model.pairs=\"{}\"", pairs.display());
    let reward_model = ["reward_model.batch_pairs=4", "reward_model.warm_up_groups=6", "reward_model.holdout=0.3"];
    let distilled = [&["run.mode=distilled"][..], &reward_model].concat();
    let human = [&["run.mode=human", human.as_str(), "reward_model.epochs=2"][..], &reward_model].concat();
    let preference = vec!["run.mode=preference", "learner.algorithm=online-dpo", "labeler.pairs=all"];
    for (overrides, stages) in [(distilled, 5), (human, 4), (preference, 5)] {
        let dir = tempfile::tempdir().unwrap();
        let output = train(dir.path(), &overrides);
        assert!(output.status.success(), "{overrides:?}: {}", stderr(&output));
        let run = dir.path().join("run");
        let checkpoint = run.join("checkpoints/step-000004");
        let steps = metrics(&run);
        assert_eq!(steps.len(), 4);
        let samples = std::fs::read_to_string(run.join("samples.jsonl")).unwrap();
        let sample: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
        let phases = std::fs::read_to_string(run.join("phases.jsonl")).unwrap_or_default();
        if overrides[0] == "run.mode=preference" {
            assert!(steps[0]["preference/pairs"].as_u64().unwrap() == 4 * 6, "{}", steps[0]);
            assert!(!checkpoint.join("reward_model").exists() && phases.is_empty());
            assert_eq!(sample["preferences"].as_array().unwrap().len(), 3);
        } else {
            assert!(phases.contains("held_out_pairs"), "{phases}");
            assert!(checkpoint.join("reward_model/model.safetensors").exists());
            assert!(steps[0]["reward_model/version"].as_u64().unwrap() >= 1, "{}", steps[0]);
            let learned = steps[3]["reward_model/version"].as_u64() > steps[0]["reward_model/version"].as_u64();
            // Human preferences are learned before the run only; a labeler's preferences continue to be learned.
            assert_eq!(learned, stages == 5, "{overrides:?}");
            assert_eq!(sample["labeler"].is_string(), stages == 5);
        }
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_panel_of_every_labeler_judges_a_run_and_reports_disagreements() {
    let dir = tempfile::tempdir().unwrap();
    let embedder = crate::common::fixture("bert");
    let members = format!(
        "labeler.members=[{{ type = \"likelihood\", weight = 2 }}, {{ type = \"embedding\", model = \"{}\", pair_temperature = 0.1 }}, {{ type = \"pairwise\", shots = 1 }}]",
        embedder.display()
    );
    let overrides = [
        "run.mode=preference",
        "learner.algorithm=online-dpo",
        "labeler.type=panel",
        "labeler.pairs=all",
        &members,
        "policy.model.scratch.context=4096",
        "run.steps=2",
    ];
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    let samples = std::fs::read_to_string(run.join("samples.jsonl")).unwrap();
    assert!(samples.lines().all(|line| line.contains("\"labeler\":\"panel\"")), "{samples}");
    let text = std::fs::read_to_string(run.join("metrics.prom")).unwrap();
    // Two steps of four groups of four, each completion compared with each.
    assert!(text.contains("preceptor_panel_pairs_total 48"), "{text}");
    let disagreements = text.lines().find(|line| line.starts_with("preceptor_panel_disagreements_total ")).unwrap();
    let count: u64 = disagreements.rsplit(' ').next().unwrap().parse().unwrap();
    assert!((1..48).contains(&count), "{disagreements}");
}

#[test]
fn fine_tuning_comes_first_and_produces_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["sft.steps=6", "sft.batch=2", "sft.lr=3e-3", "run.steps=1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let phases = std::fs::read_to_string(dir.path().join("run/phases.jsonl")).unwrap();
    let losses: Vec<f64> =
        phases.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 6);
    assert!(losses[5] < losses[0], "{losses:?}");
    // The run starts at the fine-tuned weights, and KL is measured from them.
    assert!(metrics(&dir.path().join("run"))[0]["kl/mean"].as_f64().unwrap().abs() < 1e-2);
}

/// Micro-batches do not change a group: the first step's metrics agree within rounding, for every way of passing over a
/// batch.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_smaller_micro_batch_changes_only_memory() {
    let batch =
        ["learner.algorithm=ppo", "learner.epochs=2", "learner.minibatches=2", "learner.whiten_advantages=true"];
    let loss = ["learner.algorithm=grpo", "reward.kl=loss", "learner.entropy_coef=0.01"];
    for overrides in [&[][..], &batch, &loss] {
        let (single, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let overrides = [&["learner.eta=0", "run.steps=2"], overrides].concat();
        assert!(train(single.path(), &overrides).status.success());
        // Three does not divide four.
        let output = train(parts.path(), &[&overrides[..], &["learner.micro_batch=3"]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let (single, parts) = (metrics(&single.path().join("run")), metrics(&parts.path().join("run")));
        assert_close(&single[0], &parts[0], 1e-4);
        assert_ne!(single, parts, "identical bits would mean that the group was not split");
    }
}

#[track_caller]
fn assert_close(a: &Value, b: &Value, tolerance: f64) {
    for (name, value) in a.as_object().unwrap() {
        if let (Some(a), Some(b)) = (value.as_f64(), b[name].as_f64()) {
            assert!((a - b).abs() <= tolerance * (1.0 + a.abs()), "{name}: {a} against {b}");
        } else {
            assert_eq!(value, &b[name], "{name}");
        }
    }
}

/// As in TRL, which also compares log-probabilities among all tokens.
#[test]
fn fresh_tokens_of_restricted_sampling_have_ratio_one_and_no_kl() {
    for set in ["rollout.top_k=4", "rollout.top_p=0.6", "rollout.min_p=0.2", "rollout.repetition_penalty=1.5"] {
        let dir = tempfile::tempdir().unwrap();
        let output = train(dir.path(), &["run.steps=1", "learner.eta=0", set]);
        assert!(output.status.success(), "{}", stderr(&output));
        let step = &metrics(&dir.path().join("run"))[0];
        for (figure, expected) in [("ratio/p05", 1.0), ("ratio/p95", 1.0), ("ratio/max", 1.0), ("kl/token", 0.0)] {
            let value = step[figure].as_f64().unwrap();
            assert!((value - expected).abs() < 1e-3, "{set}: {figure} = {value}");
        }
    }
}

//! Tests of invalid input: one clear error, before compute is spent, and never a hang.

use crate::common::{config, preceptor, small, stderr, train};

/// Trains with `overrides` and expects a refusal with all of `words` in the error.
#[track_caller]
fn refused(overrides: &[&str], words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), overrides);
    let text = stderr(&output);
    assert!(!output.status.success(), "it should have been refused");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
    assert!(!text.contains("step   1/"), "compute was spent: {text}");
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn a_missing_model_is_named() {
    refused(&["policy.model=\"no/such/model.gguf\""], &["no/such/model.gguf"]);
}

#[test]
fn a_device_that_the_build_lacks_is_refused_with_the_remedy() {
    if cfg!(not(feature = "cuda")) {
        for (key, set) in [
            ("policy.device", "policy.device=cuda:0"),
            ("rollout.devices", "rollout.devices=[\"cuda:0\"]"),
            ("labeler.device", "labeler.device=cuda:0"),
            ("reward_model.device", "reward_model.device=cuda:0"),
        ] {
            refused(&[set], &[&format!("{key} = \"cuda:0\""), "without CUDA", "build.sh"]);
        }
    }
}

#[test]
fn settings_that_a_device_or_dtype_excludes_are_refused() {
    for weights in ["bf16", "q8_0"] {
        let set = format!("rollout.weights={weights}");
        refused(
            &[&set, "policy.dtype=bf16"],
            &["rollout.weights", &format!("\"{weights}\" requires rollouts on the CPU")],
        );
    }
    refused(&["rollout.devices=[\"cpu\", \"cpu\"]"], &["rollout.devices", "2 devices for 1 rollout.workers"]);
}

#[test]
fn an_invalid_device_is_refused_with_its_key() {
    for (key, set) in [
        ("policy.device", "policy.device=gpu"),
        ("rollout.devices", "rollout.devices=[\"gpu\"]"),
        ("labeler.device", "labeler.device=gpu"),
        ("reward_model.device", "reward_model.device=gpu"),
    ] {
        refused(&[set], &[key, "\"gpu\" is neither \"cpu\" nor \"cuda:N\""]);
    }
}

/// The message names the key that fixes it.
#[test]
fn a_prompt_that_does_not_fit_names_the_key_to_change() {
    let long = ["data.max_prompt_tokens=100"];
    refused(&long, &["the limit is 100", "raise data.max_prompt_tokens, to at most 1012 within"]);
    let new = ["rollout.max_new_tokens=1000", "policy.model.scratch.context=1024"];
    refused(
        &new,
        &["the limit is 24", "lower rollout.max_new_tokens = 1000, which leaves 24 tokens of the model's context"],
    );
}

/// A prompt of millions of bytes is not tokenised, which would take a hundred times its size in memory.
#[test]
fn a_prompt_of_megabytes_is_refused_or_skipped_without_being_tokenised() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.jsonl");
    let short = std::fs::read_to_string(config("data/posts.jsonl")).unwrap();
    std::fs::write(&path, format!("{{\"prompt\": \"{}\"}}\n{short}", "x".repeat(7_000_000))).unwrap();
    let data = format!("data.path=\"{}\"", path.display());
    refused(&[&data], &["long.jsonl:1", "has 7000000 bytes", "data.on_long = \"skip\""]);
    let output = train(dir.path(), &[&data, "data.on_long=skip", "run.steps=1"]);
    assert!(output.status.success() && stderr(&output).contains("100 prompts"), "{}", stderr(&output));
}

#[test]
fn a_damaged_parquet_file_gives_one_error_without_a_panic_message() {
    let dir = tempfile::tempdir().unwrap();
    let sound = std::fs::read(crate::common::fixture("parquet/pairs.parquet")).unwrap();
    let path = dir.path().join("damaged.parquet");
    let mut panicked = 0;
    for i in (0..sound.len()).step_by(3) {
        let mut bytes = sound.clone();
        bytes[i] ^= 0xff;
        std::fs::write(&path, bytes).unwrap();
        let Err(error) = preceptor::pipeline::data::Rows::open(&path) else { continue };
        if !format!("{error:#}").contains("its contents are inconsistent") {
            continue;
        }
        panicked += 1;
        refused(&[&format!("data.path=\"{}\"", path.display())], &["damaged.parquet", "contents are inconsistent"]);
        break;
    }
    assert!(panicked > 0, "no damage makes the library panic any more, so this test checks nothing");
}

#[test]
fn a_model_with_a_non_finite_value_is_refused_with_its_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["run.steps=1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let model = dir.path().join("run/checkpoints/step-000001");
    let weights = model.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    let named = format!("policy.model=\"{}\"", model.display());
    refused(&[&named], &["tensor ", "not finite", "model.safetensors"]);
    for arguments in [&["generate", model.to_str().unwrap(), "hi"][..], &["score", model.to_str().unwrap(), "hi you"]] {
        let output = preceptor(dir.path()).args(arguments).output().unwrap();
        assert!(!output.status.success() && stderr(&output).contains("not finite"), "{}", stderr(&output));
    }
    let mut check = preceptor(dir.path());
    check.arg("check").arg(config("offline.toml")).args(["--set", &named]);
    let output = check.output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("not finite"), "{}", stderr(&output));
}

#[test]
fn three_mistakes_are_three_lines_in_one_report() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wrong.toml");
    let text = std::fs::read_to_string(config("offline.toml")).unwrap();
    let data = config("data/posts.jsonl");
    let text = text
        .replace("\"data/posts.jsonl\"", &format!("\"{}\"", data.display()))
        .replace("temperature = 0.9", "temprature = 0.9")
        .replace("steps = 60", "steps = \"sixty\"")
        .replace("eta = 1", "eta = -1");
    std::fs::write(&path, text).unwrap();
    let output = preceptor(dir.path()).arg("train").arg(&path).output().unwrap();
    let text = stderr(&output);
    assert!(!output.status.success());
    for word in ["temprature", "temperature", "run.steps", "learner.eta"] {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
    assert_eq!(text.matches("wrong.toml:").count(), 3, "{text}");
}

#[test]
fn off_policy_learning_without_correction_is_refused() {
    refused(&["learner.eta=2", "learner.correction=\"none\""], &["learner.correction"]);
}

#[test]
fn a_prompt_beyond_the_context_is_reported_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.jsonl");
    std::fs::write(&path, format!("{{\"prompt\": \"short\"}}\n{{\"prompt\": \"{}\"}}\n", "long ".repeat(500))).unwrap();
    let set = format!("data.path=\"{}\"", path.display());
    refused(&[&set, "data.max_prompt_tokens=100000"], &["long.jsonl:2", "tokens"]);
}

#[test]
fn a_line_that_is_not_json_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.jsonl");
    std::fs::write(&path, "{\"prompt\": \"fine\"}\nnot json\n{\"text\": \"other field\"}\n").unwrap();
    let set = format!("data.path=\"{}\"", path.display());
    refused(&[&set], &["broken.jsonl:2", "not JSON", "broken.jsonl:3", "data.prompt_field"]);
}

#[test]
fn a_port_in_use_is_reported() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let set = format!("serve.listen=\"{}\"", listener.local_addr().unwrap());
    refused(&["serve.enabled=true", &set], &["serve.listen"]);
}

#[test]
fn a_missing_or_weak_bearer_token_is_refused_without_being_printed() {
    let set = ["serve.enabled=true", "serve.listen=127.0.0.1:0", "serve.token_env=PRECEPTOR_TEST_TOKEN"];
    for (token, words) in [
        (None, &["PRECEPTOR_TEST_TOKEN", "serve.token_env", "is not set"][..]),
        (Some("tooshort"), &["PRECEPTOR_TEST_TOKEN", "8 characters", "at least 16"]),
        (Some("a token with spaces"), &["PRECEPTOR_TEST_TOKEN", "spaces"]),
    ] {
        for command in ["train", "check"] {
            let dir = tempfile::tempdir().unwrap();
            let mut program = preceptor(dir.path());
            program.arg(command).arg(config("offline.toml")).args(set.iter().flat_map(|one| ["--set", one]));
            program.envs(token.map(|token| ("PRECEPTOR_TEST_TOKEN", token)));
            let output = program.output().unwrap();
            let text = stderr(&output);
            assert!(!output.status.success(), "{command} should have been refused");
            assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
            assert!(token.is_none_or(|token| !text.contains(token)), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
            assert!(!dir.path().join("runs").exists(), "a directory was made for a run that cannot start");
        }
    }
}

#[test]
fn a_run_directory_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    // A run that took no step does not block its directory.
    assert!(!train(dir.path(), &["policy.model=\"no/such.gguf\""]).status.success());
    assert!(train(dir.path(), &["run.steps=1"]).status.success());
    let again = train(dir.path(), &["run.steps=1"]);
    assert!(!again.status.success());
    assert!(stderr(&again).contains("--run-dir"), "{}", stderr(&again));
}

#[test]
fn ids_beyond_the_vocabulary_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(train(dir.path(), &["run.steps=1"]).status.success());
    let output = preceptor(dir.path())
        .args(["generate", "run/checkpoints/step-000001", "--prompt-ids", "99999"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("99999"), "{}", stderr(&output));
}

/// A file size limit simulates a full disk: writing the weights fails half way.
#[test]
fn a_checkpoint_that_cannot_be_written_gives_one_error_and_leaves_no_partial_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut arguments: Vec<String> =
        ["train", config("offline.toml").to_str().unwrap(), "--run-dir", "run"].map(str::to_owned).to_vec();
    arguments.extend(small().map(str::to_owned));
    arguments.extend(
        ["--set", "run.steps=3", "--set", "checkpoint.every_steps=1", "--set", "checkpoint.retry_s=0"]
            .map(str::to_owned),
    );
    let output = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_preceptor")])
        .args(arguments)
        .current_dir(dir.path())
        .output()
        .unwrap();
    let text = stderr(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("training continues"), "a periodic checkpoint that fails does not end the run: {text}");
    assert!(text.contains("error: the checkpoint of step 3 was not written"), "{text}");
    let left: Vec<_> = std::fs::read_dir(dir.path().join("run/checkpoints")).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

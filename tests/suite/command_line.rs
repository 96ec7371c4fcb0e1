//! Tests of the command line: the keys that each command needs, and the meaning of paths.

use std::path::Path;
use std::process::Output;

use crate::common::{config, preceptor, resume, small, stderr, train, trained};
use crate::mock_judge::{Act, MockJudge};

fn run(dir: &Path, args: &[&str]) -> Output {
    preceptor(dir).args(args).env("HOME", dir).output().unwrap()
}

/// Starts a judge, and writes `judge.toml`, which names it, into `dir`.
fn judge_in(dir: &Path) -> MockJudge {
    let judge = MockJudge::start(|_, _, _| Act::Tokens(vec![("1", 0.9), ("2", 0.1)]));
    let text = format!(
        "[labeler]\ntype = \"pairwise\"\ncache = \"labels\"\nremote = {{ url = \"{}\", model = \"m\", probe = false }}\n",
        judge.url
    );
    std::fs::write(dir.join("judge.toml"), text).unwrap();
    judge
}

#[test]
fn label_and_eval_need_no_training_keys() {
    let dir = tempfile::tempdir().unwrap();
    let _judge = judge_in(dir.path());
    std::fs::write(dir.path().join("local.toml"), "[labeler]\ntype = \"pairwise\"\n").unwrap();
    let pair = "{\"prompt\": \"p\", \"chosen\": \"a b\", \"rejected\": \"c\"}\n";
    std::fs::write(dir.path().join("pairs.jsonl"), pair.repeat(3)).unwrap();
    let output = run(dir.path(), &["label", "judge.toml", "--input", "pairs.jsonl", "--output", "out.jsonl"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap().lines().count(), 3);
    let alignment = ["eval", "alignment", "judge.toml", "--input", "pairs.jsonl", "--variants", "configured"];
    let output = run(dir.path(), &alignment);
    assert!(output.status.success(), "{}", stderr(&output));
    // The policy would be the judge, and none is configured.
    let output = run(dir.path(), &["label", "local.toml", "--input", "pairs.jsonl", "--output", "other.jsonl"]);
    assert!(stderr(&output).contains("policy.model, which would be the judge, is missing"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let output = run(dir.path(), &["check", "judge.toml"]);
    assert!(
        output.status.code() == Some(2) && stderr(&output).contains("run.steps: is missing"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn every_command_exits_with_status_2_when_its_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _judge = judge_in(dir.path());
    std::fs::write(dir.path().join("bad.jsonl"), "{\"prompt\": \"p\", \"chosen\": 1, \"rejected\": \"c\"}\n").unwrap();
    std::fs::create_dir(dir.path().join("model")).unwrap();
    std::fs::write(dir.path().join("pairs.jsonl"), "{\"prompt\": \"p\", \"chosen\": \"a\", \"rejected\": \"c\"}\n")
        .unwrap();
    for (args, words) in [
        (&["label", "judge.toml", "--input", "bad.jsonl", "--output", "out.jsonl"][..], "bad.jsonl:1"),
        (&["label", "judge.toml", "--input", "none.jsonl", "--output", "out.jsonl"], "no file or folder none.jsonl"),
        (&["eval", "alignment", "judge.toml", "--input", "bad.jsonl"], "bad.jsonl:1"),
        (&["eval", "reward-accuracy", "model", "judge.toml", "--input", "bad.jsonl"], "model"),
        (
            &["label", "judge.toml", "--input", "pairs.jsonl", "--output", "/dev/null"],
            "/dev/null is not a regular file",
        ),
        (
            &["label", "judge.toml", "--input", "pairs.jsonl", "--output", "o.jsonl", "--batch", "0"],
            "--batch must be above zero",
        ),
        (&["pairs", "--input", "bad.jsonl", "--output", "pairs.jsonl"], "bad.jsonl:1"),
        (&["generate", "model", "Hello"], "model"),
        (&["generate", "model", "Hello", "--samples", "0"], "--samples must be above zero"),
        (&["score", "model", "Hello", "--completion", ""], "model"),
        (&["generate", "model", "Hello", "--max-new-tokens", "0"], "--max-new-tokens must be above zero"),
        (&["score", "model", "Hello"], "model"),
        (&["replay", "model"], "journal"),
    ] {
        let output = run(dir.path(), args);
        let text = stderr(&output);
        assert!(output.status.code() == Some(2) && text.contains(words), "{args:?}: {text}");
    }
}

#[test]
fn an_unreachable_hub_is_a_temporary_failure() {
    let dir = tempfile::tempdir().unwrap();
    let closed_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let offline = config("offline.toml");
    let train = ["train", offline.to_str().unwrap(), "--set", "policy.model={ hub = \"o/n\" }"];
    let generate = ["generate", "{ hub = \"o/n\" }", "Hello"];
    for (args, endpoint, status) in [
        (&train[..], format!("http://{closed_port}"), 1),
        (&generate, format!("http://{closed_port}"), 1),
        (&generate, "not an address".to_owned(), 2),
    ] {
        let mut program = preceptor(dir.path());
        let output = program.args(args).env("HF_HOME", dir.path()).env("HF_ENDPOINT", &endpoint).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?} {endpoint}: {}", stderr(&output));
    }
}

#[test]
fn a_refused_run_leaves_its_directory_usable() {
    let dir = tempfile::tempdir().unwrap();
    let offline = config("offline.toml");
    let train = |more: &[&str]| {
        let mut program = preceptor(dir.path());
        program.args(["train", offline.to_str().unwrap(), "--set", "serve.enabled=false", "--set", "run.steps=1"]);
        program.args(more.iter().flat_map(|set| ["--set", set])).output().unwrap()
    };
    assert_eq!(train(&["data.max_prompt_tokens=1"]).status.code(), Some(2));
    assert!(train(&[]).status.success() && train(&[]).status.success());
    let mut runs: Vec<_> =
        std::fs::read_dir(dir.path().join("runs")).unwrap().map(|run| run.unwrap().file_name()).collect();
    runs.sort();
    assert_eq!(runs, ["offline", "offline-2"]);
}

#[test]
fn a_resumed_run_keeps_the_date_of_its_chat_template() {
    let dir = tempfile::tempdir().unwrap();
    let date_of = |step: &str| {
        let config =
            std::fs::read_to_string(dir.path().join("run/checkpoints").join(step).join("config.toml")).unwrap();
        config.parse::<toml::Table>().unwrap()["data"]["date"].as_str().unwrap().to_owned()
    };
    let output = train(dir.path(), &["run.steps=1", "data.date=2020-01-02"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = resume(dir.path(), &["run.steps=2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!((date_of("step-000001"), date_of("step-000002")), ("2020-01-02".into(), "2020-01-02".into()));
    let output = resume(dir.path(), &["run.steps=3", "data.date=2020-01-03"]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("data.date"), "{}", stderr(&output));
    let output = train(dir.path(), &["data.date=tomorrow"]);
    assert!(stderr(&output).contains("is not a date; write it as 2026-11-29"), "{}", stderr(&output));
}

#[test]
fn a_tilde_is_the_home_directory() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(config("data/posts.jsonl"), dir.path().join("mine.jsonl")).unwrap();
    let offline = config("offline.toml");
    let check = |path: &str| {
        let set = format!("data.path={path}");
        run(dir.path(), &["check", offline.to_str().unwrap(), "--set", &set])
    };
    let output = check("~/mine.jsonl");
    assert!(output.status.success(), "{}", stderr(&output));
    let output = check("~other/mine.jsonl");
    assert!(stderr(&output).contains("the home directory of other; write the path in full"), "{}", stderr(&output));
}

#[test]
fn a_run_directory_means_its_latest_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["run.steps=2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let of_run = run(dir.path(), &["generate", "run", "Hello", "--seed", "1", "--max-new-tokens", "8"]);
    let of_step =
        run(dir.path(), &["generate", "run/checkpoints/step-000002", "Hello", "--seed", "1", "--max-new-tokens", "8"]);
    assert!(of_run.status.success() && of_run.stdout == of_step.stdout, "{}", stderr(&of_run));
    let mut resumed = preceptor(dir.path());
    resumed.arg("train").arg(config("offline.toml")).arg("--resume=run").args(small()).args(["--set", "run.steps=3"]);
    let output = resumed.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(trained(&dir.path().join("run")).len(), 12);
}

//! Tests of `preceptor label`, `pairs` and `eval` through the command line.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::common::{config, preceptor, stderr, train, wait_until};
use crate::mock_judge::{Act, MockJudge};

fn write_pairs(path: &Path, count: usize) {
    let lines: String = (0..count)
        .map(|i| {
            format!("{}\n", json!({ "prompt": format!("post {i}"), "chosen": format!("good {i}"), "rejected": "bad" }))
        })
        .collect();
    std::fs::write(path, lines).unwrap();
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn label(dir: &Path, mock: &MockJudge) -> Command {
    let mut command = preceptor(dir);
    let remote = format!(
        "labeler.remote={{ url = \"{}\", model = \"mock\", concurrency = 2, timeout_s = 3600, probe = false }}",
        mock.url
    );
    command.args([
        "label",
        config("offline.toml").to_str().unwrap(),
        "--input",
        "pairs.jsonl",
        "--output",
        "labels.jsonl",
    ]);
    command.args(["--batch", "2", "--set", "labeler.type=pairwise", "--set", &remote]);
    let cache = format!("labeler.cache=\"{}\"", dir.join("cache").display());
    command.args(["--set", &cache]);
    command
}

#[test]
fn a_judge_that_abstains_from_all_pairs_ends_a_labeling_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(&dir.path().join("pairs.jsonl"), 2);
    let mock = MockJudge::start(|_, _, _| Act::Tokens(vec![("It", 0.9), ("The", 0.1)]));
    let output = label(dir.path(), &mock).output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("the judge abstained from all 2") && text.contains("labels.jsonl"), "{text}");
}

#[test]
fn a_killed_labeling_resumes_and_no_pair_is_written_twice() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(&dir.path().join("pairs.jsonl"), 30);
    // Two pairs with two questions each form a batch, and two questions are asked at a time. The judge answers half of
    // the third and of the tenth batch, and then nothing until the labeler is killed.
    let allowed = Arc::new(AtomicU64::new(10));
    let limit = Arc::clone(&allowed);
    // The better answer is recognised in either position.
    let mock = MockJudge::start(move |number, _, body| {
        if number >= limit.load(Ordering::SeqCst) {
            return Act::Hang;
        }
        let prompt = body["messages"][0]["content"].as_str().unwrap();
        let first = prompt.rsplit("Summary 1 - ").next().unwrap().starts_with("good");
        let tokens = if first { vec![("1", 0.9), ("2", 0.1)] } else { vec![("1", 0.2), ("2", 0.8)] };
        Act::Tokens(tokens)
    });
    let output = dir.path().join("labels.jsonl");
    // After the first 10 questions come 2 that hang, the first 2 of the lost batch again, and 28 more up to the middle
    // of another batch.
    for (answered, hanging, complete, next) in [(10, 2, 4, 10 + 2 + 2 + 28), (40, 4, 18, u64::MAX)] {
        let mut child = label(dir.path(), &mock).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the judge stops answering", || {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            let written = lines(&output).len();
            (mock.served("ok"), mock.served("timeout"), written) == (answered, hanging, complete)
        });
        // SIGKILL: no cleanup runs.
        child.kill().unwrap();
        child.wait().unwrap();
        allowed.store(next, Ordering::SeqCst);
    }
    // Simulates a last write that was cut off in the middle.
    let mut text = std::fs::read_to_string(&output).unwrap();
    text.push_str("{\"pair\": 29, \"prefer");
    std::fs::write(&output, text).unwrap();
    let ended = label(dir.path(), &mock).output().unwrap();
    assert!(ended.status.success(), "{}", stderr(&ended));
    let rows = lines(&output);
    let mut pairs: Vec<u64> = rows.iter().map(|row| row["pair"].as_u64().unwrap()).collect();
    pairs.sort_unstable();
    assert_eq!(pairs, (0..30).collect::<Vec<_>>());
    for row in &rows {
        assert!((row["preference"].as_f64().unwrap() - 0.85).abs() < 1e-9, "{row}");
        assert_eq!(row["orders"].as_array().unwrap().len(), 2);
    }
    // Two questions per pair, plus the two answers that each killed process had received of its unfinished batch.
    assert_eq!(mock.served("ok"), 60 + 2 * 2);
    // The output is a preference file, and another labeler must not write into it.
    let again = label(dir.path(), &mock).args(["--set", "labeler.preamble=detailed"]).output().unwrap();
    assert!(stderr(&again).contains("another template") && !again.status.success(), "{}", stderr(&again));
}

#[test]
fn a_pair_that_the_judge_refuses_is_an_abstention_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(&dir.path().join("pairs.jsonl"), 4);
    let down = MockJudge::start(|_, _, body| {
        let prompt = body["messages"][0]["content"].as_str().unwrap();
        if prompt.contains("post 2") { Act::Status(400, "", "no") } else { Act::Tokens(vec![("1", 0.6), ("2", 0.4)]) }
    });
    let output = label(dir.path(), &down).output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success() && text.contains("labels 3, abstentions 1"), "{text}");
    let rows = lines(&dir.path().join("labels.jsonl"));
    let without: Vec<&Value> = rows.iter().filter(|row| row["preference"].is_null()).collect();
    assert!(rows.len() == 4 && without.len() == 1, "{rows:?}");
    assert!(without[0]["abstention"].as_str().unwrap().contains("400: no"), "{}", without[0]);
}

fn eval(dir: &Path, arguments: &[&str]) -> Vec<Value> {
    let output = preceptor(dir).arg("eval").args(arguments).args(["--format", "json"]).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let tables: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    tables[0].as_array().unwrap().clone()
}

#[test]
fn every_evaluation_runs_on_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let overrides =
        ["run.mode=distilled", "run.steps=1", "reward_model.warm_up_groups=4", "reward_model.batch_pairs=4"];
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let checkpoint = "run/checkpoints/step-000001";
    let offline = config("offline.toml");
    let offline = offline.to_str().unwrap();
    let pairs = config("data/preferences-summaries.jsonl");
    let pairs = pairs.to_str().unwrap();
    let common = [offline, "--set", "rollout.max_new_tokens=8", "--limit", "6"];

    let names = "base-0,detailed-2,base-0-cot,direct,likelihood";
    let arguments = ["alignment", offline, "--input", pairs, "--limit", "6", "--cot-limit", "2", "--variants", names];
    let quick = ["--set", "labeler.rationale_tokens=4", "--set", "policy.model.scratch.context=8192"];
    let rows = eval(dir.path(), &[&arguments[..], &quick].concat());
    let labelers: Vec<&str> = rows.iter().map(|row| row["labeler"].as_str().unwrap()).collect();
    assert_eq!(labelers.join(","), names);
    let asked: Vec<u64> = rows.iter().map(|row| row["pairs"].as_u64().unwrap()).collect();
    assert_eq!(asked, [6, 6, 2, 6, 6]);

    // A model against itself gives the same answers, so every comparison is a tie.
    let rows = eval(dir.path(), &[&["win-rate"][..], &common, &["--a", checkpoint, "--b", checkpoint]].concat());
    assert_eq!((&rows[0]["ties"], &rows[0]["wins"]), (&json!(6), &json!(0)), "{}", rows[0]);
    let rows = eval(dir.path(), &[&["win-rate"][..], &common, &["--a", checkpoint, "--answers", "a.jsonl"]].concat());
    assert_eq!(rows[0]["prompts"], 6);
    assert_eq!(lines(&dir.path().join("a.jsonl")).len(), 6);

    let reward_model = format!("{checkpoint}/reward_model");
    let rows = eval(dir.path(), &["reward-accuracy", &reward_model, offline, "--input", pairs, "--limit", "10"]);
    assert_eq!(rows[0]["pairs"], 10);

    let direct = ["--set", "labeler.type=direct", "--set", "labeler.templates=harmless", "--model", checkpoint];
    let rows = eval(dir.path(), &[&["harmless-rate"][..], &common, &direct].concat());
    assert_eq!(rows[0]["answers"], 6);
    let refused = preceptor(dir.path())
        .args(["eval", "harmless-rate"])
        .args(common)
        .args(["--model", checkpoint])
        .output()
        .unwrap();
    assert!(stderr(&refused).contains("labeler.type = \"direct\""), "{}", stderr(&refused));
}

/// Returns the arguments of `eval alignment` on pairs.jsonl with only a remote judge. The policy's model and device do
/// not exist, so the command fails if it loads or opens them.
fn remote_alignment(dir: &Path, mock: &MockJudge) -> Vec<String> {
    let settings = [
        format!("labeler.remote={{ url = \"{}\", model = \"mock\", probe = false }}", mock.url),
        format!("labeler.cache=\"{}\"", dir.join("cache").display()),
        "labeler.type=pairwise".to_owned(),
        "policy.model={ path = \"no/such/model\" }".to_owned(),
        "policy.device=cuda:7".to_owned(),
    ];
    let offline = config("offline.toml").display().to_string();
    let fixed = ["alignment", &offline, "--input", "pairs.jsonl"].map(str::to_owned);
    fixed.into_iter().chain(settings.into_iter().flat_map(|one| ["--set".to_owned(), one])).collect()
}

fn judged(prompt: &str) -> Act {
    let after = |mark: &str| prompt.rsplit(mark).next().unwrap().to_owned();
    match () {
        () if prompt.contains("post 1") => Act::Tokens(vec![("1", 0.5), ("2", 0.5)]),
        // A rating: 9 for good answers, 2 for bad ones.
        () if prompt.ends_with("SCORE:") && after("SUMMARY: ").starts_with("good") => Act::Tokens(vec![("9", 1.0)]),
        () if prompt.ends_with("SCORE:") => Act::Tokens(vec![("2", 1.0)]),
        () if after("\nSummary 1 - ").starts_with("good") => Act::Tokens(vec![("1", 0.9), ("2", 0.1)]),
        () => Act::Tokens(vec![("1", 0.2), ("2", 0.8)]),
    }
}

#[test]
fn a_remote_judge_is_asked_only_in_supported_ways_and_ties_and_equal_answers_are_neither_right_nor_wrong() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(&dir.path().join("pairs.jsonl"), 5);
    let mut text = std::fs::read_to_string(dir.path().join("pairs.jsonl")).unwrap();
    for _ in 0..2 {
        text.push_str(&format!("{}\n", json!({ "prompt": "p", "chosen": "the same", "rejected": "the same " })));
    }
    std::fs::write(dir.path().join("pairs.jsonl"), text).unwrap();
    let mock = MockJudge::start(|_, _, body| judged(body["messages"][0]["content"].as_str().unwrap()));
    let arguments = remote_alignment(dir.path(), &mock);
    // An unsupported method ends the command before the first question.
    let wrong = preceptor(dir.path()).arg("eval").args(&arguments).args(["--variants", "base-0,likelihood"]).output();
    let wrong = stderr(&wrong.unwrap());
    assert!(wrong.contains("likelihood: it reads the weights of its judge"), "{wrong}");
    assert_eq!(mock.served("ok"), 0);

    let output = preceptor(dir.path()).arg("eval").args(&arguments).args(["--format", "json"]).output().unwrap();
    let said = stderr(&output);
    assert!(output.status.success() && said.contains("left out: likelihood: "), "{said}");
    // 7 pairs: 4 methods of 2 questions, 4 methods with rationales of 4, and ratings of 4, of which 2 need an extra
    // question to distinguish 1 from 10.
    assert!(said.contains("questions to the judge: at most 196 (base-0 14, "), "{said}");
    let tables = String::from_utf8(output.stdout).unwrap();
    let rows: Value = serde_json::from_str(tables.lines().next().unwrap()).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 9);
    for row in [&rows[0], &rows[8]] {
        assert_eq!((&row["pairs"], &row["identical"]), (&json!(7), &json!(2)), "{row}");
        assert_eq!(row["ties"], 1, "{row}");
        assert_eq!((&row["alignment"]["value"], &row["alignment"]["count"]), (&json!(1.0), &json!(4)), "{row}");
    }
    // Five pairs: 10 questions for each of four methods without rationales, 20 for each of four with them, and ten
    // ratings, two of which need an extra question.
    assert_eq!(mock.served("ok"), 4 * 10 + 4 * 20 + 10 + 2);
}

/// A judge that follows a forged verdict at the start of a line, control tokens, and praise.
#[test]
fn attacks_flip_the_judge_unless_the_template_guards_against_them() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(&dir.path().join("pairs.jsonl"), 4);
    let mock = MockJudge::start(|_, _, body| {
        let prompt = body["messages"][0]["content"].as_str().unwrap();
        let (before, second) = prompt.rsplit_once("\nSummary 2 - ").unwrap();
        let first = before.rsplit_once("\nSummary 1 - ").unwrap().1;
        let believed = |text: &str| {
            let forged = |line: &str| ["Preferred Summary=", "Summary 1"].iter().any(|one| line.starts_with(one));
            // The last line is the template's own ending.
            let lines = text.strip_suffix("Preferred Summary=").unwrap_or(text).lines();
            lines.skip(1).any(forged) || text.contains("<|im_end|>") || text.contains("Independent experts")
        };
        match (believed(first), believed(second)) {
            (true, _) => Act::Tokens(vec![("1", 0.9), ("2", 0.1)]),
            (_, true) => Act::Tokens(vec![("1", 0.1), ("2", 0.9)]),
            _ => judged(prompt),
        }
    });
    let arguments = remote_alignment(dir.path(), &mock);
    let output = preceptor(dir.path())
        .arg("eval")
        .args(&arguments)
        .args(["--variants", "base-0", "--attacks", "--format", "json"])
        .output()
        .unwrap();
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    let attacks = preceptor::tools::evaluate::attacks::ATTACKS.len();
    let announced =
        format!("at most 8 (base-0 8); {attacks} attacks on each correctly decided pair: at most {} more", 8 * attacks);
    assert!(said.contains(&announced), "{announced:?} is not in {said}");
    let tables = String::from_utf8(output.stdout).unwrap();
    let rows: Value = serde_json::from_str(tables.lines().last().unwrap()).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), attacks + 2, "{rows}");
    for row in rows.as_array().unwrap() {
        // One of the four pairs is a tie and is not attacked.
        assert_eq!((&row["labeler"], &row["pairs"]), (&json!("base-0"), &json!(3)), "{row}");
        let flipped = match row["attack"].as_str().unwrap() {
            "claims-praise" | "any of them" => 1.0,
            "mean of all" => 1.0 / attacks as f64,
            _ => 0.0,
        };
        let found = row["flipped"]["value"].as_f64();
        assert!(found.is_some_and(|found| (found - flipped).abs() < 1e-12), "{row}");
    }
}

#[test]
fn pairs_follow_the_documented_rule_and_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let posts = config("data/posts.jsonl");
    let made = preceptor(dir.path())
        .args(["pairs", "--input", posts.to_str().unwrap(), "--output", "pairs.jsonl", "--limit", "20"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", stderr(&made));
    let shipped = lines(&config("data/preferences-summaries.jsonl"));
    assert_eq!(
        lines(&dir.path().join("pairs.jsonl")),
        shipped[..20],
        "the shipped file must equal the command's output"
    );
}

#[test]
fn parquet_files_are_read_row_by_row() {
    use preceptor::pipeline::data::{PairOptions, Preferences, Rows};
    let path = crate::common::fixture("parquet/pairs.parquet");
    let rows = Rows::open(&path).unwrap();
    assert_eq!(rows.len(), 7);
    // A row in the third row group, after nulls.
    let row = rows.get(6).unwrap().unwrap();
    assert_eq!(
        (&row["score"], &row["note"], &rows.get(1).unwrap().unwrap()["note"]),
        (&json!(3.0), &json!("note 6"), &Value::Null)
    );
    for codec in ["zstd", "lz4", "brotli", "gzip", "none"] {
        let same = Rows::open(&path.with_file_name(format!("pairs-{codec}.parquet"))).unwrap();
        for i in 0..7 {
            assert_eq!(same.get(i).unwrap(), rows.get(i).unwrap(), "{codec}, row {i}");
        }
    }
    let pairs = Preferences::read(&path, &PairOptions { labeled: true, ..PairOptions::default() }).unwrap();
    let pair = pairs.get(4).unwrap();
    assert_eq!(pair.dialogue.text(), "Human: question 4\n\nAssistant: hm\n\nHuman: and?");
    assert_eq!((pair.first.as_str(), pair.second.as_str(), pair.preference), ("good 4", "bad é", Some(1.0)));
    // A truncated file is reported by name and not misread.
    let dir = tempfile::tempdir().unwrap();
    let half = dir.path().join("half.parquet");
    let bytes = std::fs::read(&path).unwrap();
    for length in [bytes.len() / 2, bytes.len() - 1, 3, 0] {
        std::fs::write(&half, &bytes[..length]).unwrap();
        let error = format!("{:#}", Rows::open(&half).err().unwrap());
        assert!(error.contains("half.parquet"), "{error}");
    }
}

//! Tests of the label cache with real processes: several at once, killed, with a damaged file, on a full disk, with a
//! judge that moved.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use preceptor::util::seed;
use serde_json::{Value, json};

use crate::common::{config, preceptor, stderr, training, wait_until};
use crate::mock_judge::{Act, MockJudge};

/// Writes preference pairs number `from` to `to` to the file `name`.
fn write_pairs(dir: &Path, name: &str, from: usize, to: usize) {
    let line = |i| {
        format!("{}\n", json!({ "prompt": format!("post {i}."), "chosen": format!("good {i}"), "rejected": "bad" }))
    };
    std::fs::write(dir.join(name), (from..to).map(line).collect::<String>()).unwrap();
}

/// A preference that is a function of the question.
fn preference(body: &Value) -> Act {
    let p = 0.1 + 0.8 * (seed::text(&body["messages"].to_string()) % 1000) as f64 / 1000.0;
    Act::Tokens(vec![("1", p), ("2", 1.0 - p)])
}

fn cache(dir: &Path) -> String {
    format!("labeler.cache=\"{}\"", dir.join("cache").display())
}

fn remote(url: &str, more: &str) -> String {
    format!("labeler.remote={{ url = \"{url}\", model = \"mock\", concurrency = 2, probe = false{more} }}")
}

/// Returns the `label` command for the pairs in `input`, with a judge at `url` and its keys `more`.
fn label(dir: &Path, input: &str, output: &str, url: &str, more: &str) -> Command {
    let mut command = preceptor(dir);
    command.arg("label").arg(config("offline.toml")).args(["--input", input, "--output", output, "--batch", "2"]);
    let sets = ["labeler.type=pairwise".to_owned(), remote(url, more), cache(dir)];
    command.args(sets.iter().flat_map(|one| ["--set", one]));
    command
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[test]
fn concurrent_processes_share_the_cache_and_buy_no_label_twice() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_pairs(dir, "all.jsonl", 0, 21);
    write_pairs(dir, "first.jsonl", 0, 20);
    let answers_all = Arc::new(AtomicBool::new(false));
    let all = Arc::clone(&answers_all);
    let mock = MockJudge::start(move |_, _, body| {
        let text = body["messages"].to_string();
        if text.contains("post 20.") && !all.load(Ordering::SeqCst) { Act::Hang } else { preference(body) }
    });
    // It has labeled all pairs but the last one, and waits for the judge. After its retries, two minutes later, it would ask a
    // question again to learn whether the judge answers others.
    let hang = ", timeout_s = 1, retries = 20, backoff_s = 5, max_backoff_s = 5";
    let mut first = label(dir, "all.jsonl", "a.jsonl", &mock.url, hang).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("twenty pairs are labeled", || {
        assert!(first.try_wait().unwrap().is_none(), "it ended");
        lines(&dir.join("a.jsonl")) == 20
    });
    assert_eq!(mock.served("ok"), 40);
    // While the first labeler runs, a second one finds its labels, as does a training run that also asks other
    // questions.
    let second = label(dir, "first.jsonl", "b.jsonl", &mock.url, "").output().unwrap();
    let text = stderr(&second);
    assert!(second.status.success() && text.contains("0 questions to the judge, 40 from the cache"), "{text}");
    let sets = ["labeler.type=pairwise", "learner.eta=0", &remote(&mock.url, ""), &cache(dir)];
    let train = || training(dir, &sets).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let trained = train();
    assert!(trained.status.success(), "{}", stderr(&trained));
    let bought = mock.served("ok");
    assert!(bought > 40);
    assert!(first.try_wait().unwrap().is_none(), "it ended");
    // Repeating the run finds the first one's labels.
    std::fs::remove_dir_all(dir.join("run")).unwrap();
    let trained = train();
    assert!(trained.status.success(), "{}", stderr(&trained));
    assert_eq!(mock.served("ok"), bought, "training bought labels again");
    answers_all.store(true, Ordering::SeqCst);
    let first = first.wait_with_output().unwrap();
    assert!(first.status.success(), "{}", stderr(&first));
    assert_eq!(lines(&dir.join("a.jsonl")), 21);
}

#[test]
fn labels_are_found_at_another_address_but_not_for_another_question() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_pairs(dir, "pairs.jsonl", 0, 3);
    let start = || MockJudge::start(|_, _, body| preference(body));
    let (here, there) = (start(), start());
    let asked = |number: usize, mock: &MockJudge, more: &str, sets: &[&str]| {
        let before = mock.served("ok");
        let mut command = label(dir, "pairs.jsonl", &format!("{number}.jsonl"), &mock.url, more);
        let output = command.args(sets.iter().flat_map(|one| ["--set", one])).output().unwrap();
        assert!(output.status.success(), "{more}: {}", stderr(&output));
        mock.served("ok") - before
    };
    assert_eq!(asked(0, &here, "", &[]), 6);
    assert_eq!(asked(1, &there, "", &[]), 0, "the server moved");
    let changes = [
        (", votes = 7", &[][..]),
        (", evidence = \"logprobs\"", &[]),
        (", system = \"Be fair.\"", &[]),
        (", api = \"completions\"", &[]),
        ("", &["labeler.preamble=detailed"]),
    ];
    for (i, (more, sets)) in changes.into_iter().enumerate() {
        assert_eq!(asked(10 + i, &here, more, sets), 6, "{more} {sets:?}");
        assert_eq!(asked(20 + i, &there, more, sets), 0, "{more} {sets:?}");
    }
    let first = std::fs::read_to_string(dir.join("0.jsonl")).unwrap();
    let moved = std::fs::read_to_string(dir.join("1.jsonl")).unwrap();
    let labels = |text: &str| -> Vec<Value> {
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["orders"].clone()).collect()
    };
    assert_eq!(labels(&first), labels(&moved));
}

#[test]
fn processes_killed_while_writing_lose_only_questions_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    const PAIRS: usize = 150;
    const KILLS: u64 = 8;
    write_pairs(dir, "a.jsonl", 0, PAIRS);
    write_pairs(dir, "b.jsonl", PAIRS, 2 * PAIRS);
    write_pairs(dir, "all.jsonl", 0, 2 * PAIRS);
    let asked: Arc<Mutex<HashMap<String, u64>>> = Arc::default();
    let seen = Arc::clone(&asked);
    let mock = MockJudge::start(move |_, _, body| {
        *seen.lock().unwrap().entry(body.to_string()).or_default() += 1;
        preference(body)
    });
    let start = |name: &str| {
        let output = format!("out-{name}");
        label(dir, name, &output, &mock.url, "").stderr(Stdio::null()).spawn().unwrap()
    };
    for kill in 0..KILLS {
        let before = mock.served("ok");
        let mut children = [start("a.jsonl"), start("b.jsonl")];
        // Both are working; then waits a little longer, by chance.
        wait_until("questions", || mock.served("ok") > before + 8 || children[0].try_wait().unwrap().is_some());
        std::thread::sleep(Duration::from_millis(seed::mix(kill) % 40));
        for child in &mut children {
            // The process may have ended.
            let _ = child.kill();
            child.wait().unwrap();
        }
    }
    for mut child in [start("a.jsonl"), start("b.jsonl")] {
        assert!(child.wait().unwrap().success());
    }
    {
        let asked = asked.lock().unwrap();
        assert_eq!(asked.len(), 4 * PAIRS);
        let again = asked.values().sum::<u64>() - asked.len() as u64;
        // Each process asks four questions at a time.
        assert!(again <= KILLS * 2 * 4, "{again} labels were bought again");
    }
    let before = mock.served("ok");
    let output = label(dir, "all.jsonl", "out-all.jsonl", &mock.url, "").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(mock.served("ok"), before, "a label that was bought is not kept");
    let damaged = std::fs::read_dir(dir.join("cache")).unwrap().map(|entry| entry.unwrap().file_name());
    let damaged: Vec<_> = damaged.filter(|name| name.to_string_lossy().contains("damaged")).collect();
    assert!(damaged.is_empty(), "{damaged:?}");
}

#[test]
fn a_damaged_cache_is_set_aside_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_pairs(dir, "pairs.jsonl", 0, 3);
    let mock = MockJudge::start(|_, _, body| preference(body));
    std::fs::create_dir(dir.join("cache")).unwrap();
    std::fs::write(dir.join("cache/labels.sqlite"), "no database\n".repeat(1000)).unwrap();
    let output = label(dir, "pairs.jsonl", "0.jsonl", &mock.url, "").output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success() && lines(&dir.join("0.jsonl")) == 3, "{text}");
    for words in ["cache/labels.sqlite is damaged", "labels.sqlite.damaged-1", "put the copy in its place"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    assert!(dir.join("cache/labels.sqlite.damaged-1").exists());
    let output = label(dir, "pairs.jsonl", "1.jsonl", &mock.url, "").output().unwrap();
    assert!(output.status.success() && !stderr(&output).contains("damaged"), "{}", stderr(&output));
    assert_eq!(mock.served("ok"), 6);
}

/// A disk that accepts no bytes: here a file size limit.
#[test]
fn on_a_full_disk_labels_are_read_and_bought_answers_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mock = MockJudge::start(|_, _, body| preference(body));
    let pairs = config("data/preferences-summaries.jsonl");
    let eval = |limit: &str, count: &str| {
        let mut command = Command::new("bash");
        command.args(["-c", &format!("trap '' XFSZ; {limit} exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_preceptor")]);
        command.args(["eval", "alignment"]).arg(config("offline.toml")).arg("--input").arg(&pairs);
        command.args(["--limit", count, "--variants", "base-0", "--format", "json"]);
        let sets = ["labeler.type=pairwise".to_owned(), remote(&mock.url, ""), cache(dir)];
        let output = command.args(sets.iter().flat_map(|one| ["--set", one])).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let text = stderr(&output);
        (String::from_utf8(output.stdout).unwrap(), text)
    };
    let (sound, _) = eval("", "4");
    let bought = mock.served("ok");
    let (full, text) = eval("ulimit -f 0;", "4");
    assert_eq!(mock.served("ok"), bought, "labels that are kept were bought again: {text}");
    assert!(text.contains("cache/labels.sqlite cannot be opened") && text.contains("File too large"), "{text}");
    let rows = |text: &str| -> Value {
        let mut rows: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        // Exchanges are counted by the side that answered.
        for row in rows.as_array_mut().unwrap() {
            row.as_object_mut().unwrap().retain(|key, _| key == "labeler" || key == "pairs" || key == "accuracy");
        }
        rows
    };
    assert_eq!(rows(&full), rows(&sound));
}

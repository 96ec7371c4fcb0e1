//! Tests of rate limits shared by all processes of a machine that ask the same server with the same key.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{config, preceptor, stderr, wait_until};
use crate::mock_judge::{Act, MockJudge};

/// Tolerance for times from `/proc/uptime`, which are truncated to hundredths of a second.
const CLOCK: Duration = Duration::from_millis(20);

type Arrivals = Arc<Mutex<Vec<Instant>>>;

/// A judge that records when requests arrive; `first` answers the first one.
fn judge(first: Act) -> (MockJudge, Arrivals) {
    let arrivals = Arrivals::default();
    let noted = Arc::clone(&arrivals);
    let mock = MockJudge::start(move |number, _, _| {
        noted.lock().unwrap().push(Instant::now());
        if number == 0 { first.clone() } else { answer() }
    });
    (mock, arrivals)
}

fn answer() -> Act {
    Act::Tokens(vec![("1", 0.9), ("2", 0.1)])
}

/// Starts a labeling of `count` pairs, with one question each, under the name `name` in `dir`.
fn label(dir: &Path, name: &str, mock: &MockJudge, count: usize, per_minute: u64) -> Command {
    let lines: String = (0..count)
        .map(|i| format!("{}\n", json!({ "prompt": format!("{name} {i}"), "chosen": "good", "rejected": "bad" })))
        .collect();
    std::fs::write(dir.join(format!("{name}.jsonl")), lines).unwrap();
    let mut command = preceptor(dir);
    command.arg("label").arg(config("offline.toml"));
    command.args(["--input", &format!("{name}.jsonl"), "--output", &format!("{name}-labels.jsonl")]);
    let remote = format!(
        "labeler.remote={{ url = \"{}\", model = \"mock\", probe = false, requests_per_minute = {per_minute}, retries = 0 }}",
        mock.url
    );
    let cache = format!("labeler.cache=\"{}\"", dir.join(name).display());
    for one in ["labeler.type=pairwise", "labeler.both_orders=false", &remote, &cache] {
        command.args(["--set", one]);
    }
    command.env("PRECEPTOR_CACHE", dir.join("cache")).stdout(Stdio::null());
    command
}

fn start(mut command: Command) -> Child {
    command.stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the end of a labeling of `count` pairs, which must succeed; returns its log.
fn end(dir: &Path, name: &str, child: Child, count: usize) -> String {
    let output = child.wait_with_output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    let labels = std::fs::read_to_string(dir.join(format!("{name}-labels.jsonl"))).unwrap();
    assert_eq!(labels.lines().count(), count, "{text}");
    text
}

/// Returns the file of the only limit in `dir`.
fn file(dir: &Path) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(dir.join("cache/limits")).ok()?.flatten().map(|entry| entry.path());
    let file = files.next();
    assert!(files.next().is_none(), "one server and one key have one file");
    file
}

#[test]
fn two_processes_share_a_rate_limit() {
    let dir = tempfile::tempdir().unwrap();
    let (mock, arrivals) = judge(answer());
    // 100 per minute: a burst of 10, then one every 0.6 s. Either process alone would need only a burst.
    let began = Instant::now();
    let both = ["a", "b"].map(|name| (name, start(label(dir.path(), name, &mock, 8, 100))));
    for (name, child) in both {
        end(dir.path(), name, child, 8);
    }
    let arrivals = arrivals.lock().unwrap();
    assert_eq!(arrivals.len(), 16);
    let took = arrivals[15] - began;
    assert!(took + CLOCK >= Duration::from_millis(6 * 600), "16 requests were sent within {took:?}");
}

#[test]
fn a_pause_that_a_server_asks_one_process_for_applies_to_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let (mock, arrivals) = judge(Act::Status(429, "Retry-After: 3\r\n", "{}"));
    let first = start(label(dir.path(), "a", &mock, 1, 6000));
    wait_until("the process notes that it has to wait", || {
        let text = file(dir.path()).and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
        text.split_whitespace().nth(4).is_some_and(|hold| hold.parse::<f64>().unwrap() > 0.0)
    });
    let second = start(label(dir.path(), "b", &mock, 1, 6000));
    end(dir.path(), "b", second, 1);
    end(dir.path(), "a", first, 1);
    let arrivals = arrivals.lock().unwrap();
    assert_eq!(arrivals.len(), 3);
    let waited = arrivals[1] - arrivals[0];
    assert!(waited + CLOCK >= Duration::from_secs(3), "the next request was sent after {waited:?}");
}

#[test]
fn a_process_killed_while_it_waits_for_a_rate_limit_does_not_block_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let (mock, arrivals) = judge(answer());
    let mut killed = start(label(dir.path(), "a", &mock, 200, 100));
    wait_until("the burst is used up", || arrivals.lock().unwrap().len() >= 10);
    killed.kill().unwrap();
    killed.wait().unwrap();
    let text = end(dir.path(), "b", start(label(dir.path(), "b", &mock, 3, 100)), 3);
    assert!(!text.contains("for this process alone"), "{text}");
}

#[test]
fn a_limit_that_cannot_be_shared_applies_to_the_process_alone_with_one_warning() {
    let dir = tempfile::tempdir().unwrap();
    let (mock, _) = judge(answer());
    let warned = |text: &str, why: &str| {
        let words = "holds for this process alone";
        assert!(text.matches(words).count() == 1 && text.contains(why), "{text}");
    };
    end(dir.path(), "a", start(label(dir.path(), "a", &mock, 1, 6000)), 1);
    // Simulates a process that was suspended while it held the lock.
    let locked = std::fs::File::open(file(dir.path()).unwrap()).unwrap();
    locked.lock().unwrap();
    let text = end(dir.path(), "b", start(label(dir.path(), "b", &mock, 3, 6000)), 3);
    warned(&text, "another process keeps it locked");
    drop(locked);
    let mut nowhere = label(dir.path(), "c", &mock, 3, 6000);
    let missing = dir.path().join("a.jsonl/none");
    nowhere.env("PRECEPTOR_CACHE", &missing).env("TMPDIR", &missing).env_remove("XDG_RUNTIME_DIR");
    let text = end(dir.path(), "c", start(nowhere), 3);
    warned(&text, "set PRECEPTOR_CACHE to a folder that can be written");
}

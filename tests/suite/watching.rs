//! Tests of a run's observability: metrics and their reference, the page and its data, logs, win rates, bottlenecks.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use preceptor::observe::telemetry::catalogue::{self, METRICS};
use serde_json::Value;

use crate::common::{PATIENCE, config, is_generated, metrics, preceptor, small, stderr, train, wait_until};
use crate::mock_judge::{Act, MockJudge};

/// A node that runs until it is dropped.
struct Node {
    child: Child,
    address: String,
    lines: Receiver<String>,
}

impl Node {
    fn start(dir: &Path, overrides: &[&str], token: Option<&str>) -> Self {
        let mut command = preceptor(dir);
        command.arg("train").arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
        let endless = ["run.steps=1000000", "serve.enabled=true", "serve.listen=127.0.0.1:0"];
        command.args(overrides.iter().chain(&endless).flat_map(|one| ["--set", one]));
        if let Some(token) = token {
            command.args(["--set", "serve.token_env=NODE_TOKEN"]).env("NODE_TOKEN", token);
        }
        Self::spawn(command)
    }

    /// Starts a program that says on standard error where it serves.
    fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, lines) = sync_channel(1 << 16);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // A test may stop reading before the end of the output.
                let _ = sender.try_send(line);
            }
        });
        let mut node = Self { child, address: String::new(), lines };
        let serving = node.wait("serving");
        node.address = serving.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        node
    }

    fn wait(&self, what: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect(what);
            if line.contains(what) {
                return line;
            }
        }
    }

    /// Returns the status line and headers, and the body.
    fn get(&self, path: &str, token: Option<&str>) -> (String, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let token = token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{token}Connection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path, None).1).unwrap()
    }

    /// Returns `/status` once it satisfies `enough`.
    fn status(&self, what: &str, enough: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.json("/status");
            if enough(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{what}: {}", status["diagnosis"]);
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_metrics_reference_matches_the_catalogue() {
    is_generated("grafana/METRICS.md", &catalogue::reference());
}

/// Checks that each family in `/metrics` is in the catalogue, with the same kind and labels.
#[track_caller]
fn catalogued(text: &str) -> usize {
    let mut families = 0;
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            families += 1;
            let metric = catalogue::find(name).unwrap_or_else(|| panic!("{name} is not in the catalogue"));
            assert_eq!(metric.kind.name(), kind, "{name}");
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
        } else if let Some((name, labels)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| catalogue::find(name.strip_suffix(end)?));
            let metric = catalogue::find(name).or(base).unwrap_or_else(|| panic!("{name} is not in the catalogue"));
            let labels = labels.split_once('}').unwrap().0.split(',').map(|label| label.split_once('=').unwrap().0);
            for label in labels.filter(|label| *label != "le") {
                assert!(metric.labels.contains(&label), "{name} has a label {label} that the catalogue does not tell");
            }
        }
    }
    families
}

#[test]
fn all_exported_metrics_are_in_the_catalogue_and_named_by_convention() {
    let dir = tempfile::tempdir().unwrap();
    let distilled = ["run.mode=distilled", "reward_model.warm_up_groups=4", "reward_model.batch_pairs=4"];
    for (i, overrides) in [&distilled[..], &["learner.algorithm=ppo"], &["controller.enabled=true"]].iter().enumerate()
    {
        let dir = dir.path().join(i.to_string());
        std::fs::create_dir(&dir).unwrap();
        let output = train(&dir, overrides);
        assert!(output.status.success(), "{}", stderr(&output));
        let text = std::fs::read_to_string(dir.join("run/metrics.prom")).unwrap();
        assert!(catalogued(&text) > 70, "{overrides:?}");
    }
    let mut names: Vec<&str> = Vec::new();
    for metric in METRICS.iter().flat_map(|(_, metrics)| *metrics) {
        let counter = metric.kind == catalogue::Kind::Counter;
        assert_eq!(counter, metric.name.ends_with("_total"), "{}", metric.name);
        assert!(!metric.help.is_empty() && !metric.help.ends_with('.'), "{}", metric.name);
        names.push(metric.name);
    }
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "a name occurs twice");
}

#[test]
fn a_worker_serves_probes_and_catalogued_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let worker = |address: &str| {
        let mut command = preceptor(dir.path());
        // Nothing listens there, so the worker waits for the broker.
        command.args(["worker", "--join", "nats://127.0.0.1:1", "--run", "r", "--metrics-listen", address]);
        command
    };
    let waiting = Node::spawn(worker("127.0.0.1:0"));
    let (head, body) = waiting.get("/healthz", None);
    assert!(head.starts_with("HTTP/1.1 200") && body == "ok\n", "{head}{body}");
    let (head, body) = waiting.get("/readyz", None);
    assert!(head.starts_with("HTTP/1.1 503") && body.contains("waits for the broker"), "{head}{body}");
    let (head, text) = waiting.get("/metrics", None);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(catalogued(&text) > 12, "{text}");
    for line in ["preceptor_worker_process_results_total 0", "preceptor_worker_process_broker_ok 0"] {
        assert!(text.lines().any(|known| known == line), "{line} is missing: {text}");
    }
    assert!(!text.contains("preceptor_trained_tokens_total"), "a worker has no metrics of a node: {text}");
    assert!(waiting.get("/status", None).0.starts_with("HTTP/1.1 404"));
    let second = worker(&waiting.address).output().unwrap();
    assert_eq!(second.status.code(), Some(1), "another time the port may be free");
    assert!(stderr(&second).contains("give --metrics-listen a free port"), "{}", stderr(&second));
}

#[test]
fn the_page_is_complete_and_its_data_is_available() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[], None);
    node.wait("step   3/");
    let (head, page) = node.get("/", None);
    assert!(head.contains("default-src 'none'") && head.contains("connect-src 'self'"), "{head}");
    assert!(page.contains("<style>") && page.contains("<script>") && !page.contains("<!--script-->"));
    // The page loads nothing from elsewhere; XML namespace names are not addresses.
    let elsewhere: Vec<&str> = page.split("http").skip(1).filter(|rest| !rest.starts_with("://www.w3.org/")).collect();
    assert!(elsewhere.iter().all(|rest| !rest.starts_with("s://") && !rest.starts_with("://")), "{elsewhere:?}");
    assert!(page.contains("id=\"servers\"") && page.contains("function showServers"));

    let history = node.json("/history");
    let columns = history["columns"].as_array().unwrap();
    let step = columns.iter().position(|column| column == "step").unwrap();
    assert_eq!(history["rows"][0][step], 1);
    let samples = node.json("/samples");
    let first = &samples[0];
    assert!(first["step"].as_u64() >= Some(3) && first["prompt"].as_str().is_some_and(|prompt| !prompt.is_empty()));
    let completions = first["completions"].as_array().unwrap();
    assert_eq!(completions.len(), 4);
    assert!(completions[0]["text"].is_string() && completions[0]["reward"].is_number(), "{}", completions[0]);
    let status = node.status("shares of time", |status| status["roles"].as_array().is_some_and(|all| all.len() >= 4));
    assert_eq!(status["plan"]["mode"], "direct");
    assert!(status["servers"].as_array().is_some_and(Vec::is_empty), "{}", status["servers"]);
    for role in status["roles"].as_array().unwrap() {
        let sum: f64 = ["busy", "idle", "blocked", "admission"].iter().map(|part| role[part].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{role}");
    }
}

#[test]
fn the_page_is_public_and_its_data_requires_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[], Some("a-token-of-some-length"));
    node.wait("step   1/");
    assert!(node.get("/", None).0.starts_with("HTTP/1.1 200"));
    for path in ["/status", "/history", "/samples", "/metrics"] {
        assert!(node.get(path, None).0.starts_with("HTTP/1.1 401"), "{path}");
        assert!(node.get(path, Some("a-token-of-some-length")).0.starts_with("HTTP/1.1 200"), "{path}");
    }
    let top = |arguments: &[&str]| {
        let mut command = preceptor(dir.path());
        command.args(["top", "--once", &node.address]).args(arguments).env("TOP_TOKEN", "a-token-of-some-length");
        command.output().unwrap()
    };
    let refused = top(&[]);
    assert!(!refused.status.success() && stderr(&refused).contains("--token-env"), "{}", stderr(&refused));
    let shown = top(&["--token-env", "TOP_TOKEN"]);
    let text = String::from_utf8_lossy(&shown.stdout);
    for words in ["offline", "bottleneck", "rollout-0", "learn", "groups", "score"] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
}

#[test]
fn a_slow_labeler_is_reported_with_the_setting_that_helps() {
    let dir = tempfile::tempdir().unwrap();
    let mock = MockJudge::start(|_, _, _| {
        Act::Slow(Duration::from_millis(250), Box::new(Act::Tokens(vec![("7", 0.6), ("2", 0.4)])))
    });
    let remote = format!("labeler.remote={{ url = \"{}\", model = \"mock\", concurrency = 2 }}", mock.url);
    let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
    let slow = ["labeler.type=direct", remote.as_str(), &cache, "learner.eta=2"];
    let controlled = ["controller.enabled=true", "controller.every_s=1", "rollout.group_size=2"];
    let node = Node::start(dir.path(), &[&slow[..], &controlled].concat(), None);
    let clearly = |found: &Value| found["share"].as_f64() > Some(0.6) && found["gain"].as_f64() > Some(1.2);
    let status = node.status("label is the bottleneck", |status| {
        status["diagnosis"]["role"] == "label" && clearly(&status["diagnosis"])
    });
    let found = &status["diagnosis"];
    assert!(found["headline"].as_str().unwrap().contains("label is the bottleneck"), "{found}");
    let keys: Vec<&Value> = found["settings"].as_array().unwrap().iter().map(|setting| &setting["key"]).collect();
    assert_eq!(keys, ["labeler.workers", "labeler.remote.concurrency"]);
    wait_until("the metric", || node.get("/metrics", None).1.contains("preceptor_bottleneck{role=\"label\"} 1"));
    // The controller lowers the rollout concurrency, since the labeler cannot consume so many groups.
    let reported = node.wait("controller: rollout concurrency 8 → 6");
    assert!(reported.contains("is blocked on its output"), "{reported}");
    let status = node.status("a move", |status| status["controller"][0]["last_move"] != "");
    assert_eq!(status["controller"][0]["knob"], "rollout");
}

#[test]
fn a_collector_receives_a_trace_of_each_group() {
    let dir = tempfile::tempdir().unwrap();
    let bodies: Arc<Mutex<Vec<Value>>> = Arc::default();
    let kept = Arc::clone(&bodies);
    let collector = MockJudge::start(move |_, path, body| {
        assert_eq!(path, "/v1/traces");
        kept.lock().unwrap().push(body.clone());
        Act::Body("{}".into())
    });
    let mut command = preceptor(dir.path());
    command.arg("train").arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
    command.args(["--set", "run.steps=40"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.trim_end_matches("/v1"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let bodies = bodies.lock().unwrap();
    let all = |body: &Value| body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().clone();
    let spans: Vec<Value> = bodies.iter().flat_map(all).collect();
    let groups: Vec<&Value> = spans.iter().filter(|span| span["name"] == "group").collect();
    let trained = metrics(&dir.path().join("run")).len() * 4;
    assert_eq!((groups.len(), trained), (160, 160), "each trained group is exported once");
    let nanos = |span: &Value, end: &str| span[end].as_str().unwrap().parse::<u64>().unwrap();
    for group in groups {
        let of: Vec<&Value> = spans.iter().filter(|span| span["traceId"] == group["traceId"]).collect();
        let mut names: Vec<&str> = of.iter().map(|span| span["name"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["group", "label-0", "learn", "prompts", "reward", "rollout-0"]);
        assert!(of.iter().all(|span| span["name"] == "group" || span["parentSpanId"] == group["spanId"]), "{of:?}");
        for span in &of {
            assert!(nanos(span, "startTimeUnixNano") >= nanos(group, "startTimeUnixNano"), "{span}");
            assert!(nanos(span, "endTimeUnixNano") <= nanos(group, "endTimeUnixNano"), "{span}");
        }
    }
    let service = &bodies[0]["resourceSpans"][0]["resource"]["attributes"];
    assert!(service.to_string().contains("preceptor"), "{service}");
}

#[test]
fn machine_readable_log_lines_are_objects_with_their_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = preceptor(dir.path());
    command.args(["--log", "json,info", "train"]).arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let lines: Vec<Value> = stderr(&output).lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["message"].is_string()), "{lines:?}");
    let reported: Vec<&Value> = lines.iter().filter(|line| line["event"] == "step").collect();
    let steps = metrics(&dir.path().join("run"));
    assert_eq!(reported.len(), steps.len());
    for (reported, step) in reported.iter().zip(&steps) {
        assert_eq!(reported["figures"]["score/mean"], step["score/mean"]);
    }
}

#[test]
fn check_reports_the_resources_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let judge = "labeler.remote={ url = \"http://127.0.0.1:9/v1\", model = \"m\", price_prompt = 10, price_completion = 20, probe = false }";
    let mut command = preceptor(dir.path());
    command.arg("check").arg(config("offline.toml"));
    let cut = [
        "labeler.type=direct",
        judge,
        "rollout.top_k=5",
        "rollout.weights=bf16",
        "learner.epochs=2",
        "learner.algorithm=ppo",
        "learner.eta=3",
    ];
    let output = command.args(cut.iter().flat_map(|one| ["--set", one])).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", stderr(&output));
    for words in [
        "memory      about",
        "are free",
        "threads     ",
        "disk        about",
        "growth      at most about",
        "bounds      journal.bin at most 16.0 GiB (checkpoint.journal_max_bytes)",
        "generates up to 1536 in 64 completions",
        "direct, server: 64 questions per step",
        " per step, ",
        "η = 3: a token is at most 3 versions old",
        "sampling    tokens are drawn from a restricted distribution",
        "off-policy  tokens are sampled with 16-bit weights",
        "off-policy  later epochs",
    ] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    // 400 more tokens in each of 32 slots: keys and values of 2 layers with 2 heads of 16 numbers of 4 bytes.
    let cache = |tokens: usize| -> f64 {
        let mut command = preceptor(dir.path());
        command.arg("check").arg(config("offline.toml"));
        let output = command.arg("--set").arg(format!("rollout.max_new_tokens={tokens}")).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (before, _) = text.split_once(" MiB keys and values of rollouts").unwrap_or_else(|| panic!("{text}"));
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let more = cache(424) - cache(24);
    assert!((more - 6.25).abs() < 0.03, "{more} MiB more of keys and values");
    // A custom preamble is processed with each question.
    let own = dir.path().join("preamble.txt");
    std::fs::write(&own, "Judge well. ".repeat(1000)).unwrap();
    let read = |preamble: &str| -> f64 {
        let preamble = format!("labeler.preamble=\"{preamble}\"");
        let mut command = preceptor(dir.path());
        command.arg("check").arg(config("offline.toml"));
        let output =
            command.args(["--set", "labeler.type=pairwise", "--set", judge, "--set", &preamble]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = |before: &str, after: &str| -> f64 {
            let (start, _) = text.split_once(after).unwrap_or_else(|| panic!("{text}{}", stderr(&output)));
            start.rsplit(before).next().unwrap().parse().unwrap()
        };
        number("about ", " tokens read") / number("server: ", " questions per step")
    };
    let more = read(own.to_str().unwrap()) - read("base");
    assert!((2500.0..3100.0).contains(&more), "12,000 characters more, and {more} tokens");
    // The reported disk space is that of a checkpoint.
    let output = train(dir.path(), &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let taken: u64 = walk(&dir.path().join("run/checkpoints/step-000004"));
    let mut command = preceptor(dir.path());
    let output = command.arg("check").arg(config("offline.toml")).args(small()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let reported =
        text.split("disk        about ").nth(1).unwrap().split_once(" MiB").unwrap().0.parse::<f64>().unwrap();
    let taken = taken as f64 / f64::from(1 << 20);
    assert!((reported / taken - 1.0).abs() < 0.1, "{reported} MiB were reported, and {taken} were used");
    // The reported growth is an upper bound on the run's files, and not far above their size.
    let growth = text.lines().find(|line| line.starts_with("growth")).unwrap();
    for (name, least) in [("journal.bin", 0.4), ("samples.jsonl", 0.4), ("metrics.jsonl", 0.6), ("tensorboard", 0.6)] {
        let (size, unit) = growth.split_once(&format!("{name} ")).unwrap().1.split_once(' ').unwrap();
        let reported = size.parse::<f64>().unwrap() * if unit.starts_with("KiB") { 1024.0 } else { 1.0 };
        let path = dir.path().join("run").join(name);
        let taken = if path.is_dir() { walk(&path) } else { path.metadata().unwrap().len() } as f64 / 4.0;
        assert!(
            (least..1.2).contains(&(taken / reported)),
            "{name}: {reported} bytes per step were reported, and {taken} were used"
        );
    }
}

fn walk(dir: &Path) -> u64 {
    let size = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() { walk(&entry.path()) } else { entry.metadata().unwrap().len() }
    };
    std::fs::read_dir(dir).unwrap().map(size).sum()
}

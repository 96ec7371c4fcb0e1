//! Tests against untrusted parties: servers that redirect, clients that hold connections, host names that are not the
//! node's, and text with control characters.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use preceptor::config::RemoteJudge;
use preceptor::pipeline::label::backend::{Ask, Backend, NoAnswer, Usage};
use preceptor::pipeline::remote::Remote;

use crate::common::{config, preceptor, small, stderr, train};
use crate::mock_judge::{Act, MockJudge};

const KEY: &str = "sk-trust-0123456789-abcdef";
const TOKEN: &str = "tk-trust-9876543210-zyxwvu";

/// A server that answers every GET according to `answer` of its path, and records the heads of the requests.
struct Server {
    address: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answer: impl Fn(&str, TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, answer) = (Arc::clone(&heads), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                std::thread::spawn(move || {
                    let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                    let path = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
                    log.lock().unwrap().push(head.join("\n"));
                    answer(&path, stream);
                });
            }
        });
        Self { address, heads }
    }
}

fn respond(mut stream: TcpStream, status: &str, headers: &str, body: &str) {
    // The client may have disconnected already.
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
}

fn leaked(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

#[test]
fn a_judge_that_redirects_sends_no_question_and_no_key_to_another_address() {
    // SAFETY: no other test reads or writes this variable.
    unsafe { std::env::set_var("PRECEPTOR_TRUST_KEY", KEY) };
    // The second server redirects once more, to itself: a client that removed the key once might send it again there.
    let other = MockJudge::start(|_, path, _| {
        if path.ends_with("/y") {
            Act::Tokens(vec![("1", 0.75), ("2", 0.25)])
        } else {
            Act::Status(307, "Location: /y\r\n", "")
        }
    });
    let port = other.url.trim_end_matches("/v1").to_owned();
    let named = port.replace("127.0.0.1", "localhost");
    let secret = format!("http://{KEY}.test/{KEY}?key={KEY}");
    for (status, location, words) in [
        (307, format!("{port}/x"), format!("redirects to {port}/x (status 307)")),
        (302, format!("{named}/x?token=hush"), format!("redirects to {named}/x (status 302)")),
        (308, "/v1/chat/completions".to_owned(), "/v1/chat/completions (status 308)".to_owned()),
        (307, "file:///etc/passwd".to_owned(), "redirects to file:///etc/passwd".to_owned()),
        (301, secret, "contains the secret".to_owned()),
        (303, String::new(), "redirects to http://127.0.0.1".to_owned()),
    ] {
        let headers = leaked(format!("Location: {location}\r\n"));
        let mock = MockJudge::start(move |_, _, _| Act::Status(status, headers, ""));
        let judge = RemoteJudge {
            url: mock.url.clone(),
            model: "m".into(),
            api_key_env: Some("PRECEPTOR_TRUST_KEY".into()),
            retries: 0,
            outage_s: 0.0,
            ..RemoteJudge::default()
        };
        let remote = Remote::new(judge).unwrap();
        let question = Ask { prompt: "Which?".into(), answers: vec!["1".into(), "2".into()] };
        let reply = remote.weigh(&[question], &mut Usage::default()).remove(0);
        let Err(NoAnswer::Failure(why)) = reply else { panic!("{location}: {reply:?}") };
        assert!(why.contains(&words) && why.contains("labeler.remote.url"), "{location}: {why}");
        assert!(!why.to_lowercase().contains("0123456789") && !why.contains("hush"), "{why}");
        assert_eq!((remote.stats().of("http_3xx"), mock.served("http_3xx")), (1, 1), "it is asked once and counted");
    }
    assert_eq!((other.served("ok"), other.served("http_3xx")), (0, 0), "the other server was asked");
}

/// Runs `preceptor top` on `address` with a bearer token. Returns its exit status and output.
fn top(address: &str) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut program = preceptor(dir.path());
    program.args(["top", address, "--once", "--token-env", "PRECEPTOR_TRUST_TOKEN"]);
    let output = program.env("PRECEPTOR_TRUST_TOKEN", TOKEN).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &stderr(&output))
}

#[test]
fn top_sends_its_token_only_to_the_given_address() {
    let other = Server::start(|path, stream| {
        if path == "/y" {
            respond(stream, "200 OK", "", "{}")
        } else {
            respond(stream, "302 Found", "Location: /y\r\n", "")
        }
    });
    for host in [other.address.clone(), other.address.replace("127.0.0.1", "localhost")] {
        let location = format!("Location: http://{host}/x?secret={TOKEN}\r\n");
        let node = Server::start(move |_, stream| respond(stream, "302 Found", &location, ""));
        let (done, text) = top(&node.address);
        assert!(!done && text.contains(&format!("redirects to http://{host}/x")), "{text}");
        assert!(!text.contains("9876543210"), "{text}");
        assert!(
            node.heads.lock().unwrap().iter().all(|head| head.contains(TOKEN)),
            "requests to the node itself carry the token"
        );
    }
    assert_eq!(other.heads.lock().unwrap().len(), 0, "another address was asked");
}

#[test]
fn top_limits_the_size_of_answers_and_shows_no_control_characters() {
    let endless = Server::start(|_, mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        while stream.write_all(&[b' '; 1 << 16]).is_ok() {}
    });
    let (done, text) = top(&endless.address);
    assert!(!done && text.contains("more than") && text.contains("bytes"), "{text}");
    let hostile = Server::start(|_, stream| {
        let text = "\\u001b]52;c;cHduZWQ=\\u0007\\u009b2J\\r\\u001b[31mEVIL";
        let body = format!(
            r#"{{"run":"{text}","phase":"{text}","plan":{{"mode":"{text}"}},"diagnosis":{{"headline":"{text}"}},"graph":{{"stages":[{{"name":"{text}"}}],"edges":[{{"name":"{text}"}}]}}}}"#
        );
        respond(stream, "200 OK", "", &body);
    });
    let (done, text) = top(&hostile.address);
    assert!(done && text.contains("EVIL"), "{text}");
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    let refusing = Server::start(|_, stream| respond(stream, "200 OK", "", "\u{1b}[2J"));
    let (done, text) = top(&refusing.address);
    assert!(!done && text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    for (address, words) in
        [("http://user:pass@127.0.0.1:1", "--token-env"), ("file:///etc/passwd", "is not the URL of a node")]
    {
        let (done, text) = top(address);
        assert!(!done && text.contains(words) && !text.contains("pass@"), "{text}");
    }
}

/// Sends one request to `address`, and returns the complete answer.
fn ask(address: &str, head: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let _ = write!(stream, "{head}\r\n\r\n");
    let mut text = Vec::new();
    // A reset connection has already delivered its answer.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// A node in a separate process, which ends with the test.
struct Node {
    child: std::process::Child,
    address: String,
    stderr: std::path::PathBuf,
}

impl Node {
    /// Starts the offline run without a last step, with at most `files` open files.
    fn start(dir: &std::path::Path, files: u64, sets: &[&str]) -> Self {
        let stderr = dir.join("stderr.txt");
        let mut program = std::process::Command::new("bash");
        program.args([
            "-c",
            &format!("trap '' XFSZ; ulimit -n {files}; exec \"$0\" \"$@\""),
            env!("CARGO_BIN_EXE_preceptor"),
        ]);
        program.arg("train").arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
        let own = ["serve.enabled=true", "serve.listen=127.0.0.1:0", "run.steps=1000000"];
        program.args(own.iter().chain(sets).flat_map(|one| ["--set", one]));
        program.current_dir(dir).stdout(std::process::Stdio::null());
        let child = program.stderr(std::fs::File::create(&stderr).unwrap()).spawn().unwrap();
        let mut node = Self { child, address: String::new(), stderr };
        let text = node.wait(|text| text.contains("step   2/").then(|| text.to_owned()));
        let address = text.split("http://").find(|part| part.contains("/metrics")).unwrap();
        node.address = address.split('/').next().unwrap().to_owned();
        node
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits until `what` finds a value in standard error.
    fn wait<T>(&self, what: impl Fn(&str) -> Option<T>) -> T {
        until(|| what(&self.said()).ok_or_else(|| self.said()))
    }

    /// Sends a GET for `path` with the host name `host`.
    fn get(&self, path: &str, host: &str) -> String {
        ask(&self.address, &format!("GET {path} HTTP/1.1\r\nHost: {host}"))
    }

    /// Returns the value of a metric without labels.
    fn metric(&self, name: &str) -> f64 {
        until(|| {
            let text = self.get("/metrics", "localhost");
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).ok_or(text)
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The process may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Retries until a value is found, for at most two minutes.
fn until<T>(mut what: impl FnMut() -> Result<T, String>) -> T {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        match what() {
            Ok(value) => return value,
            Err(why) => assert!(std::time::Instant::now() < deadline, "it did not come: {why}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn idle_connections_stop_neither_checkpoints_nor_scrapes() {
    preceptor::util::process::descriptors::raise_limit();
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), 1024, &["checkpoint.every_steps=20", "checkpoint.keep=2"]);
    let mut idle = Vec::new();
    for i in 0..2000 {
        let mut stream = until(|| TcpStream::connect(&node.address).map_err(|error| error.to_string()));
        // Half of the connections send part of a request head, and some a complete one without reading the answer.
        let _ = match i % 4 {
            0 => stream.write_all(b"GET /metrics HT"),
            1 => stream.write_all(b"GET /samples HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            _ => Ok(()),
        };
        idle.push(stream);
    }
    assert!(node.metric("process_open_fds") < 512.0);
    let written = || node.metric("preceptor_checkpoint_duration_seconds_count");
    let before = written();
    until(|| if written() >= before + 3.0 { Ok(()) } else { Err(node.said()) });
    assert_eq!(node.metric("preceptor_disk_errors_total"), 0.0, "{}", node.said());
    assert!(node.get("/healthz", "localhost").starts_with("HTTP/1.1 200"));
    drop(idle);
}

#[test]
fn a_node_answers_only_to_its_own_host_names() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), 4096, &["serve.hosts=[\"node.example\"]"]);
    for host in [&node.address as &str, "localhost:1", "[::1]", "10.1.2.3", "node.example", "NODE.example:9464"] {
        for path in ["/", "/metrics", "/status", "/healthz"] {
            assert!(node.get(path, host).starts_with("HTTP/1.1 200"), "{host}{path}");
        }
    }
    for host in ["rebind.test", "rebind.test:9464", "node.example.rebind.test", "127.0.0.1.rebind.test"] {
        for path in ["/", "/metrics", "/status", "/history", "/samples", "/no/such/page"] {
            let answer = node.get(path, host);
            assert!(answer.starts_with("HTTP/1.1 421") && answer.contains("serve.hosts"), "{host}{path}: {answer}");
        }
        for path in ["/healthz", "/readyz"] {
            assert!(node.get(path, host).starts_with("HTTP/1.1 200"), "{host}{path}");
        }
    }
    let both = ask(&node.address, "GET http://rebind.test/status HTTP/1.1\r\nHost: localhost");
    assert!(both.starts_with("HTTP/1.1 421"), "{both}");
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_node_speaks_http_1_and_waits_for_no_client() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), 4096, &[]);
    let mut slow = TcpStream::connect(&node.address).unwrap();
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost: loc").unwrap();
    let mut preface = TcpStream::connect(&node.address).unwrap();
    preface.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").unwrap();
    let mut answer = Vec::new();
    let _ = preface.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    assert!(node.get("/metrics", "localhost").to_lowercase().contains("\r\nconnection: close\r\n"));
    // Ends when the node has closed the connection; otherwise the test would hang.
    let _ = slow.read_to_end(&mut answer);
    let long = format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: {}", "x".repeat(100_000));
    assert!(!ask(&node.address, &long).starts_with("HTTP/1.1 200"));
}

/// Runs the program in `dir` with standard output connected to `sink`, a shell redirection or pipe. Returns the
/// program's exit status and its standard error.
fn into(dir: &std::path::Path, arguments: &[&str], sink: &str) -> (i32, String) {
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", &format!("\"$0\" \"$@\" {sink}; exit ${{PIPESTATUS[0]}}"), env!("CARGO_BIN_EXE_preceptor")]);
    let output = shell.args(arguments).current_dir(dir).output().unwrap();
    (output.status.code().unwrap(), stderr(&output))
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_closed_pipe_ends_a_command_silently_and_a_full_disk_with_one_error() {
    let dir = tempfile::tempdir().unwrap();
    assert!(train(dir.path(), &["run.steps=1"]).status.success());
    let model = "run/checkpoints/step-000001";
    let config = config("offline.toml");
    let config = config.to_str().unwrap();
    // Far more than a pipe buffers, so that the program writes after its reader has gone, however fast it is.
    let many = ["--max-new-tokens", "100", "--samples", "3000", "--temperature", "3"];
    let generate = [&["generate", model, "a"][..], &many].concat();
    for arguments in [&generate, &[&generate[..], &["--json"]].concat()] {
        let (status, text) = into(dir.path(), arguments, "| head -c 1 > /dev/null");
        assert_eq!((status, text.as_str()), (141, ""), "{arguments:?}");
    }
    for arguments in [
        &["check", config, "--print"][..],
        &["check", config],
        &["generate", model, "a"],
        &["generate", model, "a", "--json"],
        &["score", model, "abc"],
        &["score", model, "abc", "--json"],
    ] {
        // It is a matter of timing whether the reader has gone before the program writes here.
        let (status, text) = into(dir.path(), arguments, "| true");
        assert!([0, 141].contains(&status) && text.is_empty(), "{arguments:?}: {status}: {text}");
        let (status, text) = into(dir.path(), arguments, "> /dev/full");
        assert_eq!(status, 1, "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.starts_with("error: cannot write to standard output: No space left"), "{arguments:?}: {text}");
    }
}

#[test]
fn model_output_reaches_the_terminal_without_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    assert!(train(dir.path(), &["run.steps=1"]).status.success());
    let generate = |more: &[&str]| {
        let mut program = preceptor(dir.path());
        program
            .args(["generate", "run/checkpoints/step-000001", "a", "--samples", "60", "--temperature", "5"])
            .args(more);
        let output = program.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = generate(&[]);
    assert!(text.contains("\\u{1b}"), "the model writes no escape, so that nothing was tried: {text}");
    assert!(text.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()), "{text:?}");
    let json = generate(&["--json"]);
    assert!(json.chars().all(|c| c == '\n' || !c.is_control()), "{json:?}");
    let texts = json.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].clone());
    assert!(
        texts.into_iter().any(|text| text.as_str().unwrap().contains('\u{1b}')),
        "the JSON file has the unmodified model output"
    );
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_log_that_is_not_a_terminal_has_no_colours() {
    let mock = MockJudge::start(|_, _, _| Act::Status(500, "", ""));
    let dir = tempfile::tempdir().unwrap();
    let remote = format!(
        "labeler.remote={{ url = \"{}\", model = \"m\", retries = 0, outage_s = 0, breaker_failures = 1, breaker_cooldown_s = 0.01 }}",
        mock.url
    );
    let mut program = preceptor(dir.path());
    program.args(["--log", "debug", "train"]).arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
    program.args([
        "--set",
        "labeler.type=direct",
        "--set",
        "run.steps=1",
        "--set",
        &remote,
        "--set",
        "labeler.retries=0",
    ]);
    let text = stderr(&program.env_remove("NO_COLOR").output().unwrap());
    assert!(text.contains("DEBUG") || text.contains("WARN"), "nothing was logged: {text}");
    assert!(!text.contains('\u{1b}'), "{text:?}");
}

/// A disk that fails for some time: here a file size limit, which is raised later.
#[test]
fn a_temporarily_unwritable_label_cache_keeps_every_label() {
    let mock = MockJudge::start(|number, _, _| {
        let rating = if number % 2 == 0 { 0.25 } else { 0.05 };
        Act::Slow(std::time::Duration::from_millis(2), Box::new(Act::Tokens(vec![("7", 0.5), ("1", rating)])))
    });
    let dir = tempfile::tempdir().unwrap();
    let remote = format!("labeler.remote={{ url = \"{}\", model = \"m\", probe = false }}", mock.url);
    let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
    let sets = ["labeler.type=direct", "learner.eta=0", "checkpoint.every_minutes=0", &remote, &cache];
    let node = Node::start(dir.path(), 4096, &sets);
    let limit = |bytes: u64| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: `limit` is a valid rlimit, and nothing is read back.
        let done = unsafe {
            libc::prlimit(node.child.id() as libc::pid_t, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut())
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    };
    limit(64 << 10);
    node.wait(|text| text.contains("labels.sqlite cannot be written").then_some(()));
    assert!(node.metric("preceptor_disk_errors_total") > 0.0);
    limit(libc::RLIM_INFINITY);
    node.wait(|text| text.contains("can be written again").then_some(()));
    let step = node.wait(|text| text.rsplit("step ").next()?.trim().split('/').next()?.trim().parse::<u64>().ok());
    drop(node);
    // Another run with the same questions finds every answer.
    let before = mock.served("ok");
    let again = tempfile::tempdir().unwrap();
    let steps = format!("run.steps={step}");
    let output = train(again.path(), &[&sets[..], &[&steps]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(mock.served("ok"), before, "labels were bought again");
}

#[test]
fn a_hub_without_a_home_directory_for_its_models_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = preceptor(dir.path());
    // A home directory that is not an absolute path counts as missing.
    program.args(["generate", "{ hub = \"owner/name\" }", "a"]).env("HOME", "nowhere").env_remove("HF_HOME");
    let output = program.output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("HF_HOME") && text.contains("HOME,") && !text.contains("panicked"), "{text}");
}

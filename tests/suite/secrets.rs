//! Tests that the API key and the bearer token grant access, and that no output or file of the program contains them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;

use crate::common::{config, preceptor, small};
use crate::mock_judge::{Act, MockJudge};

const KEY: &str = "sk-mock-0123456789-abcdefghij";
const TOKEN: &str = "tk-mock-9876543210-zyxwvutsrq";

/// A server that repeats the key in every way that servers do, depending on the question, and answers some questions
/// correctly.
fn indiscreet() -> MockJudge {
    MockJudge::start(|_, _, body| {
        let prompt = body["prompt"].to_string();
        if prompt.contains("Which number is larger") {
            return Act::Tokens(vec![("2", 0.5), ("1", 0.25)]);
        }
        let number = preceptor::util::seed::text(&prompt);
        let long = format!("{}{KEY}", " ".repeat(150));
        let escaped = KEY.replace('k', "\\u006b");
        let odd = |token: &str| format!(r#"{{"choices":[{{"text":"1","logprobs":{{"top_logprobs":[{token}]}}}}]}}"#);
        match number % 9 {
            0 => Act::Status(401, "", r#"{"error":"no such key: sk-mock-0123456789-abcdefghij"}"#),
            1 => Act::Status(400, "", r#"{"error":"wrong key sk-mock-0123456789-abcdefghij"}"#),
            2 => Act::Status(404, "", "Authorization: Bearer sk-mock-0123456789-abcdefghij"),
            3 => Act::Body(json!({ "error": long }).to_string()),
            4 => Act::Body(format!(r#"{{"error": "{escaped}"}}"#)),
            5 => Act::Body(odd(&format!(r#"{{"{KEY}":null}}"#))),
            // These two are valid answers whose most likely token is the key.
            6 => Act::Body(odd(&format!(r#"{{"{KEY}":-0.1}}"#))),
            7 => Act::Body(odd(&format!(r#"{{"{escaped}":-0.1}}"#))),
            _ => Act::Tokens(vec![("8", 0.5), ("3", 0.25)]),
        }
    })
}

#[test]
fn secrets_grant_access_and_appear_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let mock = indiscreet();
    let remote = format!(
        "labeler.remote={{ url = \"{}\", model = \"m\", api = \"completions\", evidence = \"logprobs\", api_key_env = \"PRECEPTOR_TEST_KEY\", retries = 0, concurrency = 1, breaker_cooldown_s = 0.05 }}",
        mock.url
    );
    let cache = format!("labeler.cache={}", dir.path().join("labels").display());
    let sets = [
        "serve.enabled=true",
        "serve.listen=127.0.0.1:0",
        "serve.token_env=PRECEPTOR_TEST_TOKEN",
        "labeler.type=direct",
        "labeler.retries=0",
        "guard.unlabeled_steps=1000000",
        &cache,
        "learner.batch_groups=1",
        "run.steps=100000",
        "checkpoint.every_steps=3",
        &remote,
    ];
    let arguments = || small().map(str::to_owned).chain(sets.iter().flat_map(|one| ["--set".into(), (*one).into()]));
    let start = |first: &[&str]| {
        let mut program = preceptor(dir.path());
        program.args(["--log", "debug"]).args(first).arg(config("offline.toml")).args(arguments());
        program.env("PRECEPTOR_TEST_KEY", KEY).env("PRECEPTOR_TEST_TOKEN", TOKEN);
        program
    };
    let printed = start(&["check", "--print"]).output().unwrap();
    assert!(printed.status.success(), "{}", crate::common::stderr(&printed));

    let errors = dir.path().join("errors.txt");
    let (out, err) =
        (std::fs::File::create(dir.path().join("out.txt")).unwrap(), std::fs::File::create(&errors).unwrap());
    let mut program = start(&["train", "--run-dir", "run"]);
    let mut child = program.stdout(Stdio::from(out)).stderr(Stdio::from(err)).spawn().unwrap();
    let text = wait(&errors, "step   9/");
    let address = text.split("http://").find(|part| part.contains("/metrics")).unwrap();
    let address = address.split('/').next().unwrap();

    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    for path in ["/metrics", "/status", "/no/such/page"] {
        for header in ["", "Authorization: Bearer wrong\r\n", &bearer.replace("Bearer", "Basic")] {
            let answer = ask(address, "GET", path, header);
            assert!(answer.starts_with("HTTP/1.1 401"), "{path}, {header:?}: {answer}");
            assert!(answer.to_lowercase().contains("\r\nwww-authenticate: bearer\r\n"), "{answer}");
        }
    }
    for (method, path, header, status) in [
        ("GET", "/healthz", "", "200"),
        ("GET", "/readyz", "", "200"),
        ("HEAD", "/readyz", "", "200"),
        ("POST", "/healthz", "", "405"),
        ("GET", "/metrics", &bearer as &str, "200"),
        ("HEAD", "/status", &bearer, "200"),
        ("GET", "/no/such/page", &bearer, "404"),
        ("POST", "/metrics", &bearer, "405"),
        ("PUT", "/status", &bearer, "405"),
        ("DELETE", "/status", &bearer, "405"),
        ("DELETE", "/status", "", "401"),
    ] {
        let answer = ask(address, method, path, header);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{method} {path}: {answer}");
        std::fs::write(dir.path().join(format!("{method}{}.txt", path.replace('/', "-"))), answer).unwrap();
    }
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let status = child.wait().unwrap().code();
    assert_eq!(status, Some(130), "{}", std::fs::read_to_string(&errors).unwrap());

    std::fs::write(dir.path().join("printed.txt"), [printed.stdout, printed.stderr].concat()).unwrap();
    let files = files(dir.path());
    for name in
        ["config.toml", "samples.jsonl", "metrics.jsonl", "metrics.prom", "model.safetensors", "GET-metrics.txt"]
    {
        assert!(files.iter().any(|path| path.ends_with(name)), "{name} is not among {files:?}");
    }
    let mut hidden = 0;
    for path in files {
        let bytes = std::fs::read(&path).unwrap();
        // Also searches for the middle of each secret, in case a text was truncated.
        for secret in ["0123456789-abc", "9876543210-zyx"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds a secret: {}", path.display(), String::from_utf8_lossy(&bytes));
        }
        hidden += String::from_utf8_lossy(&bytes).matches("[API key]").count();
    }
    assert!(hidden > 0, "the judge's repetitions of the key were never seen, so this test checks nothing");
}

/// Returns every file below `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Waits until `path` contains `words`, and returns its complete text.
fn wait(path: &Path, words: &str) -> String {
    let text = || std::fs::read_to_string(path).unwrap();
    crate::common::wait_until(words, || text().contains(words));
    text()
}

fn ask(address: &str, method: &str, path: &str, header: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{header}Connection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

//! Tests of the hub's client against local servers.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

/// Starts a hub with one repository, `o/n`, of these files, and returns its address. It serves until the test program
/// ends.
fn hub(files: &'static [(&'static str, &'static str)]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || listener.incoming().for_each(|stream| serve(stream.unwrap(), files)));
    address
}

fn serve(mut stream: TcpStream, files: &[(&str, &str)]) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let path = request.split(' ').nth(1).unwrap();
    let send = |stream: &mut TcpStream, status: &str, headers: &str, body: &str| {
        // A client may hang up early.
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}",
            body.len()
        );
    };
    if path == "/api/models/o/n/revision/main" || path == "/api/datasets/o/d/revision/v1" {
        let siblings: Vec<Value> = files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "siblings": siblings, "sha": "c0ffee" }).to_string();
        return send(&mut stream, "200 OK", "Content-Type: application/json\r\n", &body);
    }
    let name = path.strip_prefix("/o/n/resolve/main/").or(path.strip_prefix("/datasets/o/d/resolve/v1/"));
    let Some((name, body)) = files.iter().find(|(file, _)| Some(*file) == name) else {
        return send(&mut stream, "404 Not Found", "", "");
    };
    let range = headers.iter().find_map(|line| line.strip_prefix("range: bytes=")).unwrap();
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(body.len(), |to: usize| to + 1);
    let headers = format!(
        "ETag: \"{}\"\r\nX-Repo-Commit: c0ffee\r\nContent-Range: bytes {from}-{}/{}\r\n",
        name.replace('/', "-"),
        to - 1,
        body.len()
    );
    send(&mut stream, "206 Partial Content", &headers, &body[from..to]);
}

fn get(endpoint: &str, home: &Path, repo: &str, file: Option<&str>) -> Result<ModelFiles> {
    let hub = Hub { endpoint: endpoint.to_owned(), home: home.to_owned(), token: None };
    fetch_from(hub, repo, None, file, &patient(Duration::from_secs(60)))
}

#[test]
fn a_sharded_model_is_downloaded_once() {
    let index = r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"}}"#;
    let files: [(&str, &str); 8] = [
        ("config.json", "{}"),
        ("added_tokens.json", "{  }"),
        ("tokenizer.json", "{ }"),
        ("chat_template.jinja", "x"),
        ("additional_chat_templates/tool_use.jinja", "y"),
        (INDEX, index),
        ("model-1.safetensors", "one"),
        ("model-2.safetensors", "two"),
    ];
    let endpoint = hub(Box::leak(Box::new(files)));
    let home = tempfile::tempdir().unwrap();
    let found = get(&endpoint, home.path(), "o/n", None).unwrap();
    let ModelFiles::Directory(dir) = &found else { panic!("no directory") };
    for (name, content) in files {
        assert_eq!(std::fs::read_to_string(dir.join(name)).unwrap(), content, "{name}");
    }
    // Nothing listens on a port that was just released, and nothing needs to.
    let nobody = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    assert_eq!(get(&nobody, home.path(), "o/n", None).unwrap(), found);
    std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
    assert!(get(&nobody, home.path(), "o/n", None).is_err());
}

#[test]
fn a_gguf_is_downloaded_by_name() {
    let endpoint = hub(&[("a.gguf", "aaa"), ("b.gguf", "bbb"), ("config.json", "{}")]);
    let home = tempfile::tempdir().unwrap();
    let ModelFiles::Gguf(path) = get(&endpoint, home.path(), "o/n", Some("b.gguf")).unwrap() else { panic!("no GGUF") };
    assert_eq!(std::fs::read_to_string(path).unwrap(), "bbb");
    for (repo, file, word) in [
        ("o/n", Some("c.gguf"), "it has no c.gguf; its GGUF files: a.gguf, b.gguf"),
        ("o/n", Some("../a.gguf"), "is not a .gguf"),
        ("o/n", None, "it has no tokenizer.json"),
        ("o/other", None, "needs HF_TOKEN"),
        ("n", None, "owner/name"),
        ("../n", None, "owner/name"),
    ] {
        let error = format!("{:#}", get(&endpoint, home.path(), repo, file).unwrap_err());
        assert!(error.contains(word), "{repo} {file:?}: {error}");
    }
}

#[test]
fn a_data_set_is_downloaded_by_its_split_once() {
    let files = [
        ("README.md", "about"),
        ("data/train-00000-of-00002.jsonl", "one"),
        ("data/train-00001-of-00002.jsonl", "two"),
        ("data/test-00000-of-00001.jsonl", "three"),
    ];
    let endpoint = hub(Box::leak(Box::new(files)));
    let home = tempfile::tempdir().unwrap();
    let get = |endpoint: &str, repo: &str, split: Option<&str>| {
        let hub = Hub { endpoint: endpoint.to_owned(), home: home.path().to_owned(), token: None };
        let choice = Choice { split, ..Choice::default() };
        fetch_dataset_from(hub, repo, Some("v1"), &choice, &patient(Duration::from_secs(60)))
    };
    let texts = |paths: &[PathBuf]| -> Vec<String> {
        paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect()
    };
    let found = get(&endpoint, "o/d", None).unwrap();
    assert_eq!(texts(&found), ["one", "two"]);
    assert!(found[0].starts_with(home.path().join("hub/datasets--o--d/snapshots/c0ffee/data")), "{found:?}");
    // Nothing listens on a port that was just released; the hub is contacted only for missing files.
    let nobody = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    assert_eq!(get(&nobody, "o/d", None).unwrap(), found);
    assert!(get(&nobody, "o/d", Some("test")).is_err());
    assert_eq!(texts(&get(&endpoint, "o/d", Some("test")).unwrap()), ["three"]);
    assert_eq!(texts(&get(&nobody, "o/d", Some("test")).unwrap()), ["three"]);
    for (repo, split, words) in [
        ("o/d", Some("validation"), "no file of the split \"validation\"; its data files: data/test"),
        ("o/other", None, "needs HF_TOKEN"),
        ("d", None, "owner/name"),
    ] {
        let error = format!("{:#}", get(&endpoint, repo, split).unwrap_err());
        assert!(error.contains(words), "{repo} {split:?}: {error}");
    }
}

fn patient(timeout: Duration) -> ResolveOptions {
    ResolveOptions { timeout, progress: false, ..ResolveOptions::default() }
}

#[test]
fn an_unresponsive_hub_times_out() {
    // The server accepts connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = tempfile::tempdir().unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let hub = Hub { endpoint, home: home.path().to_owned(), token: None };
    let error = fetch_from(hub, "o/n", None, None, &patient(Duration::from_millis(50))).unwrap_err();
    assert!(error.to_string().contains("did not answer within 50ms"), "{error:#}");
    // The same timeout applies to a part of a file.
    let client = || {
        Client::new(
            &format!("http://{}", silent.local_addr().unwrap()),
            None,
            Kind::Model,
            "o/n",
            "main",
            Duration::from_millis(50),
        )
    };
    let asked = block_on_thread(|| async move { client()?.metadata("a.gguf").await });
    let error = asked.unwrap_err();
    assert!(error.to_string().contains("sent nothing for 50ms"), "{error:#}");
}

/// Starts a server that answers each request by `answer`, given its path and head.
fn answers(answer: impl Fn(&str, &str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let path = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
            let text = answer(path, &head.join("\n").to_lowercase());
            // The client may have closed the connection.
            let _ = stream.write_all(text.as_bytes());
        }
    });
    address
}

fn ok(headers: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

fn found(location: &str) -> String {
    let commit = "X-Repo-Commit: c0ffee\r\nX-Linked-ETag: \"abc\"\r\n";
    format!("HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n{commit}Location: {location}\r\n\r\n")
}

/// Starts a hub of one file, `a.gguf`, whose requests `file` answers.
fn with_file(file: impl Fn(&str) -> String + Send + 'static, heads: HeadLog) -> String {
    answers(move |path, head| {
        heads.lock().unwrap().push(head.to_owned());
        let listed = r#"{"siblings":[{"rfilename":"a.gguf"},{"rfilename":"../../evil"}]}"#;
        if path.starts_with("/api/") { ok("", listed) } else { file(path) }
    })
}

type HeadLog = std::sync::Arc<std::sync::Mutex<Vec<String>>>;

fn with_token(endpoint: String, home: &Path) -> Result<ModelFiles> {
    let hub = Hub { endpoint, home: home.to_owned(), token: Some("hf_secret0123456789".into()) };
    fetch_from(hub, "o/n", None, Some("a.gguf"), &patient(Duration::from_secs(60)))
}

#[test]
fn the_token_is_sent_only_to_the_hub_over_several_redirects() {
    let (away, home_heads) = (HeadLog::default(), HeadLog::default());
    let log = away.clone();
    let store = answers(move |path, head| {
        log.lock().unwrap().push(head.to_owned());
        if path == "/x" { found("/y") } else { ok("", "weights") }
    });
    // The same host at another port, and the same port under another name; each redirects once more.
    for target in [format!("{store}/x"), store.replace("127.0.0.1", "localhost") + "/x"] {
        let home = tempfile::tempdir().unwrap();
        // A redirect within the hub comes first.
        let file = move |path: &str| if path == "/moved" { found(&target) } else { found("/moved") };
        let found = with_token(with_file(file, home_heads.clone()), home.path()).unwrap();
        let ModelFiles::Gguf(path) = found else { panic!("no GGUF") };
        assert_eq!(std::fs::read_to_string(path).unwrap(), "weights");
    }
    let away = away.lock().unwrap();
    assert!(away.len() >= 8 && away.iter().all(|head| !head.contains("hf_secret")), "{away:?}");
    let heads = home_heads.lock().unwrap();
    assert!(heads.iter().all(|head| head.contains("bearer hf_secret")), "{heads:?}");
}

#[test]
fn an_endless_or_insecure_redirect_is_refused() {
    for (location, words) in [
        ("/o/n/resolve/main/a.gguf", "more than 10 times"),
        ("file:///etc/passwd", "less secure"),
        ("http://[", "redirects to an address that is not valid"),
        ("http://u:p@127.0.0.1:1/hf_SECRET0123456789", "cannot be reached"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let endpoint = with_file(move |_| found(location), HeadLog::default());
        let error = format!("{:#}", with_token(endpoint, home.path()).unwrap_err());
        assert!(error.contains(words) && !error.to_lowercase().contains("hf_secret"), "{location}: {error}");
    }
}

/// Returns every file below `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn a_header_that_is_not_a_file_name_is_rejected_and_writes_nothing() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let absolute = victim.to_str().unwrap();
    for value in ["../../../../victim", absolute, "..", "a/b", "a\\b", &"x".repeat(500), ""] {
        for header in ["ETag", "X-Linked-ETag", "X-Repo-Commit"] {
            let home = outside.path().join("a/b/home");
            let line = |name: &str, sound: &str| {
                let value = if name == header { value } else { sound };
                let quote = if name == "X-Repo-Commit" { "" } else { "\"" };
                format!("{name}: {quote}{value}{quote}\r\n")
            };
            let mut all = line("ETag", "abc") + &line("X-Repo-Commit", "c0ffee");
            if header == "X-Linked-ETag" {
                all += &line(header, "");
            }
            let endpoint = with_file(move |_| ok(&all, "weights"), HeadLog::default());
            let error = format!("{:#}", with_token(endpoint.clone(), &home).unwrap_err());
            let named = if header == "X-Repo-Commit" { header } else { "ETag" };
            assert!(error.contains(&endpoint) && error.contains(named), "{header}: {value:?}: {error}");
            assert_eq!(files(outside.path()), std::slice::from_ref(&victim), "{header}: {value:?}");
            assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        }
    }
}

#[test]
fn content_that_does_not_match_its_metadata_is_rejected() {
    for (etag, sent, words) in [
        ("0".repeat(64), "weights", "its sha256 is"),
        ("abc".to_owned(), "weights and more", "more than the 7 bytes"),
        ("abc".to_owned(), "weigh", "5 bytes of the 7"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let times = std::sync::atomic::AtomicU64::new(0);
        let file = move |_: &str| {
            let headers = format!("ETag: {etag}\r\nX-Repo-Commit: c0ffee\r\n");
            let first = times.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
            ok(&headers, if first { "weights" } else { sent })
        };
        let error = format!("{:#}", with_token(with_file(file, HeadLog::default()), home.path()).unwrap_err());
        assert!(error.contains(words), "{error}");
        assert!(!files(home.path()).iter().any(|path| path.ends_with("a.gguf")), "it counts as fetched");
    }
}

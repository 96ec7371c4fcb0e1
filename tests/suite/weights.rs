//! Tests of workers without a shared folder: weights from HTTP servers that break off, and from object stores.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::DType;
use metrics_exporter_prometheus::PrometheusBuilder;
use preceptor::config::{WeightsPlace, parse};
use preceptor::lm::model::Lora;
use preceptor::observe::monitor::{Monitor, PublishedWeights};
use preceptor::observe::serve::{Token, serve};
use preceptor::pipeline::cluster::{BucketStore, Health, MemoryNotices, StorePlan, StoreToken};
use preceptor::pipeline::served::FolderStore;
use preceptor::util::bucket::Bucket;
use preceptor_actors::transport::MemoryTransport;

use crate::cluster::{Cluster, GROUP, changed, expected};
use crate::common::{byte_policy, wait_until};

/// Answer of a [`FileServer`] to a request.
#[derive(Clone, Copy)]
enum Reply {
    /// The file, from the requested byte on.
    File,
    /// As much of it as this number of bytes, and then the connection is closed.
    Cut(usize),
    /// The whole file, whatever range is requested.
    Whole,
    /// The file with its last byte changed.
    Damaged,
    /// This status without a body.
    Status(u16),
}

/// A request: the name of the file, and the first byte of the range.
type Asked = (String, Option<usize>);
type Plan = dyn Fn(usize, &str) -> Reply + Send + Sync;

/// HTTP server of a folder, which misbehaves as planned.
struct FileServer {
    url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl FileServer {
    /// Serves `folder`. `plan` is given how often the file was requested before, and its name.
    fn start(folder: PathBuf, plan: impl Fn(usize, &str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/store", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (log, plan): (_, Arc<Plan>) = (Arc::clone(&asked), Arc::new(plan));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A client that has closed its connection gets nothing.
                let _ = answer(stream, &folder, &log, &*plan);
            }
        });
        Self { url, asked }
    }

    fn place(&self) -> Option<WeightsPlace> {
        Some(WeightsPlace::parse(&self.url).unwrap())
    }

    /// Returns the first bytes of the ranges that were requested of the files with this name.
    fn ranges(&self, file: &str) -> Vec<Option<usize>> {
        self.asked.lock().unwrap().iter().filter(|(of, _)| of.ends_with(file)).map(|(_, from)| *from).collect()
    }
}

fn answer(mut stream: TcpStream, folder: &Path, log: &Mutex<Vec<Asked>>, plan: &Plan) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default();
    let file = path.trim_start_matches("/store/").to_owned();
    let mut from = None;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let line = line.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse().ok();
        }
    }
    let mut log = log.lock().unwrap();
    let before = log.iter().filter(|(of, _)| *of == file).count();
    log.push((file.clone(), from));
    drop(log);
    let bytes = std::fs::read(folder.join(&file));
    let mut reply = plan(before, &file);
    let mut bytes = bytes.unwrap_or_else(|_| {
        reply = Reply::Status(404);
        Vec::new()
    });
    let size = bytes.len();
    if let Reply::Damaged = reply {
        *bytes.last_mut().unwrap() ^= 1;
    }
    let start = if let Reply::Whole = reply { 0 } else { from.unwrap_or(0) };
    let head = match (reply, start) {
        (Reply::Status(status), _) => format!("{status} Planned\r\nContent-Length: 0"),
        (_, start) if start >= size => format!("416 Nothing\r\nContent-Range: bytes */{size}\r\nContent-Length: 0"),
        (_, 0) => format!("200 OK\r\nContent-Length: {size}"),
        _ => {
            format!("206 Part\r\nContent-Range: bytes {start}-{}/{size}\r\nContent-Length: {}", size - 1, size - start)
        }
    };
    write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\n\r\n")?;
    let body = match reply {
        Reply::Status(_) => &[],
        Reply::Cut(most) => &bytes[start.min(size)..size.min(start + most)],
        _ => &bytes[start.min(size)..],
    };
    stream.write_all(body)?;
    stream.flush()?;
    // The client must read what was sent before the connection is reset.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn memory(lora: Option<&Lora>) -> Cluster {
    Cluster::start(Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()), lora)
}

/// Returns the names of the visible folders of weights below a cache.
fn folders(cache: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(cache.join("test/0"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_download_that_breaks_off_continues_where_it_stopped() {
    let mut cluster = memory(None);
    let cache = tempfile::tempdir().unwrap();
    let server = FileServer::start(cluster.dir.path().join("weights"), |before, file| match before {
        0 if file.ends_with("model.safetensors") => Reply::Cut(1000),
        1 if file.ends_with("model.safetensors") => Reply::Status(503),
        2 if file.ends_with("model.safetensors") => Reply::Cut(500),
        _ => Reply::File,
    });
    let plan = StorePlan { place: server.place(), cache: Some(cache.path().into()), token: None };
    let worker = cluster.worker_with("a", plan, Arc::default());
    cluster.submit(0..2);
    assert_eq!(cluster.take(2), expected(&cluster.model, 0, 0..2));
    assert_eq!(server.ranges("model.safetensors"), [None, Some(1000), Some(1000), Some(1500)]);
    // Old versions are removed, here and there.
    let mut newest = cluster.model.clone();
    for version in 1..5 {
        newest = changed(&newest);
        cluster.publish(version, &newest);
        let seq = 2 * version + 2;
        cluster.submit([seq]);
        assert_eq!(cluster.take(1), expected(&newest, version, [seq]));
    }
    worker.end().unwrap();
    let names = folders(cache.path());
    assert_eq!(names.len(), 3, "the base model and the last two versions: {names:?}");
    assert!(names.iter().all(|name| !name.contains("partial") && !name.starts_with("policy-00000007-2-")), "{names:?}");
}

#[test]
fn a_worker_works_with_its_weights_while_newer_ones_cannot_be_fetched() {
    let mut cluster = memory(None);
    let cache = tempfile::tempdir().unwrap();
    let away = Arc::new(Mutex::new(false));
    let is_away = Arc::clone(&away);
    let server = FileServer::start(cluster.dir.path().join("weights"), move |_, _| {
        if *is_away.lock().unwrap() { Reply::Status(503) } else { Reply::File }
    });
    let plan = StorePlan { place: server.place(), cache: Some(cache.path().into()), token: None };
    let health = Arc::<Health>::default();
    let worker = cluster.worker_with("a", plan, Arc::clone(&health));
    cluster.submit([0]);
    assert_eq!(cluster.take(1), expected(&cluster.model, 0, [0]));
    *away.lock().unwrap() = true;
    let asked = server.asked.lock().unwrap().len();
    let newest = changed(&cluster.model);
    cluster.publish(1, &newest);
    wait_until("the new version is asked for", || server.asked.lock().unwrap().len() > asked + 1);
    cluster.submit([1]);
    assert_eq!(cluster.take(1), expected(&cluster.model, 0, [1]));
    let state = health.state();
    assert!(state.version == Some(0) && !state.behind.is_zero(), "{state:?}");
    // Group 4 must begin with version 1.
    cluster.submit([4]);
    wait_until("the worker says why it waits", || {
        cluster.coordinator.roster.report().iter().any(|worker| {
            worker.why.contains("waits for version 1, and cannot fetch policy-00000007-1-")
                && worker.why.contains("503")
        })
    });
    *away.lock().unwrap() = false;
    assert_eq!(cluster.take(1), expected(&newest, 1, [4]));
    worker.end().unwrap();
}

#[test]
fn a_damaged_download_is_never_used() {
    let mut cluster = memory(None);
    let cache = tempfile::tempdir().unwrap();
    // The beginning of another file is left of an earlier download.
    let left = cache.path().join("test/0");
    let base = std::fs::read_dir(cluster.dir.path().join("weights")).unwrap();
    let base =
        base.map(|entry| entry.unwrap().file_name().into_string().unwrap()).find(|name| name.starts_with("base-"));
    let partial = left.join(format!(".{}.partial", base.unwrap()));
    std::fs::create_dir_all(&partial).unwrap();
    std::fs::write(partial.join("config.json"), "{ \"other\": true").unwrap();
    let server = FileServer::start(cluster.dir.path().join("weights"), |before, file| match before {
        0 if file.ends_with("model.safetensors") => Reply::Damaged,
        1 if file.ends_with("model.safetensors") => Reply::Cut(700),
        2 if file.ends_with("model.safetensors") => Reply::Whole,
        _ => Reply::File,
    });
    let plan = StorePlan { place: server.place(), cache: Some(cache.path().into()), token: None };
    let worker = cluster.worker_with("a", plan, Arc::default());
    cluster.submit(0..2);
    assert_eq!(cluster.take(2), expected(&cluster.model, 0, 0..2));
    assert_eq!(server.ranges("model.safetensors"), [None, None, Some(700)]);
    assert_eq!(server.ranges("/config.json"), [Some(15), None], "the rest, and then the whole");
    worker.end().unwrap();
}

#[test]
fn a_server_that_refuses_a_worker_ends_it_with_the_remedy() {
    let cluster = memory(None);
    let cache = tempfile::tempdir().unwrap();
    for (status, words) in [(401, "--token-env"), (421, "serve.hosts"), (302, "redirects to")] {
        let server = FileServer::start(cluster.dir.path().join("weights"), move |_, _| Reply::Status(status));
        let plan = StorePlan { place: server.place(), cache: Some(cache.path().into()), token: None };
        let error = format!("{:#}", cluster.worker_with("a", plan, Arc::default()).thread.join().unwrap().unwrap_err());
        assert!(error.contains(words) && error.contains("127.0.0.1"), "{error}");
    }
}

#[test]
fn a_node_serves_its_weights_to_workers_with_the_token() {
    let lora = Lora { rank: 2, alpha: 4.0, targets: vec!["q_proj".into()] };
    let mut cluster = memory(Some(&lora));
    let base = cluster.coordinator_base();
    let text = "[run]\nname = \"r\"\nsteps = 1\n[data]\npath = \"Cargo.toml\"\n[policy]\nmodel = { scratch = {} }\n[serve]\nlisten = \"127.0.0.1:0\"\n";
    let config = parse(text, "test", Path::new("."), &[]).unwrap();
    let monitor = Monitor::new(&config, PrometheusBuilder::new().build_recorder().handle());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let token = "0123456789abcdef";
    let address = runtime.block_on(serve(&config.serve, Some(Token::new(token)), Arc::clone(&monitor))).unwrap();
    let get = |path: &str, headers: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let at = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        (String::from_utf8(bytes[..at].to_vec()).unwrap().to_lowercase(), bytes[at + 4..].to_vec())
    };
    let bearer = format!("Authorization: Bearer {token}\r\n");
    let file = format!("/weights/{base}/model.safetensors");
    assert!(get(&file, &bearer).0.starts_with("http/1.1 503"), "nothing is published yet");
    let folder = cluster.dir.path().join("weights");
    monitor.set_published_weights(PublishedWeights { folder: folder.clone(), run: 7, models: vec![base.clone()] });

    let content = std::fs::read(folder.join(&base).join("model.safetensors")).unwrap();
    let size = content.len();
    let (head, body) = get(&file, &bearer);
    assert!(head.starts_with("http/1.1 200") && head.contains("accept-ranges: bytes") && body == content, "{head}");
    let tag = head.split("etag: ").nth(1).unwrap().split("\r\n").next().unwrap().to_owned();
    let (head, body) = get(&file, &format!("{bearer}Range: bytes=100-\r\nIf-Range: {tag}\r\n"));
    assert!(head.starts_with("http/1.1 206") && body == content[100..], "{head}");
    assert!(head.contains(&format!("content-range: bytes 100-{}/{size}", size - 1)), "{head}");
    let (head, body) = get(&file, &format!("{bearer}Range: bytes=100-\r\nIf-Range: \"other\"\r\n"));
    assert!(head.starts_with("http/1.1 200") && body == content, "{head}");
    let (head, body) = get(&file, &format!("{bearer}Range: bytes={size}-\r\n"));
    assert!(head.starts_with("http/1.1 416") && head.contains(&format!("bytes */{size}")) && body.is_empty(), "{head}");

    for path in [
        format!("/weights/{base}/..%2F..%2Fpolicy%2Fmodel.safetensors"),
        "/weights/..%2Fpolicy/model.safetensors".into(),
        "/weights/../policy/model.safetensors".into(),
        format!("/weights/{base}/%2e%2e"),
        format!("/weights/{base}"),
        format!("/weights/.{base}.partial/model.safetensors"),
    ] {
        assert!(get(&path, &bearer).0.starts_with("http/1.1 404"), "{path}");
    }
    for headers in ["", "Authorization: Bearer 0123456789abcdeF\r\n"] {
        assert!(get(&file, headers).0.starts_with("http/1.1 401"), "{headers}");
    }

    let place = Some(WeightsPlace::parse(&format!("http://{address}/weights")).unwrap());
    let cache = tempfile::tempdir().unwrap();
    let plan = |token: Option<&str>| StorePlan {
        place: place.clone(),
        token: token.map(|token| StoreToken::new(token.into())),
        cache: Some(cache.path().into()),
    };
    let refused = cluster.worker_with("a", plan(Some("0123456789abcdeF")), Arc::default()).thread.join().unwrap();
    let error = format!("{:#}", refused.unwrap_err());
    assert!(error.contains("correct the token of --token-env") && !error.contains("0123456789"), "{error}");
    let worker = cluster.worker_with("a", plan(Some(token)), Arc::default());
    let (adapted, params) = cluster.model.adapted(&lora, 3).unwrap();
    for (_, var) in params.iter() {
        var.set(&(var.as_tensor().ones_like().unwrap() * 0.1).unwrap()).unwrap();
    }
    let adapted = adapted.snapshot().unwrap();
    cluster.publish(1, &adapted);
    cluster.submit(4..6);
    assert_eq!(cluster.take(2), expected(&adapted, 1, 4..6));
    worker.end().unwrap();
    // The base model is in the cache now, and not fetched again by the next process.
    assert!(folders(cache.path()).contains(&base));
    runtime.shutdown_background();
}

#[test]
fn weights_travel_through_an_object_store_without_settings_of_the_worker() {
    let (dir, shared, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_, model) = byte_policy(dir.path(), 5);
    let url = format!("file://{}/runs/a", shared.path().display());
    let local = FolderStore::new(&dir.path().join("weights"), None, None, DType::F32).unwrap();
    let store = Arc::new(BucketStore::new(local, Bucket::open(&url, "cluster.store").unwrap()));
    let (transport, notices) = (Arc::new(MemoryTransport::default()), Arc::new(MemoryNotices::default()));
    let mut cluster = Cluster::with_store((dir, model), (transport, notices), None, (1, GROUP), (store, url));
    let plan = StorePlan { cache: Some(cache.path().into()), ..StorePlan::default() };
    let worker = cluster.worker_with("a", plan, Arc::default());
    cluster.submit(0..2);
    assert_eq!(cluster.take(2), expected(&cluster.model, 0, 0..2));
    let mut newest = cluster.model.clone();
    for version in 1..5 {
        newest = changed(&newest);
        cluster.publish(version, &newest);
        let seq = 2 * version + 2;
        cluster.submit([seq]);
        assert_eq!(cluster.take(1), expected(&newest, version, [seq]));
    }
    worker.end().unwrap();
    let there: BTreeMap<String, bool> = std::fs::read_dir(shared.path().join("runs/a"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path().join("SHA256SUMS").exists()))
        .collect();
    let complete: Vec<&String> = there.iter().filter(|(_, complete)| **complete).map(|(name, _)| name).collect();
    assert_eq!(complete.len(), 4, "the base model and three versions: {there:?}");
}

//! Models from a hub, in the cache that Hugging Face's own libraries use: `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` are
//! honoured.

mod cache;
mod client;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::{ModelFiles, ResolveOptions};
use crate::bounded;
use crate::say;
use cache::{Cache, is_inside};
use client::Client;

const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Most names of files that an error lists.
const LISTED: usize = 20;

/// Where a hub is and what is known on this machine of it.
struct Hub {
    endpoint: String,
    home: PathBuf,
    token: Option<String>,
}

impl Hub {
    fn from_env() -> Result<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.trim().is_empty());
        let home = cache::home()?;
        let token = variable("HF_TOKEN").or_else(|| bounded::text(&home.join("token"), bounded::WRITTEN).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self { endpoint, home, token })
    }
}

/// The model in `repo`: its safetensors, or the one GGUF `file`. What the cache holds whole is not asked for again.
pub(super) fn fetch(
    repo: &str,
    revision: Option<&str>,
    file: Option<&str>,
    options: &ResolveOptions,
) -> Result<ModelFiles> {
    fetch_from(Hub::from_env()?, repo, revision, file, options)
}

fn fetch_from(
    hub: Hub,
    repo: &str,
    revision: Option<&str>,
    file: Option<&str>,
    options: &ResolveOptions,
) -> Result<ModelFiles> {
    if let Some(file) = file {
        ensure!(
            file.ends_with(".gguf") && is_inside(file),
            "file = {file:?} is no .gguf; leave it out for the safetensors"
        );
    }
    let revision = revision.unwrap_or("main");
    let cache = Cache::new(&hub.home, repo, revision)?;
    if let Some(files) = cached(&cache, file) {
        return Ok(files);
    }
    let client = Client::new(&hub.endpoint, hub.token, repo, revision, options.timeout)?;
    let bar = bar(options.progress);
    if options.progress && bar.is_hidden() {
        say!("fetching {repo} from the hub");
    }
    let download = Download { cache, client, bar: bar.clone(), patience: options.timeout };
    let found = on_a_thread(|| download.all(file));
    bar.finish_and_clear();
    found
}

/// Runs `work` to its end on a thread of its own, which may wait where the caller's may not.
fn on_a_thread<T: Send, F: Future<Output = Result<T>>>(work: impl FnOnce() -> F + Send) -> Result<T> {
    let body = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let done = runtime.block_on(work());
        // Looking up a name cannot be interrupted.
        runtime.shutdown_background();
        done
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("hub".into()).spawn_scoped(scope, body)?;
        thread.join().map_err(|_| anyhow!("the hub's client failed; see the message above"))?
    })
}

/// The model, if all of it is in the cache.
fn cached(cache: &Cache, file: Option<&str>) -> Option<ModelFiles> {
    if let Some(file) = file {
        return cache.get(file).map(ModelFiles::Gguf);
    }
    for name in REQUIRED {
        cache.get(name)?;
    }
    if cache.get(WEIGHTS).is_none() {
        for shard in shards(&cache.get(INDEX)?).ok()? {
            cache.get(&shard)?;
        }
    }
    Some(ModelFiles::Directory(cache.get("config.json")?.parent()?.to_owned()))
}

/// The files that the index of a model in several parts names.
fn shards(index: &Path) -> Result<Vec<String>> {
    let index: Value = serde_json::from_str(&bounded::text(index, bounded::DESCRIPTION)?)
        .with_context(|| format!("{INDEX} is not JSON"))?;
    let map = index["weight_map"].as_object().with_context(|| format!("{INDEX} has no weight_map"))?;
    let mut shards: Vec<String> = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    shards.sort_unstable();
    shards.dedup();
    ensure!(shards.iter().all(|shard| is_inside(shard)), "{INDEX} names files outside of the model");
    Ok(shards)
}

/// Most bytes of the file `name` of a model; weights may have any number.
fn most(name: &str) -> u64 {
    let described = [".json", ".jinja"].iter().any(|end| name.ends_with(end));
    if described { bounded::TOKENIZER } else { u64::MAX }
}

/// Files of one repository on their way.
struct Download {
    cache: Cache,
    client: Client,
    bar: ProgressBar,
    /// How long another process that fetches the same may stand still.
    patience: Duration,
}

impl Download {
    /// The weights come last, so that a cache which has them has the rest.
    async fn all(&self, file: Option<&str>) -> Result<ModelFiles> {
        let names = self.client.files().await?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if let Some(file) = file {
            let others = names.iter().copied().filter(|name| name.ends_with(".gguf"));
            let others: Vec<&str> = others.take(LISTED).collect();
            ensure!(names.contains(&file), "it has no {file}; its GGUF files: {}", others.join(", "));
            return Ok(ModelFiles::Gguf(self.one(file).await?));
        }
        for name in REQUIRED {
            ensure!(names.contains(&name), "it has no {name}");
        }
        for name in OPTIONAL.iter().chain(&REQUIRED).filter(|name| names.contains(name)) {
            self.one(name).await?;
        }
        if names.contains(&WEIGHTS) {
            self.one(WEIGHTS).await?;
        } else {
            ensure!(names.contains(&INDEX), "it has no {WEIGHTS}; name one of its GGUF files by file, if it has any");
            for shard in shards(&self.one(INDEX).await?)? {
                self.one(&shard).await?;
            }
        }
        cached(&self.cache, None).context("the hub's cache lost the model after it came; is its folder writable?")
    }

    async fn one(&self, name: &str) -> Result<PathBuf> {
        match self.cache.get(name) {
            Some(path) => Ok(path),
            None => self.fetch(name).await.with_context(|| format!("{name} cannot be fetched")),
        }
    }

    async fn fetch(&self, name: &str) -> Result<PathBuf> {
        let metadata = self.client.metadata(name).await?;
        let most = most(name);
        ensure!(metadata.size <= most, "it has {} bytes, and at most {most} are taken", metadata.size);
        let blob = self.cache.blob(&metadata.etag)?;
        let partial = blob.with_file_name(format!("{}.part", metadata.etag));
        let _held = self.held(&metadata.etag, &partial).await?;
        if std::fs::metadata(&blob).map(|blob| blob.len()).ok() != Some(metadata.size) {
            self.bar.reset();
            self.bar.set_length(metadata.size);
            self.bar.set_message(format!("fetching {name}"));
            self.client.fetch(name, &metadata, &partial, |bytes| self.bar.inc(bytes)).await?;
            std::fs::rename(&partial, &blob).with_context(|| format!("cannot write {}", blob.display()))?;
        }
        self.cache.keep(&metadata.etag, &metadata.commit, name)
    }

    /// The right to write the content with this ETag; waits for another process that writes it, as long as `partial` grows.
    async fn held(&self, etag: &str, partial: &Path) -> Result<std::fs::File> {
        let size = || std::fs::metadata(partial).map_or(0, |file| file.len());
        let (mut seen, mut moved) = (size(), Instant::now());
        loop {
            if let Some(held) = self.cache.lock(etag)? {
                return Ok(held);
            }
            if size() != seen {
                (seen, moved) = (size(), Instant::now());
            }
            ensure!(
                moved.elapsed() < self.patience,
                "another process is fetching it, and makes no progress; end that process, and try again"
            );
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

/// A moving bar for the person who waits.
fn bar(shown: bool) -> ProgressBar {
    let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target);
    let style = ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message("asking the hub");
    if shown {
        bar.enable_steady_tick(Duration::from_millis(250));
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    /// A hub with one repository, `o/n`, of these files; its address. It serves until the test program ends.
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
        if path == "/api/models/o/n/revision/main" {
            let siblings: Vec<Value> = files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
            let body = serde_json::json!({ "siblings": siblings, "sha": "c0ffee" }).to_string();
            return send(&mut stream, "200 OK", "Content-Type: application/json\r\n", &body);
        }
        let name = path.strip_prefix("/o/n/resolve/main/");
        let Some((name, body)) = files.iter().find(|(file, _)| Some(*file) == name) else {
            return send(&mut stream, "404 Not Found", "", "");
        };
        let range = headers.iter().find_map(|line| line.strip_prefix("range: bytes=")).unwrap();
        let (from, to) = range.split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to.parse().map_or(body.len(), |to: usize| to + 1);
        let headers = format!(
            "ETag: \"{name}\"\r\nX-Repo-Commit: c0ffee\r\nContent-Range: bytes {from}-{}/{}\r\n",
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
    fn a_model_in_parts_is_fetched_once() {
        let index = r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"}}"#;
        let files: [(&str, &str); 6] = [
            ("config.json", "{}"),
            ("tokenizer.json", "{ }"),
            ("chat_template.jinja", "x"),
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
        // Nobody listens on a port that was just let go, and nobody need.
        let nobody = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        assert_eq!(get(&nobody, home.path(), "o/n", None).unwrap(), found);
        std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
        assert!(get(&nobody, home.path(), "o/n", None).is_err());
    }

    #[test]
    fn one_gguf_is_fetched_by_name() {
        let endpoint = hub(&[("a.gguf", "aaa"), ("b.gguf", "bbb"), ("config.json", "{}")]);
        let home = tempfile::tempdir().unwrap();
        let ModelFiles::Gguf(path) = get(&endpoint, home.path(), "o/n", Some("b.gguf")).unwrap() else {
            panic!("no GGUF")
        };
        assert_eq!(std::fs::read_to_string(path).unwrap(), "bbb");
        for (repo, file, word) in [
            ("o/n", Some("c.gguf"), "it has no c.gguf; its GGUF files: a.gguf, b.gguf"),
            ("o/n", Some("../a.gguf"), "is no .gguf"),
            ("o/n", None, "it has no tokenizer.json"),
            ("o/other", None, "needs HF_TOKEN"),
            ("n", None, "owner/name"),
            ("../n", None, "owner/name"),
        ] {
            let error = format!("{:#}", get(&endpoint, home.path(), repo, file).unwrap_err());
            assert!(error.contains(word), "{repo} {file:?}: {error}");
        }
    }

    fn patient(timeout: Duration) -> ResolveOptions {
        ResolveOptions { timeout, progress: false, ..ResolveOptions::default() }
    }

    #[test]
    fn a_hub_that_stands_still_is_given_up_on() {
        // It accepts connections, and never answers.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let home = tempfile::tempdir().unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let hub = Hub { endpoint, home: home.path().to_owned(), token: None };
        let error = fetch_from(hub, "o/n", None, None, &patient(Duration::from_millis(50))).unwrap_err();
        assert!(error.to_string().contains("did not answer within 50ms"), "{error:#}");
        // A part of a file is waited for in the same way.
        let client = || {
            Client::new(
                &format!("http://{}", silent.local_addr().unwrap()),
                None,
                "o/n",
                "main",
                Duration::from_millis(50),
            )
        };
        let asked = on_a_thread(|| async move { client()?.metadata("a.gguf").await });
        let error = asked.unwrap_err();
        assert!(error.to_string().contains("sent nothing for 50ms"), "{error:#}");
    }

    /// A server that gives each request, by its path and its head, to `answer`.
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
                // The client may be gone already.
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

    /// A hub of one file, `a.gguf`, which it answers as `file` says.
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
    fn the_token_stays_with_the_hub_over_several_redirects() {
        let (away, home_heads) = (HeadLog::default(), HeadLog::default());
        let log = away.clone();
        let store = answers(move |path, head| {
            log.lock().unwrap().push(head.to_owned());
            if path == "/x" { found("/y") } else { ok("", "weights") }
        });
        // The same host at another port, and the same port by another name; each redirects once more.
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
    fn a_redirect_without_end_or_to_another_kind_of_address_is_refused() {
        for (location, words) in [
            ("/o/n/resolve/main/a.gguf", "more than 10 times"),
            ("file:///etc/passwd", "not as well protected"),
            ("http://[", "redirects to an address that is not valid"),
            ("http://u:p@127.0.0.1:1/hf_SECRET0123456789", "cannot be reached"),
        ] {
            let home = tempfile::tempdir().unwrap();
            let endpoint = with_file(move |_| found(location), HeadLog::default());
            let error = format!("{:#}", with_token(endpoint, home.path()).unwrap_err());
            assert!(error.contains(words) && !error.to_lowercase().contains("hf_secret"), "{location}: {error}");
        }
    }

    /// Every file below `dir`.
    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
    }

    #[test]
    fn a_header_that_is_no_name_is_refused_and_writes_nothing() {
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
    fn content_that_is_not_what_the_hub_named_is_refused() {
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
}

//! Models from a hub, through the `hf-hub` crate: its cache, `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` are honoured.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::{ModelFiles, ResolveOptions};
use crate::bounded;
use crate::say;

/// How long a hub may take to show that it is there at all; a place that is not should cost seconds.
const CONTACT: Duration = Duration::from_secs(10);

const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// The model in `repo`: its safetensors, or the one GGUF `file`. What the cache holds whole is not asked for again.
pub(super) fn fetch(
    repo: &str,
    revision: Option<&str>,
    file: Option<&str>,
    options: &ResolveOptions,
) -> Result<ModelFiles> {
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    let mut builder = ApiBuilder::from_env();
    if token.is_some() {
        builder = builder.with_token(token);
    }
    fetch_with(builder, &Cache::from_env(), repo, revision, file, options)
}

fn fetch_with(
    builder: ApiBuilder,
    cache: &Cache,
    repo: &str,
    revision: Option<&str>,
    file: Option<&str>,
    options: &ResolveOptions,
) -> Result<ModelFiles> {
    let parts: Vec<&str> = repo.split('/').collect();
    ensure!(parts.len() == 2 && parts.iter().all(|p| plain(p)), "{repo:?} is no repository; write it as owner/name");
    if let Some(file) = file {
        ensure!(
            file.ends_with(".gguf") && plain(file),
            "file = {file:?} is no .gguf; leave it out for the safetensors"
        );
    }
    let revision = revision.unwrap_or("main");
    let repo = Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned());
    if let Some(files) = cached(&cache.repo(repo.clone()), file) {
        return Ok(files);
    }
    let meter = Meter::new(options.progress);
    if options.progress && meter.bar.is_hidden() {
        say!("fetching {} from the hub", repo.url());
    }
    let api = builder.build().context("the hub's client cannot be set up")?;
    let download = Download { cache: cache.repo(repo.clone()), repo: api.repo(repo), meter: meter.clone() };
    let file = file.map(str::to_owned);
    let found = watched(options.timeout, &meter.moved, move || download.all(file.as_deref()));
    meter.bar.finish_and_clear();
    found
}

/// Runs `work` on a thread of its own and gives up on it when `moved` stands still: hf-hub knows no time-out. A thread
/// that is given up on ends with the program or with its connection.
fn watched<T: Send + 'static>(
    timeout: Duration,
    moved: &AtomicU64,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (said, heard) = sync_channel(1);
    // The listener may have given up.
    std::thread::Builder::new().name("hub".into()).spawn(move || drop(said.send(work())))?;
    let mut seen = 0;
    let mut patience = timeout.min(CONTACT);
    loop {
        match heard.recv_timeout(patience) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => bail!("the hub's client broke down"),
            Err(RecvTimeoutError::Timeout) => {
                let now = moved.load(Ordering::Relaxed);
                ensure!(now != 0, "the hub did not answer within {patience:?}");
                ensure!(now != seen, "the hub sent nothing for {patience:?}; try again, what has come is kept");
                (seen, patience) = (now, timeout);
            }
        }
    }
}

/// The model, if all of it is in the cache.
fn cached(cache: &CacheRepo, file: Option<&str>) -> Option<ModelFiles> {
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
    ensure!(shards.iter().all(|shard| plain(shard)), "{INDEX} names files outside of the model");
    Ok(shards)
}

/// A relative path that stays where it is put.
fn plain(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Files of one repository on their way.
struct Download {
    cache: CacheRepo,
    repo: ApiRepo,
    meter: Meter,
}

impl Download {
    /// The weights come last, so that a cache which has them has the rest.
    fn all(&self, file: Option<&str>) -> Result<ModelFiles> {
        let info = self.repo.info().map_err(|error| {
            let said = error.to_string();
            // The hub's answers to who may not know whether it is there.
            let closed = ["401", "403", "404"].iter().any(|status| said.contains(status));
            let hint = if closed { "; a private or gated repository needs HF_TOKEN" } else { "" };
            anyhow!("the hub does not list it: {said}{hint}")
        })?;
        self.meter.moved.fetch_add(1, Ordering::Relaxed);
        let names: Vec<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        if let Some(file) = file {
            let others: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".gguf")).collect();
            ensure!(names.contains(&file), "it has no {file}; its GGUF files: {}", others.join(", "));
            return Ok(ModelFiles::Gguf(self.one(file)?));
        }
        for name in REQUIRED {
            ensure!(names.contains(&name), "it has no {name}");
        }
        for name in OPTIONAL.iter().chain(&REQUIRED).filter(|name| names.contains(name)) {
            self.one(name)?;
        }
        if names.contains(&WEIGHTS) {
            self.one(WEIGHTS)?;
        } else {
            ensure!(names.contains(&INDEX), "it has no {WEIGHTS}; name one of its GGUF files by file, if it has any");
            for shard in shards(&self.one(INDEX)?)? {
                self.one(&shard)?;
            }
        }
        cached(&self.cache, None).context("the hub's cache lost the model after it came; is its folder writable?")
    }

    fn one(&self, name: &str) -> Result<PathBuf> {
        if let Some(path) = self.cache.get(name) {
            return Ok(path);
        }
        self.repo.download_with_progress(name, self.meter.clone()).with_context(|| format!("{name} cannot be fetched"))
    }
}

/// Counts what comes, for the watch and for the person who waits.
#[derive(Clone)]
struct Meter {
    moved: Arc<AtomicU64>,
    bar: ProgressBar,
}

impl Meter {
    fn new(shown: bool) -> Self {
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message("asking the hub");
        if shown {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Self { moved: Arc::default(), bar }
    }
}

impl Progress for Meter {
    fn init(&mut self, size: usize, name: &str) {
        self.moved.fetch_add(1, Ordering::Relaxed);
        self.bar.reset();
        self.bar.set_length(size as u64);
        self.bar.set_message(format!("fetching {name}"));
    }

    fn update(&mut self, size: usize) {
        self.moved.fetch_add(size as u64, Ordering::Relaxed);
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {}
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
        let cache = Cache::new(home.to_owned());
        let builder = ApiBuilder::from_cache(cache.clone()).with_endpoint(endpoint.to_owned());
        let options = ResolveOptions { timeout: Duration::from_secs(60), progress: false, ..ResolveOptions::default() };
        fetch_with(builder, &cache, repo, None, file, &options)
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

    #[test]
    fn a_hub_that_stands_still_is_given_up_on() {
        // It takes connections, and never answers.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path().to_owned());
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let builder = ApiBuilder::from_cache(cache.clone()).with_endpoint(endpoint);
        let options =
            ResolveOptions { timeout: Duration::from_millis(50), progress: false, ..ResolveOptions::default() };
        let error = fetch_with(builder, &cache, "o/n", None, None, &options).unwrap_err();
        assert!(error.to_string().contains("did not answer within 50ms"), "{error:#}");
        // One that did answer, and then fell silent.
        let moved = Arc::new(AtomicU64::new(1));
        let (_open, closed) = sync_channel::<()>(0);
        let error = watched(Duration::from_millis(20), &moved, move || Ok(closed.recv()?)).unwrap_err();
        assert!(error.to_string().contains("sent nothing for 20ms"), "{error:#}");
    }
}

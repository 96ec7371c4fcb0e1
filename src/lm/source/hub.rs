//! Models and data sets of a hub, in the cache of Hugging Face's own libraries. `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN`
//! are honoured.

mod cache;
mod client;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::dataset::{self, Choice};
use super::{ModelFiles, ResolveOptions};
use crate::status;
use crate::util::read_bounded;
use cache::{Cache, Kind, is_inside};
use client::Client;

const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 5] = [
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];
/// Folder of the chat templates other than the default one.
const TEMPLATES: &str = "additional_chat_templates/";

/// Largest number of file names that an error lists.
const LISTED: usize = 20;

/// Address of a hub, cache directory and token.
struct Hub {
    endpoint: String,
    home: PathBuf,
    token: Option<String>,
}

impl Hub {
    fn from_env() -> Result<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.trim().is_empty());
        let home = cache::home()?;
        let token =
            variable("HF_TOKEN").or_else(|| read_bounded::text(&home.join("token"), read_bounded::WRITTEN).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self { endpoint, home, token })
    }
}

/// Returns the model in `repo`: its safetensors, or the GGUF `file`. Does not contact the hub if the cache holds the
/// complete model.
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
            "file = {file:?} is not a .gguf; leave it out for the safetensors"
        );
    }
    let revision = revision.unwrap_or("main");
    let cache = Cache::new(&hub.home, Kind::Model, repo, revision)?;
    if let Some(files) = cached(&cache, file) {
        return Ok(files);
    }
    let download = Download::new(hub, cache, Kind::Model, (repo, revision), options)?;
    let found = block_on_thread(|| download.fetch_model(file));
    download.bar.finish_and_clear();
    found
}

/// Returns the files of the data set `repo` that `choice` selects. Does not contact the hub if the cache holds all of
/// them.
pub(super) fn fetch_dataset(
    repo: &str,
    revision: Option<&str>,
    choice: &Choice<'_>,
    options: &ResolveOptions,
) -> Result<Vec<PathBuf>> {
    fetch_dataset_from(Hub::from_env()?, repo, revision, choice, options)
}

fn fetch_dataset_from(
    hub: Hub,
    repo: &str,
    revision: Option<&str>,
    choice: &Choice<'_>,
    options: &ResolveOptions,
) -> Result<Vec<PathBuf>> {
    let revision = revision.unwrap_or("main");
    let cache = Cache::new(&hub.home, Kind::Dataset, repo, revision)?;
    if let Some(names) = cache.list() {
        let there: Option<Vec<PathBuf>> =
            dataset::of_split(&names, choice)?.iter().map(|name| cache.get(name)).collect();
        if let Some(files) = there {
            return Ok(files);
        }
    }
    let download = Download::new(hub, cache, Kind::Dataset, (repo, revision), options)?;
    let found = block_on_thread(|| download.fetch_selected(choice));
    download.bar.finish_and_clear();
    found
}

/// Runs `work` to its end on a separate thread, because the caller's thread may not block on a future.
fn block_on_thread<T: Send, F: Future<Output = Result<T>>>(work: impl FnOnce() -> F + Send) -> Result<T> {
    let body = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let done = runtime.block_on(work());
        // Name resolution cannot be interrupted.
        runtime.shutdown_background();
        done
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("hub".into()).spawn_scoped(scope, body)?;
        thread.join().map_err(|_| anyhow!("the hub's client failed; see the message above"))?
    })
}

/// Returns the model if the cache holds all its files.
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

/// Returns the files that the index of a sharded model names.
fn shards(index: &Path) -> Result<Vec<String>> {
    let index: Value = serde_json::from_str(&read_bounded::text(index, read_bounded::DESCRIPTION)?)
        .with_context(|| format!("{INDEX} is not JSON"))?;
    let map = index["weight_map"].as_object().with_context(|| format!("{INDEX} has no weight_map"))?;
    let mut shards: Vec<String> = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    shards.sort_unstable();
    shards.dedup();
    ensure!(shards.iter().all(|shard| is_inside(shard)), "{INDEX} names files outside of the model");
    Ok(shards)
}

/// Returns the largest accepted size in bytes of the file `name`; the size of weights is not limited.
fn most(name: &str) -> u64 {
    let described = [".json", ".jinja"].iter().any(|end| name.ends_with(end));
    if described { read_bounded::TOKENIZER } else { u64::MAX }
}

/// Download of files of one repository.
struct Download {
    cache: Cache,
    client: Client,
    bar: ProgressBar,
    /// Time that another process that downloads the same file may make no progress.
    patience: Duration,
}

impl Download {
    fn new(
        hub: Hub,
        cache: Cache,
        kind: Kind,
        (repo, revision): (&str, &str),
        options: &ResolveOptions,
    ) -> Result<Self> {
        let offline = std::env::var("HF_HUB_OFFLINE")
            .is_ok_and(|value| ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str()));
        ensure!(!offline, "it is not in the cache, and HF_HUB_OFFLINE forbids requests to the hub");
        let client = Client::new(&hub.endpoint, hub.token, kind, repo, revision, options.timeout)?;
        let bar = bar(options.progress);
        if options.progress && bar.is_hidden() {
            status!("fetching {repo} from the hub");
        }
        Ok(Self { cache, client, bar, patience: options.timeout })
    }

    /// Downloads the files of a data set that `choice` selects.
    async fn fetch_selected(&self, choice: &Choice<'_>) -> Result<Vec<PathBuf>> {
        let names = self.client.files().await?;
        let mut files = Vec::new();
        for name in dataset::of_split(&names, choice)? {
            ensure!(is_inside(&name), "{name:?} is outside of the data set");
            files.push(self.fetch_if_missing(&name).await?);
        }
        self.cache.keep_list(&names)?;
        Ok(files)
    }

    /// Downloads a model. The weights come last, so that a cache with the weights has all other files.
    async fn fetch_model(&self, file: Option<&str>) -> Result<ModelFiles> {
        let names = self.client.files().await?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if let Some(file) = file {
            let others = names.iter().copied().filter(|name| name.ends_with(".gguf"));
            let others: Vec<&str> = others.take(LISTED).collect();
            ensure!(names.contains(&file), "it has no {file}; its GGUF files: {}", others.join(", "));
            return Ok(ModelFiles::Gguf(self.fetch_if_missing(file).await?));
        }
        for name in REQUIRED {
            ensure!(names.contains(&name), "it has no {name}");
        }
        for name in &names {
            let is_template = name.starts_with(TEMPLATES) && name.ends_with(".jinja") && is_inside(name);
            if is_template || OPTIONAL.contains(name) || REQUIRED.contains(name) {
                self.fetch_if_missing(name).await?;
            }
        }
        if names.contains(&WEIGHTS) {
            self.fetch_if_missing(WEIGHTS).await?;
        } else {
            ensure!(names.contains(&INDEX), "it has no {WEIGHTS}; name one of its GGUF files by file, if it has any");
            for shard in shards(&self.fetch_if_missing(INDEX).await?)? {
                self.fetch_if_missing(&shard).await?;
            }
        }
        cached(&self.cache, None)
            .context("the model is not in the hub's cache after the download; is the cache folder writable?")
    }

    async fn fetch_if_missing(&self, name: &str) -> Result<PathBuf> {
        match self.cache.get(name) {
            Some(path) => Ok(path),
            None => self.fetch(name).await.with_context(|| format!("{name} cannot be fetched")),
        }
    }

    async fn fetch(&self, name: &str) -> Result<PathBuf> {
        let metadata = self.client.metadata(name).await?;
        let most = most(name);
        ensure!(metadata.size <= most, "it has {} bytes, the limit is {most}", metadata.size);
        let blob = self.cache.blob(&metadata.etag)?;
        let partial = blob.with_file_name(format!("{}.part", metadata.etag));
        let _lock = self.lock_blob(&metadata.etag, &partial).await?;
        if std::fs::metadata(&blob).map(|blob| blob.len()).ok() != Some(metadata.size) {
            self.bar.reset();
            self.bar.set_length(metadata.size);
            self.bar.set_message(format!("fetching {name}"));
            self.client.fetch(name, &metadata, &partial, |bytes| self.bar.inc(bytes)).await?;
            std::fs::rename(&partial, &blob).with_context(|| format!("cannot write {}", blob.display()))?;
        }
        self.cache.keep(&metadata.etag, &metadata.commit, name)
    }

    /// Takes the lock of the content with this ETag. Waits for another process that downloads it, as long as `partial`
    /// grows.
    async fn lock_blob(&self, etag: &str, partial: &Path) -> Result<std::fs::File> {
        let size = || std::fs::metadata(partial).map_or(0, |file| file.len());
        let (mut last_size, mut changed_at) = (size(), Instant::now());
        loop {
            if let Some(lock) = self.cache.lock(etag)? {
                return Ok(lock);
            }
            if size() != last_size {
                (last_size, changed_at) = (size(), Instant::now());
            }
            ensure!(
                changed_at.elapsed() < self.patience,
                "another process is fetching it, and makes no progress; end that process, and try again"
            );
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

/// Creates a progress bar.
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
mod tests;

//! Models from a hub, through the `hf-hub` crate: its cache, `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` are honoured.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{ModelFiles, ResolveOptions};

/// Files that a directory needs or may have, besides its weights.
const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// The model in `repo`: its safetensors, or the one GGUF `file`.
pub(super) fn fetch(
    repo: &str,
    revision: Option<&str>,
    file: Option<&str>,
    options: &ResolveOptions,
) -> Result<ModelFiles> {
    ensure!(repo.split('/').count() == 2, "{repo:?} is no repository; write it as owner/name");
    let revision = revision.unwrap_or("main").to_owned();
    let repo = Repo::with_revision(repo.to_owned(), RepoType::Model, revision);
    let api =
        ApiBuilder::from_env().with_progress(options.progress).build().context("the hub's client cannot be set up")?;
    let first = file.unwrap_or("config.json");
    if Cache::from_env().repo(repo.clone()).get(first).is_none() {
        answers(&api, &repo, first, options.timeout)?;
    }
    let repo = api.repo(repo);
    if let Some(file) = file {
        ensure!(file.ends_with(".gguf"), "file = {file:?} is no .gguf; leave it out to take the safetensors");
        return Ok(ModelFiles::Gguf(get(&repo, file)?));
    }
    let config = get(&repo, "config.json")?;
    get(&repo, "tokenizer.json")?;
    match repo.get("model.safetensors.index.json") {
        Ok(index) => {
            let index: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(index)?)
                .context("model.safetensors.index.json is not JSON")?;
            let map = index["weight_map"].as_object().context("model.safetensors.index.json has no weight_map")?;
            let mut shards: Vec<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                get(&repo, shard)?;
            }
        }
        Err(_) => drop(get(&repo, "model.safetensors")?),
    }
    for name in OPTIONAL {
        if let Err(error) = repo.get(name) {
            tracing::debug!("{name} is not there: {error}");
        }
    }
    let dir = config.parent().context("the hub's cache has no folder for the model")?;
    Ok(ModelFiles::Directory(dir.to_owned()))
}

fn get(repo: &ApiRepo, name: &str) -> Result<PathBuf> {
    repo.get(name).with_context(|| format!("{name} cannot be fetched"))
}

/// Asks for one file's metadata and gives up after `timeout`, so that the next place is tried soon.
fn answers(api: &Api, repo: &Repo, file: &str, timeout: Duration) -> Result<()> {
    let url = api.repo(repo.clone()).url(file);
    let (said, heard) = std::sync::mpsc::sync_channel(1);
    let api = api.clone();
    std::thread::spawn(move || {
        // The listener may have given up.
        let _ = said.send(api.metadata(&url).map(|_| ()));
    });
    match heard.recv_timeout(timeout) {
        Ok(answer) => answer.map_err(|error| anyhow!("the hub does not give {file}: {error}")),
        Err(_) => Err(anyhow!("the hub did not answer within {} s", timeout.as_secs())),
    }
}

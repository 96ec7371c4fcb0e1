//! The checks of a server at the start of a run, before compute is spent.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::fleet::FleetPlan;
use super::http::{Fault, Http};
use super::server::{SamplingPlan, Server};
use crate::config::EngineKind;
use crate::status;

const QUICK: Duration = Duration::from_secs(30);

/// Texts whose token ids are compared.
const TEXTS: [&str; 3] = ["Hello, world!", "  two spaces\n\ttab 12345", "Ünïcödé — 東京 🙂"];

/// Versions of vLLM (from, to below) that were tested.
const VLLM: [(u64, u64); 2] = [(0, 32), (0, 33)];
/// Versions of SGLang whose documentation was read.
const SGLANG: [(u64, u64); 2] = [(0, 5), (0, 6)];

/// Connects to the server at `url`, and compares its version, context length, vocabulary and tokenizer with the run's.
///
/// # Errors
/// If the server cannot be reached or does not suit the run.
pub(super) async fn probe(
    plan: &FleetPlan,
    url: &str,
    sampling: &Arc<SamplingPlan>,
    encode: &dyn Fn(&str) -> Result<Vec<u32>>,
) -> Result<Server> {
    let http = Http::new(url, plan.api_key_env.as_deref())?;
    http.get("/health", QUICK)
        .await
        .context("it does not answer; start it, or correct its address (rollout.servers, or --server of a worker)")?;
    let version = version(plan.kind, &http).await?;
    let tested = if plan.kind == EngineKind::Sglang { SGLANG } else { VLLM };
    let named = if plan.kind == EngineKind::Sglang { "SGLang" } else { "vLLM" };
    if plan.check_version {
        let number = parse(&version).with_context(|| format!("its version {version:?} is not a number"))?;
        ensure!(
            tested[0] <= number && number < tested[1],
            "it is {named} {version}, and this program was tested with {named} {}.{} only; use that version, or set rollout.check_version = false (a worker: --any-server-version)",
            tested[0].0,
            tested[0].1
        );
    }
    let (base, context) = model(plan.kind, &http).await?;
    if let Some(context) = context {
        let wanted = plan.longest_prompt + plan.sampling.max_new_tokens;
        ensure!(
            wanted <= context,
            "its context has {context} tokens, and the longest prompt with rollout.max_new_tokens has {wanted}; start it with a larger --max-model-len, or lower max_new_tokens or data.max_prompt_tokens"
        );
    }
    let server = Server::new(plan.kind, http, base, Arc::clone(sampling));
    for text in TEXTS {
        let ours = encode(text)?;
        let Some(theirs) = tokenize(&server, text).await? else { break };
        ensure!(
            ours == theirs,
            "its tokenizer encodes {text:?} as {theirs:?}, and the policy's as {ours:?}; serve the model of policy.model"
        );
    }
    status!("server    {} is {named} {version} with the model {}", server.name(), server.base);
    Ok(server)
}

async fn version(kind: EngineKind, http: &Http) -> Result<String> {
    let (path, key) = match kind {
        EngineKind::Sglang => ("/get_server_info", "version"),
        _ => ("/version", "version"),
    };
    let answer = http.get(path, QUICK).await.with_context(|| format!("it is not a {} server", kind_name(kind)))?;
    let version = answer[key].as_str().with_context(|| format!("it does not tell its version at {path}"))?;
    Ok(version.to_owned())
}

fn kind_name(kind: EngineKind) -> &'static str {
    if kind == EngineKind::Sglang { "SGLang" } else { "vLLM" }
}

/// Returns the first two numbers of a version.
fn parse(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Returns the name of the base model, and the context length if the server tells it.
async fn model(kind: EngineKind, http: &Http) -> Result<(String, Option<usize>)> {
    if kind == EngineKind::Sglang {
        let info = http.get("/get_model_info", QUICK).await?;
        let name = info["model_path"].as_str().context("it does not tell its model at /get_model_info")?;
        return Ok((name.to_owned(), None));
    }
    let list = http.get("/v1/models", QUICK).await?;
    let models = list["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(base) = models.iter().find(|model| model["parent"].is_null()) else {
        bail!("it lists no model at /v1/models");
    };
    let name = base["id"].as_str().context("its model has no name")?.to_owned();
    let told = &base["max_model_len"];
    let context = told.as_u64().map(|context| context as usize);
    ensure!(context.is_some(), "it does not tell its context length (max_model_len), as vLLM does");
    Ok((name, context))
}

/// Returns the token ids of `text` on the server, or `None` if the server has no endpoint for that.
async fn tokenize(server: &Server, text: &str) -> Result<Option<Vec<u32>>> {
    let body = json!({ "model": server.base, "prompt": text, "add_special_tokens": false });
    let answer = match server.http.post("/tokenize", &body, QUICK).await {
        Ok(answer) => answer,
        Err(Fault::Lost(_)) => return Ok(None),
        Err(fault) => return Err(fault.into()),
    };
    let ids = answer["tokens"].as_array().map(|ids| ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect());
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed() {
        assert_eq!(parse("0.32.0"), Some((0, 32)));
        assert_eq!(parse("0.32.0rc1+cpu"), Some((0, 32)));
        assert_eq!(parse("v0.5.23"), Some((0, 5)));
        assert_eq!(parse("unknown"), None);
    }
}

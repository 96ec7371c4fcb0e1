//! Requests and answers of vLLM (checked against 0.32).
//!
//! Completions come from `/inference/v1/generate`, which takes and returns token ids and tells the version of the weights of
//! each token. Adapters are loaded by `/v1/load_lora_adapter` and named as the model of a request. All weights are
//! replaced by `/pause`, `/collective_rpc` with `reload_weights`, `/update_weight_version` and `/resume`.

use serde_json::{Value, json};

use super::http::Fault;
use super::server::{Choice, Group, SamplingPlan, Versions};
use super::store::Tag;

/// Returns the body of a request for completions of `prompt`.
pub(super) fn generate(plan: &SamplingPlan, model: &str, tag: Tag, prompt: &[u32], group: Group) -> Value {
    let sampling = &plan.sampling;
    // No seed: a server's samples depend on its batches anyway, and seeded requests are slower and have ended vLLM's engine
    // on a CPU.
    let mut body = json!({
        "model": model,
        "token_ids": prompt,
        // Keys and values of other weights must not be found in the prefix cache.
        "cache_salt": tag.to_string(),
        "sampling_params": {
            "max_tokens": group.max_tokens,
            "temperature": sampling.temperature,
            "n": group.n,
            "logprobs": 0,
            // The end tokens are those of the run, and not those of the server's generation_config.json.
            "ignore_eos": true,
            "stop_token_ids": sampling.eos,
        },
    });
    if let Some(stop) = &sampling.stop {
        body["output_mode"] = json!("text");
        body["sampling_params"]["stop"] = json!(stop.strings());
    }
    body
}

/// Returns the body of a request for the log-probabilities of `ids` at temperature 1.
pub(super) fn score(model: &str, ids: &[u32]) -> Value {
    json!({
        "model": model,
        "token_ids": ids,
        "sampling_params": { "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0 },
    })
}

/// Number of tokens whose log-probabilities [`top`] asks for: the most that vLLM gives without an option.
const TOP: usize = 20;

/// Returns the body of a request for the log-probabilities of the most likely tokens after `ids`, at temperature 1.
pub(super) fn top(model: &str, tag: Tag, ids: &[u32]) -> Value {
    json!({
        "model": model,
        "token_ids": ids,
        "cache_salt": tag.to_string(),
        "sampling_params": { "max_tokens": 1, "temperature": 1.0, "logprobs": TOP, "ignore_eos": true },
    })
}

/// Reads the tokens of an answer to [`top`], with their log-probabilities.
pub(super) fn tops(answer: &Value) -> Result<Vec<(u32, f32)>, Fault> {
    let list = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array();
    let read = |token: &Value| {
        let id = u32::try_from(token["token_id"].as_u64()?).ok()?;
        token["logprob"].as_f64().filter(|logprob| logprob.is_finite()).map(|logprob| (id, logprob as f32))
    };
    let tops: Option<Vec<_>> = list.and_then(|list| list.iter().map(read).collect());
    tops.ok_or_else(|| Fault::Invalid("/inference/v1/generate: the answer has no top_logprobs".into()))
}

/// Reads the choices of an answer to [`generate`], in order of their index. `versions` gives the versions of their tokens.
pub(super) fn choices(answer: &Value, versions: &Versions<'_>) -> Result<Vec<Choice>, Fault> {
    let invalid = |what: &str| Fault::Invalid(format!("/inference/v1/generate: {what}"));
    let list = answer["choices"].as_array().ok_or_else(|| invalid("the answer has no choices"))?;
    let mut read = Vec::with_capacity(list.len());
    for choice in list {
        let ids: Vec<u32> = choice["token_ids"]
            .as_array()
            .and_then(|ids| ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect())
            .ok_or_else(|| invalid("a choice has no token_ids"))?;
        let content =
            choice["logprobs"]["content"].as_array().ok_or_else(|| invalid("a choice has no log-probabilities"))?;
        let logprobs: Vec<f32> = content
            .iter()
            .map(|token| token["logprob"].as_f64().map(|logprob| logprob as f32))
            .collect::<Option<_>>()
            .ok_or_else(|| invalid("a token's log-probability is not a number"))?;
        let versions = match versions {
            Versions::Adapter(version) => vec![*version; ids.len()],
            Versions::Told(known) => {
                spans(&choice["weight_versions"], ids.len(), *known).map_err(|why| invalid(&why))?
            }
        };
        let index = choice["index"].as_u64().ok_or_else(|| invalid("a choice has no index"))?;
        let reason = choice["finish_reason"].as_str().unwrap_or("none").to_owned();
        read.push((index, Choice { ids, logprobs, versions, reason }));
    }
    read.sort_by_key(|(index, _)| *index);
    Ok(read.into_iter().map(|(_, choice)| choice).collect())
}

/// Returns the version of each of `len` tokens from the spans of an answer.
fn spans(spans: &Value, len: usize, known: &dyn Fn(&str) -> Result<u64, String>) -> Result<Vec<u64>, String> {
    let list = spans.as_array().ok_or("a choice does not tell the versions of its weights")?;
    let mut versions = Vec::with_capacity(len);
    for span in list {
        let name = span["version"].as_str().unwrap_or_default();
        let version = known(name)?;
        let (start, end) = (span["start"].as_u64(), span["end"].as_u64());
        let (Some(start), Some(end)) = (start, end) else { return Err("a span of versions has no bounds".into()) };
        if start != versions.len() as u64 || end < start || end > len as u64 {
            return Err(format!("the span {start} to {end} of version {name} does not continue the one before it"));
        }
        versions.resize(end as usize, version);
    }
    match versions.len() == len {
        true => Ok(versions),
        false => Err(format!("the spans of versions cover {} of {len} tokens", versions.len())),
    }
}

/// Reads the log-probabilities of `ids` from the second on, of an answer to [`score`].
pub(super) fn scores(answer: &Value, ids: &[u32]) -> Result<Vec<f32>, Fault> {
    let invalid = |what: String| Fault::Invalid(format!("/inference/v1/generate: {what}"));
    let list = answer["prompt_logprobs"].as_array();
    let list = list.ok_or_else(|| invalid("the answer has no prompt_logprobs".into()))?;
    if list.len() != ids.len() {
        return Err(invalid(format!("{} log-probabilities of {} prompt tokens", list.len(), ids.len())));
    }
    let read = |(id, entry): (&u32, &Value)| {
        entry[id.to_string()]["logprob"].as_f64().filter(|logprob| logprob.is_finite()).map(|logprob| logprob as f32)
    };
    let scores: Option<Vec<f32>> = ids.iter().zip(list).skip(1).map(read).collect();
    scores.ok_or_else(|| invalid("a prompt token has no log-probability".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(version: &str, start: u64, end: u64) -> Value {
        json!({ "version": version, "start": start, "end": end })
    }

    #[test]
    fn versions_of_tokens_come_from_spans_that_cover_them() {
        let known = |name: &str| match name {
            "four" => Ok(4),
            "five" => Ok(5),
            other => Err(format!("{other} is foreign")),
        };
        let read = |list: Value| spans(&list, 5, &known);
        assert_eq!(read(json!([span("four", 0, 2), span("five", 2, 5)])).unwrap(), [4, 4, 5, 5, 5]);
        for (list, words) in [
            (json!(null), "does not tell the versions"),
            (json!([span("four", 0, 2)]), "cover 2 of 5"),
            (json!([span("four", 1, 5)]), "does not continue"),
            (json!([span("four", 0, 9)]), "does not continue"),
            (json!([span("default", 0, 5)]), "default is foreign"),
        ] {
            assert!(read(list.clone()).unwrap_err().contains(words), "{list}");
        }
    }
}

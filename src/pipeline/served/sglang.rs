//! Requests and answers of SGLang, as its documentation describes them (0.5). They were never exchanged with a real server.

use serde_json::{Value, json};

use super::http::Fault;
use super::server::{Choice, Group, SamplingPlan, Versions};

/// Returns the body of a request for completions of `prompt` by the adapter called `adapter`, if set.
pub(super) fn generate(plan: &SamplingPlan, adapter: Option<&str>, prompt: &[u32], group: Group) -> Value {
    let sampling = &plan.sampling;
    let mut body = json!({
        "input_ids": prompt,
        "sampling_params": {
            "max_new_tokens": group.max_tokens,
            "temperature": sampling.temperature,
            "n": group.n,
            "ignore_eos": true,
            "stop_token_ids": sampling.eos,
        },
        "return_logprob": true,
        "stream": false,
    });
    if let Some(stop) = &sampling.stop {
        body["sampling_params"]["stop"] = json!(stop.strings());
    }
    if let Some(adapter) = adapter {
        body["lora_path"] = json!(adapter);
    }
    body
}

/// Returns the body of a request for the log-probabilities of `ids` at temperature 1.
pub(super) fn score(adapter: Option<&str>, ids: &[u32]) -> Value {
    let mut body = json!({
        "input_ids": ids,
        "sampling_params": { "max_new_tokens": 1, "temperature": 1.0 },
        "return_logprob": true,
        "logprob_start_len": 0,
    });
    if let Some(adapter) = adapter {
        body["lora_path"] = json!(adapter);
    }
    body
}

/// Reads the completions of an answer to [`generate`]. `versions` gives the versions of their tokens; without adapters, an
/// answer tells one version for all tokens of a completion.
pub(super) fn choices(answer: &Value, versions: &Versions<'_>) -> Result<Vec<Choice>, Fault> {
    let invalid = |what: String| Fault::Invalid(format!("/generate: {what}"));
    let list = match answer {
        Value::Array(list) => list.iter().collect(),
        one => vec![one],
    };
    let read = |choice: &Value| {
        let meta = &choice["meta_info"];
        let ids: Vec<u32> = choice["output_ids"]
            .as_array()
            .and_then(|ids| ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect())
            .ok_or_else(|| invalid("a completion has no output_ids".into()))?;
        let logprobs = pairs(&meta["output_token_logprobs"], &ids).map_err(invalid)?;
        let version = match versions {
            Versions::Adapter(version) => *version,
            Versions::Told(known) => known(meta["weight_version"].as_str().unwrap_or_default()).map_err(invalid)?,
        };
        let reason = meta["finish_reason"]["type"].as_str().unwrap_or("none").to_owned();
        Ok(Choice { versions: vec![version; ids.len()], ids, logprobs, reason })
    };
    list.into_iter().map(read).collect()
}

/// Reads the log-probabilities of `ids` from the second on, of an answer to [`score`].
pub(super) fn scores(answer: &Value, ids: &[u32]) -> Result<Vec<f32>, Fault> {
    let invalid = |what: String| Fault::Invalid(format!("/generate: {what}"));
    let list = &answer["meta_info"]["input_token_logprobs"];
    let rest = list.as_array().filter(|list| list.len() == ids.len()).map(|list| Value::Array(list[1..].to_vec()));
    let rest = rest.ok_or_else(|| invalid("the prompt's tokens do not all have log-probabilities".into()))?;
    pairs(&rest, &ids[1..]).map_err(invalid)
}

/// Reads entries `[log-probability, id, text]`, whose ids must be `ids`.
fn pairs(list: &Value, ids: &[u32]) -> Result<Vec<f32>, String> {
    let list = list.as_array().ok_or("there are no log-probabilities")?;
    if list.len() != ids.len() {
        return Err(format!("{} log-probabilities of {} tokens", list.len(), ids.len()));
    }
    let read = |(entry, id): (&Value, &u32)| {
        (entry[1].as_u64() == Some(u64::from(*id))).then_some(entry[0].as_f64()?).map(|logprob| logprob as f32)
    };
    let all: Option<Vec<f32>> = list.iter().zip(ids).map(read).collect();
    all.ok_or_else(|| "log-probabilities are not those of the tokens".into())
}

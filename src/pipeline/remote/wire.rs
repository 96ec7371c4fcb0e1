//! JSON bodies of requests, and error messages in responses.

use serde_json::{Value, json};

use super::abilities::Abilities;
use super::lenient;
use crate::config::{RemoteApi, RemoteJudge};
use crate::util::seed;

/// One question to a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt.
    pub prompt: String,
    /// Text with which the answer has already begun.
    pub begun: Option<String>,
    /// Maximum number of tokens of the answer.
    pub max_tokens: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Sample among this many most likely tokens only.
    pub top_k: Option<usize>,
    /// Number of most likely tokens whose probabilities are requested; zero for none.
    pub top_logprobs: usize,
    /// Sampling seed.
    pub seed: Option<u64>,
}

impl Request {
    /// Creates a request for the distribution of the next token.
    pub fn first_token(prompt: &str, begun: Option<String>, top_logprobs: usize) -> Self {
        Self {
            prompt: prompt.to_owned(),
            begun,
            max_tokens: 1,
            temperature: 0.0,
            top_k: None,
            top_logprobs,
            seed: None,
        }
    }

    /// Creates a request for sampled answer number `vote` to a question.
    pub fn vote(prompt: &str, vote: u64) -> Self {
        /// Enough tokens for a number with punctuation around it.
        const TOKENS: usize = 6;
        Self {
            prompt: prompt.to_owned(),
            begun: None,
            max_tokens: TOKENS,
            temperature: 1.0,
            top_k: None,
            top_logprobs: 0,
            // Servers read the seed as a signed number.
            seed: Some(seed::mix(seed::text(prompt) ^ vote) >> 33),
        }
    }

    /// Returns whether a temperature other than the server's default of 1 changes the answer. The probabilities of the
    /// first token do not depend on the sampled one.
    pub fn needs_temperature(&self) -> bool {
        self.top_logprobs == 0 && self.temperature != 1.0
    }

    /// Returns the maximum number of tokens of the answer, including reasoning.
    pub fn limit(&self, judge: &RemoteJudge, abilities: &Abilities) -> usize {
        let room = if abilities.reasons { judge.thinking_tokens } else { 0 };
        (self.max_tokens + room).max(abilities.least_tokens)
    }

    /// Returns the path below the server's address and the body, for a server with `abilities`.
    pub fn body(&self, judge: &RemoteJudge, abilities: &Abilities) -> (&'static str, Value) {
        let sent = |field: &str| !abilities.without.contains(field);
        let limit = if abilities.completion_tokens { "max_completion_tokens" } else { "max_tokens" };
        let mut body = json!({ "model": judge.model, limit: self.limit(judge, abilities) });
        if sent("temperature") || self.needs_temperature() {
            body["temperature"] = json!(self.temperature);
        }
        if sent("stream") {
            body["stream"] = json!(false);
        }
        if let Some(seed) = self.seed.filter(|_| sent("seed")) {
            body["seed"] = json!(seed);
        }
        if let Some(k) = self.top_k.filter(|_| sent("top_k")) {
            body["top_k"] = json!(k);
        }
        for (name, value) in &judge.extra_body {
            body[name] = json!(value);
        }
        if judge.api == RemoteApi::Chat {
            let mut variables = json!(judge.chat_template_kwargs);
            if abilities.thinking_off {
                variables["enable_thinking"] = json!(false);
            }
            if variables.as_object().is_some_and(|variables| !variables.is_empty()) {
                body["chat_template_kwargs"] = variables;
            }
        }
        if judge.api == RemoteApi::Completions {
            body["prompt"] = json!(format!("{}{}", self.prompt, self.begun.as_deref().unwrap_or_default()));
            if self.top_logprobs > 0 {
                body["logprobs"] = json!(self.top_logprobs);
            }
            return ("completions", body);
        }
        let mut messages = Vec::new();
        if let Some(system) = &judge.system {
            messages.push(json!({ "role": "system", "content": system }));
        }
        messages.push(json!({ "role": "user", "content": self.prompt }));
        if let Some(begun) = &self.begun {
            messages.push(json!({ "role": "assistant", "content": begun }));
            // Tells vLLM and compatible servers to continue the last message rather than to answer it.
            body["add_generation_prompt"] = json!(false);
            body["continue_final_message"] = json!(true);
        }
        body["messages"] = json!(messages);
        if self.top_logprobs > 0 {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(self.top_logprobs);
        }
        ("chat/completions", body)
    }

    /// Returns an upper bound on the prompt's tokens: a token has at least one byte, and a chat template adds a few.
    pub fn most_prompt_tokens(&self) -> u64 {
        const TEMPLATE: u64 = 64;
        (self.prompt.len() + self.begun.as_ref().map_or(0, String::len)) as u64 + TEMPLATE
    }

    /// Estimates the tokens of the question: a quarter of its characters, plus the maximum answer length.
    pub fn estimate(&self) -> u64 {
        estimate(&self.prompt) + self.max_tokens as u64
    }
}

/// Estimates the number of tokens of a text: a quarter of its characters.
pub(super) fn estimate(text: &str) -> u64 {
    (text.chars().count() as u64).div_ceil(4)
}

/// Rewrites a JSON body without unnecessary escapes; `None` if it has no escapes or is not JSON.
pub(super) fn rewritten(body: &[u8]) -> Option<Vec<u8>> {
    let escaped = body.windows(2).any(|pair| pair == b"\\u" || pair == b"\\/");
    let value: Value = serde_json::from_slice(body).ok().filter(|_| escaped)?;
    serde_json::to_vec(&value).ok()
}

/// Returns the server's error message from a response body: the message of a JSON error, or the start of the body.
pub fn sentence(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    lenient::message(&value).unwrap_or_else(|| excerpt(&String::from_utf8_lossy(body)))
}

/// Returns whether the body of a 429 reports an exhausted quota, for which waiting does not help, rather than a rate
/// limit.
pub fn reports_quota(body: &[u8]) -> bool {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let error = &value["error"];
    let named = ["code", "type"].into_iter().filter_map(|key| error[key].as_str());
    named
        .into_iter()
        .any(|name| ["insufficient_quota", "billing_hard_limit_reached", "credits_exhausted"].contains(&name))
        || sentence(body).to_lowercase().contains("exceeded your current quota")
}

/// Returns the first 160 characters of a text, on one line.
pub fn excerpt(text: &str) -> String {
    let line: String = text.chars().take(160).map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_bodies_follow_the_openai_api() {
        let judge = RemoteJudge { system: Some("s".into()), model: "m".into(), ..RemoteJudge::default() };
        let request = Request::first_token("p", Some("1".into()), 20);
        let abilities = Abilities::new(&judge);
        let (path, body) = request.body(&RemoteJudge { api: RemoteApi::Chat, ..judge.clone() }, &abilities);
        assert_eq!(path, "chat/completions");
        let roles: Vec<&str> =
            body["messages"].as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant"]);
        assert_eq!((&body["top_logprobs"], &body["logprobs"]), (&json!(20), &json!(true)));
        let (path, body) = request.body(&RemoteJudge { api: RemoteApi::Completions, ..judge }, &abilities);
        assert_eq!((path, &body["prompt"], &body["logprobs"]), ("completions", &json!("p1"), &json!(20)));
    }
}

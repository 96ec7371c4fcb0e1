//! What goes over the wire: bodies of requests, and a strict reading of answers.

use serde_json::{Value, json};

use crate::config::{RemoteApi, RemoteJudge};
use crate::seed;

/// Most tokens that one exchange may have taken.
const MOST_TOKENS: u64 = 1 << 30;
/// What probabilities may add up to, rounding included.
const MOST_MASS: f64 = 1.01;

/// One question to a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt.
    pub prompt: String,
    /// Text that the answer has begun with already.
    pub begun: Option<String>,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Draw among this many tokens only.
    pub top_k: Option<usize>,
    /// How many of the likeliest tokens are wanted with their probabilities; zero for none.
    pub top_logprobs: usize,
    /// Seed of the draws.
    pub seed: Option<u64>,
}

impl Request {
    /// Asks for the distribution of the next token.
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

    /// Asks for sampled answer number `vote` to a question.
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
            // Servers take the seed as a signed number.
            seed: Some(seed::mix(seed::text(prompt) ^ vote) >> 33),
        }
    }

    /// Path below the server's address, and the body.
    pub fn body(&self, judge: &RemoteJudge) -> (&'static str, Value) {
        let mut body = json!({
            "model": judge.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        });
        if let Some(seed) = self.seed {
            body["seed"] = json!(seed);
        }
        if let Some(k) = self.top_k {
            body["top_k"] = json!(k);
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
            // As vLLM and others are told to go on with a message rather than to answer it.
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

    /// Most tokens that the prompt can have: a token is at least a byte, and a chat template adds a few.
    pub fn most_prompt_tokens(&self) -> u64 {
        const TEMPLATE: u64 = 64;
        (self.prompt.len() + self.begun.as_ref().map_or(0, String::len)) as u64 + TEMPLATE
    }

    /// Tokens that the question will cost, roughly: four characters each, and the answer in full.
    pub fn estimate(&self) -> u64 {
        estimate(&self.prompt) + self.max_tokens as u64
    }
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What was written.
    pub text: String,
    /// The likeliest first tokens with their probabilities, likeliest first; absent where the server sent none.
    pub first_token: Option<Vec<(String, f64)>>,
    /// Tokens read.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// The model that answered, by the name that the server reports.
    pub model: Option<String>,
}

/// The reason why a body of status 200 is not an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unread {
    /// It cannot be read, or reports that the server failed.
    Malformed(String),
    /// The server withheld the answer to this question.
    Filtered(String),
}

impl<T: Into<String>> From<T> for Unread {
    fn from(why: T) -> Self {
        Self::Malformed(why.into())
    }
}

/// Reads a body. What is missing, of another type or no number is an error in words, never a guess; so is an answer that the
/// server itself calls failed or filtered, whatever else it holds.
///
/// # Errors
/// Says what is wrong with the body.
pub fn read(body: &[u8], request: &Request) -> Result<Answer, Unread> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err("the body is empty".into());
    }
    let value: Value = serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))?;
    if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
        return Err(format!("an error in a body of status 200: {}", excerpt(&error.to_string())).into());
    }
    let choice = value["choices"].get(0).ok_or("there is no choices[0]")?;
    let failed = choice["finish_reason"] == "error" || choice.get("error").is_some_and(|error| !error.is_null());
    if failed {
        let why = excerpt(&choice["error"].to_string());
        return Err(format!("the server calls its answer failed (finish_reason \"error\", status 200): {why}").into());
    }
    if choice["finish_reason"] == "content_filter" {
        return Err(Unread::Filtered("finish_reason \"content_filter\"".into()));
    }
    let text = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
    // A chat answer that is nothing but its end may come with a null text.
    let text = match text {
        Some(text) => text.to_owned(),
        None if choice["message"].is_object() && choice["message"]["content"].is_null() => String::new(),
        None => return Err("choices[0] has neither message.content nor text".into()),
    };
    let first_token = if request.top_logprobs > 0 { listed(&choice["logprobs"])? } else { None };
    // A count that no exchange can come to is as good as none.
    let usage = |name: &str| value["usage"][name].as_u64().filter(|count| *count <= MOST_TOKENS);
    Ok(Answer {
        prompt_tokens: usage("prompt_tokens").unwrap_or_else(|| estimate(&request.prompt)),
        completion_tokens: usage("completion_tokens").unwrap_or_else(|| estimate(&text)),
        model: value["model"].as_str().filter(|name| !name.is_empty()).map(excerpt),
        text,
        first_token,
    })
}

/// The first token's alternatives: a list of objects (`content[0].top_logprobs`), or a map (`top_logprobs[0]`).
fn listed(logprobs: &Value) -> Result<Option<Vec<(String, f64)>>, String> {
    let pairs: Vec<(String, &Value)> = if let Some(list) = logprobs["content"][0]["top_logprobs"].as_array() {
        let pair = |one: &'_ Value| one["token"].as_str().map(str::to_owned);
        list.iter()
            .map(|one| Ok((pair(one).ok_or("a token of top_logprobs has no text")?, &one["logprob"])))
            .collect::<Result<_, String>>()?
    } else if let Some(map) = logprobs["top_logprobs"][0].as_object() {
        map.iter().map(|(token, logprob)| (token.clone(), logprob)).collect()
    } else {
        return Ok(None);
    };
    if pairs.is_empty() {
        return Ok(None);
    }
    let mut read = pairs
        .into_iter()
        .map(|(token, logprob)| {
            let p = logprob.as_f64().map(f64::exp).filter(|p| (0.0..=1.0 + 1e-6).contains(p));
            let words = || excerpt(&format!("the log-probability of {:?} is {logprob}", excerpt(&token)));
            p.map(|p| (token.clone(), p)).ok_or_else(words)
        })
        .collect::<Result<Vec<_>, String>>()?;
    let mass: f64 = read.iter().map(|(_, p)| p).sum();
    if mass > MOST_MASS {
        return Err(format!("the probabilities of the first token add up to {mass:.3}"));
    }
    read.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(Some(read))
}

/// Four characters a token.
fn estimate(text: &str) -> u64 {
    (text.chars().count() as u64).div_ceil(4)
}

/// A body of JSON written anew, without needless escapes; `None` where it has none of them, or is no JSON.
pub(super) fn rewritten(body: &[u8]) -> Option<Vec<u8>> {
    let escaped = body.windows(2).any(|pair| pair == b"\\u" || pair == b"\\/");
    let value: Value = serde_json::from_slice(body).ok().filter(|_| escaped)?;
    serde_json::to_vec(&value).ok()
}

/// The server's own sentence in the body of a refusal: the message of an error in JSON, or the beginning of the body.
pub fn sentence(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let error = &value["error"];
    let told = [&error["message"], error, &value["message"], &value["detail"]].into_iter().find_map(Value::as_str);
    excerpt(told.unwrap_or(&String::from_utf8_lossy(body)))
}

/// Whether the body of a 429 reports an exhausted quota, which waiting does not bring back, rather than a rate limit.
pub fn reports_quota(body: &[u8]) -> bool {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let error = &value["error"];
    let named = ["code", "type"].into_iter().filter_map(|key| error[key].as_str());
    named
        .into_iter()
        .any(|name| ["insufficient_quota", "billing_hard_limit_reached", "credits_exhausted"].contains(&name))
        || sentence(body).to_lowercase().contains("exceeded your current quota")
}

/// The beginning of a text, on one line.
pub fn excerpt(text: &str) -> String {
    let line: String = text.chars().take(160).map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(body: &str) -> Result<Answer, String> {
        read(body.as_bytes(), &Request::first_token("12345678", None, 5)).map_err(|unread| match unread {
            Unread::Malformed(why) => why,
            Unread::Filtered(why) => format!("filtered: {why}"),
        })
    }

    #[test]
    fn both_forms_of_log_probabilities_are_read() {
        let half = 0.5f64.ln();
        let chat = json!({ "choices": [{ "message": { "content": "1" }, "logprobs": { "content": [{ "token": "1",
            "logprob": half, "top_logprobs": [{ "token": "2", "logprob": -2.0 }, { "token": "1", "logprob": half }] }] } }],
            "usage": { "prompt_tokens": 9, "completion_tokens": 1 } });
        let answer = ask(&chat.to_string()).unwrap();
        let tokens = answer.first_token.unwrap();
        assert_eq!((tokens[0].0.as_str(), tokens[1].0.as_str()), ("1", "2"));
        assert!((tokens[0].1 - 0.5).abs() < 1e-12);
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (9, 1));
        let plain =
            json!({ "choices": [{ "text": " 1", "logprobs": { "top_logprobs": [{ " 1": half, " 2": -3.0 }] } }] });
        let answer = ask(&plain.to_string()).unwrap();
        assert_eq!(answer.first_token.unwrap()[0].0, " 1");
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (2, 1), "estimated where the server is silent");
        assert_eq!(ask("{\"choices\": [{\"text\": \"1\", \"logprobs\": null}]}").unwrap().first_token, None);
    }

    #[test]
    fn a_count_that_cannot_be_is_estimated() {
        let body = format!(
            r#"{{"choices": [{{"text": "1"}}], "usage": {{"prompt_tokens": {}, "completion_tokens": -1}}}}"#,
            u64::MAX
        );
        let answer = ask(&body).unwrap();
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (2, 1));
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for (body, words) in [
            ("", "empty"),
            ("  \n", "empty"),
            ("<html>", "not JSON"),
            ("{\"choices\": []}", "choices[0]"),
            ("{\"choices\": [{}]}", "neither"),
            ("{\"error\": {\"message\": \"overloaded\"}}", "overloaded"),
            (
                "{\"choices\": [{\"text\": \"1\", \"finish_reason\": \"error\", \"error\": {\"code\": 502}}]}",
                "calls its answer failed (finish_reason \"error\", status 200): {\"code\":502}",
            ),
            ("{\"choices\": [{\"text\": \"\", \"error\": {\"code\": 502}}]}", "calls its answer failed"),
            ("{\"choices\": [{\"text\": \"1\", \"finish_reason\": \"content_filter\"}]}", "filtered: "),
            (
                "{\"choices\": [{\"text\": \"1\", \"logprobs\": {\"top_logprobs\": [{\"1\": null}]}}]}",
                "log-probability of \"1\" is null",
            ),
            (
                "{\"choices\": [{\"text\": \"1\", \"logprobs\": {\"top_logprobs\": [{\"1\": 0.5}]}}]}",
                "log-probability of \"1\" is 0.5",
            ),
            // The same token over and over would make a probability above one of it, and a negative one of its rival.
            (
                "{\"choices\": [{\"text\": \"1\", \"logprobs\": {\"content\": [{\"top_logprobs\": [{\"token\": \"1\", \"logprob\": 0}, {\"token\": \"1\", \"logprob\": 0}]}]}}]}",
                "add up to 2.000",
            ),
        ] {
            let error = ask(body).unwrap_err();
            assert!(error.contains(words), "{body}: {error}");
        }
    }

    #[test]
    fn requests_are_what_servers_expect() {
        let judge = RemoteJudge { system: Some("s".into()), model: "m".into(), ..RemoteJudge::default() };
        let request = Request::first_token("p", Some("1".into()), 20);
        let (path, body) = request.body(&RemoteJudge { api: RemoteApi::Chat, ..judge.clone() });
        assert_eq!(path, "chat/completions");
        let roles: Vec<&str> =
            body["messages"].as_array().unwrap().iter().map(|one| one["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant"]);
        assert_eq!((&body["top_logprobs"], &body["logprobs"]), (&json!(20), &json!(true)));
        let (path, body) = request.body(&RemoteJudge { api: RemoteApi::Completions, ..judge });
        assert_eq!((path, &body["prompt"], &body["logprobs"]), ("completions", &json!("p1"), &json!(20)));
    }
}

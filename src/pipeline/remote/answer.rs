//! Parsing of servers' answers in all common formats.

use serde_json::Value;

use super::tokens;
use super::wire::{Request, estimate, excerpt};
use super::{lenient, wire};

/// Maximum plausible number of tokens of one exchange.
const MAX_TOKENS: u64 = 1 << 30;
/// Maximum sum of probabilities, including rounding.
const MAX_MASS: f64 = 1.01;
/// Maximum log-probability that counts as a rounding error above zero.
const ROUNDING: f64 = 0.01;

/// Parsed answer of a judge server.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Text of the answer, without the reasoning before it.
    pub text: String,
    /// The most likely first tokens with their probabilities in decreasing order; `None` if the server sent none. An
    /// unreadable probability is NaN.
    pub first_token: Option<Vec<(String, f64)>>,
    /// Number of tokens of the prompt, estimated if the server reports none.
    pub prompt_tokens: u64,
    /// Number of tokens of the answer, estimated if the server reports none.
    pub completion_tokens: u64,
    /// Number of tokens of the prompt as reported by the server.
    pub counted_prompt_tokens: Option<u64>,
    /// Model name that the server reports.
    pub model: Option<String>,
    /// True if the model reasons before it answers, so that the first token is not that of an answer.
    pub reasons: bool,
    /// True if the limit on tokens ended the answer.
    pub cut: bool,
}

/// Reason why a body of status 200 is not an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadError {
    /// The body cannot be parsed.
    Malformed(String),
    /// The server withheld the answer to this question.
    Filtered(String),
    /// The body reports a failure with this status.
    Failed(u16, String),
}

impl<T: Into<String>> From<T> for ReadError {
    fn from(why: T) -> Self {
        Self::Malformed(why.into())
    }
}

/// Parses a body. A missing part, a part of another type or a non-finite number is an error, never replaced by a guess.
/// An answer that the server itself marks as failed or filtered is an error, too.
///
/// # Errors
/// If the body is not a valid answer; the error describes the fault.
pub fn read(body: &[u8], request: &Request) -> Result<Answer, ReadError> {
    let value = lenient::parse(body)?;
    if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
        return Err(failure(error, "an error in a body of status 200"));
    }
    let choice = value["choices"].get(0).ok_or_else(|| match lenient::message(&value) {
        Some(message_of_error) => format!("choices[0] is missing: {message_of_error}"),
        None => "choices[0] is missing".into(),
    })?;
    if choice["finish_reason"] == "error" || choice.get("error").is_some_and(|error| !error.is_null()) {
        let what = "the server marks its answer as failed (finish_reason \"error\", status 200)";
        return Err(failure(&choice["error"], what));
    }
    if choice["finish_reason"] == "content_filter" {
        return Err(ReadError::Filtered("finish_reason \"content_filter\"".into()));
    }
    let message = &choice["message"];
    if let Some(refusal) = message["refusal"].as_str().filter(|text| !text.is_empty()) {
        return Err(ReadError::Filtered(format!("the model refuses: {}", excerpt(refusal))));
    }
    let written = match (content(&message["content"]), choice["text"].as_str()) {
        (Some(text), _) => text,
        (None, Some(text)) => text.to_owned(),
        // A chat answer without text may have null content or none.
        (None, None) if message.is_object() && message["content"].is_null() => String::new(),
        (None, None) => return Err("choices[0] has neither message.content nor text".into()),
    };
    let (thought, text) = split_reasoning(&written);
    let apart =
        ["reasoning_content", "reasoning"].iter().any(|name| message[*name].as_str().is_some_and(|t| !t.is_empty()));
    let first_token = if request.top_logprobs > 0 { listed(&choice["logprobs"])? } else { None };
    let opens = first_token.as_ref().and_then(|tokens| tokens.first()).is_some_and(|(token, _)| opens_reasoning(token));
    // An implausible count or zero is treated as missing.
    let usage = |name: &str| value["usage"][name].as_u64().filter(|count| (1..=MAX_TOKENS).contains(count));
    let counted = usage("prompt_tokens");
    Ok(Answer {
        prompt_tokens: counted.unwrap_or_else(|| estimate(&request.prompt)),
        completion_tokens: usage("completion_tokens").unwrap_or_else(|| estimate(&written)),
        counted_prompt_tokens: counted,
        model: value["model"].as_str().filter(|name| !name.is_empty()).map(excerpt),
        text,
        first_token,
        reasons: thought || apart || opens,
        cut: choice["finish_reason"] == "length",
    })
}

/// Returns the failure that a body of status 200 reports, classified by its code.
fn failure(error: &Value, what: &str) -> ReadError {
    let message_of_error = lenient::message(error).unwrap_or_else(|| excerpt(&error.to_string()));
    let words = format!("{what}: {message_of_error}");
    let code = error["code"].as_u64().or_else(|| error["code"].as_str().and_then(|code| code.parse().ok()));
    let quota = wire::reports_quota(&serde_json::json!({ "error": error }).to_string().into_bytes());
    match code.and_then(|code| u16::try_from(code).ok()).filter(|code| (400..600).contains(code)) {
        _ if quota => ReadError::Failed(402, words),
        Some(code) => ReadError::Failed(code, words),
        None => ReadError::Malformed(words),
    }
}

/// Returns the text of a message's content: a string, a list of parts, or an object with a string.
fn content(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(self::content).collect::<Option<Vec<_>>>().map(|parts| parts.concat()),
        Value::Object(object) => match object.get("type").and_then(Value::as_str) {
            // A separate reasoning part is not the answer.
            Some("thinking" | "reasoning") => Some(String::new()),
            _ => ["text", "content", "value"].iter().find_map(|name| self::content(object.get(*name)?)),
        },
        _ => None,
    }
}

/// Returns whether a token begins a reasoning block.
fn opens_reasoning(token: &str) -> bool {
    ["<think", "<thought", "<|channel|>", "[THINK]", "<reasoning"]
        .iter()
        .any(|open| token.trim_start().starts_with(open))
}

/// Returns whether a text begins with reasoning, and the answer after it, which is empty if the reasoning is
/// unfinished.
fn split_reasoning(text: &str) -> (bool, String) {
    const ENDS: [&str; 5] = ["</think>", "</thought>", "[/THINK]", "</reasoning>", "<|channel|>final<|message|>"];
    if let Some((at, end)) = ENDS.iter().filter_map(|end| Some((text.rfind(end)?, end))).max() {
        // An empty block is written by models whose reasoning is turned off.
        let thought = text[..at].trim_start_matches(|c: char| c != '>' && c != ']').chars().any(char::is_alphanumeric);
        let lacks_opening = !opens_reasoning(text) && text[..at].chars().any(char::is_alphanumeric);
        return (thought || lacks_opening, text[at + end.len()..].trim_start().to_owned());
    }
    if opens_reasoning(text) { (true, String::new()) } else { (false, text.to_owned()) }
}

/// Returns the alternatives of the first token, from a list of objects (`content[0].top_logprobs`) or a map
/// (`top_logprobs[0]`).
fn listed(logprobs: &Value) -> Result<Option<Vec<(String, f64)>>, String> {
    let pairs: Vec<(String, &Value)> = if let Some(list) = logprobs["content"][0]["top_logprobs"].as_array() {
        let pair = |entry: &'_ Value| tokens::text(&entry["token"], &entry["bytes"]);
        list.iter()
            .map(|entry| Ok((pair(entry).ok_or("a token of top_logprobs has no text")?, &entry["logprob"])))
            .collect::<Result<_, String>>()?
    } else if let Some(map) = logprobs["top_logprobs"][0].as_object() {
        map.iter().map(|(token, logprob)| (tokens::plain(token), logprob)).collect()
    } else {
        return Ok(None);
    };
    if pairs.is_empty() {
        return Ok(None);
    }
    let mut read: Vec<(String, f64)> =
        pairs.into_iter().map(|(token, logprob)| (token, probability(logprob).unwrap_or(f64::NAN))).collect();
    let mass: f64 = read.iter().map(|(_, p)| p).filter(|p| !p.is_nan()).sum();
    if mass == 0.0 {
        return Err("no log-probability of the first token can be read".into());
    }
    if mass > MAX_MASS {
        return Err(format!("the probabilities of the first token add up to {mass:.3}"));
    }
    read.sort_by(|a, b| b.1.total_cmp(&a.1));
    // In total order NaN is above all numbers; unreadable entries are moved to the end.
    let unreadable = read.iter().filter(|(_, p)| p.is_nan()).count();
    read.rotate_left(unreadable);
    Ok(Some(read))
}

/// Converts a log-probability to a probability. Servers whose JSON has no infinity write null, a string or a huge
/// number for the logarithm of zero.
fn probability(logprob: &Value) -> Option<f64> {
    let number = match logprob {
        Value::Null => f64::NEG_INFINITY,
        Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
            "-inf" | "-infinity" => f64::NEG_INFINITY,
            text => text.parse().ok()?,
        },
        other => other.as_f64()?,
    };
    // A value slightly above zero is a rounding error.
    (number <= ROUNDING).then(|| number.min(0.0).exp())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ask(body: &str) -> Result<Answer, String> {
        read(body.as_bytes(), &Request::first_token("12345678", None, 5)).map_err(|error| match error {
            ReadError::Malformed(why) => why,
            ReadError::Filtered(why) => format!("filtered: {why}"),
            ReadError::Failed(status, why) => format!("{status}: {why}"),
        })
    }

    /// Returns the parsed alternatives of a chat answer's first token with these log-probabilities, given as JSON.
    fn alternatives(pairs: &[(&str, &str)]) -> Result<Vec<(String, f64)>, String> {
        let list: Vec<String> = pairs
            .iter()
            .map(|(token, logprob)| format!("{{\"token\": {}, \"logprob\": {logprob}}}", json!(token)))
            .collect();
        let body = format!(
            "{{\"choices\": [{{\"message\": {{\"content\": \"1\"}}, \"logprobs\": {{\"content\": [{{\"top_logprobs\": [{}]}}]}}}}]}}",
            list.join(", ")
        );
        ask(&body).map(|answer| answer.first_token.unwrap())
    }

    #[test]
    fn both_formats_of_log_probabilities_are_read() {
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
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (2, 1), "estimated where the server reports none");
        assert_eq!(ask("{\"choices\": [{\"text\": \"1\", \"logprobs\": null}]}").unwrap().first_token, None);
    }

    #[test]
    fn an_implausible_token_count_is_estimated() {
        for (prompt, completion) in [(u64::MAX.to_string(), "-1"), ("0".into(), "0"), ("null".into(), "\"1\"")] {
            let body = format!(
                r#"{{"choices": [{{"text": "1"}}], "usage": {{"prompt_tokens": {prompt}, "completion_tokens": {completion}}}}}"#
            );
            let answer = ask(&body).unwrap();
            assert_eq!((answer.prompt_tokens, answer.completion_tokens), (2, 1));
            assert_eq!(answer.counted_prompt_tokens, None);
        }
    }

    #[test]
    fn log_probabilities_are_read_in_every_spelling() {
        // Spellings of the logarithm of zero: JSON has no infinity.
        for zero in ["null", "-Infinity", "\"-inf\"", "\"-Infinity\"", "-1e999", "-9999.0", "-1e308"] {
            let read = alternatives(&[("1", "0.0"), ("2", zero)]).unwrap();
            assert_eq!(read, [("1".to_owned(), 1.0), ("2".to_owned(), 0.0)], "{zero}");
        }
        for rounding in ["1e-9", "0.00001", "-0.0", "\"0.0\"", "0"] {
            assert_eq!(alternatives(&[("1", rounding)]).unwrap(), [("1".to_owned(), 1.0)], "{rounding}");
        }
        assert!((alternatives(&[("1", "\"-0.5\"")]).unwrap()[0].1 - (-0.5f64).exp()).abs() < 1e-12);
        // An unreadable one counts as unknown and is last.
        for unknown in ["NaN", "0.5", "\"x\"", "{}", "Infinity", "true"] {
            let read = alternatives(&[("x", unknown), ("1", "-0.1"), ("2", "-2.4")]).unwrap();
            assert_eq!((read[0].0.as_str(), read[2].0.as_str(), read[2].1.is_nan()), ("1", "x", true), "{unknown}");
        }
        assert!(alternatives(&[("1", "0"), ("1", "0")]).unwrap_err().contains("add up to 2.000"));
    }

    #[test]
    fn the_text_of_an_answer_is_read_in_every_format() {
        for (message, text, reasons) in [
            (json!({ "content": "1" }), "1", false),
            (json!({ "content": [{ "type": "text", "text": "1" }, { "type": "text", "text": "0" }] }), "10", false),
            (
                json!({ "content": [{ "type": "thinking", "thinking": "hm" }, { "type": "text", "text": "2" }] }),
                "2",
                false,
            ),
            (json!({ "content": { "type": "text", "text": "1" } }), "1", false),
            (json!({ "content": { "text": { "value": "1" } } }), "1", false),
            (json!({ "content": ["1"] }), "1", false),
            (json!({ "content": null }), "", false),
            (json!({ "content": null, "reasoning_content": "First, I" }), "", true),
            (json!({ "content": "1", "reasoning": "First, I" }), "1", true),
            (json!({ "content": "<think>\n\n</think>\n\n1" }), "1", false),
            (json!({ "content": "<think>\nOkay, 2\n</think>\n\n1" }), "1", true),
            (json!({ "content": "Okay, 2\n</think>\n\n1" }), "1", true),
            (json!({ "content": "<think>\nOkay, so" }), "", true),
            (json!({ "content": "[THINK]hm[/THINK]1" }), "1", true),
        ] {
            let answer = ask(&json!({ "choices": [{ "message": message }] }).to_string()).unwrap();
            assert_eq!((answer.text.as_str(), answer.reasons), (text, reasons), "{message}");
        }
    }

    #[test]
    fn a_body_that_is_not_an_answer_is_described() {
        for (body, words) in [
            ("", "empty"),
            ("  \n", "empty"),
            ("<html>", "is an HTML page, not JSON"),
            ("{\"choices\": []}", "choices[0]"),
            ("{\"choices\": null}", "choices[0]"),
            (
                "{\"object\": \"error\", \"message\": \"no such model\", \"choices\": []}",
                "choices[0] is missing: no such model",
            ),
            ("{\"choices\": [{}]}", "neither"),
            ("{\"choices\": [{\"message\": {\"content\": 3}}]}", "neither"),
            ("{\"error\": {\"message\": \"overloaded\"}}", "status 200: overloaded"),
            ("{\"error\": \"busy\"}", "status 200: busy"),
            (
                "{\"error\": {\"message\": \"slow down\", \"code\": 429}}",
                "429: an error in a body of status 200: slow down",
            ),
            ("{\"error\": {\"message\": \"down\", \"code\": \"503\"}}", "503: "),
            ("{\"error\": {\"message\": \"none left\", \"code\": \"insufficient_quota\"}}", "402: "),
            (
                "{\"choices\": [{\"text\": \"1\", \"finish_reason\": \"error\", \"error\": {\"code\": 502}}]}",
                "502: the server marks its answer as failed (finish_reason \"error\", status 200): {\"code\":502}",
            ),
            ("{\"choices\": [{\"text\": \"\", \"finish_reason\": \"error\"}]}", "marks its answer as failed"),
            ("{\"choices\": [{\"text\": \"1\", \"finish_reason\": \"content_filter\"}]}", "filtered: "),
            (
                "{\"choices\": [{\"message\": {\"content\": null, \"refusal\": \"I cannot\"}}]}",
                "filtered: the model refuses: I cannot",
            ),
        ] {
            let error = ask(body).unwrap_err();
            assert!(error.contains(words), "{body}: {error}");
        }
    }
}

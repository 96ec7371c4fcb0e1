//! Request fields and values that a server accepts, as found so far. Only an explicit refusal of a field changes them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::retry::is_too_long;
use super::wire::Request;
use super::{lenient, wire};
use crate::config::{Evidence, RemoteJudge};

/// Numbers of alternatives to try if a server refuses the requested number without naming its maximum.
const FEWER_LOGPROBS: [usize; 3] = [20, 5, 2];
/// Minimum number of alternatives that can distinguish two answers.
const MIN_LOGPROBS: usize = 2;
/// Maximum number that is taken as a lower limit on tokens.
const MAX_MINIMUM: u64 = 4096;

/// Request fields that a server may refuse. A name that contains another one comes first.
const FIELDS: [&str; 11] = [
    "max_completion_tokens",
    "max_tokens",
    "top_logprobs",
    "logprobs",
    "temperature",
    "seed",
    "top_k",
    "stream",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
];

/// Phrases with which servers refuse a field as such, and not its value.
const UNSUPPORTED: [&str; 20] = [
    "unsupported",
    "not support",
    "unrecognized",
    "unrecognised",
    "unknown",
    "extra inputs",
    "extra fields",
    "extra_forbidden",
    "not permitted",
    "unexpected",
    "not allowed",
    "not implemented",
    "not available",
    "not enabled",
    "invalid field",
    "invalid parameter",
    "deprecated",
    "only the default",
    "strictly positive",
    "does not exist",
];

/// A server's refusal of a request field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldRefusal {
    field: &'static str,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The server does not accept the field.
    Unsupported,
    /// Maximum value of the field.
    Most(u64),
    /// Minimum value of the field.
    Least(u64),
    /// The value is refused for an unknown reason.
    Value,
}

impl FieldRefusal {
    /// Finds the field of the request `sent` that the body of an error response refuses.
    pub fn find(status: u16, body: &[u8], sent: &Value) -> Option<Self> {
        if ![400, 403, 404, 405, 415, 422, 500, 501].contains(&status) {
            return None;
        }
        let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let text = value_text(&value).unwrap_or_else(|| String::from_utf8_lossy(body).into_owned()).to_lowercase();
        // Such a message also mentions the limit on the answer's tokens, which is not the cause.
        if is_too_long(&text) {
            return None;
        }
        let sent_fields: Vec<&'static str> = FIELDS.into_iter().filter(|field| sent.get(*field).is_some()).collect();
        let param = value["error"]["param"].as_str().or_else(|| value["param"].as_str());
        let named =
            |name: &str| sent_fields.iter().copied().find(|field| name.split(['.', '[']).any(|part| part == *field));
        let located = value["detail"]
            .as_array()
            .into_iter()
            .flatten()
            .find_map(|mistake| mistake["loc"].as_array()?.iter().rev().filter_map(Value::as_str).find_map(named));
        let exact = param.and_then(named).or(located);
        let mention = |field: &&'static str| mentioned(&text, field);
        let field = exact.or_else(|| {
            let mentions = sent_fields.iter().filter_map(|field| Some((mention(field)?, *field)));
            mentions.min_by_key(|(at, field)| (*at, usize::MAX - field.len())).map(|(_, field)| field)
        })?;
        let unsupported = UNSUPPORTED.iter().any(|words| text.contains(words));
        let given = sent[field].as_u64().or_else(|| sent["top_logprobs"].as_u64());
        let kind = match field {
            "top_logprobs" | "logprobs" => {
                let most = given.and_then(|given| numbers(&text).into_iter().filter(|n| *n < given).max());
                match most {
                    _ if [403, 501].contains(&status) => Kind::Unsupported,
                    Some(0) => Kind::Unsupported,
                    Some(most) => Kind::Most(most),
                    None if unsupported => Kind::Unsupported,
                    None => Kind::Value,
                }
            }
            "max_tokens" | "max_completion_tokens" => {
                let least = given.and_then(|given| numbers(&text).into_iter().filter(|n| *n > given).min());
                let lower = ["at least", "minimum", ">=", "greater than or equal", "greater than"];
                match least.filter(|least| *least <= MAX_MINIMUM) {
                    Some(least) if lower.iter().any(|words| text.contains(words)) => Kind::Least(least),
                    _ if unsupported || text.contains("max_completion_tokens") => Kind::Unsupported,
                    _ => return None,
                }
            }
            // Without such a phrase, a mention may be about something else.
            _ if unsupported || exact.is_some() => Kind::Unsupported,
            _ => return None,
        };
        // With a status of another meaning, only a clear phrase is a refusal of a field.
        if [404, 405, 415, 500].contains(&status) && (kind == Kind::Value || !(unsupported || exact.is_some())) {
            return None;
        }
        Some(Self { field, kind })
    }
}

/// Returns all messages of an error response.
fn value_text(value: &Value) -> Option<String> {
    let message = [&value["error"]["message"], &value["error"], &value["message"], &value["detail"]];
    let text = message.into_iter().find_map(Value::as_str).map(str::to_owned);
    text.or_else(|| value["detail"].is_array().then(|| value["detail"].to_string())).or_else(|| lenient::message(value))
}

/// Returns the position of a field's name as a separate word in a text.
fn mentioned(text: &str, field: &str) -> Option<usize> {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let whole = |at: usize, len: usize| {
        !text[..at].chars().next_back().is_some_and(part) && !text[at + len..].chars().next().is_some_and(part)
    };
    let spellings: &[&str] = match field {
        "logprobs" => &["logprobs", "logprob", "log probabilities", "log probs", "log-probabilities"],
        _ => &[field],
    };
    spellings
        .iter()
        .filter_map(|word| text.match_indices(word).map(|(at, _)| at).find(|at| whole(*at, word.len())))
        .min()
}

/// Returns the integers of a text that are separate words, not parts of names, versions or fractions.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| c.is_whitespace() || "()[]{},;:'\"`=<>".contains(c))
        .filter_map(|word| word.trim_end_matches(['.', '!', '?']).parse().ok())
        .collect()
}

/// Form of requests that a server accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// Maximum number of listed alternatives of a token; zero if the server sends no log-probabilities.
    pub top_logprobs: usize,
    /// True if the limit on an answer's tokens is `max_completion_tokens` instead of `max_tokens`.
    pub completion_tokens: bool,
    /// Minimum accepted value of the limit on an answer's tokens.
    pub least_tokens: usize,
    /// Fields that the server refuses.
    pub without: BTreeSet<&'static str>,
    /// True if requests turn the model's reasoning off (`chat_template_kwargs.enable_thinking = false`).
    pub thinking_off: bool,
    /// True if the model reasons before each answer, which then needs tokens for it.
    pub reasons: bool,
}

impl Abilities {
    /// Returns the abilities of a server that has refused nothing yet.
    pub fn new(judge: &RemoteJudge) -> Self {
        let top_logprobs = if judge.evidence == Evidence::Votes { 0 } else { judge.top_logprobs };
        Self {
            top_logprobs,
            completion_tokens: false,
            least_tokens: 1,
            without: BTreeSet::new(),
            thinking_off: false,
            reasons: false,
        }
    }

    /// Returns whether the server continues an answer that has begun.
    pub fn continues(&self) -> bool {
        !self.without.contains("continue_final_message") && !self.without.contains("add_generation_prompt")
    }

    /// Changes the form of requests so that the server does not refuse `request` again. Returns a description of the
    /// change (empty if it was made before), or `None` if no change keeps the meaning of the request.
    pub fn adapt(&mut self, refusal: &FieldRefusal, request: &Request, judge: &RemoteJudge) -> Option<String> {
        match (refusal.field, refusal.kind) {
            ("top_logprobs" | "logprobs", kind) => {
                let fewer =
                    FEWER_LOGPROBS.into_iter().find(|fewer| *fewer < request.top_logprobs.min(self.top_logprobs));
                let most = match kind {
                    Kind::Most(most) => most.min(self.top_logprobs as u64) as usize,
                    Kind::Value => fewer.unwrap_or(0),
                    Kind::Unsupported | Kind::Least(_) => 0,
                };
                let most = if most < MIN_LOGPROBS { 0 } else { most };
                if most >= self.top_logprobs || (most == 0 && judge.evidence == Evidence::Logprobs) {
                    // Another request has found this out before, or no change helps.
                    return (request.top_logprobs > self.top_logprobs).then(String::new);
                }
                self.top_logprobs = most;
                Some(match most {
                    0 => format!(
                        "it offers no log-probabilities, so that {} answers to each question are sampled and counted as votes",
                        judge.votes
                    ),
                    most => format!("it lists at most {most} alternatives of a token"),
                })
            }
            (field @ ("max_tokens" | "max_completion_tokens"), Kind::Least(least)) => {
                let least = least as usize;
                (least > self.least_tokens).then(|| {
                    self.least_tokens = least;
                    format!("{field} is at least {least}")
                })
            }
            ("max_tokens", _) if !self.completion_tokens && !self.without.contains("max_completion_tokens") => {
                self.completion_tokens = true;
                Some("max_completion_tokens is sent instead of max_tokens".into())
            }
            ("max_completion_tokens", _) if self.completion_tokens => {
                self.completion_tokens = false;
                self.without.insert("max_completion_tokens");
                Some("max_tokens is sent instead of max_completion_tokens".into())
            }
            ("temperature", _) if !request.needs_temperature() => self.drop(refusal.field),
            ("seed" | "stream" | "top_k", _) => self.drop(refusal.field),
            ("add_generation_prompt" | "continue_final_message", _) => self.drop("continue_final_message"),
            ("chat_template_kwargs", _) if self.thinking_off => {
                self.thinking_off = false;
                self.reasons = true;
                Some("chat_template_kwargs is not sent, so that the model reasons before it answers".into())
            }
            _ => None,
        }
    }

    fn drop(&mut self, field: &'static str) -> Option<String> {
        // Another request may have found this out before.
        Some(if self.without.insert(field) { format!("{field} is not sent") } else { String::new() })
    }

    /// Returns a description of how answers become probabilities, for the log and for comparison when a run is resumed.
    pub fn words(&self) -> &'static str {
        match (self.top_logprobs, self.reasons) {
            (_, true) => "votes after reasoning",
            (0, _) => "votes",
            _ => "log-probabilities",
        }
    }
}

/// Returns the field of `labeler.remote.extra_body` that an error message names, which a person has to change.
pub fn names_extra(body: &[u8], extra: &toml::Table) -> Option<String> {
    let sentence = wire::sentence(body).to_lowercase();
    extra.keys().find(|key| mentioned(&sentence, &key.to_lowercase()).is_some()).cloned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn find(status: u16, body: &Value, sent: &Value) -> Option<(&'static str, Kind)> {
        FieldRefusal::find(status, body.to_string().as_bytes(), sent).map(|refusal| (refusal.field, refusal.kind))
    }

    #[test]
    fn the_refused_field_is_found_in_a_servers_message() {
        let chat = json!({ "max_tokens": 1, "temperature": 0, "stream": false, "logprobs": true, "top_logprobs": 20 });
        let plain = json!({ "max_tokens": 1, "temperature": 0, "logprobs": 20, "prompt": "p" });
        let vote = json!({ "max_tokens": 6, "temperature": 1, "seed": 3, "top_k": 40 });
        let error = |message: &str| json!({ "error": { "message": message } });
        let named = |message: &str, param: &str| json!({ "error": { "message": message, "param": param } });
        for (status, body, sent, expected) in [
            (
                400,
                named("Invalid value for 'top_logprobs': must be less than or equal to 5.", "top_logprobs"),
                &chat,
                Some(("top_logprobs", Kind::Most(5))),
            ),
            (422, error("top_logprobs must be between 0 and 8"), &chat, Some(("top_logprobs", Kind::Most(8)))),
            (
                400,
                error("Requested sample logprobs of 20, which is greater than max allowed: 5"),
                &plain,
                Some(("logprobs", Kind::Most(5))),
            ),
            (400, error("20 is greater than the maximum of 1 - 'logprobs'"), &plain, Some(("logprobs", Kind::Most(1)))),
            (400, error("logprobs is not supported"), &chat, Some(("logprobs", Kind::Unsupported))),
            (
                400,
                named("This model does not support the 'logprobs' parameter.", "logprobs"),
                &chat,
                Some(("logprobs", Kind::Unsupported)),
            ),
            (
                403,
                error("You are not allowed to request logprobs from this model"),
                &chat,
                Some(("logprobs", Kind::Unsupported)),
            ),
            (
                422,
                json!({ "detail": [{ "type": "extra_forbidden", "loc": ["body", "logprobs"], "msg": "Extra inputs are not permitted" }] }),
                &chat,
                Some(("logprobs", Kind::Unsupported)),
            ),
            (501, error("logprobs is not implemented"), &chat, Some(("logprobs", Kind::Unsupported))),
            (400, error("bad logprobs"), &chat, Some(("logprobs", Kind::Value))),
            (
                400,
                named(
                    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
                    "max_tokens",
                ),
                &chat,
                Some(("max_tokens", Kind::Unsupported)),
            ),
            (
                400,
                error("Invalid 'max_tokens': integer below minimum value. Expected a value >= 16, but got 1 instead."),
                &chat,
                Some(("max_tokens", Kind::Least(16))),
            ),
            (400, error("max_tokens is too large: 1"), &chat, None),
            (
                400,
                error(
                    "'max_tokens' or 'max_completion_tokens' is too large: 1. This model's maximum context length is 2048 tokens and your request has 3000 input tokens",
                ),
                &chat,
                None,
            ),
            (
                400,
                named(
                    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
                    "temperature",
                ),
                &chat,
                Some(("temperature", Kind::Unsupported)),
            ),
            (
                422,
                error("Input validation error: `temperature` must be strictly positive"),
                &chat,
                Some(("temperature", Kind::Unsupported)),
            ),
            (400, error("Unrecognized request argument supplied: top_k"), &vote, Some(("top_k", Kind::Unsupported))),
            (400, error("Unknown name \"seed\": Cannot find field."), &vote, Some(("seed", Kind::Unsupported))),
            (400, error("the prompt is too long: 5000 tokens"), &chat, None),
            (401, error("logprobs is not supported"), &chat, None),
            (404, error("The model `m` does not exist"), &chat, None),
            (500, error("internal error"), &chat, None),
            (500, error("logprobs not supported with this backend"), &chat, Some(("logprobs", Kind::Unsupported))),
            // About a field that was not sent.
            (400, error("top_k is not supported"), &chat, None),
        ] {
            assert_eq!(find(status, &body, sent), expected, "{status} {body}");
        }
    }

    #[test]
    fn requests_are_adapted_only_if_their_meaning_stays_the_same() {
        let judge = RemoteJudge::default();
        let refusal = |field, kind| FieldRefusal { field, kind };
        let mut abilities = Abilities::new(&judge);
        let first = Request::first_token("p", None, 20);
        let adapt = |abilities: &mut Abilities, field, kind, request: &Request| {
            abilities.adapt(&refusal(field, kind), request, &judge)
        };
        assert!(adapt(&mut abilities, "top_logprobs", Kind::Most(8), &first).is_some_and(|words| words.contains('8')));
        assert_eq!(abilities.top_logprobs, 8);
        // A second request was under way with the old number.
        assert_eq!(adapt(&mut abilities, "top_logprobs", Kind::Most(8), &first), Some(String::new()));
        let first = Request { top_logprobs: 8, ..first };
        for expected in [5, 2, 0] {
            let request = Request { top_logprobs: abilities.top_logprobs, ..first.clone() };
            assert!(adapt(&mut abilities, "logprobs", Kind::Value, &request).is_some());
            assert_eq!(abilities.top_logprobs, expected);
        }
        assert!(adapt(&mut abilities, "max_tokens", Kind::Unsupported, &first).is_some());
        assert!(adapt(&mut abilities, "max_completion_tokens", Kind::Unsupported, &first).is_some());
        assert_eq!(adapt(&mut abilities, "max_tokens", Kind::Unsupported, &first), None, "it accepts neither");
        // The temperature does not affect the log-probabilities of the first token, but it does affect a text.
        assert!(adapt(&mut abilities, "temperature", Kind::Unsupported, &first).is_some());
        let text = Request { temperature: 0.0, top_logprobs: 0, max_tokens: 100, ..first.clone() };
        assert_eq!(adapt(&mut abilities, "temperature", Kind::Unsupported, &text), None);
        let strict = RemoteJudge { evidence: Evidence::Logprobs, ..RemoteJudge::default() };
        let mut abilities = Abilities::new(&strict);
        assert_eq!(
            abilities.adapt(&refusal("logprobs", Kind::Unsupported), &Request::first_token("p", None, 20), &strict),
            None
        );
        assert_eq!(abilities.top_logprobs, 20);
    }
}

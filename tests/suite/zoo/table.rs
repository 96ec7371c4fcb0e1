//! Table of behaviours of real servers with the OpenAI API, each with its correct outcome.

use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use preceptor::config::{RemoteApi, RemoteJudge};
use serde_json::{Value, json};

use crate::mock_judge::Act;

/// Source of the knowledge about a behaviour.
#[derive(Clone, Copy, PartialEq)]
pub enum Source {
    /// Tried with the real server.
    Run,
    /// Recorded from the real server.
    Recorded,
    /// From the server's documentation or its public bug reports.
    Documented,
}
pub use Source::{Documented, Recorded, Run};

/// The correct outcome for the question whether the answer is 1, 2 or 10.
#[derive(Clone, Copy)]
pub enum Expected {
    /// These probabilities, from the log-probabilities 0.6 of `1` and 0.3 of `2`.
    Listed,
    /// The shares of sampled answers, all of which are `2`.
    Votes,
    /// Other probabilities.
    Weights([f64; 3]),
    /// No label for this question, with this cause; other questions are answered.
    Abstains(&'static str),
    /// The judge cannot be used, which is detected before the run, with this cause.
    Unusable(&'static str),
}
pub use Expected::{Abstains, Listed, Unusable, Votes, Weights};

/// Response to a request, given the number of requests before it, its path and its body.
pub type Plan = Box<dyn Fn(u64, &str, &Value) -> Act + Send + Sync>;

/// One behaviour of a server.
pub struct Row {
    pub server: &'static str,
    pub behaviour: &'static str,
    pub source: Source,
    /// Keys of `labeler.remote` that the user sets, and their description for the page.
    pub settings: &'static str,
    pub set: fn(RemoteJudge) -> RemoteJudge,
    pub plan: Plan,
    pub expected: Expected,
}

fn row(
    server: &'static str,
    behaviour: &'static str,
    source: Source,
    expected: Expected,
    plan: impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static,
) -> Row {
    Row { server, behaviour, source, settings: "", set: |judge| judge, plan: Box::new(plan), expected }
}

impl Row {
    fn with(self, settings: &'static str, set: fn(RemoteJudge) -> RemoteJudge) -> Self {
        Self { settings, set, ..self }
    }
}

/// Text of the labeler's question; all other questions are those at the start.
pub const QUESTION: &str = "Which of 1, 2 and 10 is it?";

/// Returns whether a request asks for log-probabilities.
fn lists(body: &Value) -> bool {
    body.get("logprobs").is_some_and(|value| value != &json!(false) && !value.is_null())
}

/// Returns whether a request is the labeler's question.
fn asked(body: &Value) -> bool {
    body.to_string().contains(QUESTION)
}

/// Returns a list of alternatives as log-probabilities; JSON values are sent unchanged.
fn top(pairs: &[(&str, Value)]) -> Value {
    Value::Array(pairs.iter().map(|(token, logprob)| json!({ "token": token, "logprob": logprob })).collect())
}

fn ln(p: f64) -> Value {
    json!(p.ln())
}

/// Returns a chat answer with these alternatives of the first token.
fn chat(alternatives: &Value) -> Act {
    Act::Body(chat_body(alternatives).to_string())
}

fn chat_body(alternatives: &Value) -> Value {
    json!({
        "model": "m",
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": "1" },
            "logprobs": { "content": [{ "token": "1", "logprob": -0.5, "top_logprobs": alternatives }] },
            "finish_reason": "length",
        }],
        "usage": { "prompt_tokens": 20, "completion_tokens": 1 },
    })
}

fn usual() -> Value {
    top(&[("1", ln(0.6)), ("2", ln(0.3)), ("3", ln(0.05)), ("10", ln(0.0001))])
}

/// Returns the usual answer: alternatives if they are requested, else `2`.
fn good(body: &Value) -> Act {
    if lists(body) { chat(&usual()) } else { text("2") }
}

/// Returns a chat answer without log-probabilities.
fn text(text: &str) -> Act {
    message(&json!({ "role": "assistant", "content": text }))
}

fn message(message: &Value) -> Act {
    let usage = json!({ "prompt_tokens": 20, "completion_tokens": 3 });
    Act::Body(json!({ "choices": [{ "index": 0, "message": message, "logprobs": null, "finish_reason": "stop" }], "usage": usage }).to_string())
}

fn refuse(status: u16, body: &'static str) -> Act {
    Act::Status(status, "", body)
}

/// Refuses requests in which `refused` finds something, with this status and body.
fn refusing(
    refused: impl Fn(&Value) -> bool + Send + Sync + 'static,
    status: u16,
    body: &'static str,
) -> impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static {
    move |_, _, request| if refused(request) { refuse(status, body) } else { good(request) }
}

/// Answers the first request of all with `act`, and others as usual.
fn once(act: Act) -> impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static {
    move |number, _, request| if number == 0 { act.clone() } else { good(request) }
}

/// Answers the labeler's question with `act`, and others as usual.
fn on_question(act: Act) -> impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static {
    move |_, _, request| if asked(request) { act.clone() } else { good(request) }
}

/// Answers requests for log-probabilities with these alternatives.
fn listing(alternatives: Value) -> impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static {
    move |_, _, request| if lists(request) { chat(&alternatives) } else { text("2") }
}

fn has(field: &'static str) -> impl Fn(&Value) -> bool + Send + Sync + 'static {
    move |request| request.get(field).is_some()
}

fn more_than(most: u64) -> impl Fn(&Value) -> bool + Send + Sync + 'static {
    move |request| {
        let number = request["top_logprobs"].as_u64().or_else(|| request["logprobs"].as_u64());
        number.is_some_and(|number| number > most)
    }
}

/// Returns whether a request tells the template not to reason.
fn switched_off(request: &Value) -> bool {
    request["chat_template_kwargs"]["enable_thinking"] == false
}

/// A reasoning model: its first token opens a block, and its text is `before` the answer if the token limit allows it.
fn thinking(request: &Value, apart: Option<&str>) -> Act {
    let room = request["max_tokens"].as_u64().unwrap_or(0) > 100;
    if lists(request) {
        return chat(&top(&[("<think>", ln(0.99)), ("1", ln(0.001))]));
    }
    match (apart, room) {
        (Some(field), true) => message(&json!({ "content": "2", field: "First, I compare." })),
        (Some(field), false) => message(&json!({ "content": null, field: "First, I" })),
        (None, true) => text("<think>\nFirst, I compare 1 and 2.\n</think>\n\n2"),
        (None, false) => text("<think>\nFirst, I"),
    }
}

fn gzip(text: &str) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(text.as_bytes()).unwrap();
    packed.finish().unwrap()
}

/// Adds text around the usual answer.
fn around(before: &'static str, after: &'static str) -> impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static {
    move |_, _, request| match good(request) {
        Act::Body(body) => Act::Body(format!("{before}{body}{after}")),
        other => other,
    }
}

fn api_of_completions(judge: RemoteJudge) -> RemoteJudge {
    RemoteJudge { api: RemoteApi::Completions, ..judge }
}

#[rustfmt::skip]
pub fn rows() -> Vec<Row> {
    let map = |_: u64, _: &str, request: &Value| {
        let logprobs = json!({ "tokens": [" 1"], "top_logprobs": [{ " 1": 0.6f64.ln(), " 2": 0.3f64.ln(), " 10": 0.0001f64.ln() }] });
        let logprobs = if lists(request) { logprobs } else { Value::Null };
        Act::Body(json!({ "choices": [{ "text": if lists(request) { " 1" } else { " 2" }, "logprobs": logprobs }] }).to_string())
    };
    vec![
        row("OpenAI", "20 alternatives of a chat's first token", Documented, Listed, |_, _, request| good(request)),
        row("OpenAI", "alternatives of a completion, as a map", Documented, Listed, map).with("api = \"completions\"", api_of_completions),
        row("OpenAI", "a completion lists 5 alternatives at most", Documented, Listed, move |number, path, request| {
            if more_than(5)(request) { refuse(400, r#"{"error":{"message":"20 is greater than the maximum of 5 - 'logprobs'","type":"invalid_request_error"}}"#) } else { map(number, path, request) }
        }).with("api = \"completions\"", api_of_completions),
        row("OpenAI", "a reasoning model takes max_completion_tokens only", Documented, Listed, refusing(has("max_tokens"), 400, r#"{"error":{"message":"Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.","type":"invalid_request_error","param":"max_tokens","code":"unsupported_parameter"}}"#)),
        row("OpenAI", "a reasoning model takes the default temperature only", Documented, Listed, refusing(|request| request.get("temperature").is_some_and(|t| t != 1.0), 400, r#"{"error":{"message":"Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.","param":"temperature","code":"unsupported_value"}}"#)),
        row("OpenAI", "a reasoning model refuses log-probabilities", Documented, Votes, refusing(lists, 403, r#"{"error":{"message":"You are not allowed to request logprobs from this model","type":"invalid_request_error"}}"#)),
        row("OpenAI", "a limit on tokens below 16 is refused", Documented, Listed, refusing(|request| request["max_tokens"].as_u64() < Some(16), 400, r#"{"error":{"message":"Invalid 'max_tokens': integer below minimum value. Expected a value >= 16, but got 1 instead.","param":"max_tokens","code":"integer_below_min_value"}}"#)),
        row("OpenAI", "a partial answer is not continued; 10 is one token", Documented, Weights([0.6, 0.3, 0.0]), |_, _, request| {
            if request.get("continue_final_message").is_some() { return refuse(400, r#"{"error":{"message":"Unrecognized request argument supplied: continue_final_message"}}"#) }
            if request.to_string().contains("Write the number 10") { return chat(&top(&[("10", ln(0.9)), ("1", ln(0.05))])) }
            if lists(request) { chat(&top(&[("1", ln(0.6)), ("2", ln(0.3))])) } else { text("2") }
        }),
        row("a gateway", "a partial answer is not continued; 10 is two tokens", Documented, Abstains("do not distinguish 1 from 10"), |_, _, request| {
            if request.get("continue_final_message").is_some() { return refuse(400, r#"{"error":{"message":"Unrecognized request argument supplied: continue_final_message"}}"#) }
            if lists(request) { chat(&top(&[("1", ln(0.6)), ("2", ln(0.3))])) } else { text("2") }
        }),
        row("OpenAI", "the rate of requests is limited (Retry-After in seconds)", Documented, Listed, once(Act::Status(429, "Retry-After: 0\r\n", r#"{"error":{"message":"Rate limit reached","code":"rate_limit_exceeded"}}"#))),
        row("OpenAI", "the quota is exhausted", Documented, Unusable("no quota left (429: You exceeded your current quota"), |_, _, _| refuse(429, r#"{"error":{"message":"You exceeded your current quota, please check your plan and billing details.","type":"insufficient_quota","code":"insufficient_quota"}}"#)),
        row("OpenAI", "the key is not valid", Documented, Unusable("refused the key (401: Incorrect API key"), |_, _, _| refuse(401, r#"{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}"#)),
        row("OpenAI", "the model does not exist", Documented, Unusable("no such address or model (404: The model"), |_, _, _| refuse(404, r#"{"error":{"message":"The model `x` does not exist or you do not have access to it.","code":"model_not_found"}}"#)),
        row("OpenAI", "an answer is withheld (finish_reason content_filter)", Documented, Abstains("withheld"), on_question(Act::Body(r#"{"choices":[{"message":{"role":"assistant","content":""},"finish_reason":"content_filter"}]}"#.into()))),
        row("OpenAI", "the model refuses in message.refusal", Documented, Abstains("the model refuses: I cannot help"), on_question(Act::Body(r#"{"choices":[{"message":{"role":"assistant","content":null,"refusal":"I cannot help with that."},"finish_reason":"stop"}]}"#.into()))),
        row("OpenAI", "a prompt is too long for the model", Documented, Abstains("maximum context length"), on_question(refuse(400, r#"{"error":{"message":"This model's maximum context length is 128000 tokens.","code":"context_length_exceeded"}}"#))),
        row("Azure OpenAI", "the address has a deployment and the version in its query", Documented, Listed, |_, path, request| {
            if path == "/openai/deployments/d/chat/completions?api-version=2024-06-01" { good(request) } else { refuse(404, r#"{"error":{"code":"404","message":"Resource not found"}}"#) }
        }).with("url with the deployment, query = { api-version = \"2024-06-01\" }", |judge| RemoteJudge { url: judge.url.replace("/v1", "/openai/deployments/d/chat/completions"), query: [("api-version".to_owned(), "2024-06-01".to_owned())].into(), ..judge }),
        row("Azure OpenAI", "the content filter refuses a prompt", Documented, Abstains("content management policy"), on_question(refuse(400, r#"{"error":{"message":"The response was filtered due to the prompt triggering Azure OpenAI's content management policy.","code":"content_filter","status":400}}"#))),
        row("Azure OpenAI", "the rate of requests is limited (retry-after-ms)", Documented, Listed, once(Act::Status(429, "retry-after-ms: 5\r\n", r#"{"error":{"code":"429","message":"Requests have exceeded call rate limit."}}"#))),
        row("vLLM", "alternatives with bytes", Documented, Listed, listing(json!([
            { "token": "1", "logprob": 0.6f64.ln(), "bytes": [49] }, { "token": "2", "logprob": 0.3f64.ln(), "bytes": [50] }, { "token": "10", "logprob": -9.0, "bytes": [49, 48] },
        ]))),
        row("vLLM", "--max-logprobs 5", Documented, Listed, refusing(more_than(5), 400, r#"{"object":"error","message":"Requested sample logprobs of 20, which is greater than max allowed: 5","type":"BadRequestError","code":400}"#)),
        row("vLLM", "-9999 for the logarithm of zero", Documented, Weights([1.0, 0.0, 0.0]), listing(top(&[("1", json!(0.0)), ("2", json!(-9999.0)), ("10", json!(-9999.0))]))),
        row("vLLM", "--return-tokens-as-token-ids", Documented, Abstains("--return-tokens-as-token-ids"), listing(top(&[("token_id:16", ln(0.6)), ("token_id:17", ln(0.3))]))),
        row("vLLM", "--reasoning-parser, and a template with enable_thinking", Documented, Listed, |_, _, request| if switched_off(request) { good(request) } else { thinking(request, Some("reasoning_content")) }),
        row("vLLM", "--reasoning-parser, in the field reasoning of newer versions", Documented, Listed, |_, _, request| if switched_off(request) { good(request) } else { thinking(request, Some("reasoning")) }),
        row("vLLM", "a template with enable_thinking, no reasoning parser", Documented, Listed, |_, _, request| if switched_off(request) { good(request) } else { thinking(request, None) }),
        row("vLLM", "a model that always reasons", Documented, Votes, |_, _, request| thinking(request, None)),
        row("vLLM", "a prompt is too long for the model", Recorded, Abstains("longer than the maximum model length of 512"), on_question(refuse(400, r#"{"error":{"message":"The decoder prompt (length 600) is longer than the maximum model length of 512. Make sure that `max_model_len` is no smaller than the number of text tokens.","type":"BadRequestError","param":null,"code":400}}"#))),
        row("vLLM", "the key is not valid", Recorded, Unusable("refused the key (401: Unauthorized)"), |_, _, _| refuse(401, r#"{"error":"Unauthorized"}"#)),
        row("vLLM", "the model does not exist", Recorded, Unusable("(404: The model `nobody` does not exist. Valid aliases: policy.)"), |_, _, _| refuse(404, r#"{"error":{"message":"The model `nobody` does not exist. Valid aliases: policy.","type":"NotFoundError","param":"model","code":404}}"#)),
        row("vLLM", "a prompt is too long, and the limit on tokens is named", Documented, Abstains("maximum context length is 2048"), on_question(refuse(400, r#"{"error":{"message":"'max_tokens' or 'max_completion_tokens' is too large: 1. This model's maximum context length is 2048 tokens and your request has 3000 input tokens (1 > 2048 - 3000).","type":"BadRequestError","param":null,"code":400}}"#))),
        row("vLLM", "a prompt is too long, with status 500", Documented, Abstains("maximum context length is 4096"), on_question(refuse(500, r#"{"object":"error","message":"This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.","code":500}"#))),
        row("SGLang", "tokens in the spelling of the vocabulary", Documented, Listed, listing(top(&[("Ġ1", ln(0.6)), ("Ġ2", ln(0.3)), ("Ġ10", ln(0.0001))]))),
        row("SGLang", "null for the logarithm of zero", Documented, Weights([1.0, 0.0, 0.0]), listing(top(&[("1", json!(0.0)), ("2", Value::Null), ("10", Value::Null)]))),
        row("SGLang", "a model that always reasons, with separate reasoning", Documented, Votes, |_, _, request| thinking(request, Some("reasoning_content"))),
        row("llama.cpp", "alternatives with id and bytes", Run, Listed, listing(json!([
            { "id": 16, "token": "1", "bytes": [49], "logprob": 0.6f64.ln() }, { "id": 17, "token": "2", "bytes": [50], "logprob": 0.3f64.ln() }, { "id": 605, "token": "10", "bytes": [49, 48], "logprob": -9.0 },
        ]))),
        row("llama.cpp", "the model is being loaded (503)", Documented, Listed, once(refuse(503, r#"{"error":{"message":"Loading model","type":"unavailable_error","code":503}}"#))),
        row("llama.cpp", "null for the logarithm of zero", Documented, Weights([1.0, 0.0, 0.0]), listing(top(&[("1", json!(0.0)), ("2", Value::Null), ("10", Value::Null)]))),
        row("llama.cpp", "a prompt is larger than the context", Documented, Abstains("exceeds the available context size"), on_question(refuse(400, r#"{"error":{"code":400,"message":"the request exceeds the available context size. try increasing the context size or enable context shift","type":"exceed_context_size_error"}}"#))),
        row("llama.cpp", "log-probabilities are not available", Documented, Votes, refusing(lists, 501, r#"{"error":{"code":501,"message":"logprobs is not supported","type":"not_supported_error"}}"#)),
        row("Ollama", "log-probabilities are ignored", Documented, Votes, |_, _, _| text("2")),
        row("Ollama", "the model does not exist", Documented, Unusable("try pulling it first"), |_, _, _| refuse(404, r#"{"error":{"message":"model \"x\" not found, try pulling it first","type":"api_error"}}"#)),
        row("Ollama", "a reasoning model with separate reasoning", Documented, Votes, |_, _, request| if lists(request) { message(&json!({ "content": "", "reasoning": "First" })) } else { thinking(request, Some("reasoning")) }),
        row("TGI", "a temperature of zero is refused", Documented, Listed, refusing(|request| request.get("temperature") == Some(&json!(0.0)), 422, r#"{"error":"Input validation error: `temperature` must be strictly positive","error_type":"validation"}"#)),
        row("TGI", "5 alternatives at most", Documented, Listed, refusing(more_than(5), 422, r#"{"error":"Input validation error: `top_logprobs` must be >= 0 and <= 5","error_type":"validation"}"#)),
        row("TGI", "overloaded (429)", Documented, Listed, once(refuse(429, r#"{"error":"Model is overloaded","error_type":"overloaded"}"#))),
        row("LM Studio", "log-probabilities are null", Documented, Votes, |_, _, _| text("2")),
        row("LM Studio", "no model is loaded", Documented, Unusable("No models loaded"), |_, _, _| refuse(400, r#"{"error":"No models loaded. Please load a model in the developer page."}"#)),
        row("OpenRouter", "a rate limit inside a 200", Documented, Listed, once(Act::Body(r#"{"error":{"message":"Rate limit exceeded","code":429}}"#.into()))),
        row("OpenRouter", "choices is null", Documented, Listed, once(Act::Body(r#"{"id":null,"choices":null}"#.into()))),
        row("OpenRouter", "an answer that the provider aborted (finish_reason error)", Documented, Listed, once(Act::Body(r#"{"choices":[{"message":{"role":"assistant","content":"1"},"finish_reason":"error","error":{"code":502,"message":"upstream"}}]}"#.into()))),
        row("OpenRouter", "comments keep the connection alive", Documented, Listed, around(": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n", "")),
        row("OpenRouter", "the credit is exhausted", Documented, Unusable("no quota left (402: Insufficient credits"), |_, _, _| refuse(402, r#"{"error":{"message":"Insufficient credits","code":402}}"#)),
        row("LiteLLM", "unsupported parameters are named in a list", Documented, Votes, refusing(lists, 400, r#"{"error":{"message":"litellm.UnsupportedParamsError: x does not support parameters: ['logprobs', 'top_logprobs'], for model=x","type":null,"param":null,"code":"400"}}"#)),
        row("LiteLLM", "no deployment is available (429)", Documented, Listed, once(refuse(429, r#"{"error":{"message":"No deployments available for selected model, Try again in 0 seconds.","code":"429"}}"#))),
        row("Mistral", "log-probabilities are an unknown field (422)", Documented, Votes, refusing(lists, 422, r#"{"object":"error","message":{"detail":[{"type":"extra_forbidden","loc":["body","logprobs"],"msg":"Extra inputs are not permitted","input":true}]},"detail":[{"type":"extra_forbidden","loc":["body","logprobs"],"msg":"Extra inputs are not permitted"}]}"#)),
        row("Mistral", "seed is an unknown field (422)", Documented, Votes, |_, _, request| {
            if lists(request) { return refuse(422, r#"{"detail":[{"type":"extra_forbidden","loc":["body","logprobs"],"msg":"Extra inputs are not permitted"}]}"#) }
            if request.get("seed").is_some() { return refuse(422, r#"{"detail":[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not permitted"}]}"#) }
            text("2")
        }),
        row("Mistral", "content is a list of parts, one of them reasoning", Documented, Votes, |_, _, request| {
            if lists(request) { return refuse(400, r#"{"message":"logprobs is not supported"}"#) }
            message(&json!({ "content": [{ "type": "thinking", "thinking": [{ "type": "text", "text": "hm" }] }, { "type": "text", "text": "2" }] }))
        }),
        row("Groq", "log-probabilities are not supported", Documented, Votes, refusing(lists, 400, r#"{"error":{"message":"`logprobs` is not supported with this model","type":"invalid_request_error"}}"#)),
        row("Groq", "the rate of tokens is limited (Retry-After)", Documented, Listed, once(Act::Status(429, "retry-after: 0\r\n", r#"{"error":{"message":"Rate limit reached for model in organization on tokens per minute (TPM)","type":"tokens","code":"rate_limit_exceeded"}}"#))),
        row("Together", "a chat's alternatives as a map", Documented, Listed, |_, _, request| {
            if !lists(request) { return text("2") }
            Act::Body(json!({ "choices": [{ "message": { "content": "1" }, "logprobs": { "tokens": ["1"], "token_logprobs": [-0.5], "top_logprobs": [{ "1": 0.6f64.ln(), "2": 0.3f64.ln(), "10": -9.0 }] } }] }).to_string())
        }),
        row("Together", "5 alternatives at most (422)", Documented, Listed, refusing(more_than(5), 422, r#"{"error":{"message":"Input validation error: logprobs must be between 0 and 5","type":"invalid_request_error","param":"logprobs"}}"#)),
        row("DeepSeek", "the reasoning model refuses log-probabilities and returns its reasoning separately", Documented, Votes, |_, _, request| if lists(request) { refuse(400, r#"{"error":{"message":"deepseek-reasoner does not support logprobs","type":"invalid_request_error"}}"#) } else { thinking(request, Some("reasoning_content")) }),
        row("DeepSeek", "empty lines keep the connection alive", Documented, Listed, around("\n\n   \n\n", "\n")),
        row("DashScope (Qwen)", "reasoning is disabled by a field of the body", Documented, Listed, refusing(|request| request.get("enable_thinking") != Some(&json!(false)), 400, r#"{"error":{"message":"parameter.enable_thinking must be set to false for non-streaming calls","type":"invalid_request_error"}}"#))
            .with("extra_body = { enable_thinking = false }", |judge| RemoteJudge { extra_body: [("enable_thinking".to_owned(), false.into())].into_iter().collect(), ..judge }),
        row("a gateway", "an event stream although stream is false", Documented, Listed, |_, _, request| {
            let piece = if lists(request) { json!({ "choices": [{ "delta": { "content": "1" }, "logprobs": chat_body(&usual())["choices"][0]["logprobs"] }] }) } else { json!({ "choices": [{ "delta": { "content": "2" } }] }) };
            Act::Body(format!("data: {{\"choices\":[{{\"delta\":{{\"role\":\"assistant\"}}}}]}}\n\ndata: {piece}\n\ndata: [DONE]\n\n"))
        }),
        row("a gateway", "an answer is an event stream unless stream is given", Documented, Listed, |_, _, request| if request.get("stream") == Some(&json!(false)) { good(request) } else { Act::Body("data: [DONE]\n\n".into()) }),
        row("a gateway", "the field stream is refused", Documented, Listed, refusing(has("stream"), 400, r#"{"error":{"message":"Unknown field: stream"}}"#)),
        row("a gateway", "a login page with status 200", Documented, Unusable("is an HTML page, not JSON"), |_, _, _| Act::Body("<!doctype html><html><body>Please log in</body></html>".into())),
        row("a gateway", "unrequested gzip compression", Documented, Listed, |_, _, request| match good(request) { Act::Body(body) => Act::Bytes(gzip(&body)), other => other }),
        row("a gateway", "a byte order mark", Documented, Listed, around("\u{feff}", "")),
        row("a gateway", "the answer ends with the end marker of a stream", Documented, Listed, around("", "\n\ndata: [DONE]\n\n")),
        row("a gateway", "a redirect to another address", Documented, Unusable("redirects to https://elsewhere.test/v1"), |_, _, _| Act::Status(301, "Location: https://elsewhere.test/v1\r\n", "")),
        row("a gateway", "a connection that was closed while it was idle", Documented, Listed, once(Act::Close)),
        row("a gateway", "an incomplete response body", Documented, Listed, once(Act::CloseMidBody)),
        row("a gateway", "an empty body", Documented, Listed, once(Act::Body(String::new()))),
        row("a proxy", "the proxy requires a password (407)", Documented, Unusable("(407: Proxy Authentication Required)"), |_, _, _| refuse(407, "Proxy Authentication Required")),
        row("a proxy", "the server is unavailable for a moment (502)", Documented, Listed, once(refuse(502, "<html>Bad gateway</html>"))),
        row("any", "the address has no version", Documented, Listed, |_, path, request| if path == "/v1/chat/completions" { good(request) } else { refuse(404, "404 page not found") })
            .with("url without /v1", |judge| RemoteJudge { url: judge.url.replace("/v1", ""), ..judge }),
        row("any", "the address is that of the endpoint", Documented, Listed, |_, path, request| if path == "/v1/chat/completions" { good(request) } else { refuse(404, "404 page not found") })
            .with("url with /chat/completions/", |judge| RemoteJudge { url: format!("{}/chat/completions/", judge.url), ..judge }),
        row("any", "a rounding error above zero", Documented, Weights([1.0, 0.0, 0.0]), listing(top(&[("1", json!(1e-5)), ("2", json!(-30.0)), ("10", json!(-30.0))]))),
        row("any", "NaN for a token that is not needed", Documented, Listed, |_, _, request| {
            if !lists(request) { return text("2") }
            Act::Body(chat_body(&usual()).to_string().replace(&0.05f64.ln().to_string(), "NaN"))
        }),
        row("any", "NaN for an answer", Documented, Abstains("log-probability of the answer 2 cannot be read"), |_, _, request| {
            if !lists(request) { return text("2") }
            let body = chat_body(&usual()).to_string();
            Act::Body(if asked(request) { body.replace(&0.3f64.ln().to_string(), "NaN") } else { body })
        }),
        row("any", "tokens of SentencePiece", Documented, Listed, listing(top(&[("▁1", ln(0.6)), ("<0x32>", ln(0.3)), ("▁10", ln(0.0001))]))),
        row("any", "half of a surrogate pair in a token", Documented, Listed, |_, _, request| {
            if !lists(request) { return text("2") }
            Act::Body(chat_body(&usual()).to_string().replace("\"3\"", "\"\\ud83d\""))
        }),
        row("any", "one answer without log-probabilities", Documented, Listed, |_, _, request| {
            static NUMBER: AtomicU64 = AtomicU64::new(0);
            if asked(request) && lists(request) && NUMBER.fetch_add(1, Ordering::SeqCst) == 0 { text("2") } else { good(request) }
        }),
        row("any", "a text that is not an answer", Documented, Abstains("could be read"), |_, _, request| if lists(request) { refuse(400, r#"{"error":"logprobs is not supported"}"#) } else { text("I would say that it depends.") }),
        row("any", "a usage of zero", Documented, Listed, |_, _, request| match good(request) {
            Act::Body(body) => Act::Body(body.replace("\"prompt_tokens\":20", "\"prompt_tokens\":0")),
            other => other,
        }),
    ]
}

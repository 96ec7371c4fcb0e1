//! vLLM's protocol for the fake inference server.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::generate::stop::Stop;
use preceptor::util::seed;
use serde_json::{Map, Value, json};

use super::core::{Answer, Core, Finish, PauseMode, Request, Sampled};
use super::http::{Received, Reply};
use super::shown::{Shown, number};
use super::weights::Adapter;
use super::{Faults, Server};

/// Name of the base model.
pub const BASE: &str = "policy";
const DEAD: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";

/// Answers a request; `None` closes the connection.
pub fn answer(server: &Server, received: &Received, faults: &Faults, stream: &TcpStream) -> Option<Reply> {
    let path = received.path.as_str();
    if (path.starts_with("/v1/") || path.starts_with("/inference/")) && !server.is_authorised(received) {
        return Some(Reply::Json(401, json!({ "error": "Unauthorized" })));
    }
    match (received.method.as_str(), path) {
        ("GET", "/health") => {
            let dead = server.call(|core| core.dead)?;
            Some(Reply::Text(if dead { 503 } else { 200 }, String::new()))
        }
        ("GET", "/version") => Some(Reply::ok(json!({ "version": faults.program_version.unwrap_or("0.32.0") }))),
        ("GET", "/v1/models") => models(server),
        ("GET", "/metrics") => {
            server.metrics(["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:generation_tokens_total"])
        }
        ("POST", "/tokenize") => server.tokenize(received, faults),
        ("POST", "/inference/v1/generate") if faults.no_scale_out => {
            Some(Reply::error(403, "ForbiddenError", "start the server with --enable-scale-out", ""))
        }
        ("POST", "/inference/v1/generate") if faults.repeats_answers => repeat(server, received, faults, stream),
        ("POST", "/inference/v1/generate") => generate(server, received, faults, stream),
        ("POST", "/v1/completions") => complete(server, received, faults, stream),
        ("POST", "/v1/load_lora_adapter" | "/v1/unload_lora_adapter") if faults.no_lora_updates => {
            Some(Reply::not_found())
        }
        ("POST", "/v1/load_lora_adapter") => load_adapter(server, &received.body, faults),
        ("POST", "/v1/unload_lora_adapter") => unload_adapter(server, &received.body),
        ("GET", "/is_paused") => server.call(|core| Reply::ok(json!({ "is_paused": core.is_paused() }))),
        ("POST", "/pause") => {
            let mode = match received.parameter("mode").unwrap_or("abort") {
                "keep" => PauseMode::Keep,
                "abort" => PauseMode::Abort,
                "wait" => PauseMode::Wait,
                mode => return Some(Reply::error(400, "BadRequestError", &format!("unknown mode {mode}"), "mode")),
            };
            server.pause(mode).map(|()| Reply::ok(json!({ "status": "paused" })))
        }
        ("POST", "/resume") => server.resume().map(|()| Reply::ok(json!({ "status": "resumed" }))),
        ("POST", "/collective_rpc") => reload(server, &received.body, faults),
        ("POST", "/update_weight_version") => match received.body["new_version"].as_str().map(str::to_owned) {
            Some(version) => server.call(move |core| {
                core.version.clone_from(&version);
                Reply::ok(json!({ "success": true, "new_version": version }))
            }),
            None => Some(Reply::error(400, "BadRequestError", "new_version: a text is required", "new_version")),
        },
        ("GET", "/weight_info") => server.call(|core| Reply::ok(json!({ "weight_version": core.version }))),
        _ => Some(Reply::not_found()),
    }
}

fn models(server: &Server) -> Option<Reply> {
    let length = server.options.max_model_len;
    server.call(move |core| {
        let model = |id: &str, root: &Path, parent: Option<&str>, length: Option<usize>| {
            json!({
                "id": id, "object": "model", "created": 1_795_937_080, "owned_by": "vllm", "root": root,
                "parent": parent, "max_model_len": length, "permission": [],
            })
        };
        let mut data = vec![model(BASE, &core.base.root, None, Some(length))];
        data.extend(core.adapters.values().map(|adapter| model(&adapter.name, &adapter.path, Some(BASE), None)));
        Reply::ok(json!({ "object": "list", "data": data }))
    })
}

/// Settings and prompt of a request, and its response in case of an error.
type Parsed = Result<(Request, Tokenizer), Reply>;

/// Parses the settings in `params` for `prompt`.
fn parse(core: &Core, body: &Value, prompt: &Value, params: &Value, length: usize) -> Parsed {
    let bad = |message: &str, param: &str| Reply::error(400, "BadRequestError", message, param);
    let name = body["model"].as_str().unwrap_or(BASE);
    let adapter = match core.adapters.get(name) {
        Some(adapter) => Some(Arc::clone(adapter)),
        None if name == BASE => None,
        None => {
            let words = format!("The model `{name}` does not exist. Valid aliases: {BASE}.");
            return Err(Reply::error(404, "NotFoundError", &words, "model"));
        }
    };
    let vocabulary = core.base.config.vocab_size;
    let prompt = ids(prompt).filter(|ids| !ids.is_empty()).ok_or_else(|| bad("the prompt has no token ids", ""))?;
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocabulary) {
        return Err(bad(&format!("Token id {id} is out of vocabulary"), ""));
    }
    if prompt.len() > length {
        let words = format!(
            "The decoder prompt (length {}) is longer than the maximum model length of {length}. Make sure that `max_model_len` is no smaller than the number of text tokens.",
            prompt.len()
        );
        return Err(bad(&words, ""));
    }
    let texts: Vec<String> = match &params["stop"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(all) => all.iter().filter_map(|text| Some(text.as_str()?.to_owned())).collect(),
        _ => Vec::new(),
    };
    let tokenizer = core.base.tokenizer.clone();
    let stop = texts.into_iter().filter_map(|text| {
        let stop = Stop::new(std::slice::from_ref(&text), &tokenizer)?;
        Some((text, stop))
    });
    let stop = stop.collect();
    let number = |name: &str, default: u64| params[name].as_u64().unwrap_or(default);
    let bias = params["logit_bias"].as_object().into_iter().flatten();
    let bias = bias.filter_map(|(id, bias)| Some((id.parse().ok()?, bias.as_f64()? as f32)));
    // Of several end tokens vLLM has one, and treats the others as stop tokens.
    let ends = if params["ignore_eos"] == true { &[][..] } else { &core.base.config.eos };
    let (eos, others) = ends.split_at(ends.len().min(1));
    let mut stop_ids = ids(&params["stop_token_ids"]).unwrap_or_default();
    stop_ids.extend(others);
    let seed = params["seed"].as_u64().unwrap_or_else(|| seed::mix(core.tickets()));
    let request = Request {
        prompt,
        adapter,
        seeds: (0..number("n", 1)).map(|index| seed.wrapping_add(index)).collect(),
        temperature: params["temperature"].as_f64().unwrap_or(1.0),
        max_tokens: number("max_tokens", 16) as usize,
        eos: eos.to_vec(),
        stop_ids,
        stop,
        bias: bias.filter(|(id, _): &(u32, f32)| (*id as usize) < vocabulary).collect(),
        wants_prompt_logprobs: !params["prompt_logprobs"].is_null(),
        top: number("logprobs", 0) as usize,
    };
    if request.max_tokens == 0 || request.seeds.is_empty() || request.temperature < 0.0 {
        return Err(bad("max_tokens and n must be at least 1, temperature must be non-negative", ""));
    }
    Ok((request, tokenizer))
}

/// Returns the token ids of a JSON list.
fn ids(list: &Value) -> Option<Vec<u32>> {
    list.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

/// A request with its tokenizer and its completions.
pub struct Done {
    pub prompt: Vec<u32>,
    pub tokenizer: Tokenizer,
    pub vocabulary: usize,
    pub answer: Answer,
}

/// Parses and generates. An error is a response; `None` closes the connection.
pub fn run(
    server: &Server,
    body: &Value,
    [prompt, params]: [&Value; 2],
    stream: &TcpStream,
) -> Option<Result<Done, Reply>> {
    let length = server.options.max_model_len;
    let (body, prompt, params) = (body.clone(), prompt.clone(), params.clone());
    let parsed = server.call(move |core| {
        let length = length.min(core.base.config.context);
        let parsed = parse(core, &body, &prompt, &params, length);
        if core.dead { Err(dead()) } else { parsed.map(|parsed| (parsed, core.base.config.vocab_size)) }
    })?;
    let ((request, tokenizer), vocabulary) = match parsed {
        Ok(parsed) => parsed,
        Err(reply) => return Some(Err(reply)),
    };
    let prompt = request.prompt.clone();
    let Some(answer) = server.generate(request, stream) else {
        return server.call(|core| core.dead)?.then(|| Err(dead()));
    };
    Some(Ok(Done { prompt, tokenizer, vocabulary, answer }))
}

fn dead() -> Reply {
    Reply::error(500, "InternalServerError", DEAD, "")
}

fn finish(sampled: &Sampled) -> (&'static str, Value) {
    match &sampled.finish {
        Some(Finish::Eos) => ("stop", Value::Null),
        Some(Finish::StopId(id)) => ("stop", json!(id)),
        Some(Finish::StopString(text)) => ("stop", json!(text)),
        Some(Finish::Abort) => ("abort", Value::Null),
        Some(Finish::Length) | None => ("length", Value::Null),
    }
}

fn usage(prompt: usize, completions: &[Sampled]) -> Value {
    let sampled: usize = completions.iter().map(|completion| completion.ids.len()).sum();
    json!({
        "prompt_tokens": prompt, "total_tokens": prompt + sampled, "completion_tokens": sampled,
        "prompt_tokens_details": null, "completion_tokens_details": null,
    })
}

fn generate(server: &Server, received: &Received, faults: &Faults, stream: &TcpStream) -> Option<Reply> {
    let body = &received.body;
    let params = &body["sampling_params"];
    let text_mode = body["output_mode"] == "text";
    if !params["stop"].is_null() && !text_mode {
        return Some(Reply::error(400, "BadRequestError", "stop needs output_mode \"text\"", "stop"));
    }
    let done = match run(server, body, [&body["token_ids"], params], stream)? {
        Ok(done) => done,
        Err(reply) => return Some(reply),
    };
    let token = |id: u32| done.tokenizer.decode(&[id]).unwrap_or_default();
    let choices = done.answer.completions.iter().enumerate().map(|(index, sampled)| {
        let shown = Shown::of(sampled, faults, done.vocabulary);
        let most = params["logprobs"].as_u64().unwrap_or(0).max(1) as usize;
        let content = shown.logprobs.iter().zip(&shown.ids).zip(&shown.ranks).enumerate();
        let content = content.map(|(at, ((logprob, id), rank))| {
            let mut one = if text_mode {
                let text = token(*id);
                json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() })
            } else {
                json!({ "token_id": id, "logprob": logprob, "rank": rank })
            };
            // The sampled token is the first, and counts as one of them.
            let mut tops = vec![one.clone()];
            let others = sampled.tops[at].iter().enumerate().filter(|(_, (top, _))| top != id && !text_mode);
            tops.extend(others.map(
                |(rank, (top, logprob))| json!({ "token_id": top, "logprob": number(*logprob), "rank": rank + 1 }),
            ));
            tops.truncate(most);
            one["top_logprobs"] = json!(tops);
            one
        });
        let (reason, stop) = finish(sampled);
        let logprobs =
            if params["logprobs"].is_null() { Value::Null } else { json!({ "content": content.collect::<Vec<_>>() }) };
        let mut choice = json!({
            "index": index, "finish_reason": reason, "stop_reason": stop, "token_ids": shown.ids,
            "routed_experts": null, "sampling_mask": null, "logprobs": logprobs,
        });
        if let Some(spans) = shown.spans {
            choice["weight_versions"] = json!(spans);
        }
        if text_mode {
            choice["text"] = json!(text(&done.tokenizer, sampled));
        }
        choice
    });
    let choices: Vec<Value> = choices.collect();
    let prompt_logprobs = done.answer.prompt_logprobs.as_ref().map(|known| {
        let rest = known.iter().zip(&done.prompt[1..]).map(|((logprob, rank), id)| {
            let value = json!({ "logprob": number(*logprob), "rank": rank, "decoded_token": token(*id) });
            Value::Object(Map::from_iter([(id.to_string(), value)]))
        });
        std::iter::once(Value::Null).chain(rest).collect::<Vec<_>>()
    });
    Some(Reply::ok(json!({
        "request_id": format!("generate-tokens-{:016x}", seed::text(&choices[0].to_string())),
        "model": body["model"].as_str().unwrap_or(BASE), "created": 1_795_937_080,
        "usage": usage(done.prompt.len(), &done.answer.completions),
        "prompt_logprobs": prompt_logprobs, "prompt_token_id_logprobs": null, "prompt_token_ids": null,
        "mm_placeholders": null, "metrics": null, "kv_transfer_params": null, "ec_transfer_params": null,
        "output_mode": if text_mode { "text" } else { "tokens" }, "choices": choices,
    })))
}

/// Answers as before if a request for as many completions of the same length was answered.
fn repeat(server: &Server, received: &Received, faults: &Faults, stream: &TcpStream) -> Option<Reply> {
    let params = &received.body["sampling_params"];
    let key = ["n", "max_tokens"].map(|name| params[name].as_u64().unwrap_or(1));
    if let Some(answer) = server.repeated.lock().unwrap().get(&key).filter(|_| key[0] > 1) {
        return Some(Reply::Text(200, answer.clone()));
    }
    let reply = generate(server, received, faults, stream);
    if let Some(Reply::Json(200, body)) = &reply {
        server.repeated.lock().unwrap().insert(key, body.to_string());
    }
    reply
}

/// Returns the text of a completion up to the stop string.
pub fn text(tokenizer: &Tokenizer, sampled: &Sampled) -> String {
    let text = tokenizer.decode(&sampled.ids).unwrap_or_default();
    match &sampled.finish {
        Some(Finish::StopString(stop)) => text.split(stop.as_str()).next().unwrap_or_default().to_owned(),
        _ => text,
    }
}

fn complete(server: &Server, received: &Received, faults: &Faults, stream: &TcpStream) -> Option<Reply> {
    let body = &received.body;
    let done = match run(server, body, [&body["prompt"], body], stream)? {
        Ok(done) => done,
        Err(reply) => return Some(reply),
    };
    let with_ids = body["return_token_ids"] == true;
    let choices = done.answer.completions.iter().enumerate().map(|(index, sampled)| {
        let shown = Shown::of(sampled, faults, done.vocabulary);
        let tokens: Vec<String> =
            shown.ids.iter().map(|id| done.tokenizer.decode(&[*id]).unwrap_or_default()).collect();
        let offsets = tokens.iter().scan(0, |at, token| {
            *at += token.chars().count();
            Some(*at - token.chars().count())
        });
        let top = tokens.iter().zip(&shown.logprobs).map(|(token, logprob)| json!({ token.as_str(): logprob }));
        let logprobs = (!body["logprobs"].is_null()).then(|| {
            json!({
                "text_offset": offsets.collect::<Vec<_>>(), "token_logprobs": shown.logprobs, "tokens": tokens,
                "top_logprobs": top.collect::<Vec<_>>(),
            })
        });
        let (reason, stop) = finish(sampled);
        json!({
            "index": index, "text": text(&done.tokenizer, sampled), "logprobs": logprobs, "finish_reason": reason,
            "stop_reason": stop, "token_ids": with_ids.then_some(&shown.ids), "prompt_logprobs": null,
            "prompt_token_ids": with_ids.then_some(&done.prompt), "routed_experts": null,
        })
    });
    let choices: Vec<Value> = choices.collect();
    Some(Reply::ok(json!({
        "id": format!("cmpl-{:016x}", seed::text(&choices[0].to_string())), "object": "text_completion",
        "created": 1_795_937_080, "model": body["model"].as_str().unwrap_or(BASE), "choices": choices,
        "service_tier": null, "system_fingerprint": "vllm-0.32.0-3d48c27e",
        "usage": usage(done.prompt.len(), &done.answer.completions),
        "kv_transfer_params": null, "ec_transfer_params": null, "metrics": null,
    })))
}

fn load_adapter(server: &Server, body: &Value, faults: &Faults) -> Option<Reply> {
    let (Some(name), Some(path)) = (body["lora_name"].as_str(), body["lora_path"].as_str()) else {
        return Some(Reply::error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.", ""));
    };
    std::thread::sleep(faults.handover_delay);
    let (name, path, keeps) = (name.to_owned(), PathBuf::from(path), faults.ignores_handover);
    let rank = server.options.max_lora_rank;
    server.call(move |core| {
        if core.adapters.contains_key(&name) {
            let words = format!(
                "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
            );
            return Reply::error(400, "InvalidUserInput", &words, "");
        }
        if !path.join("adapter_config.json").is_file() {
            let words = format!("Loading lora {name} failed: No adapter found for {}", path.display());
            return Reply::error(404, "NotFoundError", &words, "");
        }
        match core.load_adapter(&name, &path, rank, keeps) {
            Ok(()) => Reply::Text(200, format!("Success: LoRA adapter '{name}' added successfully.")),
            Err(error) => Reply::error(400, "BadRequestError", &format!("{error:#}"), ""),
        }
    })
}

fn unload_adapter(server: &Server, body: &Value) -> Option<Reply> {
    let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
    server.call(move |core| match core.adapters.remove(&name) {
        Some(_) => Reply::Text(200, format!("Success: LoRA adapter '{name}' removed successfully.")),
        None => Reply::error(404, "NotFoundError", &format!("The lora adapter '{name}' cannot be found."), ""),
    })
}

fn reload(server: &Server, body: &Value, faults: &Faults) -> Option<Reply> {
    if body["method"] != "reload_weights" {
        return Some(Reply::error(400, "BadRequestError", "unknown method", "method"));
    }
    std::thread::sleep(faults.handover_delay);
    let (dir, keeps) = (body["kwargs"]["weights_path"].as_str().map(PathBuf::from), faults.ignores_handover);
    server.call(move |core| {
        if core.dead {
            return dead();
        }
        let dir = dir.unwrap_or_else(|| core.base.root.clone());
        match if keeps { Ok(()) } else { core.base.reload(&dir, true) } {
            Ok(()) => {
                core.weights_changed();
                Reply::ok(json!({ "results": [null] }))
            }
            Err(error) => {
                core.die();
                let words = format!(
                    "Call to collective_rpc method failed: Worker failed with error '{error:#}', please check the stack trace above for the root cause"
                );
                Reply::error(500, "InternalServerError", &words, "")
            }
        }
    })
}

impl Core {
    /// Loads an adapter, or registers one without new weights if `keeps` is true.
    pub fn load_adapter(&mut self, name: &str, path: &Path, max_rank: usize, keeps: bool) -> anyhow::Result<()> {
        let adapter = if keeps {
            Adapter::unchanged(name, path, self.adapters.values().next_back().map(Arc::as_ref))
        } else {
            Adapter::read(name, path, &self.base, max_rank)?
        };
        self.adapters.insert(name.to_owned(), Arc::new(adapter));
        Ok(())
    }
}

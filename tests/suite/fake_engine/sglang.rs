//! SGLang's protocol for the fake inference server, as its sources describe it; no answers of a real server were
//! recorded.

use std::net::TcpStream;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::core::{Core, Finish, PauseMode, Sampled};
use super::http::{Received, Reply};
use super::shown::{Shown, number};
use super::vllm::{self, BASE, Done};
use super::{Faults, Server, Versions};

/// Answers a request; `None` closes the connection.
pub fn answer(server: &Server, received: &Received, faults: &Faults, stream: &TcpStream) -> Option<Reply> {
    let (path, body) = (received.path.as_str(), &received.body);
    // With an API key, SGLang guards all paths but those for health and metrics.
    if !path.starts_with("/health") && !path.starts_with("/metrics") && !server.is_authorised(received) {
        return Some(Reply::Json(401, json!({ "error": "Unauthorized" })));
    }
    match (received.method.as_str(), path) {
        ("GET", "/health") => {
            let dead = server.call(|core| core.dead)?;
            Some(Reply::Text(if dead { 503 } else { 200 }, String::new()))
        }
        ("GET", "/get_model_info" | "/model_info") => server.call(|core| {
            Reply::ok(json!({
                "model_path": core.base.root, "tokenizer_path": core.base.root, "is_generation": true,
                "preferred_sampling_params": null, "weight_version": core.version,
            }))
        }),
        ("GET", "/server_info" | "/get_server_info") => info(server, faults),
        ("GET", "/metrics") => {
            server.metrics(["sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:generation_tokens_total"])
        }
        ("POST", "/tokenize" | "/v1/tokenize") => server.tokenize(received, faults),
        ("POST", "/generate") => generate(server, body, faults, stream),
        ("POST", "/pause_generation") => {
            let mode = match body["mode"].as_str().unwrap_or("abort") {
                "abort" => PauseMode::Abort,
                "retract" | "in_place" => PauseMode::Keep,
                _ => return Some(Reply::Json(422, json!({ "detail": "mode: abort, retract or in_place" }))),
            };
            server.pause(mode)?;
            Some(Reply::ok(json!({ "status": "ok", "message": "Generation paused successfully." })))
        }
        ("POST", "/continue_generation") => {
            server.resume()?;
            Some(Reply::ok(json!({ "status": "ok", "message": "Generation continued successfully." })))
        }
        ("POST", "/update_weights_from_disk") => update(server, body, faults),
        ("POST", "/load_lora_adapter" | "/unload_lora_adapter") if faults.no_lora_updates => Some(Reply::not_found()),
        ("POST", "/load_lora_adapter") => load_adapter(server, body, faults),
        ("POST", "/unload_lora_adapter") => {
            let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
            server.call(move |core| match core.adapters.remove(&name) {
                Some(_) => adapters(core, None),
                None => adapters(core, Some(format!("LoRA with name {name} is not loaded."))),
            })
        }
        ("GET" | "POST", "/flush_cache") => {
            let [running, waiting] = server.call(|core| core.load())?;
            let is_idle = running + waiting == 0;
            Some(Reply::Text(if is_idle { 200 } else { 400 }, "Cache flushed.\n".to_owned()))
        }
        _ => Some(Reply::not_found()),
    }
}

fn info(server: &Server, faults: &Faults) -> Option<Reply> {
    let options = server.options.clone();
    let version = faults.program_version.unwrap_or("0.5.23");
    let rank = options.max_lora_rank;
    server.call(move |core| {
        Reply::ok(json!({
            "model_path": core.base.root, "served_model_name": BASE, "context_length": options.max_model_len,
            "max_running_requests": options.max_num_seqs, "enable_lora": true, "max_lora_rank": rank,
            "weight_version": core.version, "version": version, "internal_states": [{}],
        }))
    })
}

/// Returns the parameters of a request under the names that vLLM has for them.
fn translated(body: &Value) -> (Value, Value) {
    let theirs = &body["sampling_params"];
    let mut ours = theirs.clone();
    if !ours.is_object() {
        ours = json!({});
    }
    ours["max_tokens"] = theirs["max_new_tokens"].as_u64().unwrap_or(128).into();
    ours["seed"].clone_from(&theirs["sampling_seed"]);
    let from = body["logprob_start_len"].as_i64().unwrap_or(-1);
    ours["prompt_logprobs"] = if from >= 0 && body["return_logprob"] == true { json!(0) } else { Value::Null };
    (json!({ "model": body["lora_path"].as_str().unwrap_or(BASE) }), ours)
}

fn generate(server: &Server, body: &Value, faults: &Faults, stream: &TcpStream) -> Option<Reply> {
    let (model, params) = translated(body);
    let done = match vllm::run(server, &model, [&body["input_ids"], &params], stream)? {
        Ok(done) => done,
        Err(Reply::Json(status, error)) => {
            let message = &error["error"]["message"];
            let status = if status == 500 { 500 } else { 400 };
            return Some(Reply::Json(status, json!({ "error": { "message": message } })));
        }
        Err(reply) => return Some(reply),
    };
    let one = |sampled: &Sampled| {
        let shown = Shown::of(sampled, faults, done.vocabulary);
        let mut meta = json!({
            "id": format!("{:032x}", u128::from(preceptor::util::seed::text(&json!(shown.ids).to_string()))),
            "finish_reason": finish(sampled), "prompt_tokens": done.prompt.len(), "completion_tokens": shown.ids.len(),
            "cached_tokens": 0, "e2e_latency": 0.01,
        });
        match &faults.versions {
            Versions::True => meta["weight_version"] = json!(done.answer.version),
            Versions::Always(version) => meta["weight_version"] = json!(version),
            Versions::Missing | Versions::Gap => {}
        }
        if body["return_logprob"] == true {
            let output = shown.logprobs.iter().zip(&shown.ids).map(|(logprob, id)| json!([logprob, id, null]));
            meta["output_token_logprobs"] = json!(output.collect::<Vec<_>>());
            meta["input_token_logprobs"] = json!(input(&done, body["logprob_start_len"].as_i64().unwrap_or(-1)));
        }
        json!({ "text": vllm::text(&done.tokenizer, sampled), "output_ids": shown.ids, "meta_info": meta })
    };
    let mut all: Vec<Value> = done.answer.completions.iter().map(one).collect();
    Some(Reply::ok(if all.len() == 1 { all.remove(0) } else { json!(all) }))
}

/// Returns the log-probabilities of the prompt's tokens from `start`; the first has none.
fn input(done: &Done, start: i64) -> Vec<Value> {
    let start = usize::try_from(start).unwrap_or(done.prompt.len() - 1);
    let known = done.answer.prompt_logprobs.as_deref().unwrap_or_default();
    let of = |(index, id): (usize, &u32)| {
        let logprob = if index == start { None } else { known.get(index.wrapping_sub(1)) };
        json!([logprob.map(|(logprob, _)| number(*logprob)), id, null])
    };
    done.prompt.iter().enumerate().skip(start).map(of).collect()
}

fn finish(sampled: &Sampled) -> Value {
    match &sampled.finish {
        Some(Finish::Eos) => json!({ "type": "stop", "matched": sampled.ids.last() }),
        Some(Finish::StopId(id)) => json!({ "type": "stop", "matched": id }),
        Some(Finish::StopString(text)) => json!({ "type": "stop", "matched": text }),
        Some(Finish::Abort) => json!({ "type": "abort", "message": "Abort in waiting queue", "status_code": null }),
        Some(Finish::Length) | None => json!({ "type": "length", "length": sampled.ids.len() }),
    }
}

/// Loads weights. Requests under way end first, unless they are paused or aborted. A failure leaves the old weights.
fn update(server: &Server, body: &Value, faults: &Faults) -> Option<Reply> {
    std::thread::sleep(faults.handover_delay);
    if body["abort_all_requests"] == true {
        server.pause(PauseMode::Abort)?;
    } else {
        server.pause(PauseMode::Wait)?;
    }
    let (dir, keeps) = (PathBuf::from(body["model_path"].as_str().unwrap_or_default()), faults.ignores_handover);
    let version = body["weight_version"].as_str().map(str::to_owned);
    let reply = server.call(move |core| {
        let mut base = core.base.clone();
        match if keeps { Ok(()) } else { base.reload(&dir, false) } {
            Ok(()) => {
                core.base = base;
                core.weights_changed();
                core.version = version.unwrap_or_else(|| core.version.clone());
                let message = "Succeeded to update model weights.";
                Reply::ok(json!({ "success": true, "message": message, "num_paused_requests": 0 }))
            }
            Err(error) => {
                let message = format!("Failed to update weights: {error:#}. Rolling back to original weights.");
                Reply::Json(400, json!({ "success": false, "message": message, "num_paused_requests": 0 }))
            }
        }
    })?;
    if body["keep_pause"] != true {
        server.resume()?;
    }
    Some(reply)
}

fn load_adapter(server: &Server, body: &Value, faults: &Faults) -> Option<Reply> {
    std::thread::sleep(faults.handover_delay);
    let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
    let path = PathBuf::from(body["lora_path"].as_str().unwrap_or_default());
    let (rank, keeps) = (server.options.max_lora_rank, faults.ignores_handover);
    server.call(move |core| {
        if core.adapters.contains_key(&name) {
            return adapters(core, Some(format!("LoRA with name {name} already exists.")));
        }
        let loaded = core.load_adapter(&name, &path, rank, keeps);
        adapters(core, loaded.err().map(|error| format!("{error:#}")))
    })
}

/// Returns the answer to a change of adapters, which succeeded if there is no error.
fn adapters(core: &Core, error: Option<String>) -> Reply {
    let loaded: Value = core.adapters.values().map(|adapter| (adapter.name.clone(), json!(adapter.path))).collect();
    let status = if error.is_none() { 200 } else { 400 };
    let message = error.as_deref().unwrap_or_default();
    Reply::Json(status, json!({ "success": error.is_none(), "error_message": message, "loaded_adapters": loaded }))
}

//! Tests of the fake inference server.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use preceptor::lm::model::{Decoder, ModelConfig, Pack, Weights, export};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Engine, Fixed, Request, generate_with};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::weights::{Adapter, Base};
use super::{FakeEngine, Faults, Kind, Options, Versions, copy_model};
use crate::common::{fixture, max_abs_difference, wait_until};

const PROMPT: [u32; 4] = [5, 17, 33, 80];

/// Sends a request and returns status and body; `None` if the connection ended before the answer.
fn ask_as(engine: &FakeEngine, method: &str, path: &str, body: &Value, key: Option<&str>) -> Option<(u16, Value)> {
    let mut stream = TcpStream::connect(engine.url().trim_start_matches("http://")).ok()?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let key = key.map_or(String::new(), |key| format!("Authorization: Bearer {key}\r\n"));
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{key}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).ok()?;
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut part).ok().filter(|count| *count > 0)?;
        text.extend_from_slice(&part[..count]);
        let known = String::from_utf8_lossy(&text).into_owned();
        let Some((head, body)) = known.split_once("\r\n\r\n") else { continue };
        let length: usize = head.split("Content-Length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
        if body.len() >= length {
            let status = head.split(' ').nth(1)?.parse().ok()?;
            return Some((status, serde_json::from_str(body).unwrap_or_else(|_| json!(body))));
        }
    }
}

#[track_caller]
fn ask(engine: &FakeEngine, method: &str, path: &str, body: &Value) -> (u16, Value) {
    ask_as(engine, method, path, body, None).expect("the server answers")
}

#[track_caller]
fn post(engine: &FakeEngine, path: &str, body: &Value) -> Value {
    let (status, answer) = ask(engine, "POST", path, body);
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

/// Starts a server of a fixture's model. It reads the copy in the directory again when it restarts.
fn start(kind: Kind, model: &str) -> (FakeEngine, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (FakeEngine::start(Options::new(kind, &copy_model(model, dir.path()))), dir)
}

fn wanted(model: &str, n: usize, tokens: usize) -> Value {
    let params =
        json!({ "max_tokens": tokens, "temperature": 1.0, "seed": 7, "logprobs": 0, "n": n, "ignore_eos": true });
    json!({ "model": model, "token_ids": PROMPT, "sampling_params": params })
}

fn sample(engine: &FakeEngine, model: &str) -> Value {
    post(engine, "/inference/v1/generate", &wanted(model, 1, 12))["choices"][0].clone()
}

/// Stops the engine once it has sampled `count` further tokens. Returns the number of tokens at that point.
fn stall(engine: &FakeEngine, count: u64) -> u64 {
    let at = engine.generated_tokens() + count;
    engine.faults(|faults| faults.stalls_at = Some(at));
    at
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn logprobs(choice: &Value) -> Vec<f32> {
    let content = choice["logprobs"]["content"].as_array().unwrap();
    content.iter().map(|token| token["logprob"].as_f64().unwrap() as f32).collect()
}

fn score(model: &Decoder, prompt: &[u32], ids: &[u32], temperature: f64) -> Vec<f32> {
    model.score(&Pack::new(prompt, &[ids]), &[temperature]).unwrap().remove(0)
}

#[track_caller]
fn assert_is_of(choice: &Value, model: &Decoder) {
    let ids = ids(&choice["token_ids"]);
    let gap = max_abs_difference(&logprobs(choice), &score(model, &PROMPT, &ids, 1.0));
    assert!(gap < 1e-5, "log-probabilities differ by {gap}");
}

fn decoder(dir: &Path) -> Decoder {
    let (config, weights) = Weights::from_directory(dir, &Device::Cpu).unwrap();
    Decoder::new(&config, &weights).unwrap()
}

/// Writes a model whose weights are those of `model` times `factor`, with a separate head if `head` is true. Returns the
/// directory and the model that a server has after it reads the directory.
fn scaled(dir: &Path, model: &str, factor: f64, head: bool) -> (PathBuf, Decoder) {
    let (config, old) = Weights::from_directory(&fixture(model), &Device::Cpu).unwrap();
    let scale = |(name, tensor): (&String, &candle_core::Tensor)| (name.clone(), (tensor * factor).unwrap());
    let mut new = Weights(old.0.iter().map(scale).collect());
    let embedding = "model.embed_tokens.weight";
    let served_head = if head { new.0[embedding].clone() } else { old.0[embedding].clone() };
    let dir = dir.join(format!("{factor}-{head}"));
    std::fs::create_dir(&dir).unwrap();
    if head {
        new.0.insert("lm_head.weight".into(), served_head.clone());
    }
    export::write(&dir, &config, &new, DType::F32).unwrap();
    new.0.insert("lm_head.weight".into(), served_head);
    (dir, Decoder::new(&ModelConfig { tied: false, ..config }, &new).unwrap())
}

fn reload(engine: &FakeEngine, dir: &Path) -> (u16, Value) {
    let body = json!({ "method": "reload_weights", "kwargs": { "weights_path": dir } });
    ask(engine, "POST", "/collective_rpc", &body)
}

/// Answers are a function of the weights and the seed, not of the batch size.
#[test]
fn completions_equal_those_of_the_library() {
    let (engine, _dir) = start(Kind::Vllm, "llama");
    let model = Arc::new(decoder(&fixture("llama")));
    let answer = post(&engine, "/inference/v1/generate", &wanted("policy", 20, 10));
    let sampling = Sampling { max_new_tokens: 10, ..Sampling::default() };
    let request = Request::new(PROMPT.to_vec(), (7..27).collect());
    let library = Engine::new(&sampling, 20).with_small_batch_kernels();
    let expected = generate_with(library, &mut Fixed(Arc::clone(&model)), vec![request]).unwrap().remove(0);
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), expected.len());
    for (choice, sampled) in choices.iter().zip(&expected) {
        assert_eq!((ids(&choice["token_ids"]), logprobs(choice)), (sampled.ids.clone(), sampled.logprobs.clone()));
        assert_is_of(choice, &model);
    }
    assert_eq!((engine.generated_tokens(), engine.weight_version()), (200, "default".to_owned()));
    // The fallback without versions, at another temperature.
    let body = json!({ "model": "policy", "prompt": PROMPT, "max_tokens": 6, "temperature": 0.7, "logprobs": 0, "return_token_ids": true });
    let choice = post(&engine, "/v1/completions", &body)["choices"][0].clone();
    let theirs: Vec<f32> =
        choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    assert!(max_abs_difference(&theirs, &score(&model, &PROMPT, &ids(&choice["token_ids"]), 0.7)) < 1e-5);
    // Log-probabilities of a prompt.
    let prompt: Vec<u32> = PROMPT.into_iter().chain(ids(&choices[0]["token_ids"])).collect();
    let body = json!({ "token_ids": prompt, "sampling_params": { "max_tokens": 1, "prompt_logprobs": 0 } });
    let known = post(&engine, "/inference/v1/generate", &body)["prompt_logprobs"].clone();
    let of = |(known, id): (&Value, &u32)| known[id.to_string()]["logprob"].as_f64().unwrap() as f32;
    let known: Vec<f32> = known.as_array().unwrap().iter().zip(&prompt).skip(1).map(of).collect();
    assert!(max_abs_difference(&known, &score(&model, &prompt[..1], &prompt[1..], 1.0)) < 1e-5);
}

#[test]
fn adapters_are_served_under_their_names() {
    let (engine, dir) = start(Kind::Vllm, "families/llama3");
    let base = Base::read(&copy_model("families/llama3", dir.path())).unwrap();
    let adapter = Adapter::read("a", &fixture("lora"), &base, 16).unwrap();
    let load = |name: &str, path: PathBuf| {
        ask(&engine, "POST", "/v1/load_lora_adapter", &json!({ "lora_name": name, "lora_path": path })).0
    };
    assert_eq!((load("a", fixture("lora")), load("a", fixture("lora")), load("b", fixture("none"))), (200, 400, 404));
    assert_eq!(engine.adapters(), ["a"]);
    let models = ask(&engine, "GET", "/v1/models", &Value::Null).1;
    let parent = |index: usize| (models["data"][index]["id"].clone(), models["data"][index]["parent"].clone());
    assert_eq!((parent(0), parent(1)), ((json!("policy"), Value::Null), (json!("a"), json!("policy"))));
    assert_is_of(&sample(&engine, "a"), &base.decoder(Some(&adapter)).unwrap());
    assert_is_of(&sample(&engine, "policy"), &base.decoder(None).unwrap());
    // A request that is under way keeps its adapter.
    let choice = std::thread::scope(|scope| {
        let at = stall(&engine, 3);
        let choice = scope.spawn(|| sample(&engine, "a"));
        wait_until("a request is under way", || engine.generated_tokens() == at);
        post(&engine, "/v1/unload_lora_adapter", &json!({ "lora_name": "a" }));
        engine.faults(|faults| faults.stalls_at = None);
        choice.join().unwrap()
    });
    assert_is_of(&choice, &base.decoder(Some(&adapter)).unwrap());
    assert_eq!(ask(&engine, "POST", "/v1/unload_lora_adapter", &json!({ "lora_name": "a" })).0, 404);
    assert_eq!(ask(&engine, "POST", "/inference/v1/generate", &wanted("a", 1, 1)).0, 404);
}

#[test]
fn a_switch_within_a_sequence_gives_exact_spans() {
    let (engine, dir) = start(Kind::Vllm, "llama");
    let old = decoder(&fixture("llama"));
    // Without a separate head in the file, a tied model keeps its old head.
    for (factor, head, version) in [(1.1, true, "8"), (0.9, false, "9")] {
        engine.restart();
        let (path, new) = scaled(dir.path(), "llama", factor, head);
        let stalled = stall(&engine, 5);
        let choice = std::thread::scope(|scope| {
            let answer = scope.spawn(|| post(&engine, "/inference/v1/generate", &wanted("policy", 1, 40)));
            wait_until("some tokens exist", || engine.generated_tokens() == stalled);
            post(&engine, "/pause?mode=keep&clear_cache=true", &Value::Null);
            engine.faults(|faults| faults.stalls_at = None);
            assert!(engine.is_paused());
            assert_eq!(reload(&engine, &path).0, 200);
            post(&engine, "/update_weight_version", &json!({ "new_version": version }));
            assert_eq!(engine.generated_tokens(), stalled);
            post(&engine, "/resume", &Value::Null);
            answer.join().unwrap()["choices"][0].clone()
        });
        let at = 5;
        let span = |version: &str, start: usize, end: usize| json!({ "version": version, "start": start, "end": end });
        assert_eq!(choice["weight_versions"], json!([span("default", 0, at), span(version, at, 40)]));
        let (ids, logprobs) = (ids(&choice["token_ids"]), logprobs(&choice));
        let [first, second] = [&old, &new].map(|model| score(model, &PROMPT, &ids, 1.0));
        assert!(max_abs_difference(&logprobs[..at], &first[..at]) < 1e-5);
        assert!(max_abs_difference(&logprobs[at..], &second[at..]) < 1e-5);
        assert!(max_abs_difference(&logprobs[at..], &first[at..]) > 1e-3, "the weights did not change");
        assert_is_of(&sample(&engine, "policy"), &new);
        assert_eq!(engine.weight_version(), version);
    }
    // A missing directory ends the engine.
    assert_eq!(reload(&engine, &dir.path().join("none")).0, 500);
    assert_eq!(ask(&engine, "POST", "/inference/v1/generate", &wanted("policy", 1, 1)).0, 500);
    assert_eq!(ask(&engine, "GET", "/health", &Value::Null).0, 503);
}

#[test]
fn pausing_aborts_or_waits_as_requested() {
    let (engine, _dir) = start(Kind::Vllm, "llama");
    for (mode, reason, tokens) in [("abort", "abort", 3), ("wait", "length", 12)] {
        let stalled = stall(&engine, 3);
        let choice = std::thread::scope(|scope| {
            let choice = scope.spawn(|| sample(&engine, "policy"));
            wait_until("some tokens exist", || engine.generated_tokens() == stalled);
            let paused = scope.spawn(|| post(&engine, &format!("/pause?mode={mode}"), &Value::Null));
            let has_paused = || engine.requests().last().unwrap().path == "/pause";
            wait_until("the engine is paused", || engine.is_paused() || (mode == "wait" && has_paused()));
            engine.faults(|faults| faults.stalls_at = None);
            paused.join().unwrap();
            choice.join().unwrap()
        });
        assert_eq!(choice["finish_reason"], reason);
        assert_eq!(ids(&choice["token_ids"]).len(), tokens);
        assert!(engine.is_paused());
        // The next request waits for the end of the pause.
        std::thread::scope(|scope| {
            let next = scope.spawn(|| sample(&engine, "policy"));
            wait_until("a request waits", || {
                ask(&engine, "GET", "/metrics", &Value::Null)
                    .1
                    .as_str()
                    .unwrap()
                    .contains("waiting{model_name=\"policy\"} 1")
            });
            post(&engine, "/resume", &Value::Null);
            assert_eq!(ids(&next.join().unwrap()["token_ids"]).len(), 12);
        });
    }
}

#[test]
fn a_killed_server_loses_its_state_and_keeps_its_port() {
    let (engine, _dir) = start(Kind::Vllm, "families/llama3");
    post(&engine, "/v1/load_lora_adapter", &json!({ "lora_name": "a", "lora_path": fixture("lora") }));
    post(&engine, "/update_weight_version", &json!({ "new_version": "3" }));
    post(&engine, "/pause?mode=keep", &Value::Null);
    std::thread::scope(|scope| {
        let pending = scope.spawn(|| ask_as(&engine, "POST", "/inference/v1/generate", &wanted("policy", 1, 4), None));
        wait_until("the request arrives", || engine.requests().iter().any(|one| one.path == "/inference/v1/generate"));
        engine.kill();
        assert_eq!(pending.join().unwrap(), None);
    });
    assert!(TcpStream::connect(engine.url().trim_start_matches("http://")).is_err());
    engine.restart();
    assert_eq!((engine.adapters(), engine.weight_version(), engine.is_paused()), (vec![], "default".into(), false));
    assert_is_of(&sample(&engine, "policy"), &decoder(&fixture("families/llama3")));
}

/// A client that gives up frees its slot.
#[test]
fn an_abandoned_request_ends() {
    let (engine, _dir) = start(Kind::Vllm, "llama");
    let stalled = stall(&engine, 2);
    let mut stream = TcpStream::connect(engine.url().trim_start_matches("http://")).unwrap();
    let body = wanted("policy", 2, 100).to_string();
    let text = format!("POST /inference/v1/generate HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).unwrap();
    let running = || {
        let text = ask(&engine, "GET", "/metrics", &Value::Null).1.as_str().unwrap().to_owned();
        text.lines().find(|line| line.starts_with("vllm:num_requests_running{")).unwrap().ends_with(" 2.0")
    };
    wait_until("the request runs", running);
    drop(stream);
    wait_until("the request ended", || !running());
    assert_eq!(engine.generated_tokens(), stalled);
}

#[test]
fn each_fault_is_visible_to_the_client() {
    let (engine, dir) = start(Kind::Vllm, "llama");
    let usual = sample(&engine, "policy");
    let base = decoder(&fixture("llama"));
    let set = |change: fn(&mut Faults)| {
        engine.faults(|faults| {
            *faults = Faults::default();
            change(faults);
        });
    };
    let try_sample = || ask_as(&engine, "POST", "/inference/v1/generate", &wanted("policy", 1, 12), None);
    let status = || try_sample().map(|(status, _)| status);
    set(|faults| faults.short_logprobs = true);
    assert_eq!(logprobs(&sample(&engine, "policy")).len(), 11);
    for bad in [Value::Null, json!("NaN")] {
        engine.faults(|faults| *faults = Faults { bad_logprob: Some(bad.clone()), ..Faults::default() });
        assert_eq!(sample(&engine, "policy")["logprobs"]["content"][0]["logprob"], bad);
    }
    set(|faults| faults.foreign_ids = true);
    assert_eq!(ids(&sample(&engine, "policy")["token_ids"])[11], 517);
    set(|faults| faults.versions = Versions::Always("old".into()));
    assert_eq!(sample(&engine, "policy")["weight_versions"], json!([{ "version": "old", "start": 0, "end": 12 }]));
    set(|faults| faults.versions = Versions::Gap);
    assert_eq!(sample(&engine, "policy")["weight_versions"][0]["end"], 11);
    set(|faults| faults.versions = Versions::Missing);
    assert!(sample(&engine, "policy").get("weight_versions").is_none());
    set(|faults| faults.closes_mid_answer = true);
    assert_eq!(status(), None);
    set(|faults| faults.fail_next = 2);
    assert_eq!([status(), status(), status()], [Some(500), Some(500), Some(200)]);
    set(|faults| faults.no_scale_out = true);
    assert_eq!(status(), Some(403));
    set(|faults| faults.tokens_per_second = Some(200.0));
    let begin = Instant::now();
    assert_eq!(status(), Some(200));
    assert!(begin.elapsed() >= Duration::from_millis(55));
    set(|faults| (faults.paths, faults.delay) = (vec!["/health"], Duration::from_millis(50)));
    let begin = Instant::now();
    ask(&engine, "GET", "/health", &Value::Null);
    assert!(begin.elapsed() >= Duration::from_millis(50));
    // A hanging request ends with its connection.
    set(|faults| faults.hang = true);
    std::thread::scope(|scope| {
        let hanging = scope.spawn(status);
        wait_until("the request arrives", || engine.requests().last().unwrap().path == "/inference/v1/generate");
        engine.restart();
        assert_eq!(hanging.join().unwrap(), None);
    });
    set(|faults| faults.program_version = Some("0.1"));
    assert_eq!(ask(&engine, "GET", "/version", &Value::Null).1, json!({ "version": "0.1" }));
    set(|faults| faults.tokens = Some(vec![1, 2]));
    let text = json!({ "prompt": "ab", "add_special_tokens": false });
    assert_eq!(post(&engine, "/tokenize", &text)["tokens"], json!([1, 2]));
    set(|_| {});
    let answer = post(&engine, "/tokenize", &text);
    assert_eq!((&answer["tokens"], &answer["count"]), (&json!([97, 98]), &json!(2)));
    // bf16 differs, by less than its precision.
    set(|faults| faults.bf16 = true);
    let rounded = sample(&engine, "policy");
    let exact = score(&base, &PROMPT, &ids(&rounded["token_ids"]), 1.0);
    let gap = max_abs_difference(&logprobs(&rounded), &exact);
    assert!(gap > 1e-5 && gap < 0.2, "{gap}");
    // Changes of weights that are acknowledged and not made.
    set(|faults| (faults.ignores_handover, faults.ignores_resume) = (true, true));
    assert_eq!(reload(&engine, &scaled(dir.path(), "llama", 1.2, true).0).0, 200);
    assert_eq!(sample(&engine, "policy")["logprobs"], usual["logprobs"]);
    let adapter = json!({ "lora_name": "a", "lora_path": fixture("lora") });
    post(&engine, "/v1/load_lora_adapter", &adapter);
    assert_eq!(sample(&engine, "a")["logprobs"], usual["logprobs"]);
    post(&engine, "/pause?mode=keep", &Value::Null);
    assert_eq!(post(&engine, "/resume", &Value::Null), json!({ "status": "resumed" }));
    assert!(engine.is_paused());
    set(|faults| (faults.no_lora_updates, faults.handover_delay) = (true, Duration::from_millis(50)));
    assert_eq!(ask(&engine, "POST", "/v1/unload_lora_adapter", &adapter).0, 404);
    let begin = Instant::now();
    reload(&engine, &dir.path().join("llama"));
    assert!(begin.elapsed() >= Duration::from_millis(50));
}

#[test]
fn sglangs_protocol_is_spoken() {
    let (engine, dir) = start(Kind::Sglang, "llama");
    let old = decoder(&fixture("llama"));
    let params = json!({ "max_new_tokens": 8, "temperature": 1.0, "ignore_eos": true });
    let body =
        json!({ "input_ids": PROMPT, "sampling_params": params, "return_logprob": true, "logprob_start_len": 0 });
    let check = |model: &Decoder, version: &str| {
        let answer = post(&engine, "/generate", &body);
        let meta = &answer["meta_info"];
        let values = |list: &Value| -> Vec<f32> {
            list.as_array().unwrap().iter().filter_map(|one| Some(one[0].as_f64()? as f32)).collect()
        };
        let output = score(model, &PROMPT, &ids(&answer["output_ids"]), 1.0);
        assert!(max_abs_difference(&values(&meta["output_token_logprobs"]), &output) < 1e-5);
        let input = score(model, &PROMPT[..1], &PROMPT[1..], 1.0);
        assert!(max_abs_difference(&values(&meta["input_token_logprobs"]), &input) < 1e-5);
        assert_eq!(
            (&meta["finish_reason"], &meta["weight_version"]),
            (&json!({ "type": "length", "length": 8 }), &json!(version))
        );
    };
    check(&old, "default");
    let update = |path: &Path| {
        let body = json!({ "model_path": path, "weight_version": "4", "flush_cache": true });
        ask(&engine, "POST", "/update_weights_from_disk", &body).0
    };
    // A failure leaves the old weights. A tied head follows the embedding.
    assert_eq!(update(&dir.path().join("none")), 400);
    check(&old, "default");
    assert_eq!(update(&scaled(dir.path(), "llama", 1.1, false).0), 200);
    check(&scaled(dir.path(), "llama", 1.1, true).1, "4");
    post(&engine, "/pause_generation", &json!({ "mode": "retract" }));
    assert!(engine.is_paused());
    post(&engine, "/continue_generation", &json!({}));
    let info = ask(&engine, "GET", "/get_model_info", &Value::Null).1;
    assert_eq!(info["weight_version"], "4");
    assert_eq!(ask(&engine, "GET", "/server_info", &Value::Null).1["version"], "0.5.23");
    assert_eq!(ask(&engine, "POST", "/flush_cache", &Value::Null).0, 200);

    let (engine, _dir) = start(Kind::Sglang, "families/llama3");
    let adapter = json!({ "lora_name": "a", "lora_path": fixture("lora") });
    assert_eq!(post(&engine, "/load_lora_adapter", &adapter)["loaded_adapters"], json!({ "a": fixture("lora") }));
    assert_eq!(ask(&engine, "POST", "/load_lora_adapter", &adapter).0, 400);
    let body = json!({ "input_ids": PROMPT, "sampling_params": { "n": 2 }, "lora_path": "a" });
    assert_eq!(post(&engine, "/generate", &body).as_array().unwrap().len(), 2);
    post(&engine, "/unload_lora_adapter", &adapter);
    assert_eq!(ask(&engine, "POST", "/generate", &body).0, 400);
}

/// Checks that two answers have the same keys at all levels. Dictionaries by token have only their values compared.
fn check_keys(theirs: &Value, ours: &Value, path: &str) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) if path.ends_with("logprobs[]") && theirs.len() == 1 => {
            for (theirs, ours) in theirs.values().zip(ours.values()) {
                check_keys(theirs, ours, &format!("{path}.*"));
            }
        }
        (Value::Object(theirs), Value::Object(ours)) => {
            let keys = |map: &serde_json::Map<String, Value>| map.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(keys(theirs), keys(ours), "{path}");
            for (key, theirs) in theirs {
                check_keys(theirs, &ours[key], &format!("{path}.{key}"));
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => {
            for (theirs, ours) in theirs.iter().zip(ours) {
                check_keys(theirs, ours, &format!("{path}[]"));
            }
        }
        (Value::Number(_), Value::Number(_)) | (Value::String(_), Value::String(_)) => {}
        // The reason depends on the sampled token.
        _ if path.ends_with(".stop_reason") => {}
        _ => assert_eq!(theirs, ours, "{path}"),
    }
}

#[test]
fn answers_have_the_recorded_form() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::new(Kind::Vllm, &copy_model("families/llama3", dir.path()));
    let mut key = Some("secret".to_owned());
    let small = FakeEngine::start(Options { api_key: key.clone(), ..options });
    let options = Options::new(Kind::Vllm, &copy_model("llama", dir.path()));
    let engine = FakeEngine::start(Options { api_key: key.take(), ..options });
    let text = std::fs::read_to_string(fixture("vllm/exchanges.json")).unwrap();
    let exchanges: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(exchanges.len(), 28);
    let (v1, _) = scaled(dir.path(), "llama", 1.1, true);
    for exchange in &exchanges {
        let (name, path) = (exchange["name"].as_str().unwrap(), exchange["path"].as_str().unwrap());
        let mut body = exchange["request"].clone();
        // Adapters are loaded onto the model that the fixture's adapter belongs to.
        let is_adapter =
            path.contains("lora_adapter") || body["model"].as_str().is_some_and(|name| name.starts_with("policy-"));
        let server = if is_adapter || name == "no_auth" { &small } else { &engine };
        if body.get("lora_path").is_some() {
            body["lora_path"] = json!(fixture("lora"));
        }
        if name == "reload" {
            body["kwargs"]["weights_path"] = json!(v1);
        }
        if is_adapter && body.get("token_ids").is_some() {
            let load = json!({ "lora_name": body["model"], "lora_path": fixture("lora") });
            ask_as(&small, "POST", "/v1/load_lora_adapter", &load, Some("secret"));
        }
        let key = Some("secret").filter(|_| name != "no_auth");
        let (status, answer) = ask_as(server, exchange["method"].as_str().unwrap(), path, &body, key).unwrap();
        assert_eq!(json!(status), exchange["status"], "{name}: {answer}");
        check_keys(&exchange["answer"], &answer, name);
    }
    // The key does not guard the routes of administration.
    assert_eq!(ask(&small, "POST", "/pause?mode=keep", &Value::Null).0, 200);
    assert_eq!(small.requests().last().unwrap().query, "mode=keep");
    assert_eq!(small.requests()[0].bearer, None);
}

//! Tests of model directories in common layouts: which are read, which are refused before compute is spent, and which
//! files checkpoints keep.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use preceptor::lm::model::{ModelConfig, Weights, export};
use preceptor::lm::tokens::Tokenizer;
use serde_json::{Value, json};

use crate::common::{preceptor, stderr, train};

/// Creates a byte-level model in `dir/model` whose embedding has `rows` rows.
fn model(dir: &Path, rows: usize) -> PathBuf {
    let tokenizer = Tokenizer::bytes();
    let config = ModelConfig {
        context: 1024,
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_ids().to_vec(),
        ..ModelConfig::tiny(rows)
    };
    let path = dir.join("model");
    std::fs::create_dir_all(&path).unwrap();
    let weights = Weights::scratch(&config, 0.08, 1, &Device::Cpu).unwrap();
    export::write(&path, &config, &weights, DType::F32).unwrap();
    tokenizer.save(&path).unwrap();
    path
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        .unwrap()
}

/// Sets keys of a JSON file; null removes a key.
fn set(path: &Path, keys: &Value) {
    let mut json = if path.exists() { read(path) } else { json!({}) };
    for (key, value) in keys.as_object().unwrap() {
        if value.is_null() {
            json.as_object_mut().unwrap().remove(key);
        } else {
            json[key] = value.clone();
        }
    }
    std::fs::write(path, json.to_string()).unwrap();
}

/// Changes the tensors of a model directory.
fn change(model: &Path, with: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = model.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    with(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn trained(dir: &Path, model: &Path, overrides: &[&str]) -> (PathBuf, String) {
    let model = format!("policy.model=\"{}\"", model.display());
    let output = train(dir, &[&[model.as_str(), "run.steps=1"], overrides].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    (dir.join("run/checkpoints/step-000001"), stderr(&output))
}

#[track_caller]
fn refused(model: &Path, overrides: &[&str], words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let model = format!("policy.model=\"{}\"", model.display());
    let output = train(dir.path(), &[&[model.as_str()], overrides].concat());
    let text = stderr(&output);
    assert!(!output.status.success() && !text.contains("step   1/"), "it should have been refused: {text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
}

#[test]
fn checkpoints_keep_the_generation_config_and_all_end_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    let own = json!({ "eos_token_id": [10, 258], "temperature": 0.6, "top_p": 0.95, "pad_token_id": 256, "x": [1] });
    set(&model.join("generation_config.json"), &own);
    set(&model.join("config.json"), &json!({ "eos_token_id": 33, "pad_token_id": 256 }));
    let (checkpoint, _) = trained(dir.path(), &model, &[]);
    let (kept, mut expected) =
        (read(&checkpoint.join("generation_config.json")), read(&model.join("generation_config.json")));
    expected["eos_token_id"] = json!([258, 10, 33]);
    assert_eq!(kept, expected);
    let config = read(&checkpoint.join("config.json"));
    assert_eq!((&config["eos_token_id"], &config["pad_token_id"]), (&json!([258, 10, 33]), &json!(256)));
    // All of them end a generated completion, too.
    let output = preceptor(dir.path())
        .args(["generate", "model", "a", "--json", "--samples", "200", "--max-new-tokens", "60"])
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let completions: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_end = |id: &Value| [258, 10, 33].iter().any(|end| id == end);
    let ended = completions.iter().filter(|one| is_end(one["ids"].as_array().unwrap().last().unwrap())).count();
    assert!(completions.len() == 200 && ended > 20, "{ended} of {} ended", completions.len());
    for one in &completions {
        let ids = one["ids"].as_array().unwrap();
        assert!(!ids[..ids.len() - 1].iter().any(is_end), "it continued after its end: {one}");
    }
}

#[test]
fn a_policy_without_an_end_token_is_reported_and_a_missing_eos_penalty_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    for name in ["config.json", "generation_config.json"] {
        set(&model.join(name), &json!({ "eos_token_id": null }));
    }
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        set(&model.join(name), &json!({ "eos_token": null }));
    }
    // The chat template ends answers with a token, which is used.
    let chat = tempfile::tempdir().unwrap();
    let (checkpoint, reported) = trained(chat.path(), &model, &["reward.missing_eos_penalty=1"]);
    assert!(reported.contains("completions end with \"<|im_end|>\", which its chat template writes"), "{reported}");
    assert_eq!(read(&checkpoint.join("generation_config.json"))["eos_token_id"], json!([258]));
    set(&model.join("tokenizer_config.json"), &json!({ "chat_template": null }));
    let plain = ["data.chat=false"];
    let (checkpoint, reported) = trained(dir.path(), &model, &plain);
    assert!(reported.contains("the policy has no end token"), "{reported}");
    assert_eq!(read(&checkpoint.join("generation_config.json"))["eos_token_id"], Value::Null);
    let penalty = [plain[0], "reward.missing_eos_penalty=1"];
    refused(
        &model,
        &penalty,
        &["reward.missing_eos_penalty = 1 would be subtracted from the reward of every completion"],
    );
    let output = preceptor(dir.path()).args(["generate", "model", "a", "--max-new-tokens", "2"]).output().unwrap();
    assert!(stderr(&output).contains("the model has no end token"), "{}", stderr(&output));
    // A stop string also ends completions.
    let other = tempfile::tempdir().unwrap();
    let (_, reported) =
        trained(other.path(), &model, &[plain[0], "rollout.stop=[\"x\"]", "reward.missing_eos_penalty=1"]);
    assert!(!reported.contains("no end token"), "{reported}");
}

#[test]
fn stray_tensors_are_reported_and_neither_trained_nor_written() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    change(&model, |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.7.input_layernorm.weight"] {
            tensors.insert(name.into(), norm.clone());
        }
    });
    let (checkpoint, reported) = trained(dir.path(), &model, &["learner.weight_decay=0.5", "policy.dtype=f32"]);
    assert!(
        reported.contains("1 tensors are not part of a LlamaForCausalLM") && reported.contains("layers.7"),
        "{reported}"
    );
    let written = candle_core::safetensors::load(checkpoint.join("model.safetensors"), &Device::Cpu).unwrap();
    assert!(written.keys().all(|name| !name.contains("inv_freq") && !name.contains("layers.7")));
    // Serving programs read all `.safetensors` files at the top level.
    let at_the_top = std::fs::read_dir(&checkpoint).unwrap().map(|entry| entry.unwrap().path());
    let weights: Vec<PathBuf> =
        at_the_top.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect();
    assert_eq!(weights, [checkpoint.join("model.safetensors")]);
    assert!(checkpoint.join("value_model/model.safetensors").exists());
}

#[test]
fn a_head_that_differs_from_the_embedding_is_trained_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    change(&model, |tensors| {
        let head = (&tensors["model.embed_tokens.weight"] * 2.0).unwrap();
        tensors.insert("lm_head.weight".into(), head);
    });
    assert_eq!(read(&model.join("config.json"))["tie_word_embeddings"], true);
    let (checkpoint, reported) = trained(dir.path(), &model, &[]);
    assert!(reported.contains("lm_head.weight differs from model.embed_tokens.weight"), "{reported}");
    assert_eq!(read(&checkpoint.join("config.json"))["tie_word_embeddings"], false);
    let written = candle_core::safetensors::load(checkpoint.join("model.safetensors"), &Device::Cpu).unwrap();
    assert!(written.contains_key("lm_head.weight"));
}

#[test]
fn quantised_models_are_refused_before_compute() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    let config = model.join("config.json");
    set(&config, &json!({ "quantization_config": { "quant_method": "fp8" } }));
    refused(&model, &[], &["quantization_config", "method: fp8", "config.json", "dequantise"]);
    set(&config, &json!({ "quantization_config": null }));
    change(&model, |tensors| {
        let name = "model.layers.0.mlp.up_proj.weight";
        let rounded = tensors[name].to_dtype(DType::U8).unwrap();
        tensors.insert(name.into(), rounded);
    });
    refused(&model, &[], &["up_proj.weight", "type U8, which are quantised", "model.safetensors"]);
    let output = preceptor(dir.path()).args(["generate", "model", "hi"]).output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("type U8"), "{}", stderr(&output));
}

#[test]
fn rows_beyond_the_tokenizer_are_never_sampled() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 300);
    // These rows would be the most likely ones by far.
    change(&model, |tensors| {
        let embedding = &tensors["model.embed_tokens.weight"];
        let padding = (embedding.narrow(0, 0, 41).unwrap() * 9.0).unwrap();
        let embedding = Tensor::cat(&[&embedding.narrow(0, 0, 259).unwrap(), &padding], 0).unwrap();
        tensors.insert("model.embed_tokens.weight".into(), embedding);
    });
    for how in [&["--greedy"][..], &["--samples", "20"], &["--samples", "20", "--top-k", "5"]] {
        let arguments = [&["generate", "model", "abc", "--json", "--max-new-tokens", "20"], how].concat();
        let output = preceptor(dir.path()).args(arguments).output().unwrap();
        let lines = String::from_utf8_lossy(&output.stdout);
        for line in lines.lines() {
            let ids = serde_json::from_str::<Value>(line).unwrap()["ids"].clone();
            assert!(ids.as_array().unwrap().iter().all(|id| id.as_u64().unwrap() < 259), "{how:?}: {ids}");
        }
        assert!(!lines.is_empty(), "{}", stderr(&output));
    }
    // Sampled tokens must have the log-probability that the learner computes.
    let (checkpoint, _) = trained(dir.path(), &model, &["learner.eta=0", "rollout.update=between-groups"]);
    let metrics = crate::common::metrics(checkpoint.parent().unwrap().parent().unwrap());
    let ratio = metrics[0]["ratio/mean"].as_f64().unwrap();
    assert!((ratio - 1.0).abs() < 1e-4, "{ratio}");
}

/// Sizes of one family may pad their embeddings differently, as Qwen's do.
#[test]
fn a_reward_model_may_pad_its_embedding_differently_but_must_share_the_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let policy = model(dir.path(), 259);
    let other = tempfile::tempdir().unwrap();
    let padded = model(other.path(), 320);
    let distilled = [
        "run.mode=\"distilled\"".to_owned(),
        format!("reward_model.model=\"{}\"", padded.display()),
        "reward_model.warm_up_groups=4".to_owned(),
    ];
    let distilled: Vec<&str> = distilled.iter().map(String::as_str).collect();
    let (checkpoint, _) = trained(dir.path(), &policy, &distilled);
    let config = read(&checkpoint.join("reward_model/config.json"));
    assert_eq!((&config["vocab_size"], &config["pad_token_id"]), (&json!(320), &json!(256)));
    // Swaps the ids of two letters.
    let vocabulary = std::fs::read_to_string(padded.join("tokenizer.json")).unwrap();
    let swapped = vocabulary.replace("\"q\":113", "\"q\":0").replace("\"r\":114", "\"r\":113");
    let swapped = swapped.replace("\"q\":0", "\"q\":114");
    assert_ne!(vocabulary, swapped);
    std::fs::write(padded.join("tokenizer.json"), swapped).unwrap();
    refused(&policy, &distilled, &["reward_model.model", "its vocabulary differs from that of the policy"]);
}

#[test]
fn adapters_name_the_model_they_are_for() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    let (checkpoint, _) = trained(dir.path(), &model, &["policy.lora={ rank = 2, targets = [\"q_proj\"] }"]);
    let config = read(&checkpoint.join("adapter/adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"].as_str().unwrap(), model.to_str().unwrap());
}

#[test]
fn directories_without_safetensors_are_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), 259);
    let weights = model.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    refused(&model, &[], &["model.safetensors", "is the download complete?"]);
    std::fs::rename(&weights, model.join("pytorch_model.bin")).unwrap();
    refused(&model, &[], &["pytorch_model.bin is not read", "save_pretrained()"]);
    std::fs::rename(model.join("config.json"), model.join("adapter_config.json")).unwrap();
    refused(&model, &[], &["PEFT adapter", "merge_and_unload()"]);
}

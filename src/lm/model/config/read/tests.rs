//! Configurations as published models have them.

use serde_json::json;

use super::*;
use crate::lm::model::rope::Scaling;

#[test]
fn a_value_of_another_type_is_rejected_instead_of_replaced_by_a_default() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families/gemma3/config.json");
    let sound: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let error = |key: &str, value: Json| {
        let mut json = sound.clone();
        json[key] = value;
        format!("{:#}", ModelConfig::from_json(&json, Head::Language).unwrap_err())
    };
    for (key, expected) in KEYS {
        let wrong = if *expected == Type::Object { json!("a") } else { json!({ "a": 1 }) };
        let error = error(key, wrong);
        assert!(error.contains(&format!("{key} is ")) && error.contains("and must be"), "{error}");
    }
    assert!(error("rope_theta", json!("500000")).contains("rope_theta is \"500000\", and must be a number"));
    let rope = json!({ "full_attention": { "rope_type": "linear", "factor": "8" } });
    assert!(error("rope_parameters", rope).contains("factor is \"8\", and must be a number"));
    let rope = json!({ "full_attention": { "rope_type": "linear", "factor": 0 } });
    assert!(error("rope_parameters", rope).contains("factor = 0 must be above zero"));
}

#[test]
fn numbers_that_make_a_model_useless_are_rejected() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families/gemma3/config.json");
    let mut json: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("rope_parameters");
    for (key, value) in [
        ("rope_theta", json!(0)),
        ("rope_theta", json!(-10000.0)),
        ("rope_local_base_freq", json!(0.0)),
        ("attn_logit_softcapping", json!(0)),
        ("final_logit_softcapping", json!(-1)),
        ("query_pre_attn_scalar", json!(0)),
        ("rms_norm_eps", json!(-1e-6)),
    ] {
        let mut json = json.clone();
        json[key] = value;
        let error = format!("{:#}", ModelConfig::from_json(&json, Head::Language).unwrap_err());
        assert!(error.contains("must be a number"), "{key}: {error}");
    }
}

#[test]
fn sizes_beyond_any_model_are_rejected_before_use() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families/gemma3/config.json");
    let sound: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    ModelConfig::from_json(&sound, Head::Language).unwrap();
    for (key, size, words) in [
        ("num_hidden_layers", 1u64 << 60, "num_hidden_layers = 1152921504606846976 is more than 16777216"),
        ("num_hidden_layers", 5000, "5000 layers are more than 4096"),
        ("head_dim", 1 << 24, "heads times head_dim = "),
        ("vocab_size", u64::MAX, "vocab_size = 18446744073709551615 is more than"),
        ("max_position_embeddings", 1 << 40, "max_position_embeddings = 1099511627776 is more than"),
        ("sliding_window", 1 << 40, "sliding_window = 1099511627776 is more than"),
    ] {
        let mut json = sound.clone();
        json[key] = json!(size);
        let error = format!("{:#}", ModelConfig::from_json(&json, Head::Language).unwrap_err());
        assert!(error.contains(words), "{key}: {error}");
    }
}

fn family(name: &str) -> Json {
    let path = format!("{}/tests/fixtures/families/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
    let mut json: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("rope_parameters");
    json
}

fn changed(name: &str, change: Json) -> Result<ModelConfig> {
    let mut json = family(name);
    json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    ModelConfig::from_json(&json, Head::Language)
}

/// The expected values are those of `AutoConfig` of `transformers` 5.24: the final `rope_parameters`, which include the
/// bases.
#[test]
fn contradicting_rotary_parameters_are_read_as_by_transformers() {
    use Scaling::{Linear, Llama3, None};
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    let stretched = |original| Llama3 { factor: 8.0, low: 1.0, high: 4.0, original };
    let default = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    for (change, theta, scaling) in [
        (json!({}), 1e4, None),
        (json!({ "rope_theta": 5e5 }), 5e5, None),
        (json!({ "rope_parameters": default(5e5) }), 5e5, None),
        (json!({ "rope_theta": 1e4, "rope_parameters": default(5e5) }), 5e5, None),
        (json!({ "rope_theta": 5e5, "rope_parameters": { "rope_type": "default" } }), 5e5, None),
        (json!({ "rope_theta": null, "rope_parameters": default(5e5) }), 5e5, None),
        (json!({ "rope_parameters": default(5e5), "rope_scaling": linear }), 1e4, Linear(4.0)),
        (json!({ "rope_theta": 2e4, "rope_parameters": default(5e5), "rope_scaling": linear }), 2e4, Linear(4.0)),
        (json!({ "rope_parameters": linear, "rope_scaling": null }), 1e4, Linear(4.0)),
        (json!({ "rope_parameters": linear, "rope_scaling": {} }), 1e4, Linear(4.0)),
        (json!({ "rope_parameters": linear, "rope_scaling": { "type": "default" } }), 1e4, None),
        (json!({ "rope_scaling": { "type": "linear", "factor": 4 } }), 1e4, Linear(4.0)),
        (json!({ "rope_scaling": { "type": "linear", "rope_type": "default" } }), 1e4, None),
        // Without its own value, the original context is the context.
        (json!({ "rope_scaling": llama3 }), 1e4, stretched(128.0)),
        (json!({ "rope_scaling": llama3, "original_max_position_embeddings": 64 }), 1e4, stretched(64.0)),
        (json!({ "rope_theta": 1e6, "rope_parameters": { "partial_rotary_factor": 1.0 } }), 1e6, None),
    ] {
        let config = changed("qwen3", change.clone()).unwrap();
        assert_eq!((config.rope_theta, config.rope_scaling), (theta, scaling), "{change}");
    }
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 });
    let yarn = changed("qwen2", json!({ "rope_parameters": default(5e5), "rope_scaling": yarn })).unwrap();
    let expected =
        Scaling::Yarn { factor: 4.0, fast: 32.0, slow: 1.0, original: 32.0, truncate: true, attention: Option::None };
    assert_eq!((yarn.rope_theta, yarn.rope_scaling), (1e4, expected));
}

/// The expected values are those of `AutoConfig` of `transformers` 5.24, by kind of layer.
#[test]
fn rotary_parameters_of_gemma_3_are_read_by_kind_of_layer() {
    use Scaling::{Linear, None};
    let linear = json!({ "rope_type": "linear", "factor": 8.0 });
    let default = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    for (change, theta, scaling, local, local_scaling) in [
        (json!({}), 1e6, None, 1e4, None),
        (json!({ "rope_theta": 5e5, "rope_local_base_freq": 2e4 }), 5e5, None, 2e4, None),
        (json!({ "rope_theta": 5e5, "rope_scaling": linear }), 5e5, Linear(8.0), 1e4, None),
        (json!({ "rope_theta": 1e4, "rope_parameters": { "full_attention": default(5e5) } }), 5e5, None, 1e4, None),
        (
            json!({ "rope_parameters": { "full_attention": null, "sliding_attention": default(3e4) } }),
            1e6,
            None,
            3e4,
            None,
        ),
        (json!({ "rope_parameters": { "sliding_attention": linear } }), 1e6, None, 1e4, Linear(8.0)),
        (
            json!({ "rope_parameters": { "full_attention": default(5e5) }, "rope_scaling": linear }),
            5e5,
            Linear(8.0),
            1e4,
            None,
        ),
    ] {
        let config = changed("gemma3", change.clone()).unwrap();
        let read = (config.rope_theta, config.rope_scaling, config.local_rope_theta, config.local_rope_scaling);
        assert_eq!(read, (theta, scaling, Some(local), local_scaling), "{change}");
        let again = ModelConfig::from_json(&config.to_json(Head::Language), Head::Language).unwrap();
        assert_eq!(again, config, "{change}");
    }
}

#[test]
fn an_unsupported_configuration_is_rejected_by_its_key() {
    let by_layer = json!({ "full_attention": { "rope_theta": 5e5 } });
    let flat = json!({ "rope_type": "default", "rope_theta": 5e5 });
    for (name, change, words) in [
        ("qwen3", json!({ "rope_parameters": by_layer }), "by kind of layer (full_attention), which only Gemma 3"),
        ("gemma3", json!({ "rope_parameters": flat }), "by kind of layer, under full_attention"),
        ("gemma3", json!({ "rope_scaling": by_layer }), "rope_scaling has full_attention"),
        ("gemma3", json!({ "rope_parameters": { "full_attention": 3 } }), "rope_parameters.full_attention is 3"),
        ("qwen3", json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor = 0.5 is not supported"),
        ("gemma3", json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor = 0.5 is not supported"),
        ("llama3", json!({ "rope_parameters": { "partial_rotary_factor": 0.25 } }), "partial_rotary_factor = 0.25"),
        ("llama3", json!({ "rope_theta": null }), "rope_theta is null, and must be a number"),
        ("llama3", json!({ "rope_parameters": { "rope_theta": "500000" } }), "rope_theta is \"500000\""),
        ("llama3", json!({ "rope_parameters": { "rope_theta": -1 } }), "rope_theta = -1 must be"),
        ("llama3", json!({ "rope_scaling": { "factor": 4.0 } }), "factor = 4 without a type of scaling"),
        ("llama3", json!({ "rope_scaling": { "type": "dynamic", "factor": 2 } }), "type dynamic is not supported"),
        ("llama3", json!({ "rope_scaling": { "type": "longrope" } }), "type longrope is not supported"),
        ("llama3", json!({ "rope_scaling": { "type": "yarn" } }), "type yarn needs factor"),
        ("llama3", json!({ "quantization_config": { "quant_method": "fp8" } }), "method: fp8"),
        ("llama3", json!({ "dtype": "float8_e4m3fn" }), "dtype = \"float8_e4m3fn\" is not supported"),
        ("llama3", json!({ "torch_dtype": "int8" }), "torch_dtype = \"int8\""),
        ("llama3", json!({ "hidden_act": "gelu" }), "hidden_act = gelu is not supported"),
        ("llama3", json!({ "attention_bias": true }), "attention_bias = true is not supported"),
        ("gemma3", json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention = true"),
        ("llama3", json!({ "model_type": "mistral" }), "LlamaForCausalLM has model_type = \"llama\""),
        ("llama3", json!({ "architectures": ["LlamaForSequenceClassification"] }), "use it as reward_model.model"),
        ("llama3", json!({ "architectures": ["BertForMaskedLM"] }), "BertForMaskedLM is not supported here"),
        ("llama3", json!({ "architectures": ["X"], "vision_config": {} }), "images or audio"),
        ("llama3", json!({ "architectures": null, "model_type": "phi3" }), "model_type phi3 without architectures"),
        ("llama3", json!({ "architectures": [], "model_type": null }), "neither architectures nor model_type"),
        ("llama3", json!({ "num_key_value_heads": 3 }), "4 heads cannot share 3"),
        ("llama3", json!({ "hidden_size": 34, "head_dim": null }), "not a multiple of num_attention_heads = 4"),
        ("gemma3", json!({ "layer_types": ["full_attention"] }), "layer_types has 1 entries"),
        ("gemma3", json!({ "layer_types": ["full_attention", "chunked_attention"] }), "chunked_attention"),
        ("llama3", json!({ "layer_types": ["full_attention", "sliding_attention"] }), "layer_types contradicts"),
        ("qwen2", json!({ "layer_types": ["full_attention", "sliding_attention"] }), "no window is in use"),
    ] {
        let error = format!("{:#}", changed(name, change.clone()).expect_err(&change.to_string()));
        assert!(error.contains(words), "{change}: {error}");
    }
}

/// The expected values are those of the configuration classes of `transformers` 5.24.
#[test]
fn absent_keys_have_the_defaults_of_their_family() {
    for (name, context, kv_heads, head_dim, window) in [
        ("llama3", 2048, 4, 8, None),
        ("mistral", 131_072, 8, 8, Some(4096)),
        ("qwen2", 32_768, 32, 8, None),
        ("qwen3", 32_768, 32, 128, None),
        ("gemma2", 8192, 4, 256, Some(4096)),
        ("gemma3", 131_072, 4, 256, Some(4096)),
    ] {
        let mut json = family(name);
        let heads = if kv_heads > 4 { kv_heads } else { 4 };
        json["num_attention_heads"] = json!(heads);
        json["hidden_size"] = json!(8 * heads);
        for key in ["max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window"] {
            json.as_object_mut().unwrap().remove(key);
        }
        let config = ModelConfig::from_json(&json, Head::Language).unwrap();
        let size = config.window.as_ref().map(|window| window.size);
        assert_eq!((config.context, config.kv_heads, config.head_dim, size), (context, kv_heads, head_dim, window));
        json["num_key_value_heads"] = Json::Null;
        json["head_dim"] = Json::Null;
        let config = ModelConfig::from_json(&json, Head::Language).unwrap();
        assert_eq!((config.kv_heads, config.head_dim), (heads, 8), "{name}");
    }
    // The class is found by `model_type` if no architecture is named.
    let named = changed("gemma3", json!({ "architectures": null })).unwrap();
    assert_eq!(named.family.architecture, "Gemma3ForCausalLM");
}

#[test]
fn all_configured_end_tokens_end_a_completion() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, json: Json| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    let mut config = family("llama3");
    config["eos_token_id"] = json!(2);
    config["pad_token_id"] = json!(-1);
    write("config.json", config);
    assert_eq!(ModelConfig::from_directory(dir.path()).unwrap().eos, [2]);
    let generation = json!({ "eos_token_id": [5, 2, 7], "temperature": 0.6, "pad_token_id": 9, "do_sample": true });
    write("generation_config.json", generation.clone());
    let mut config = ModelConfig::from_directory(dir.path()).unwrap();
    assert_eq!((config.eos.as_slice(), config.pad), (&[2, 5, 7][..], None));
    config.add_ends(&[7, 8]);
    let mut expected = generation;
    expected["eos_token_id"] = json!([2, 5, 7, 8]);
    assert_eq!(config.to_generation_json(), expected);
    for (wrong, words) in [("{", "is not JSON"), (r#"{ "eos_token_id": "</s>" }"#, "eos_token_id is \"</s>\"")] {
        std::fs::write(dir.path().join("generation_config.json"), wrong).unwrap();
        let error = format!("{:#}", ModelConfig::from_directory(dir.path()).unwrap_err());
        assert!(error.contains("generation_config.json") && error.contains(words), "{error}");
    }
}

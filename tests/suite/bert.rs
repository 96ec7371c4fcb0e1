//! Tests of the sentence embedder against reference values from an independent implementation
//! (tests/fixtures/README.md).

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use preceptor::lm::model::{Bert, BertConfig, Embedder, Weights};

use crate::common::{fixture, max_abs_difference};

fn texts() -> Vec<String> {
    serde_json::from_str(&std::fs::read_to_string(fixture("bert").join("texts.json")).unwrap()).unwrap()
}

fn reference(name: &str) -> Vec<Vec<f32>> {
    let all = candle_core::safetensors::load(fixture("bert").join("ref.safetensors"), &Device::Cpu).unwrap();
    all[name].to_vec2().unwrap()
}

/// Returns a copy of the fixture that a test may change.
fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("bert").join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn check(dir: &Path, expected: &[Vec<f32>]) {
    let embedder = Embedder::from_directory(dir, &Device::Cpu).unwrap();
    let texts = texts();
    // Repeated many times, so that the texts do not fit into one row.
    let many: Vec<&str> = (0..12).flat_map(|_| &texts).map(String::as_str).collect();
    let together = embedder.embed(&many).unwrap();
    assert_eq!(together.len(), many.len());
    for (i, (text, ours)) in many.iter().zip(&together).enumerate() {
        let worst = max_abs_difference(ours, &expected[i % texts.len()]);
        assert!(worst < 1e-5, "number {i}, {text:?}, differs by {worst}");
    }
    let alone = embedder.embed(&many[3..4]).unwrap();
    assert!(max_abs_difference(&alone[0], &expected[3]) < 1e-5);
    assert!(embedder.embed(&[]).unwrap().is_empty());
}

#[test]
fn embeddings_agree_with_the_reference() {
    check(&fixture("bert"), &reference("embeddings"));
}

#[test]
fn texts_are_truncated_at_the_models_limit() {
    let dir = copy();
    for (length, expected) in [(10, "embeddings_of_ten"), (4096, "embeddings")] {
        let config = format!("{{ \"max_seq_length\": {length} }}");
        std::fs::write(dir.path().join("sentence_bert_config.json"), config).unwrap();
        check(dir.path(), &reference(expected));
    }
}

#[test]
fn tensor_names_may_begin_with_the_models_prefix() {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let plain = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let mut named: std::collections::HashMap<String, Tensor> =
        plain.into_iter().map(|(name, tensor)| (format!("bert.{name}"), tensor)).collect();
    named.insert("cls.predictions.bias".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&named, &path).unwrap();
    check(dir.path(), &reference("embeddings"));
}

#[test]
fn the_identity_is_that_of_the_weights() {
    let identity = |dir: &Path| Embedder::from_directory(dir, &Device::Cpu).unwrap().identity();
    let dir = copy();
    assert_eq!(identity(dir.path()), identity(&fixture("bert")));
    let path = dir.path().join("model.safetensors");
    let mut weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let norm = weights.get_mut("embeddings.LayerNorm.weight").unwrap();
    *norm = (norm.clone() + 1e-6).unwrap();
    candle_core::safetensors::save(&weights, &path).unwrap();
    assert_ne!(identity(dir.path()), identity(&fixture("bert")));
}

#[test]
fn non_finite_states_are_refused() {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let mut weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let bias = weights.get_mut("encoder.layer.1.output.LayerNorm.bias").unwrap();
    // Finite weights whose states overflow when summed.
    *bias = bias.zeros_like().unwrap().affine(1.0, 3e38).unwrap();
    candle_core::safetensors::save(&weights, &path).unwrap();
    let error = Embedder::from_directory(dir.path(), &Device::Cpu).unwrap().embed(&["a cat"]).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
}

#[test]
fn directories_that_cannot_embed_are_refused() {
    let refused = |file: &str, content: &str, word: &str| {
        let dir = copy();
        let path = dir.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        let Err(error) = Embedder::from_directory(dir.path(), &Device::Cpu) else { panic!("{file}: {content} passes") };
        let error = format!("{error:#}");
        assert!(error.contains(word) && error.contains(file), "{file}: {error}");
    };
    refused("config.json", r#"{ "architectures": ["LlamaForCausalLM"] }"#, "these are: BertModel");
    refused("tokenizer.json", "{", "cannot read");
    refused("model.safetensors", "", "cannot read");
    refused("sentence_bert_config.json", "{", "is not JSON");
    refused("sentence_bert_config.json", r#"{ "max_seq_length": 2 }"#, "no room");
    refused("1_Pooling/config.json", r#"{ "pooling_mode_mean_tokens": false }"#, "mean pooling");
    let config = std::fs::read_to_string(fixture("bert").join("config.json")).unwrap();
    let deeper = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    let dir = copy();
    std::fs::write(dir.path().join("config.json"), deeper).unwrap();
    let error = format!("{:#}", Embedder::from_directory(dir.path(), &Device::Cpu).err().unwrap());
    assert!(error.contains("no tensor encoder.layer.2"), "{error}");
}

#[test]
fn states_are_refused_for_texts_that_do_not_fit() {
    let dir = fixture("bert");
    let config = BertConfig::from_directory(&dir).unwrap();
    let bert = Bert::new(&config, &Weights::read_directory(&dir, &Device::Cpu).unwrap()).unwrap();
    let ids: Vec<u32> = (0..=config.context as u32).collect();
    assert_eq!(bert.hidden(&[&ids[..3], &ids[..config.context]]).unwrap().dims(), [config.context + 3, 32]);
    for (text, word) in [(&ids[..], "41 tokens"), (&[], "0 tokens"), (&[10_000], "index")] {
        let error = bert.hidden(&[&ids[..3], text]).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

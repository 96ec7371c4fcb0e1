//! Tests of low-rank adapters against PEFT (tests/fixtures/README.md), and in a run.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use kernels::{Gradients, backward};
use preceptor::lm::model::{Decoder, Lora, Pack, PackedAttention, Weights};

use crate::common::{config, fixture, max_abs_difference, metrics, stderr, train};

fn lora() -> Lora {
    Lora { rank: 3, alpha: 12.0, targets: ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec() }
}

/// Loads PEFT's adapter, with tensor names converted, onto the model that it was made for.
fn adapted() -> (Decoder, Weights) {
    let (config, mut weights) = Weights::from_directory(&fixture("families/llama3"), &Device::Cpu).unwrap();
    let base = weights.clone();
    for (name, tensor) in theirs("adapter_model.safetensors") {
        weights.0.insert(name.strip_prefix("base_model.model.").unwrap().to_owned(), tensor);
    }
    (Decoder::with_adapters(&config, &weights, Some(&lora())).unwrap(), base)
}

fn theirs(file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture("lora").join(file), &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn logits(model: &Decoder, ids: &[u32]) -> Vec<f32> {
    let pack = Pack::prefill(ids);
    let mut attention = PackedAttention::new(&pack);
    flat(&model.logits(&model.hidden(&pack.ids, &pack.positions, &mut attention).unwrap()).unwrap())
}

#[test]
fn logits_and_gradients_agree_with_peft() {
    let values = theirs("ref.safetensors");
    let ids: Vec<u32> = values["ids"].to_vec1::<i64>().unwrap().iter().map(|id| *id as u32).collect();
    let (published, base) = adapted();
    let (model, params) = published.adapted(&lora(), 0).unwrap();
    let merged = Decoder::new(published.config(), &model.merged().unwrap()).unwrap();
    for model in [&published, &model, &model.snapshot().unwrap(), &merged] {
        let worst = max_abs_difference(&logits(model, &ids), &flat(&values["logits"]));
        assert!(worst < 1e-4, "logits differ by {worst}");
    }
    let plain = Decoder::new(published.config(), &base).unwrap();
    assert!(max_abs_difference(&logits(&plain, &ids), &flat(&values["logits"])) > 0.01, "the adapter does nothing");

    let nll = model.logprobs(&Pack::new(&ids[..1], &[&ids[1..]]), 1.0).unwrap().0.mean_all().unwrap().neg().unwrap();
    assert!((nll.to_scalar::<f32>().unwrap() - flat(&values["nll"])[0]).abs() < 1e-5);
    let mut sums = Gradients::new(&params);
    assert_eq!(params.len(), 2 * 3 * 2);
    assert_eq!(backward(&nll, &mut [&mut sums]).unwrap(), params.len());
    for (name, _) in &params {
        let expected = flat(&values[&format!("grad.{name}")]);
        let ours = flat(sums.get(name).unwrap());
        let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let gap: Vec<f32> = ours.iter().zip(&expected).map(|(a, b)| a - b).collect();
        assert!(norm(&gap) < 1e-4 * norm(&expected), "{name}: {} of {}", norm(&gap), norm(&expected));
    }
    // Frozen weights are shared and not part of a computation graph.
    for (name, tensor) in &base.0 {
        assert_eq!(flat(&model.weights().0[name]), flat(tensor));
        assert!(!model.weights().0[name].track_op(), "{name} is frozen and would have a gradient");
    }
    for (name, tensor) in &published.weights().0 {
        assert_eq!(tensor.id() == model.weights().0[name].id(), !name.contains("lora_"), "{name}");
    }
}

#[test]
fn fresh_adapters_change_nothing_and_are_written_with_pefts_names() {
    let (config, weights) = Weights::from_directory(&fixture("families/llama3"), &Device::Cpu).unwrap();
    let base = Decoder::new(&config, &weights).unwrap();
    let (model, _) = base.adapted(&lora(), 7).unwrap();
    assert_eq!(logits(&base, &[5, 9, 3, 60]), logits(&model, &[5, 9, 3, 60]));
    let dir = tempfile::tempdir().unwrap();
    lora().write(dir.path(), model.weights(), Some("org/base")).unwrap();
    let ours = candle_core::safetensors::load(dir.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let shapes = |tensors: &HashMap<String, Tensor>| {
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect::<HashMap<_, _>>()
    };
    assert_eq!(shapes(&ours), shapes(&theirs("adapter_model.safetensors")));
    let read = |dir: &Path| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(dir.join("adapter_config.json")).unwrap()).unwrap()
    };
    let (ours, theirs) = (read(dir.path()), read(&fixture("lora")));
    for key in ["peft_type", "task_type", "r", "bias", "fan_in_fan_out", "use_rslora", "lora_dropout"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    assert_eq!(ours["base_model_name_or_path"], "org/base");
    assert_eq!(ours["lora_alpha"].as_f64(), theirs["lora_alpha"].as_f64());
}

/// Adapters are trained and the base model is not; a checkpoint has the merged model and the separate adapters.
#[test]
fn a_run_trains_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let lora = "policy.lora={ rank = 4, targets = [\"q_proj\", \"down_proj\"] }";
    let output = train(dir.path(), &[lora, "learner.lr=0.02", "run.steps=3", "sft.steps=0", "reward.kl=reward"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let steps = metrics(&dir.path().join("run"));
    assert!(steps[2]["kl/reference"].as_f64().unwrap().abs() > 0.0, "the policy is still the reference: {}", steps[2]);
    let checkpoint = dir.path().join("run/checkpoints/step-000003");
    let load = |path: &str| candle_core::safetensors::load(checkpoint.join(path), &Device::Cpu).unwrap();
    let (merged, adapters) = (load("model.safetensors"), load("adapter/adapter_model.safetensors"));
    assert!(merged.keys().all(|name| !name.contains("lora")));
    let start =
        preceptor::pipeline::setup::prepare(&preceptor::config::load(&config("offline.toml"), &[]).unwrap(), false)
            .unwrap();
    let start = &start.policy().weights().0;
    for (name, tensor) in &merged {
        let adapter = |letter: char| {
            let stem = name.strip_suffix(".weight").unwrap();
            adapters.get(&format!("base_model.model.{stem}.lora_{letter}.weight"))
        };
        let gap = (tensor - &start[name]).unwrap();
        let expected = match (adapter('A'), adapter('B')) {
            (Some(a), Some(b)) => (b.matmul(a).unwrap() * 2.0).unwrap(),
            _ => gap.zeros_like().unwrap(),
        };
        let worst = (&gap - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-6, "{name} is off by {worst}");
        let moved = gap.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 0.0;
        assert_eq!(moved, adapter('B').is_some(), "{name}");
    }
}

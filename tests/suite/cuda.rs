//! Tests of the model on a CUDA device against the same model on the CPU. Compiled only with the feature `cuda`.
//! Without a device a test checks nothing and prints that: `benches/cuda/run.sh` counts these lines.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Result, Tensor, Var};
use kernels::{AdamW, AdamWConfig, Gradients};
use preceptor::lm::model::config::Window;
use preceptor::lm::model::family::gemma2;
use preceptor::lm::model::{
    Bert, BertConfig, Decoder, DeviceReplicas, Lora, ModelConfig, Pack, PackedAttention, Weights,
};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Fixed, Request, Sampled, generate};

/// Returns the first device, which all tests share, as actors do.
fn device(test: &str) -> Option<Device> {
    static DEVICE: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
    let opened = DEVICE.get_or_init(|| preceptor::util::device::open("cuda:0").map_err(|error| format!("{error:#}")));
    match opened {
        Ok(device) => Some(device.clone()),
        Err(error) => {
            // Bypasses the test harness, which does not show the output of a passing test.
            let line = format!("skipped: no CUDA device, {test} checks nothing ({error})\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            None
        }
    }
}

struct Case {
    name: &'static str,
    config: ModelConfig,
    weights: Weights,
    lora: Option<Lora>,
}

fn tiny() -> ModelConfig {
    ModelConfig {
        hidden_size: 64,
        intermediate_size: 96,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab_size: 300,
        context: 128,
        ..ModelConfig::llama()
    }
}

/// A Llama, the same with effective adapters, and a Gemma 2 with effective caps and window and a separate head.
fn cases() -> [Case; 3] {
    let llama = tiny();
    let gemma = ModelConfig {
        family: &gemma2::FAMILY,
        window: Some(Window { size: 6, layers: vec![true, false] }),
        attention_cap: Some(5.0),
        logit_cap: Some(8.0),
        query_scalar: Some(24),
        tied: false,
        ..tiny()
    };
    let scratch = |config: &ModelConfig| Weights::scratch(config, 0.15, 3, &Device::Cpu).unwrap();
    let lora = Lora { rank: 4, alpha: 8.0, targets: ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec() };
    let mut adapted = scratch(&llama);
    for (i, (name, tensor)) in lora.init(&adapted, 7, &Device::Cpu).unwrap().0.into_iter().enumerate() {
        // Fresh adapters have zeros in B, and then A has no gradient.
        let tensor = if name.contains("lora_B") { values(i as u64, tensor.dims(), 0.1) } else { tensor };
        adapted.0.insert(name, tensor);
    }
    [
        Case { name: "llama", weights: scratch(&llama), config: llama.clone(), lora: None },
        Case { name: "llama with adapters", config: llama, weights: adapted, lora: Some(lora) },
        Case { name: "gemma 2", weights: scratch(&gemma), config: gemma, lora: None },
    ]
}

impl Case {
    fn model(&self, device: &Device, dtype: DType) -> Decoder {
        let moved = |tensor: &Tensor| tensor.to_device(device).unwrap().to_dtype(dtype).unwrap();
        let weights = Weights(self.weights.0.iter().map(|(name, tensor)| (name.clone(), moved(tensor))).collect());
        Decoder::with_adapters(&self.config, &weights, self.lora.as_ref()).unwrap()
    }

    /// Returns the learner's model and its variables.
    fn trainable(&self, device: &Device) -> (Decoder, Vec<(String, Var)>) {
        let model = self.model(device, DType::F32);
        self.lora.as_ref().map_or_else(|| model.trainable(true), |lora| model.adapted(lora, 0)).unwrap()
    }
}

/// Returns reproducible values within ±`size`.
fn values(seed: u64, shape: &[usize], size: f64) -> Tensor {
    let count: usize = shape.iter().product();
    let value = |i: usize| (((i as f64 + 1.7) * 12.9898 + seed as f64 * 78.233).sin() * 43_758.545).fract() * size;
    Tensor::from_vec((0..count).map(|i| value(i) as f32).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
}

fn token(i: usize) -> u32 {
    ((i * 37 + 11) % 300) as u32
}

/// A prompt with three completions of different lengths.
fn pack() -> Pack {
    let completions = [5, 1, 8].map(|n| (20..20 + n).map(token).collect::<Vec<_>>());
    Pack::new(&(0..9).map(token).collect::<Vec<_>>(), &completions)
}

fn logits(model: &Decoder, pack: &Pack) -> Result<Tensor> {
    let mut attention = PackedAttention::new(pack);
    model.logits(&model.hidden(&pack.ids, &pack.positions, &mut attention)?)
}

/// A loss in which every target and every entropy has a different gradient.
fn backward(model: &Decoder, params: &[(String, Var)], gradients: &mut Gradients) {
    let pack = pack();
    let (logprobs, entropy) = model.logprobs(&pack, 0.8).unwrap();
    let weights = values(5, logprobs.dims(), 1.0).to_device(model.device()).unwrap();
    let loss = (logprobs + (entropy * 0.3).unwrap()).unwrap().mul(&weights).unwrap().sum_all().unwrap();
    let found = kernels::backward(&loss, &mut [gradients]).unwrap();
    assert_eq!(found, params.len(), "some variables receive no gradient");
}

/// Returns |got − want| / |want|.
fn distance(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let host = |tensor: &Tensor| -> Vec<f64> {
        let tensor = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (got, want) = (host(got), host(want));
    let gap: f64 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f64 = want.iter().map(|v| v * v).sum();
    assert!(size > 0.0, "there is nothing to compare");
    (gap / size).sqrt()
}

#[track_caller]
fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let distance = distance(got, want);
    assert!(distance <= tolerance, "{what}: relative distance {distance:.2e}, {tolerance:.0e} is allowed");
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn the_devices_memory_is_reported() {
    assert_eq!(preceptor::util::device::memory(&Device::Cpu), None);
    let Some(device) = device("the_devices_memory_is_reported") else { return };
    let held = Tensor::zeros(1 << 28, DType::F32, &device).unwrap();
    device.synchronize().unwrap();
    let memory = preceptor::util::device::memory(&device).unwrap();
    assert_eq!(memory.device, "cuda:0");
    assert!(memory.used_bytes >= 1 << 30 && memory.free_bytes > 0, "{memory:?}");
    assert!(preceptor::util::device::available_bytes(held.device()).is_some());
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn forward_agrees_with_the_cpu() {
    let Some(device) = device("forward_agrees_with_the_cpu") else { return };
    for case in cases() {
        let (here, there) = (case.model(&Device::Cpu, DType::F32), case.model(&device, DType::F32));
        let pack = pack();
        close(case.name, &logits(&there, &pack).unwrap(), &logits(&here, &pack).unwrap(), 1e-4);
        let (logprobs, entropy) = there.logprobs(&pack, 0.8).unwrap();
        let (want_logprobs, want_entropy) = here.logprobs(&pack, 0.8).unwrap();
        close(&format!("{}, log-probabilities", case.name), &logprobs, &want_logprobs, 1e-4);
        close(&format!("{}, entropies", case.name), &entropy, &want_entropy, 1e-4);
    }
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn every_gradient_agrees_with_the_cpu() {
    let Some(device) = device("every_gradient_agrees_with_the_cpu") else { return };
    for case in cases() {
        let [here, there] = [&Device::Cpu, &device].map(|device| {
            let (model, params) = case.trainable(device);
            let mut gradients = Gradients::new(&params);
            // Twice, as micro-batches add up.
            backward(&model, &params, &mut gradients);
            backward(&model, &params, &mut gradients);
            (params, gradients)
        });
        for (name, _) in &here.0 {
            let (got, want) = (there.1.get(name).unwrap(), here.1.get(name).unwrap());
            close(&format!("{}, gradient of {name}", case.name), got, want, 1e-3);
        }
        let (got, want) = (there.1.global_norm().unwrap(), here.1.global_norm().unwrap());
        assert!((got / want - 1.0).abs() < 1e-4, "{}: the gradient's norm is {got}, not {want}", case.name);
    }
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn adamw_steps_agree_with_the_cpu() {
    let Some(device) = device("adamw_steps_agree_with_the_cpu") else { return };
    // A larger ε than usual: if a gradient is only rounding noise, the step would otherwise be its sign.
    let config = AdamWConfig { eps: 1e-3, weight_decay: 0.01, ..AdamWConfig::default() };
    for case in cases() {
        let [here, there] = [&Device::Cpu, &device].map(|device| {
            let (model, params) = case.trainable(device);
            let before: Vec<Tensor> = params.iter().map(|(_, var)| var.copy().unwrap()).collect();
            let mut gradients = Gradients::new(&params);
            let mut optimizer = AdamW::new(params.clone(), config).unwrap();
            for _ in 0..2 {
                gradients.zero().unwrap();
                backward(&model, &params, &mut gradients);
                optimizer.step(&gradients, 1e-2, 0.5).unwrap();
            }
            let moved = params.iter().zip(before).map(|((name, var), before)| {
                let moved = (var.as_tensor().detach() - before).unwrap();
                (name.clone(), moved)
            });
            moved.collect::<BTreeMap<_, _>>()
        });
        for (name, want) in &here {
            close(&format!("{}, step of {name}", case.name), &there[name], want, 1e-3);
        }
    }
}

fn greedy(model: Decoder) -> Vec<Vec<Sampled>> {
    let prompts = [9, 3, 14].map(|n| (0..n).map(token).collect::<Vec<_>>());
    let requests = prompts.into_iter().map(|prompt| Request::new(prompt, vec![1, 2])).collect();
    let sampling = Sampling { temperature: 0.0, max_new_tokens: 16, ..Sampling::default() };
    generate(&mut Fixed(Arc::new(model)), requests, &sampling).unwrap()
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn greedy_generation_agrees_with_the_cpu() {
    let Some(device) = device("greedy_generation_agrees_with_the_cpu") else { return };
    for case in cases() {
        let [here, there] = [&Device::Cpu, &device].map(|device| greedy(case.model(device, DType::F32)));
        for (got, want) in there.iter().flatten().zip(here.iter().flatten()) {
            assert_eq!(got.ids, want.ids, "{}", case.name);
            let worst = crate::common::max_abs_difference(&got.logprobs, &want.logprobs);
            assert!(worst < 1e-3, "{}: log-probabilities differ by {worst}", case.name);
        }
    }
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn half_precision_is_near_single_precision() {
    let Some(device) = device("half_precision_is_near_single_precision") else { return };
    for case in cases() {
        let (here, there) = (case.model(&Device::Cpu, DType::F32), case.model(&device, DType::BF16));
        let pack = pack();
        close(case.name, &logits(&there, &pack).unwrap(), &logits(&here, &pack).unwrap(), 0.03);
        let (got, want) = (there.logprobs(&pack, 1.0).unwrap().0, here.logprobs(&pack, 1.0).unwrap().0);
        close(&format!("{}, log-probabilities", case.name), &got, &want, 0.03);
    }
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn an_encoder_agrees_with_the_cpu() {
    let Some(device) = device("an_encoder_agrees_with_the_cpu") else { return };
    let config = BertConfig {
        hidden_size: 32,
        intermediate_size: 48,
        layers: 2,
        heads: 4,
        vocab_size: 300,
        context: 40,
        token_types: 2,
        layer_norm_eps: 1e-12,
    };
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let tensor = values(tensors.len() as u64, shape, 0.3);
        tensors.insert(name, tensor);
    };
    let (d, ffn) = (config.hidden_size, config.intermediate_size);
    for (name, rows) in [("word", config.vocab_size), ("position", config.context), ("token_type", config.token_types)]
    {
        add(format!("embeddings.{name}_embeddings.weight"), &[rows, d]);
    }
    let mut pair = |name: String, shape: &[usize]| {
        add(format!("{name}.weight"), shape);
        add(format!("{name}.bias"), &shape[..1]);
    };
    pair("embeddings.LayerNorm".to_owned(), &[d]);
    for layer in (0..config.layers).map(|i| format!("encoder.layer.{i}")) {
        for name in ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"] {
            pair(format!("{layer}.{name}"), &[d, d]);
        }
        pair(format!("{layer}.intermediate.dense"), &[ffn, d]);
        pair(format!("{layer}.output.dense"), &[d, ffn]);
        pair(format!("{layer}.attention.output.LayerNorm"), &[d]);
        pair(format!("{layer}.output.LayerNorm"), &[d]);
    }
    let texts = [7, 1, 12].map(|n| (0..n).map(token).collect::<Vec<_>>());
    let [here, there] = [&Device::Cpu, &device].map(|device| {
        let moved = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.to_device(device).unwrap());
        let encoder = Bert::new(&config, &Weights(tensors.iter().map(moved).collect())).unwrap();
        encoder.hidden(&texts.each_ref().map(Vec::as_slice)).unwrap()
    });
    close("hidden states", &there, &here, 1e-4);
}

/// Other threads must read the weights that the learner's thread wrote, although it does not wait for the device before
/// publishing.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn a_snapshot_is_complete_in_another_thread() {
    let Some(device) = device("a_snapshot_is_complete_in_another_thread") else { return };
    let config = ModelConfig { hidden_size: 512, intermediate_size: 1024, head_dim: 128, layers: 4, ..tiny() };
    let weights = Weights::scratch(&config, 0.05, 3, &device).unwrap();
    let (model, params) = Decoder::new(&config, &weights).unwrap().trainable(true).unwrap();
    let mut gradients = Gradients::new(&params);
    let mut optimizer = AdamW::new(params.clone(), AdamWConfig::default()).unwrap();
    let read = |model: &Decoder| logits(model, &pack()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for version in 0..20 {
        gradients.zero().unwrap();
        backward(&model, &params, &mut gradients);
        optimizer.step(&gradients, 1e-3, 1.0).unwrap();
        let snapshot = model.snapshot().unwrap();
        let theirs = std::thread::scope(|scope| scope.spawn(|| read(&snapshot)).join().unwrap());
        let ours = read(&model);
        let worst = crate::common::max_abs_difference(&theirs, &ours);
        assert!(worst < 1e-5, "version {version}: another thread read other weights, logits differ by {worst}");
    }
}

/// A copy on a separate stream is complete, and unaffected by the learner's next steps.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn a_copy_on_another_stream_is_complete() {
    let Some(device) = device("a_copy_on_another_stream_is_complete") else { return };
    let other = preceptor::util::device::open("cuda:0").unwrap();
    let config = ModelConfig { hidden_size: 512, intermediate_size: 1024, head_dim: 128, layers: 4, ..tiny() };
    let weights = Weights::scratch(&config, 0.05, 3, &device).unwrap();
    let (model, params) = Decoder::new(&config, &weights).unwrap().trainable(true).unwrap();
    let mut gradients = Gradients::new(&params);
    let mut optimizer = AdamW::new(params.clone(), AdamWConfig::default()).unwrap();
    let mut copies = DeviceReplicas::new(other.clone());
    let read = |model: &Decoder| logits(model, &pack()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for version in 0..20 {
        let snapshot = Arc::new(model.snapshot().unwrap());
        let ours = read(&snapshot);
        let copies = &mut copies;
        let theirs = std::thread::scope(|scope| {
            let (other, device) = (&other, &device);
            let reader = scope.spawn(move || {
                let copy = copies.of(&snapshot).unwrap();
                // The snapshot's memory is free for the learner's next step.
                drop(snapshot);
                assert!(copy.device().same_device(other) && !copy.device().same_device(device));
                (0..5).map(|_| read(&copy)).collect::<Vec<_>>()
            });
            gradients.zero().unwrap();
            backward(&model, &params, &mut gradients);
            optimizer.step(&gradients, 1e-3, 1.0).unwrap();
            reader.join().unwrap()
        });
        for theirs in theirs {
            let worst = crate::common::max_abs_difference(&theirs, &ours);
            assert!(worst < 1e-5, "version {version}: the copy has other weights, logits differ by {worst}");
        }
    }
}

/// Steps in half precision, with the optimizer's copy in single precision.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn steps_in_half_precision_are_near_those_in_single_precision() {
    let Some(device) = device("steps_in_half_precision_are_near_those_in_single_precision") else { return };
    for case in cases() {
        let [half, single] = [(&device, DType::BF16), (&Device::Cpu, DType::F32)].map(|(device, dtype)| {
            let model = case.model(device, DType::F32).to_dtype(dtype).unwrap();
            let (model, params) =
                case.lora.as_ref().map_or_else(|| model.trainable(true), |lora| model.adapted(lora, 0)).unwrap();
            let mut gradients = Gradients::new(&params);
            backward(&model, &params, &mut gradients);
            let norm = gradients.global_norm().unwrap();
            let before = model.logprobs(&pack(), 1.0).unwrap().0.detach();
            AdamW::new(params.clone(), AdamWConfig::default()).unwrap().step(&gradients, 1e-2, 1.0).unwrap();
            (model, norm, before)
        });
        let moved = distance(&single.0.logprobs(&pack(), 1.0).unwrap().0, &single.2);
        assert!(moved > 0.06, "{}: the step moves too little to be seen, {moved}", case.name);
        assert!(
            (half.1 / single.1 - 1.0).abs() < 0.05,
            "{}: the gradient's norm is {}, not {}",
            case.name,
            half.1,
            single.1
        );
        let (got, want) = (half.0.logprobs(&pack(), 1.0).unwrap().0, single.0.logprobs(&pack(), 1.0).unwrap().0);
        close(&format!("{}, log-probabilities", case.name), &got, &want, 0.03);
    }
}

/// Rows stay on the device while tokens are sampled from them.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs an NVIDIA GPU and the feature cuda")]
fn sampling_on_the_device_equals_sampling_on_the_host() {
    let Some(device) = device("sampling_on_the_device_equals_sampling_on_the_host") else { return };
    let rows = values(5, &[4, 1300], 3.0);
    let draw =
        |rows: &Tensor| kernels::draw_from_rows(rows, rows.dim(1).unwrap(), 0.8, &[0.1, 0.4, 0.7, 0.999]).unwrap();
    for (host, there) in draw(&rows).into_iter().zip(draw(&rows.to_device(&device).unwrap())) {
        assert!(host.0 == there.0 && (host.1 - there.1).abs() < 1e-4, "{there:?} for {host:?}");
    }
}

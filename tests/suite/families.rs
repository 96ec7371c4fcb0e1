//! Tests of the decoder of every family against reference values from an independent implementation
//! (tests/fixtures/README.md), and against its own other modes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use kernels::{Format, Gradients, backward};
use preceptor::lm::model::{Decoder, LoadTarget, ModelConfig, Pack, PackedAttention, Weights};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Engine, Fixed, MAX_SLOTS, Request, generate};

use crate::common::{fixture, max_abs_difference};

/// A folder of fixtures for each family and each scaling of rotary positions.
const REFERENCES: [&str; 10] = [
    "llama",
    "families/llama3",
    "families/llama-linear",
    "families/llama-yarn",
    "families/mistral",
    "families/qwen2",
    "families/qwen2-window",
    "families/qwen3",
    "families/gemma2",
    "families/gemma3",
];

struct Reference {
    name: &'static str,
    config: ModelConfig,
    weights: Weights,
    model: Decoder,
    values: HashMap<String, Tensor>,
}

fn reference(name: &'static str) -> Reference {
    let dir = fixture(name);
    let (config, weights) = Weights::from_directory(&dir, &Device::Cpu).unwrap();
    let model = Decoder::new(&config, &weights).unwrap();
    let values = candle_core::safetensors::load(dir.join("ref.safetensors"), &Device::Cpu).unwrap();
    Reference { name, config, weights, model, values }
}

/// Returns tokens and positions of row `b` without padding, and the columns that they are in.
fn row(values: &HashMap<String, Tensor>, side: &str, b: usize) -> (Vec<u32>, Vec<u32>, Vec<usize>) {
    let column = |name: &str| values[&format!("{side}.{name}")].get(b).unwrap().to_vec1::<i64>().unwrap();
    let kept: Vec<usize> = (0..24).filter(|t| column("attention_mask")[*t] == 1).collect();
    let pick = |name: &str| kept.iter().map(|t| column(name)[*t] as u32).collect();
    (pick("input_ids"), if side == "left" { pick("position_ids") } else { (0..kept.len() as u32).collect() }, kept)
}

#[test]
fn logits_and_logprobs_agree_with_the_reference() {
    for (r, side) in REFERENCES.iter().flat_map(|name| ["right", "left"].map(|side| (reference(name), side))) {
        for b in 0..4 {
            let (ids, positions, columns) = row(&r.values, side, b);
            let pack = Pack::prefill(&ids);
            let mut attention = PackedAttention::new(&pack);
            let hidden = r.model.hidden(&ids, &positions, &mut attention).unwrap();
            let logits = r.model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
            let expected = r.values[&format!("{side}.logits")].get(b).unwrap().to_vec2::<f32>().unwrap();
            for (i, t) in columns.iter().enumerate() {
                let worst = max_abs_difference(&logits[i], &expected[*t]);
                assert!(worst < 1e-4, "{} {side} row {b} column {t}: logits differ by {worst}", r.name);
            }
            let pack = Pack::new(&ids[..1], &[&ids[1..]]);
            let (logprobs, entropy) = r.model.logprobs(&pack, 1.0).unwrap();
            for (name, ours) in [("logprobs", logprobs), ("entropy", entropy)] {
                let theirs = r.values[&format!("{side}.{name}")].get(b).unwrap().to_vec1::<f32>().unwrap();
                let theirs: Vec<f32> = columns[1..].iter().map(|t| theirs[*t]).collect();
                let worst = max_abs_difference(&ours.to_vec1().unwrap(), &theirs);
                assert!(worst < 1e-4, "{} {side} row {b}: {name} differ by {worst}", r.name);
            }
        }
    }
}

#[test]
fn gradients_agree_with_the_reference() {
    REFERENCES.map(reference).iter().for_each(check_gradients);
}

fn check_gradients(r: &Reference) {
    let vars: HashMap<String, Var> =
        r.weights.0.iter().map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap())).collect();
    let weights = Weights(vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
    let model = Decoder::new(&r.config, &weights).unwrap();
    let (mut total, mut count) = (Tensor::new(0f32, &Device::Cpu).unwrap(), 0);
    // Row by row, as the learner processes a batch.
    let params: Vec<(String, Var)> = vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    let (mut accumulated, mut again) = (Gradients::new(&params), Gradients::new(&params));
    let mut checkpointed = model.clone();
    checkpointed.checkpoint_activations(true);
    for b in 0..4 {
        let (ids, _, _) = row(&r.values, "right", b);
        let pack = Pack::new(&ids[..1], &[&ids[1..]]);
        count += pack.targets.len();
        let sum = model.logprobs(&pack, 1.0).unwrap().0.sum_all().unwrap();
        assert_eq!(backward(&sum.neg().unwrap(), &mut [&mut accumulated]).unwrap(), params.len());
        let same = checkpointed.logprobs(&pack, 1.0).unwrap().0.sum_all().unwrap();
        assert_eq!(backward(&same.neg().unwrap(), &mut [&mut again]).unwrap(), params.len());
        total = (total + sum).unwrap();
    }
    let nll = (total.neg().unwrap() / count as f64).unwrap();
    let expected = r.values["right.nll"].flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
    assert!((nll.to_scalar::<f32>().unwrap() - expected).abs() < 1e-5);
    let mut batch = Gradients::new(&params);
    assert_eq!(backward(&nll, &mut [&mut batch]).unwrap(), params.len());
    let theirs = candle_core::safetensors::load(fixture(r.name).join("grads_all.safetensors"), &Device::Cpu).unwrap();
    for (name, _) in &params {
        let key = [name.clone(), format!("grad.{name}")].into_iter().find(|key| theirs.contains_key(key));
        let theirs = &theirs[&key.unwrap_or_else(|| panic!("no reference gradient for {name}"))];
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let (batch, theirs) = (flat(batch.get(name).unwrap()), flat(theirs));
        let [by_rows, again] =
            [&accumulated, &again].map(|sums| flat(&(sums.get(name).unwrap() / count as f64).unwrap()));
        for (how, ours) in [("one batch", batch), ("accumulated", by_rows), ("checkpointed", again)] {
            let gap: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
            let error = norm(&gap) / norm(&theirs);
            assert!(error < 1e-4, "{name} of {}, {how}: relative gradient error {error}", r.name);
        }
    }
}

#[test]
fn greedy_generation_agrees_with_the_reference() {
    REFERENCES.map(reference).into_iter().for_each(check_greedy);
}

fn check_greedy(r: Reference) {
    let prompts = r.values["gen.prompt"].to_vec2::<i64>().unwrap();
    let expected = r.values["gen.greedy"].to_vec2::<i64>().unwrap();
    let prompts: Vec<Vec<u32>> = prompts.iter().map(|row| row.iter().map(|id| *id as u32).collect()).collect();
    let requests: Vec<Request> = prompts.iter().map(|prompt| Request::new(prompt, vec![0])).collect();
    let sampling = Sampling { temperature: 0.0, max_new_tokens: 16, eos: r.config.eos.clone(), ..Sampling::default() };
    let sampled = generate(&mut Fixed(Arc::new(r.model)), requests, &sampling).unwrap();
    for (sampled, expected) in sampled.iter().zip(expected) {
        // The reference may contain the prompt before the new tokens, and padding after an end token.
        let expected: Vec<u32> = expected[expected.len() - 16..].iter().map(|id| *id as u32).collect();
        assert_eq!(sampled[0].ids, expected[..sampled[0].ids.len()], "{}", r.name);
    }
}

fn ragged() -> (Vec<u32>, Vec<Vec<u32>>) {
    let token = |i: u32| (i * 37 + 11) % 96;
    ((0..9).map(token).collect(), [5usize, 1, 8].iter().map(|n| (20..20 + *n as u32).map(token).collect()).collect())
}

#[test]
fn a_pack_scores_like_its_separate_sequences() {
    REFERENCES.map(reference).iter().for_each(check_pack);
}

fn check_pack(r: &Reference) {
    let (prompt, completions) = ragged();
    let pack = Pack::new(&prompt, &completions);
    let together = pack.split(&r.model.logprobs(&pack, 0.7).unwrap().0.to_vec1().unwrap());
    for (completion, together) in completions.iter().zip(together) {
        let alone = Pack::new(&prompt, &[completion]);
        let alone = r.model.logprobs(&alone, 0.7).unwrap().0.to_vec1::<f32>().unwrap();
        assert!(max_abs_difference(&alone, &together) < 1e-5);
    }
}

#[test]
fn sampled_logprobs_equal_those_of_a_full_forward() {
    REFERENCES.map(reference).into_iter().for_each(check_behaviour);
}

/// Returns the model with its matrices rounded to `bf16`, except the embedding and those whose width is not a multiple
/// of 32, computing in `f32`.
fn rounded(model: &Decoder) -> Decoder {
    let round = |weight: &Tensor| weight.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let mut weights = model.weights().clone();
    let embedding = weights.0["model.embed_tokens.weight"].clone();
    weights.0.entry("lm_head.weight".into()).or_insert(embedding);
    for (name, weight) in &mut weights.0 {
        let is_matrix = name.ends_with("_proj.weight") || name == "lm_head.weight";
        if is_matrix && weight.dim(1).unwrap().is_multiple_of(32) {
            *weight = round(weight);
        }
    }
    Decoder::new(&ModelConfig { tied: false, ..model.config().clone() }, &weights).unwrap()
}

fn check_behaviour(r: Reference) {
    let model = Arc::new(r.model);
    let (long, others) = ragged();
    let prompts = [(&long, (1..13).collect::<Vec<u64>>()), (&others[0], vec![13]), (&others[2], (14..24).collect())];
    let requests = || prompts.iter().map(|(prompt, seeds)| Request::new(*prompt, seeds.clone())).collect::<Vec<_>>();
    let sampling =
        Sampling { temperature: 0.8, max_new_tokens: 12, eos: (0..512).step_by(7).collect(), ..Sampling::default() };
    let sampled = generate(&mut Fixed(Arc::clone(&model)), requests(), &sampling).unwrap();
    let lengths: std::collections::HashSet<usize> = sampled.iter().flatten().map(|one| one.ids.len()).collect();
    assert!(lengths.len() > 1, "the test wants ragged completions, all have {lengths:?} tokens");
    let sampled_in = |slots: usize| {
        let mut engine = Engine::new(&sampling, slots);
        let mut again = vec![Vec::new(); prompts.len()];
        for (ticket, request) in requests().into_iter().enumerate() {
            engine.submit(ticket as u64, request, &r.config).unwrap();
            for (ticket, samples) in engine.step(&mut Fixed(Arc::clone(&model))).unwrap() {
                again[ticket as usize] = samples;
            }
        }
        while !engine.is_idle() {
            for (ticket, samples) in engine.step(&mut Fixed(Arc::clone(&model))).unwrap() {
                again[ticket as usize] = samples;
            }
        }
        again
    };
    // Identical bits in one slot, in a few, and one sequence after another; and again with enough slots for the
    // large-batch kernels, as the number of sequences shrinks.
    let alone = sampled_in(1);
    for slots in [2, 4, kernels::LARGE_BATCH_ROWS] {
        assert_eq!(sampled_in(slots), alone, "in {slots} slots");
    }
    for slots in [kernels::LARGE_BATCH_ROWS + 1, 20, MAX_SLOTS] {
        assert_eq!(sampled_in(slots), sampled, "in {slots} slots");
    }
    // With reduced precision it samples from a similar distribution, with 16 bits from that of the rounded matrices;
    // the number of slots has no effect either.
    for (format, near, bound) in [(Format::Bf16, rounded(&model), 1e-4), (Format::Q8, (*model).clone(), 0.3)] {
        let narrow = Arc::new(model.quantized(format).unwrap());
        let alone = |slots: usize| {
            let mut engine = Engine::new(&sampling, slots);
            engine.submit(0, Request::new(&long, vec![1, 2, 3]), &r.config).unwrap();
            let mut ended = Vec::new();
            while !engine.is_idle() {
                ended.extend(engine.step(&mut Fixed(Arc::clone(&narrow))).unwrap());
            }
            ended.remove(0).1
        };
        assert_eq!(alone(1), alone(kernels::LARGE_BATCH_ROWS));
        for single in [alone(1), alone(kernels::LARGE_BATCH_ROWS + 1)] {
            let ids: Vec<&[u32]> = single.iter().map(|one| one.ids.as_slice()).collect();
            let pack = Pack::new(&long, &ids);
            let gap = |model: &Decoder| {
                let now = pack.split(&model.logprobs(&pack, 0.8).unwrap().0.to_vec1().unwrap());
                let gaps = single.iter().zip(&now).map(|(one, now)| max_abs_difference(&one.logprobs, now));
                gaps.fold(0.0, f32::max)
            };
            assert!(gap(&near) < bound, "{format:?}: {}", gap(&near));
            assert!(gap(&model) > 1e-3, "{format:?} moves log-probabilities by {}", gap(&model));
        }
    }
    for ((prompt, _), sampled) in prompts.iter().zip(&sampled).chain(prompts.iter().zip(&alone)) {
        let ids: Vec<&[u32]> = sampled.iter().map(|one| one.ids.as_slice()).collect();
        let pack = Pack::new(prompt, &ids);
        let now = pack.split(&model.logprobs(&pack, 0.8).unwrap().0.to_vec1().unwrap());
        for (one, now) in sampled.iter().zip(now) {
            assert!(max_abs_difference(&one.logprobs, &now) < 1e-4);
        }
    }
}

#[test]
fn an_export_reads_back_as_the_same_model() {
    REFERENCES.map(reference).iter().for_each(check_export);
}

fn check_export(r: &Reference) {
    let dir = tempfile::tempdir().unwrap();
    preceptor::lm::model::export::write(dir.path(), &r.config, &r.weights, candle_core::DType::F32).unwrap();
    let (config, weights) = Weights::from_directory(Path::new(dir.path()), &Device::Cpu).unwrap();
    let generation = r.config.to_generation_json();
    assert_eq!(config, ModelConfig { generation, ..r.config.clone() });
    assert_eq!(weights.fingerprint().unwrap(), r.weights.fingerprint().unwrap());
}

/// Files written by llama.cpp's own package from the same weights (families/make_gguf.py).
#[test]
fn gguf_files_hold_the_same_models() {
    for name in ["families/llama3", "families/qwen2", "families/qwen3", "families/gemma2", "families/gemma3"] {
        let r = reference(name);
        let (config, weights) = Weights::from_gguf(&fixture(name).join("model.gguf"), &Device::Cpu).unwrap();
        // GGUF has no generation_config.json, and these files name no padding token.
        let pad = config.pad;
        let mut expected = ModelConfig { generation: serde_json::Value::Null, pad, ..r.config.clone() };
        if expected.family.gemma.is_some() {
            // GGUF lacks these settings: the scale follows from the sizes, and one layer in so many has no window.
            expected.query_scalar = Some(expected.head_dim);
            let period = if name == "families/gemma2" { 2 } else { 6 };
            expected.window.as_mut().unwrap().layers = (1..=2).map(|nth| nth % period != 0).collect();
        }
        assert_eq!(config, expected, "{name}");
        assert_eq!(weights.0.keys().collect::<Vec<_>>(), r.weights.0.keys().collect::<Vec<_>>(), "{name}");
        for (key, tensor) in &weights.0 {
            let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let worst = max_abs_difference(&flat(tensor), &flat(&r.weights.0[key]));
            // Qwen3's matrices are in Q8_0: the step is a 127th of a block's largest value, and the error up to half of
            // it.
            assert!(worst < if name == "families/qwen3" { 0.003 } else { 1e-6 }, "{key} of {name} differs by {worst}");
        }
    }
}

/// Shards in half precision: the values read are those written, with the rounding of the writing.
#[test]
fn shards_in_half_precision_are_read() {
    let r = reference("llama");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("llama").join("config.json"), dir.path().join("config.json")).unwrap();
    let mut shards: [HashMap<String, Tensor>; 3] = Default::default();
    let dtypes = [DType::BF16, DType::F16, DType::F32];
    for (i, (name, tensor)) in r.weights.0.iter().enumerate() {
        shards[i % 3].insert(name.clone(), tensor.to_dtype(dtypes[i % 3]).unwrap());
    }
    let mut map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-0000{}-of-00003.safetensors", i + 1);
        candle_core::safetensors::save(shard, dir.path().join(&file)).unwrap();
        map.extend(shard.keys().map(|name| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let (config, weights) = Weights::from_directory(dir.path(), &Device::Cpu).unwrap();
    assert_eq!(config, r.config);
    assert_eq!(weights.0.len(), r.weights.0.len());
    for (i, (name, tensor)) in r.weights.0.iter().enumerate() {
        let rounded = tensor.to_dtype(dtypes[i % 3]).unwrap().to_dtype(DType::F32).unwrap();
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&weights.0[name]), flat(&rounded), "{name}");
    }
    // Permuting the rows while reading gives the same as permuting them afterwards.
    let onto = LoadTarget { device: &Device::Cpu, dtype: DType::BF16 };
    let half = Weights::from_directory(dir.path(), onto).unwrap().1;
    assert!(half.0.values().all(|tensor| tensor.dtype() == DType::BF16));
    assert_eq!(half.fingerprint().unwrap(), weights.to_dtype(DType::BF16).unwrap().fingerprint().unwrap());
    let file = fixture("families/llama3").join("model.gguf");
    let [half, full] = [onto, (&Device::Cpu).into()].map(|onto| Weights::from_gguf(&file, onto).unwrap().1);
    assert!(half.0.values().all(|tensor| tensor.dtype() == DType::BF16));
    assert_eq!(half.fingerprint().unwrap(), full.to_dtype(DType::BF16).unwrap().fingerprint().unwrap());
}

#[test]
fn an_unknown_architecture_is_refused_with_the_supported_ones() {
    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(fixture("llama").join("config.json")).unwrap();
    for (from, to, expected) in [
        (
            "LlamaForCausalLM",
            "PhiForCausalLM",
            "PhiForCausalLM is not supported here; these are: LlamaForCausalLM, Mistral",
        ),
        (
            "\"default\"",
            "\"dynamic\"",
            "RoPE scaling of type dynamic is not supported; these are: default, linear, llama3, yarn",
        ),
    ] {
        std::fs::write(dir.path().join("config.json"), config.replace(from, to)).unwrap();
        let error = format!("{:#}", ModelConfig::from_directory(dir.path()).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_fingerprint_distinguishes_versions() {
    let r = reference("llama");
    let before = r.weights.fingerprint().unwrap();
    let mut moved = r.weights.snapshot().unwrap();
    assert_eq!(moved.fingerprint().unwrap(), before);
    let norm = moved.0.get_mut("model.norm.weight").unwrap();
    *norm = (norm.clone() + 1e-6).unwrap();
    assert_ne!(moved.fingerprint().unwrap(), before);
}

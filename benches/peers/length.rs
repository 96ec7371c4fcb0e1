//! Work on long sequences: a decode step after a long context, the log-probabilities and the gradient of long completions.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use kernels::{Gradients, TreeMask, backward};
use preceptor::lm::model::attention::Scope;
use preceptor::lm::model::{Decoder, KvCache, ModelConfig, Pack};
use preceptor::pipeline::generate::sampler::{Sampler, Sampling};
use serde_json::{Map, Value, json};

use super::figures::{once, peak_rss_kib, repeat};

/// Number of decode steps that are measured together.
const STEPS: usize = 16;
/// Number of completions whose gradient is computed together.
const COMPLETIONS: usize = 2;

/// Measures decode steps of `width` sequences that share a prompt of `length` tokens. Keys and values of the prompt are
/// random; the time does not depend on them.
pub fn decode(model: &Decoder, width: usize, length: usize, repeats: u64) -> Result<Map<String, Value>> {
    let config = model.config();
    let row = || Tensor::rand(-1f32, 1.0, (length, config.kv_heads, config.head_dim), &Device::Cpu);
    let mut cache = KvCache::new(model, STEPS)?;
    let prompt = cache.prompt(&vec![(row()?, row()?); config.layers])?;
    let sampling = Sampling { temperature: 0.9, ..Sampling::default() };
    let mut samplers: Vec<Sampler> = (0..width as u64).map(|seed| Sampler::new(&sampling, &[], seed)).collect();
    let mut figures = repeat(repeats, width * STEPS, "tokens", || {
        let slots: Vec<usize> = (0..width).map(|_| cache.enter(&prompt)).collect();
        let mut ids = vec![1; width];
        for step in 0..STEPS {
            let positions = vec![(length + step) as u32; width];
            let hidden = model.hidden(&ids, &positions, &mut *cache.step(&slots)?)?;
            let logits = model.logits(&hidden)?.to_vec2::<f32>()?;
            ids = samplers.iter_mut().zip(&logits).map(|(sampler, logits)| sampler.draw(logits).0).collect();
        }
        slots.into_iter().for_each(|slot| cache.leave(slot));
        Ok(())
    })?;
    figures.insert("peak_rss_kib".into(), json!(peak_rss_kib()?));
    let slots: Vec<usize> = (0..width).map(|_| cache.enter(&prompt)).collect();
    let heads = |count| Tensor::rand(-1f32, 1.0, (width, count, config.head_dim), &Device::Cpu);
    let (q, k, v) = (heads(config.heads)?, heads(config.kv_heads)?, heads(config.kv_heads)?);
    let attend = || {
        for _ in 0..STEPS {
            let mut step = cache.step(&slots)?;
            for layer in 0..config.layers {
                step.attend(Scope { layer, window: None, cap: None }, &q, &k, &v)?;
            }
        }
        Ok(())
    };
    let attention = seconds(3, attend)? / (width * STEPS) as f64;
    figures.insert("attention_s_per_unit".into(), json!(attention));
    Ok(figures)
}

/// Measures the log-probabilities of a completion of `length / 2` tokens after a prompt of the same length.
pub fn score(model: &Decoder, length: usize, repeats: u64) -> Result<Map<String, Value>> {
    let pack = pack(model.config(), length, 1);
    let work = |pack: &Pack| Ok(model.logprobs(pack, 1.0)?.0.to_vec1::<f32>().map(drop)?);
    work(&self::pack(model.config(), 256, 1))?;
    let mut figures = once(repeats, pack.targets.len(), "tokens", || work(&pack))?;
    figures.insert("peak_rss_kib".into(), json!(peak_rss_kib()?));
    let [q, k, v] = heads(model.config(), pack.len())?;
    let mask = Arc::new(pack.mask());
    let layer = seconds(1, || attention([&q, &k, &v], &mask).map(drop))?;
    let attention = layer * model.config().layers as f64 / pack.targets.len() as f64;
    figures.insert("attention_s_per_unit".into(), json!(attention));
    Ok(figures)
}

/// Measures the gradient of a group: completions of `length / 2` tokens after a shared prompt of the same length.
pub fn gradient(model: Arc<Decoder>, length: usize, repeats: u64) -> Result<Map<String, Value>> {
    let (trained, params) = model.trainable(true)?;
    drop(model);
    let model = trained;
    let pack = pack(model.config(), length, COMPLETIONS);
    let mut gradients = Gradients::new(&params);
    let mut work = |pack: &Pack| {
        let (logprobs, _) = model.logprobs(pack, 1.0)?;
        backward(&logprobs.sum_all()?, &mut [&mut gradients])?;
        Ok(gradients.zero()?)
    };
    work(&self::pack(model.config(), 256, COMPLETIONS))?;
    let mut figures = once(repeats, pack.targets.len(), "tokens", || work(&pack))?;
    figures.insert("peak_rss_kib".into(), json!(peak_rss_kib()?));
    let inputs = heads(model.config(), pack.len())?;
    let mask = Arc::new(pack.mask());
    let layer = seconds(1, || {
        let [q, k, v] = inputs.each_ref().map(Var::from_tensor);
        let out = attention([&*q?, &*k?, &*v?], &mask)?;
        out.sum_all()?.backward().map(drop).context("a gradient")
    })?;
    let attention = layer * model.config().layers as f64 / pack.targets.len() as f64;
    figures.insert("attention_s_per_unit".into(), json!(attention));
    Ok(figures)
}

fn pack(config: &ModelConfig, length: usize, completions: usize) -> Pack {
    let words = |place: usize| -> Vec<u32> {
        (place * length / 2..(place + 1) * length / 2).map(|i| (i * 61 % config.vocab_size) as u32).collect()
    };
    let completions: Vec<Vec<u32>> = (1..=completions).map(words).collect();
    Pack::new(&words(0), &completions)
}

/// Returns random queries, keys and values of `tokens` tokens.
fn heads(config: &ModelConfig, tokens: usize) -> Result<[Tensor; 3]> {
    let of = |count| Tensor::rand(-1f32, 1.0, (tokens, count, config.head_dim), &Device::Cpu);
    Ok([of(config.heads)?, of(config.kv_heads)?, of(config.kv_heads)?])
}

fn attention([q, k, v]: [&Tensor; 3], mask: &Arc<TreeMask>) -> Result<Tensor> {
    Ok(kernels::tree_attention(q, k, v, mask, 0.125, None, None)?)
}

/// Returns the seconds of one run of `work`, the mean of `times`.
fn seconds(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    (0..times).try_for_each(|_| work())?;
    Ok(began.elapsed().as_secs_f64() / times as f64)
}

//! The key/value cache of generation: one shared prompt per group, ragged rows, no padding.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::attention::{Attend, Scope};

/// Keys and values of some prompts and of the sequences that continue them, in host memory.
///
/// A prompt's keys stand once, however many sequences continue it. Attention over a cache is computed here and
/// has no gradient; on a device other than the CPU, queries come to the host and results go back.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    prompts: Vec<Vec<Slab>>,
    sequences: Vec<Sequence>,
}

struct Sequence {
    prompt: usize,
    layers: Vec<Slab>,
}

/// Keys and values of one layer, each `[length][KV][hd]`.
#[derive(Default, Clone)]
struct Slab {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for a model with these sizes.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { kv_heads, head_dim, prompts: Vec::new(), sequences: Vec::new() }
    }

    /// Adds a prompt's keys and values `[T, KV, hd]` per layer, and `count` sequences that continue it.
    /// Returns the index of the first.
    ///
    /// # Errors
    /// When the tensors cannot be read.
    pub fn add(&mut self, layers: &[(Tensor, Tensor)], count: usize) -> Result<usize> {
        let read = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let slabs =
            layers.iter().map(|(k, v)| Ok(Slab { keys: read(k)?, values: read(v)? })).collect::<Result<Vec<_>>>()?;
        let first = self.sequences.len();
        let prompt = self.prompts.len();
        self.sequences.extend((0..count).map(|_| Sequence { prompt, layers: vec![Slab::default(); slabs.len()] }));
        self.prompts.push(slabs);
        Ok(first)
    }

    /// Attention for one new token of each of `sequences`, in order.
    pub fn step<'a>(&'a mut self, sequences: &'a [usize]) -> StepAttention<'a> {
        StepAttention { cache: self, sequences }
    }
}

/// One decode step: row `i` of the model's input is the next token of sequence `sequences[i]`.
pub struct StepAttention<'a> {
    cache: &'a mut KvCache,
    sequences: &'a [usize],
}

impl Attend for StepAttention<'_> {
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (layer, (rows, heads, hd)) = (scope.layer, q.dims3()?);
        let kv_width = self.cache.kv_heads * self.cache.head_dim;
        let host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
        let (queries, keys, values) = (host(q)?, host(k)?, host(v)?);
        for (row, sequence) in self.sequences.iter().enumerate() {
            let slab = &mut self.cache.sequences[*sequence].layers[layer];
            slab.keys.extend_from_slice(&keys[row * kv_width..(row + 1) * kv_width]);
            slab.values.extend_from_slice(&values[row * kv_width..(row + 1) * kv_width]);
        }
        let cache = &*self.cache;
        let repeats = heads / cache.kv_heads;
        let mut out = vec![0f32; rows * heads * hd];
        out.par_chunks_mut(heads * hd).zip(queries.par_chunks(heads * hd)).zip(self.sequences).for_each(
            |((out, queries), sequence)| {
                let sequence = &cache.sequences[*sequence];
                let slabs = [&cache.prompts[sequence.prompt][layer], &sequence.layers[layer]];
                let parts = last(slabs, kv_width, scope.window);
                let mut scores = Vec::new();
                for head in 0..heads {
                    let offset = head / repeats * hd;
                    let span = head * hd..(head + 1) * hd;
                    attend_one(&queries[span.clone()], parts, kv_width, offset, scope.cap, &mut scores, &mut out[span]);
                }
            },
        );
        Tensor::from_vec(out, (rows, heads * hd), q.device())
    }
}

/// Keys and values of the prompt's and the sequence's own part, as far back as the window reaches.
fn last(slabs: [&Slab; 2], width: usize, window: Option<usize>) -> [(&[f32], &[f32]); 2] {
    let tokens = slabs.map(|slab| slab.keys.len() / width);
    let hidden = window.map_or(0, |window| (tokens[0] + tokens[1]).saturating_sub(window));
    let from = [hidden.min(tokens[0]), hidden.saturating_sub(tokens[0])].map(|token| token * width);
    [0, 1].map(|i| (&slabs[i].keys[from[i]..], &slabs[i].values[from[i]..]))
}

/// softmax(q·Kᵀ/√hd)·V of one head over both parts, the scores capped.
fn attend_one(
    q: &[f32],
    parts: [(&[f32], &[f32]); 2],
    width: usize,
    offset: usize,
    cap: Option<f64>,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let hd = q.len();
    let scale = 1.0 / (hd as f32).sqrt();
    scores.clear();
    for (keys, _) in parts {
        scores.extend(keys.chunks_exact(width).map(|key| scale * dot(q, &key[offset..offset + hd])));
    }
    if let Some(cap) = cap.map(|cap| cap as f32) {
        scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
    }
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - top).exp();
        total += *score;
    }
    let values = parts.iter().flat_map(|(_, values)| values.chunks_exact(width));
    for (weight, value) in scores.iter().zip(values) {
        let weight = weight / total;
        for (out, value) in out.iter_mut().zip(&value[offset..offset + hd]) {
            *out += weight * value;
        }
    }
}

/// Eight running sums, so that the compiler can keep them in one register.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (chunks_a, chunks_b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in chunks_a.zip(chunks_b) {
        for i in 0..8 {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

//! The key/value cache of generation: slots that sequences come into and leave, one shared prompt per group, ragged rows,
//! no padding.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::attention::{Attend, Scope};
use super::config::ModelConfig;
use crate::ops::{Slab, attend_slabs};

/// Keys and values of the sequences under way, in host memory.
///
/// A sequence lives in a slot, whose room is kept for the next one; a prompt's keys stand once, however many sequences
/// continue it, and go with the last of them. Attention over a cache is computed here and has no gradient; on a device
/// other than the CPU, queries come to the host and results go back.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    /// Tokens that a new slot has room for.
    room: usize,
    slots: Vec<Slot>,
    free: Vec<usize>,
}

struct Slot {
    prompt: Arc<CachedPrompt>,
    /// What follows the prompt, by layer.
    layers: Vec<Slab>,
}

/// A prompt's keys and values, by layer.
pub struct CachedPrompt(Vec<Slab>);

impl KvCache {
    /// An empty cache for a model of this shape, whose sequences get `room` tokens after their prompts, or more.
    pub fn new(config: &ModelConfig, room: usize) -> Self {
        let ModelConfig { kv_heads, head_dim, layers, .. } = *config;
        Self { kv_heads, head_dim, layers, room, slots: Vec::new(), free: Vec::new() }
    }

    /// A prompt's keys and values `[T, KV, hd]` per layer, for sequences to continue.
    ///
    /// # Errors
    /// When the tensors cannot be read.
    pub fn prompt(&self, layers: &[(Tensor, Tensor)]) -> Result<Arc<CachedPrompt>> {
        let slab = |(k, v): &(Tensor, Tensor)| {
            let mut slab = Slab::new(self.kv_heads, self.head_dim, k.dim(0)?);
            slab.push(&host(k)?, &host(v)?);
            Ok(slab)
        };
        layers.iter().map(slab).collect::<Result<_>>().map(|layers| Arc::new(CachedPrompt(layers)))
    }

    /// Puts a sequence that continues `prompt` into a free slot, which it returns.
    pub fn enter(&mut self, prompt: &Arc<CachedPrompt>) -> usize {
        let prompt = Arc::clone(prompt);
        if let Some(slot) = self.free.pop() {
            self.slots[slot].prompt = prompt;
            self.slots[slot].layers.iter_mut().for_each(Slab::clear);
            return slot;
        }
        let layers = (0..self.layers).map(|_| Slab::new(self.kv_heads, self.head_dim, self.room)).collect();
        self.slots.push(Slot { prompt, layers });
        self.slots.len() - 1
    }

    /// Frees the slot of a sequence that has ended.
    pub fn leave(&mut self, slot: usize) {
        self.slots[slot].prompt = Arc::new(CachedPrompt(Vec::new()));
        self.free.push(slot);
    }

    /// Attention for one new token of each of the sequences in `slots`, in order.
    pub fn step<'a>(&'a mut self, slots: &'a [usize]) -> StepAttention<'a> {
        StepAttention { cache: self, slots }
    }
}

/// One decode step: row `i` of the model's input is the next token of the sequence in `slots[i]`.
pub struct StepAttention<'a> {
    cache: &'a mut KvCache,
    slots: &'a [usize],
}

impl Attend for StepAttention<'_> {
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (layer, (rows, heads, hd)) = (scope.layer, q.dims3()?);
        let (queries, keys, values) = (host(q)?, host(k)?, host(v)?);
        let token = self.cache.kv_heads * hd;
        for (row, slot) in self.slots.iter().enumerate() {
            let span = row * token..(row + 1) * token;
            self.cache.slots[*slot].layers[layer].push(&keys[span.clone()], &values[span]);
        }
        let cache = &*self.cache;
        let mut out = vec![0f32; rows * heads * hd];
        let attend = |scores: &mut Vec<f32>, ((out, queries), slot): ((&mut [f32], &[f32]), &usize)| {
            let slot = &cache.slots[*slot];
            let slabs = [&slot.prompt.0[layer], &slot.layers[layer]];
            let hidden = scope.window.map_or(0, |window| (slabs[0].len() + slabs[1].len()).saturating_sub(window));
            attend_slabs(out, queries, slabs, hidden, scope.cap, scores);
        };
        if rayon::current_num_threads() == 1 {
            let mut scores = Vec::new();
            let rows = out.chunks_mut(heads * hd).zip(queries.chunks(heads * hd)).zip(self.slots);
            rows.for_each(|row| attend(&mut scores, row));
        } else {
            let rows = out.par_chunks_mut(heads * hd).zip(queries.par_chunks(heads * hd)).zip(self.slots);
            rows.for_each_init(Vec::new, attend);
        }
        Tensor::from_vec(out, (rows, heads * hd), q.device())?.to_dtype(q.dtype())
    }
}

fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()
}

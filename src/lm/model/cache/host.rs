//! Keys and values in host memory.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::CachedPrompt;
use crate::lm::model::ModelConfig;
use crate::lm::model::attention::{Attend, Scope};
use kernels::{Slab, attend_slabs};

/// Cache for `f32` on the CPU. A sequence's results do not depend on the other sequences in the batch.
pub(super) struct Slabs {
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    /// Capacity of a new slot, in tokens.
    capacity: usize,
    slots: Vec<Slot>,
}

struct Slot {
    prompt: Option<Arc<CachedPrompt>>,
    /// Keys and values after the prompt, by layer.
    layers: Vec<Slab>,
}

/// A prompt's keys and values, by layer.
pub(super) struct Prompt(Vec<Slab>);

impl Slabs {
    pub(super) fn new(config: &ModelConfig, capacity: usize) -> Self {
        let ModelConfig { kv_heads, head_dim, layers, .. } = *config;
        Self { kv_heads, head_dim, layers, capacity, slots: Vec::new() }
    }

    pub(super) fn prompt(&self, layers: &[(Tensor, Tensor)]) -> Result<Prompt> {
        let slab = |(k, v): &(Tensor, Tensor)| {
            let mut slab = Slab::new(self.kv_heads, self.head_dim, k.dim(0)?);
            slab.push(&host(k)?, &host(v)?);
            Ok(slab)
        };
        layers.iter().map(slab).collect::<Result<_>>().map(Prompt)
    }

    /// Assigns a sequence to `slot`: a freed one, or the next new one.
    pub(super) fn enter(&mut self, slot: usize, prompt: &Arc<CachedPrompt>) {
        let prompt = Some(Arc::clone(prompt));
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.prompt = prompt;
            slot.layers.iter_mut().for_each(Slab::clear);
            return;
        }
        let layers = (0..self.layers).map(|_| Slab::new(self.kv_heads, self.head_dim, self.capacity)).collect();
        self.slots.push(Slot { prompt, layers });
    }

    pub(super) fn leave(&mut self, slot: usize) {
        self.slots[slot].prompt = None;
    }

    pub(super) fn step<'a>(&'a mut self, slots: &'a [usize]) -> DecodeStep<'a> {
        DecodeStep { cache: self, slots }
    }
}

/// Attention of one decode step.
pub(super) struct DecodeStep<'a> {
    cache: &'a mut Slabs,
    slots: &'a [usize],
}

impl Attend for DecodeStep<'_> {
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
            let prompt = slot.prompt.as_ref().expect("a slot that is stepped has a sequence").host();
            let slabs = [&prompt.0[layer], &slot.layers[layer]];
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
        Tensor::from_vec(out, (rows, heads * hd), q.device())
    }
}

fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1::<f32>()
}

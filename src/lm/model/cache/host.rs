//! Keys and values in host memory.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::CachedPrompt;
use crate::lm::model::ModelConfig;
use crate::lm::model::attention::{Attend, Scope};
use kernels::{Continuation, Slab, attend_slabs};

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
        let (cache, kv_heads) = (&*self.cache, self.cache.kv_heads);
        // Rows whose sequences share a prompt, of which the same tokens are visible to them.
        let mut groups: Vec<(&Arc<CachedPrompt>, usize, Vec<usize>)> = Vec::new();
        for (row, slot) in self.slots.iter().enumerate() {
            let slot = &cache.slots[*slot];
            let prompt = slot.prompt.as_ref().expect("a slot that is stepped has a sequence");
            let tokens = prompt.host().0[layer].len() + slot.layers[layer].len();
            let hidden = scope.window.map_or(0, |window| tokens.saturating_sub(window));
            match groups.iter_mut().find(|(other, with, _)| Arc::ptr_eq(other, prompt) && *with == hidden) {
                Some((_, _, rows)) => rows.push(row),
                None => groups.push((prompt, hidden, vec![row])),
            }
        }
        let threads = rayon::current_num_threads();
        let parts = groups.iter().flat_map(|(prompt, hidden, rows)| {
            rows.chunks(rows.len().div_ceil(threads)).map(move |rows| (*prompt, *hidden, rows))
        });
        let tasks: Vec<_> = parts.flat_map(|part| (0..kv_heads).map(move |head| (part, head))).collect();
        let attend = |((prompt, hidden, rows), head): &((&Arc<CachedPrompt>, usize, &[usize]), usize)| {
            let sequence = |row: &usize| Continuation {
                queries: &queries[row * heads * hd..][..heads * hd],
                own: &cache.slots[self.slots[*row]].layers[layer],
            };
            let sequences: Vec<Continuation<'_>> = rows.iter().map(sequence).collect();
            attend_slabs(&prompt.host().0[layer], &sequences, *head, *hidden, scope.cap)
        };
        let results: Vec<Vec<f32>> =
            if threads == 1 { tasks.iter().map(attend).collect() } else { tasks.par_iter().map(attend).collect() };
        let (mut out, span) = (vec![0f32; rows * heads * hd], heads / kv_heads * hd);
        for (((_, _, rows), head), result) in tasks.iter().zip(&results) {
            for (row, result) in rows.iter().zip(result.chunks_exact(span)) {
                out[(row * kv_heads + head) * span..][..span].copy_from_slice(result);
            }
        }
        Tensor::from_vec(out, (rows, heads * hd), q.device())
    }
}

fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1::<f32>()
}

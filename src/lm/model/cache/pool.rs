//! Keys and values in tensors of any device and dtype.
//!
//! All sequences share one pool per layer with a row for each token, which may be any free row: blocks of one token in
//! terms of paged attention (Kwon et al. 2023, §4). A step gathers the rows that each of its sequences attends to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Result, Tensor};

use super::CachedPrompt;
use crate::lm::model::ModelConfig;
use crate::lm::model::attention::{Attend, Scope};
use crate::util::mutex::lock;
use kernels::{masked_softmax, softcap};

/// Cache on a device.
pub(super) struct Pool {
    kv_heads: usize,
    head_dim: usize,
    /// Keys and values `[R·KV, hd]`, by layer. The first row is zeros and never assigned; padding is gathered from it.
    layers: Vec<(Tensor, Tensor)>,
    /// Indices of the free rows.
    free: Free,
    capacity: usize,
    slots: Vec<Slot>,
}

type Free = Arc<Mutex<Vec<u32>>>;

struct Slot {
    prompt: Option<Arc<CachedPrompt>>,
    /// Rows of the tokens after the prompt.
    rows: Rows,
}

/// Rows that an owner holds in all layers' pools, in the order of their tokens; freed when this is dropped.
pub(super) struct Rows {
    held: Vec<u32>,
    free: Free,
}

impl Drop for Rows {
    fn drop(&mut self) {
        lock(&self.free).append(&mut self.held);
    }
}

impl Pool {
    /// Creates a cache with `rows` rows, which grows as needed, at least to double the size each time.
    pub(super) fn new(config: &ModelConfig, dtype: DType, device: &Device, rows: usize) -> Result<Self> {
        let ModelConfig { kv_heads, head_dim, layers, .. } = *config;
        let zeros = || Tensor::zeros((rows * kv_heads, head_dim), dtype, device);
        Ok(Self {
            kv_heads,
            head_dim,
            layers: (0..layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?,
            free: Arc::new(Mutex::new((1..rows as u32).rev().collect())),
            capacity: rows,
            slots: Vec::new(),
        })
    }

    fn empty_rows(&self) -> Rows {
        Rows { held: Vec::new(), free: Arc::clone(&self.free) }
    }

    /// Takes `count` free rows; the pools grow if fewer are free.
    fn take(&mut self, count: usize) -> Result<Rows> {
        let lacking = count.saturating_sub(self.free().len());
        if lacking > 0 {
            let more = self.capacity.max(lacking);
            for (keys, values) in &mut self.layers {
                for pool in [keys, values] {
                    let rest = Tensor::zeros((more * self.kv_heads, self.head_dim), pool.dtype(), pool.device())?;
                    *pool = Tensor::cat(&[&*pool, &rest], 0)?;
                }
            }
            let (from, to) = (self.capacity, self.capacity + more);
            self.capacity = to;
            self.free().splice(0..0, (from as u32..to as u32).rev());
        }
        let mut free = self.free();
        let at = free.len() - count;
        let held = free.split_off(at);
        Ok(Rows { held, free: Arc::clone(&self.free) })
    }

    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        lock(&self.free)
    }

    /// Returns the number of rows that can be taken without growing.
    #[cfg(test)]
    pub(super) fn free_rows(&self) -> usize {
        self.free().len()
    }

    /// Returns the indices `[n, KV]`, flat, of the heads of these rows in the pool tensors.
    fn indices(&self, rows: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let heads = self.kv_heads as u32;
        rows.into_iter().flat_map(|row| row * heads..(row + 1) * heads).collect()
    }

    fn device(&self) -> &Device {
        self.layers[0].0.device()
    }

    /// Expands indices to `[n·KV, hd]`, as [`Tensor::scatter_set`] expects them.
    fn scattered(&self, indices: Vec<u32>) -> Result<Tensor> {
        let count = indices.len();
        Tensor::from_vec(indices, (count, 1), self.device())?.broadcast_as((count, self.head_dim))?.contiguous()
    }

    /// Writes keys and values `[n, KV, hd]` of one layer at `indices`.
    fn write(&self, layer: usize, indices: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let (keys, values) = &self.layers[layer];
        for (pool, new) in [(keys, k), (values, v)] {
            pool.scatter_set(indices, &new.detach().contiguous()?.reshape(((), self.head_dim))?, 0)?;
        }
        Ok(())
    }

    pub(super) fn prompt(&mut self, layers: &[(Tensor, Tensor)]) -> Result<Rows> {
        let tokens = layers.first().map_or(Ok(0), |(k, _)| k.dim(0))?;
        let rows = self.take(tokens)?;
        let indices = self.scattered(self.indices(rows.held.iter().copied()))?;
        for (layer, (k, v)) in layers.iter().enumerate() {
            self.write(layer, &indices, k, v)?;
        }
        Ok(rows)
    }

    /// Assigns a sequence to `slot`: a freed one, or the next new one.
    pub(super) fn enter(&mut self, slot: usize, prompt: &Arc<CachedPrompt>) {
        let entered = Slot { prompt: Some(Arc::clone(prompt)), rows: self.empty_rows() };
        match self.slots.get_mut(slot) {
            Some(slot) => *slot = entered,
            None => self.slots.push(entered),
        }
    }

    pub(super) fn leave(&mut self, slot: usize) {
        self.slots[slot] = Slot { prompt: None, rows: self.empty_rows() };
    }

    pub(super) fn step<'a>(&'a mut self, slots: &'a [usize]) -> Result<DecodeStep<'a>> {
        let mut new_rows = self.take(slots.len())?;
        let indices = self.scattered(self.indices(new_rows.held.iter().copied()))?;
        for (slot, row) in slots.iter().zip(new_rows.held.drain(..)) {
            self.slots[*slot].rows.held.push(row);
        }
        Ok(DecodeStep { pool: self, slots, indices, visible: HashMap::new() })
    }
}

/// Attention of one decode step.
pub(super) struct DecodeStep<'a> {
    pool: &'a Pool,
    slots: &'a [usize],
    /// Indices of the new tokens' heads.
    indices: Tensor,
    /// Visible rows by window.
    visible: HashMap<Option<usize>, VisibleRows>,
}

/// Rows that the sequences of a step attend to.
#[derive(Clone)]
struct VisibleRows {
    /// Indices of the keys and values, `[N·KV·S]`; those of shorter sequences are padded with the first row.
    indices: Tensor,
    /// Mask `[N, S]`: 0 for tokens, −∞ for padding.
    mask: Tensor,
}

impl DecodeStep<'_> {
    fn visible(&mut self, window: Option<usize>) -> Result<VisibleRows> {
        if let Some(visible) = self.visible.get(&window) {
            return Ok(visible.clone());
        }
        let rows = |slot: &usize| {
            let Slot { prompt, rows } = &self.pool.slots[*slot];
            let prompt = prompt.as_ref().expect("a slot that is stepped has a sequence").device();
            let all: Vec<u32> = prompt.held.iter().chain(&rows.held).copied().collect();
            let hidden = window.map_or(0, |window| all.len().saturating_sub(window));
            all[hidden..].to_vec()
        };
        let rows: Vec<Vec<u32>> = self.slots.iter().map(rows).collect();
        let most = rows.iter().map(Vec::len).max().unwrap_or(0);
        let heads = self.pool.kv_heads as u32;
        let (mut indices, mut mask) = (Vec::new(), Vec::with_capacity(rows.len() * most));
        for rows in &rows {
            let beyond = most - rows.len();
            for head in 0..heads {
                indices.extend(rows.iter().map(|row| row * heads + head));
                indices.extend(std::iter::repeat_n(head, beyond));
            }
            mask.extend(std::iter::repeat_n(0f32, rows.len()));
            mask.extend(std::iter::repeat_n(f32::NEG_INFINITY, beyond));
        }
        let device = self.pool.device();
        let count = indices.len();
        let visible = VisibleRows {
            indices: Tensor::from_vec(indices, count, device)?,
            mask: Tensor::from_vec(mask, (rows.len(), most), device)?,
        };
        self.visible.insert(window, visible.clone());
        Ok(visible)
    }
}

impl Attend for DecodeStep<'_> {
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (rows, heads, hd) = q.dims3()?;
        let kv_heads = self.pool.kv_heads;
        let repeats = heads / kv_heads;
        self.pool.write(scope.layer, &self.indices, k, v)?;
        let VisibleRows { indices, mask } = self.visible(scope.window)?;
        let span = mask.dim(1)?;
        let (keys, values) = &self.pool.layers[scope.layer];
        let gather = |pool: &Tensor| pool.index_select(&indices, 0)?.reshape((rows, kv_heads, span, hd));
        let scores = q.detach().reshape((rows, kv_heads, repeats, hd))?.matmul(&gather(keys)?.t()?)?;
        // The mask is the same for all heads, so they are the first dimension.
        let scores = scores.reshape((rows, heads, span))?.transpose(0, 1)?;
        let scale = 1.0 / (hd as f64).sqrt();
        let weights = match scope.cap {
            None => masked_softmax(&scores, Some(&mask), scale)?,
            Some(_) => masked_softmax(&softcap(&(scores * scale)?, scope.cap)?, Some(&mask), 1.0)?,
        };
        let weights = weights.transpose(0, 1)?.contiguous()?.reshape((rows, kv_heads, repeats, span))?;
        weights.matmul(&gather(values)?)?.reshape((rows, heads * hd))
    }
}

//! Attention over one packed row, with gradients.

use candle_core::{Device, Result, Tensor};

use super::pack::Pack;
use crate::ops;

/// What a layer's attention is besides its queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Scope {
    /// Index of the layer.
    pub layer: usize,
    /// Tokens that a token sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Bound of the scores, see [`ops::softcap`].
    pub cap: Option<f64>,
}

/// What a model asks of its caller: who may look at whom.
pub trait Attend {
    /// Attends within `scope`, given rotated queries `[T, H, hd]`, rotated keys and values `[T, KV, hd]`.
    /// Returns `[T, H·hd]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// The additive masks of one row of tokens: that of most layers, and that of layers with a window.
pub(super) struct Masks {
    whole: Tensor,
    /// Positions of the rows and of the columns.
    rows: Vec<u32>,
    columns: Vec<u32>,
    windowed: Option<(usize, Tensor)>,
}

impl Masks {
    /// From the mask `[T, S]` without a window, and the positions of its rows and columns.
    pub(super) fn new(whole: Tensor, rows: &[u32], columns: Vec<u32>) -> Self {
        Self { whole, rows: rows.to_vec(), columns, windowed: None }
    }

    /// The mask `[T, S]` of layers with this window.
    pub(super) fn within(&mut self, window: Option<usize>) -> Result<&Tensor> {
        let last = self.rows.iter().max().map_or(0, |last| *last as usize);
        let Some(window) = window.filter(|window| *window <= last) else { return Ok(&self.whole) };
        if self.windowed.as_ref().is_none_or(|(made_for, _)| *made_for != window) {
            let mut mask = self.whole.flatten_all()?.to_vec1::<f32>()?;
            for (row, mask) in self.rows.iter().zip(mask.chunks_exact_mut(self.columns.len())) {
                for (column, mask) in self.columns.iter().zip(mask) {
                    if *column as usize + window <= *row as usize {
                        *mask = f32::NEG_INFINITY;
                    }
                }
            }
            self.windowed = Some((window, Tensor::from_vec(mask, self.whole.shape(), self.whole.device())?));
        }
        Ok(self.windowed.as_ref().map_or(&self.whole, |(_, mask)| mask))
    }
}

/// Dense attention under the mask of a [`Pack`]; differentiable.
pub struct PackedAttention {
    masks: Masks,
    kept: Option<Vec<(Tensor, Tensor)>>,
}

impl PackedAttention {
    /// For a training or scoring pass over `pack`.
    ///
    /// # Errors
    /// When the mask cannot be put on the device.
    pub fn new(pack: &Pack, device: &Device) -> Result<Self> {
        let masks = Masks::new(pack.mask(device)?, &pack.positions, pack.positions.clone());
        Ok(Self { masks, kept: None })
    }

    /// As [`Self::new`], and keeps each layer's keys and values for a cache.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn keeping(pack: &Pack, device: &Device) -> Result<Self> {
        Ok(Self { kept: Some(Vec::new()), ..Self::new(pack, device)? })
    }

    /// Keys and values `[T, KV, hd]` of each layer, in order; empty unless made by [`Self::keeping`].
    pub fn into_kept(self) -> Vec<(Tensor, Tensor)> {
        self.kept.unwrap_or_default()
    }
}

impl Attend for PackedAttention {
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if let Some(kept) = &mut self.kept {
            kept.push((k.clone(), v.clone()));
        }
        dense(q, k, v, self.masks.within(scope.window)?, scope.cap)
    }
}

/// softmax(q·Kᵀ/√hd + mask)·V, scores capped before they are masked, for queries `[T, H, hd]`, keys and values `[S, KV, hd]`, mask `[T, S]`; differentiable.
/// Returns `[T, H·hd]`.
pub(super) fn dense(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, cap: Option<f64>) -> Result<Tensor> {
    let (t, heads, hd) = q.dims3()?;
    let (s, kv_heads, _) = k.dims3()?;
    let repeats = heads / kv_heads;
    // The query heads that share one key head stand below one another: one product per key head.
    let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, repeats * t, hd))?;
    let k = k.permute((1, 2, 0))?.contiguous()?; // [KV, hd, S]
    let v = v.transpose(0, 1)?.contiguous()?; // [KV, S, hd]
    let scores = q.matmul(&k)?.reshape((heads, t, s))?;
    let scale = 1.0 / (hd as f64).sqrt();
    let weights = match cap {
        None => ops::masked_softmax(&scores, Some(mask), scale)?,
        Some(_) => ops::masked_softmax(&ops::softcap(&(scores * scale)?, cap)?, Some(mask), 1.0)?,
    };
    let mixed = weights.reshape((kv_heads, repeats * t, s))?.matmul(&v)?;
    mixed.reshape((heads, t, hd))?.transpose(0, 1)?.contiguous()?.reshape((t, heads * hd))
}

//! Attention over one packed row, with gradients.

use candle_core::{Result, Tensor};

use super::pack::Pack;
use crate::ops;

/// What a model asks of its caller: who may look at whom.
pub trait Attend {
    /// Attends in `layer`, given rotated queries `[T, H, hd]`, rotated keys and values `[T, KV, hd]`.
    /// Returns `[T, H·hd]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// Dense attention under the mask of a [`Pack`]; differentiable.
pub struct PackedAttention {
    mask: Tensor,
    kept: Option<Vec<(Tensor, Tensor)>>,
}

impl PackedAttention {
    /// For a training or scoring pass over `pack`.
    ///
    /// # Errors
    /// When the mask cannot be put on the device.
    pub fn new(pack: &Pack, device: &candle_core::Device) -> Result<Self> {
        Ok(Self { mask: pack.mask(device)?, kept: None })
    }

    /// As [`Self::new`], and keeps each layer's keys and values for a cache.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn keeping(pack: &Pack, device: &candle_core::Device) -> Result<Self> {
        Ok(Self { kept: Some(Vec::new()), ..Self::new(pack, device)? })
    }

    /// Keys and values `[T, KV, hd]` of each layer, in order; empty unless made by [`Self::keeping`].
    pub fn into_kept(self) -> Vec<(Tensor, Tensor)> {
        self.kept.unwrap_or_default()
    }
}

impl Attend for PackedAttention {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if let Some(kept) = &mut self.kept {
            kept.push((k.clone(), v.clone()));
        }
        dense(q, k, v, &self.mask)
    }
}

/// softmax(q·Kᵀ/√hd + mask)·V for queries `[T, H, hd]`, keys and values `[S, KV, hd]`, mask `[T, S]`; differentiable.
/// Returns `[T, H·hd]`.
pub(super) fn dense(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (t, heads, hd) = q.dims3()?;
    let (s, kv_heads, _) = k.dims3()?;
    let repeats = heads / kv_heads;
    // The query heads that share one key head stand below one another: one product per key head.
    let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, repeats * t, hd))?;
    let k = k.permute((1, 2, 0))?.contiguous()?; // [KV, hd, S]
    let v = v.transpose(0, 1)?.contiguous()?; // [KV, S, hd]
    let scores = q.matmul(&k)?.reshape((heads, t, s))?;
    let weights = ops::masked_softmax(&scores, Some(mask), 1.0 / (hd as f64).sqrt())?;
    let mixed = weights.reshape((kv_heads, repeats * t, s))?.matmul(&v)?;
    mixed.reshape((heads, t, hd))?.transpose(0, 1)?.contiguous()?.reshape((t, heads * hd))
}

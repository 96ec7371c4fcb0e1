//! Attention over a packed row of tokens, with gradients.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::pack::Pack;
use kernels::TreeMask;

/// Settings of one layer's attention: layer index, window and soft cap.
#[derive(Debug, Clone, Copy)]
pub struct Scope {
    /// Index of the layer.
    pub layer: usize,
    /// Number of tokens that a token attends to, itself included; `None` for all that the mask allows.
    pub window: Option<usize>,
    /// Soft cap of the scores, see [`kernels::softcap`].
    pub cap: Option<f64>,
}

/// Attention of a model's layers, provided by the caller of the model.
pub trait Attend {
    /// Computes attention within `scope`, given rotated queries `[T, H, hd]`, rotated keys `[T, KV, hd]` and values of
    /// the same shape. Returns `[T, H·hd]`.
    ///
    /// # Errors
    /// If the shapes do not match.
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// Returns the mask if the tokens of a row attend only to each other and their keys and values are not kept.
    fn mask(&self) -> Option<&Arc<TreeMask>> {
        None
    }
}

/// Differentiable attention over the row of a [`Pack`].
pub struct PackedAttention {
    mask: Arc<TreeMask>,
    kept: Option<Vec<(Tensor, Tensor)>>,
}

impl PackedAttention {
    /// Creates the attention of a training or scoring pass over `pack`.
    pub fn new(pack: &Pack) -> Self {
        Self::within(&Arc::new(pack.mask()))
    }

    /// Creates the attention from the pack's mask.
    pub(super) fn within(mask: &Arc<TreeMask>) -> Self {
        Self { mask: Arc::clone(mask), kept: None }
    }

    /// Creates the attention of a pass over `pack` that keeps each layer's keys and values for a cache.
    pub fn keeping(pack: &Pack) -> Self {
        Self { kept: Some(Vec::new()), ..Self::new(pack) }
    }

    /// Returns the keys and values `[T, KV, hd]` of each layer, in order; empty unless created by [`Self::keeping`].
    pub fn into_kept(self) -> Vec<(Tensor, Tensor)> {
        self.kept.unwrap_or_default()
    }
}

impl Attend for PackedAttention {
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if let Some(kept) = &mut self.kept {
            kept.push((k.clone(), v.clone()));
        }
        within(&self.mask, scope, q, k, v)
    }

    fn mask(&self) -> Option<&Arc<TreeMask>> {
        self.kept.is_none().then_some(&self.mask)
    }
}

/// Computes the attention of the tokens of `mask` within `scope`, with scores divided by √hd.
pub(super) fn within(mask: &Arc<TreeMask>, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(2)? as f64).sqrt();
    kernels::tree_attention(q, k, v, mask, scale, scope.window, scope.cap)
}

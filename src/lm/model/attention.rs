//! Attention over one packed row, with gradients.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::pack::Pack;
use kernels::TreeMask;

/// What a layer's attention is besides its queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Scope {
    /// Index of the layer.
    pub layer: usize,
    /// Tokens that a token sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Bound of the scores, see [`kernels::softcap`].
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

    /// The mask, where nothing but the tokens of one row see each other and nobody wants their keys and values.
    fn mask(&self) -> Option<&Arc<TreeMask>> {
        None
    }
}

/// Attention over the row of a [`Pack`]; differentiable.
pub struct PackedAttention {
    mask: Arc<TreeMask>,
    kept: Option<Vec<(Tensor, Tensor)>>,
}

impl PackedAttention {
    /// For a training or scoring pass over `pack`.
    pub fn new(pack: &Pack) -> Self {
        Self::within(&Arc::new(pack.mask()))
    }

    /// The same, given the pack's mask.
    pub(super) fn within(mask: &Arc<TreeMask>) -> Self {
        Self { mask: Arc::clone(mask), kept: None }
    }

    /// As [`Self::new`], and keeps each layer's keys and values for a cache.
    pub fn keeping(pack: &Pack) -> Self {
        Self { kept: Some(Vec::new()), ..Self::new(pack) }
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
        within(&self.mask, scope, q, k, v)
    }

    fn mask(&self) -> Option<&Arc<TreeMask>> {
        self.kept.is_none().then_some(&self.mask)
    }
}

/// Attention of the tokens of `mask` within `scope`, scores divided by √hd.
pub(super) fn within(mask: &Arc<TreeMask>, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(2)? as f64).sqrt();
    kernels::tree_attention(q, k, v, mask, scale, scope.window, scope.cap)
}

//! The value baseline: a linear head on the policy's hidden states.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};

use crate::ops::{AdamW, AdamWConfig, Gradients};

/// V(s) = h·w + b, on hidden states whose gradient is cut: the baseline learns from the policy's features
/// and does not pull on them.
pub struct ValueHead {
    weight: Var,
    bias: Var,
    params: Vec<(String, Var)>,
    gradients: Gradients,
    optimizer: AdamW,
}

impl ValueHead {
    /// A head for hidden states of `width`, zero at first.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(width: usize, config: AdamWConfig, device: &Device) -> Result<Self> {
        let weight = Var::zeros((1, width), DType::F32, device)?;
        let bias = Var::zeros(1, DType::F32, device)?;
        let params =
            vec![("value_head.weight".to_owned(), weight.clone()), ("value_head.bias".to_owned(), bias.clone())];
        let gradients = Gradients::new(&params)?;
        let optimizer = AdamW::new(params.clone(), config)?;
        Ok(Self { weight, bias, params, gradients, optimizer })
    }

    /// Values `[N]` of hidden states `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn values(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.detach().matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?.squeeze(1)?)
    }

    /// Adds the gradient of Σ slope·value to the batch's.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn accumulate(&mut self, values: &Tensor, slopes: &Tensor) -> Result<()> {
        let mut store = (values * slopes)?.sum_all()?.backward()?;
        self.gradients.add(&mut store)?;
        Ok(())
    }

    /// One optimizer step on the mean over `count`, and a clean slate.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn step(&mut self, count: usize, lr: f64) -> Result<()> {
        if self.gradients.all_finite()? {
            self.optimizer.step(&self.gradients, lr, 1.0 / count.max(1) as f64)?;
        }
        self.discard()
    }

    /// Forgets the batch's gradient.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn discard(&mut self) -> Result<()> {
        Ok(self.gradients.zero()?)
    }

    /// The head's tensors by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
    }
}

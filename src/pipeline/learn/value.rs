//! The value baseline: a linear head on the policy's hidden states or on those of a separate decoder.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Tensor, Var};

use super::state::restore_params;
use crate::lm::model::{Decoder, Pack};
use kernels::{AdamW, AdamWConfig, Frozen, Gradients, clip_factor};

/// Value baseline V(s) = h·w + b. On the policy's hidden states, which are detached, the baseline uses the policy's
/// features without affecting them. With a separate decoder it also learns its own features, at the cost of a second
/// model.
pub struct ValueModel {
    trunk: Option<Trunk>,
    weight: Var,
    bias: Var,
    head: Part,
}

/// Separate decoder of the baseline.
struct Trunk {
    model: Decoder,
    part: Part,
}

/// Parameters with one learning rate.
struct Part {
    params: Vec<(String, Var)>,
    gradients: Gradients,
    optimizer: AdamW,
}

impl Part {
    fn new(params: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        Ok(Self { gradients: Gradients::new(&params)?, optimizer: AdamW::new(params.clone(), config)?, params })
    }

    /// Makes an optimizer step on the mean gradient over `count`, clipped to `max_norm`; skips a non-finite gradient.
    fn step(&mut self, count: f64, lr: f64, max_norm: f64) -> Result<()> {
        let norm = self.gradients.global_norm()? / count;
        if norm.is_finite() {
            self.optimizer.step(&self.gradients, lr, clip_factor(norm, max_norm) / count)?;
        }
        Ok(())
    }
}

impl ValueModel {
    /// Creates a baseline for `policy` that is zero everywhere, on a copy of its decoder if `decoder` is set.
    ///
    /// # Errors
    /// If the device has insufficient memory.
    pub fn new(policy: &Decoder, decoder: bool, adam: AdamWConfig) -> Result<Self> {
        let weight = Var::zeros((1, policy.config().hidden_size), DType::F32, policy.device())?;
        let bias = Var::zeros(1, DType::F32, policy.device())?;
        let params =
            vec![("value_head.weight".to_owned(), weight.clone()), ("value_head.bias".to_owned(), bias.clone())];
        let trunk = if decoder {
            let (model, params) = policy.trainable(false)?;
            Some(Trunk { model, part: Part::new(params, adam)? })
        } else {
            None
        };
        let head = Part::new(params, AdamWConfig { weight_decay: 0.0, ..adam })?;
        Ok(Self { trunk, weight, bias, head })
    }

    /// Returns the values `[N]` of the states before the targets of `pack`, whose hidden states in the policy are
    /// `hidden` `[N, D]`.
    ///
    /// # Errors
    /// If shapes do not match.
    pub fn values(&self, hidden: &Tensor, pack: &Pack) -> Result<Tensor> {
        let features = match &self.trunk {
            None => hidden.detach(),
            Some(trunk) => trunk.model.predicting(pack)?,
        };
        let features = features.to_dtype(DType::F32)?;
        Ok(features.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?.squeeze(1)?)
    }

    /// Adds the gradient of Σ slope·value to the batch's gradient.
    ///
    /// # Errors
    /// If shapes do not match.
    pub fn accumulate(&mut self, values: &Tensor, gradients: &Tensor) -> Result<()> {
        let mut accumulators: Vec<&mut Gradients> = self.parts().map(|part| &mut part.gradients).collect();
        kernels::backward(&(values * gradients)?.sum_all()?, &mut accumulators)?;
        Ok(())
    }

    /// Makes one optimizer step on the mean over `count`: the head at `head_lr`, a separate decoder at `lr` with its
    /// gradient clipped to `max_norm`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn step(&mut self, count: usize, lr: f64, head_lr: f64, max_norm: f64) -> Result<()> {
        let count = count.max(1) as f64;
        if let Some(trunk) = &mut self.trunk {
            trunk.part.step(count, lr, max_norm)?;
        }
        self.head.step(count, head_lr, f64::INFINITY)
    }

    /// Clears the batch's gradient.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn discard(&mut self) -> Result<()> {
        self.parts().try_for_each(|part| Ok(part.gradients.zero()?))
    }

    /// Returns copies of the parameters by name; those of a separate decoder have the names of the policy's.
    ///
    /// # Errors
    /// If memory for the copies cannot be allocated.
    pub fn copies(&self) -> Result<Vec<(String, Frozen)>> {
        let params = self.shared_parts().flat_map(|part| &part.params);
        params.map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach().into()))).collect()
    }

    /// Returns the state of the optimizers, in the format of [`AdamW::export`]; names begin with that of the part.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn export(&self) -> Result<Vec<(String, Frozen)>> {
        let mut all = Vec::new();
        for (part, place) in self.shared_parts().zip(["head", "trunk"]) {
            let state = part.optimizer.export()?;
            all.extend(state.into_iter().map(|(name, tensor)| (format!("{place}/{name}"), tensor)));
        }
        Ok(all)
    }

    /// Restores the state returned by [`Self::copies`] and [`Self::export`].
    ///
    /// # Errors
    /// If a tensor is missing or has another shape; the error names it.
    pub fn restore(&mut self, params: &HashMap<String, Tensor>, optimizer: &HashMap<String, Tensor>) -> Result<()> {
        let parts = std::iter::once(&mut self.head).chain(self.trunk.as_mut().map(|trunk| &mut trunk.part));
        for (part, place) in parts.zip(["head/", "trunk/"]) {
            restore_params(&part.params, params)?;
            let own = optimizer
                .iter()
                .filter_map(|(name, tensor)| Some((name.strip_prefix(place)?.to_owned(), tensor.clone())));
            part.optimizer.import(own.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn shared_parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.head).chain(self.trunk.as_ref().map(|trunk| &trunk.part))
    }

    fn parts(&mut self) -> impl Iterator<Item = &mut Part> {
        self.trunk.as_mut().map(|trunk| &mut trunk.part).into_iter().chain([&mut self.head])
    }
}

//! The value baseline: a linear head on the policy's hidden states or on those of a separate decoder.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};

use super::state::restore_params;
use crate::lm::model::{Decoder, Pack};
use kernels::{AdamW, AdamWConfig, Frozen, Gradients, clip_factor};

/// Names of the head's parameters.
const WEIGHT: &str = "value_head.weight";
const BIAS: &str = "value_head.bias";

/// Value baseline V(s) = h·w + b. On the policy's hidden states, which are detached, the baseline uses the policy's
/// features without affecting them. With a separate decoder it also learns its own features, at the cost of a second
/// model.
pub struct ValueModel {
    net: ValueNet,
    head: Part,
    /// Parameters of the separate decoder, if there is one.
    trunk: Option<Part>,
}

/// Weights of a baseline. A clone shares them.
#[derive(Clone)]
pub struct ValueNet {
    trunk: Option<Arc<Decoder>>,
    weight: Var,
    bias: Var,
}

/// Copy of a baseline's weights on another device.
pub struct ValueCopy {
    /// The copied weights.
    pub net: ValueNet,
    /// Zeroed accumulators for the gradients of the copy, as [`ValueModel::accumulators`].
    pub sums: Vec<Gradients>,
    /// Variables of the copy, in the order of [`ValueModel::variables`].
    pub params: Vec<(String, Var)>,
}

/// Parameters with one learning rate.
struct Part {
    params: Vec<(String, Var)>,
    optimizer: AdamW,
}

impl Part {
    fn new(params: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        Ok(Self { optimizer: AdamW::new(params.clone(), config)?, params })
    }

    /// Makes an optimizer step on the mean of `sum` over `count`, clipped to `max_norm`; skips a non-finite gradient.
    fn step(&mut self, sum: &Gradients, count: f64, lr: f64, max_norm: f64) -> Result<()> {
        let norm = sum.global_norm()? / count;
        if norm.is_finite() {
            self.optimizer.step(sum, lr, clip_factor(norm, max_norm) / count)?;
        }
        Ok(())
    }
}

impl ValueNet {
    /// Returns a copy of the weights on `device`, and its variables by name. `params` are the variables of the separate
    /// decoder, if there is one.
    fn on(&self, params: &[(String, Var)], device: &Device) -> Result<(Self, Vec<(String, Var)>)> {
        let copy = |var: &Var| -> Result<Var> { Ok(Var::from_tensor(&var.to_device(device)?.copy()?.detach())?) };
        let (weight, bias) = (copy(&self.weight)?, copy(&self.bias)?);
        let mut vars = vec![(WEIGHT.to_owned(), weight.clone()), (BIAS.to_owned(), bias.clone())];
        let mut trunk = None;
        if let Some(decoder) = &self.trunk {
            let (model, own) = decoder.trainable_on(params, device)?;
            trunk = Some(Arc::new(model));
            vars.extend(own);
        }
        Ok((Self { trunk, weight, bias }, vars))
    }

    /// Returns the values `[N]` of the states before the targets of `pack`, whose hidden states in the policy are
    /// `hidden` `[N, D]`.
    ///
    /// # Errors
    /// If shapes do not match.
    pub fn values(&self, hidden: &Tensor, pack: &Pack) -> Result<Tensor> {
        let features = match &self.trunk {
            None => hidden.detach(),
            Some(trunk) => trunk.predicting(pack)?,
        };
        let features = features.to_dtype(DType::F32)?;
        Ok(features.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?.squeeze(1)?)
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
        let params = vec![(WEIGHT.to_owned(), weight.clone()), (BIAS.to_owned(), bias.clone())];
        let trunk = if decoder {
            let (model, params) = policy.trainable(false)?;
            Some((Arc::new(model), Part::new(params, adam)?))
        } else {
            None
        };
        let head = Part::new(params, AdamWConfig { weight_decay: 0.0, ..adam })?;
        let (model, trunk) = trunk.unzip();
        Ok(Self { net: ValueNet { trunk: model, weight, bias }, head, trunk })
    }

    /// Returns the weights, which [`Self::step`] changes.
    pub fn net(&self) -> &ValueNet {
        &self.net
    }

    /// Returns a copy of the weights on `device`, for a replica of the learner.
    ///
    /// # Errors
    /// If the device has insufficient memory.
    pub fn copy_on(&self, device: &Device) -> Result<ValueCopy> {
        let trunk = self.trunk.as_ref().map_or(&[][..], |part| &part.params);
        let (net, params) = self.net.on(trunk, device)?;
        let (head, trunk) = params.split_at(self.head.params.len());
        let mut sums = vec![Gradients::new(head)];
        if self.trunk.is_some() {
            sums.push(Gradients::new(trunk));
        }
        Ok(ValueCopy { net, sums, params })
    }

    /// Returns the variables of the head, then those of a separate decoder, by name.
    pub fn variables(&self) -> impl Iterator<Item = &(String, Var)> {
        self.parts().flat_map(|part| &part.params)
    }

    /// Returns zero accumulators for the gradients of the baseline's parts.
    pub fn accumulators(&self) -> Vec<Gradients> {
        self.parts().map(|part| Gradients::new(&part.params)).collect()
    }

    /// Makes one optimizer step on the mean over `count` of `sums`, which are [`Self::accumulators`]: the head at `head_lr`, a
    /// separate decoder at `lr` with its gradient clipped to `max_norm`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn step(&mut self, sums: &[Gradients], count: usize, lr: f64, head_lr: f64, max_norm: f64) -> Result<()> {
        let count = count.max(1) as f64;
        let rates = [(head_lr, f64::INFINITY), (lr, max_norm)];
        let parts = std::iter::once(&mut self.head).chain(&mut self.trunk);
        for ((part, sum), (lr, max_norm)) in parts.zip(sums).zip(rates) {
            part.step(sum, count, lr, max_norm)?;
        }
        Ok(())
    }

    /// Returns copies of the parameters by name; those of a separate decoder have the names of the policy's.
    ///
    /// # Errors
    /// If memory for the copies cannot be allocated.
    pub fn copies(&self) -> Result<Vec<(String, Frozen)>> {
        let params = self.parts().flat_map(|part| &part.params);
        params.map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach().into()))).collect()
    }

    /// Returns the state of the optimizers, in the format of [`AdamW::export`]; names begin with that of the part.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn export(&self) -> Result<Vec<(String, Frozen)>> {
        let mut all = Vec::new();
        for (part, place) in self.parts().zip(["head", "trunk"]) {
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
        let parts = std::iter::once(&mut self.head).chain(&mut self.trunk);
        for (part, place) in parts.zip(["head/", "trunk/"]) {
            restore_params(&part.params, params)?;
            let own = optimizer
                .iter()
                .filter_map(|(name, tensor)| Some((name.strip_prefix(place)?.to_owned(), tensor.clone())));
            part.optimizer.import(own.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.head).chain(&self.trunk)
    }
}

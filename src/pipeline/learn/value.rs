//! The value baseline: a linear head, on the policy's hidden states or on those of a decoder of its own.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Tensor, Var};

use super::state::restore_params;
use crate::lm::model::{Decoder, Pack};
use kernels::{AdamW, AdamWConfig, Frozen, Gradients};

/// V(s) = h·w + b. On the policy's hidden states, whose gradient is cut, the baseline learns from the policy's features
/// and does not pull on them; with a decoder of its own it learns its features too, at the price of a second model.
pub struct ValueModel {
    trunk: Option<Trunk>,
    weight: Var,
    bias: Var,
    head: Part,
}

/// A decoder of its own.
struct Trunk {
    model: Decoder,
    part: Part,
}

/// Parameters that learn at one rate.
struct Part {
    params: Vec<(String, Var)>,
    gradients: Gradients,
    optimizer: AdamW,
}

impl Part {
    fn new(params: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        Ok(Self { gradients: Gradients::new(&params)?, optimizer: AdamW::new(params.clone(), config)?, params })
    }

    /// The mean over `count`, its norm bounded.
    fn step(&mut self, count: f64, lr: f64, max_norm: f64) -> Result<()> {
        let norm = self.gradients.global_norm()? / count;
        if norm.is_finite() {
            self.optimizer.step(&self.gradients, lr, (max_norm / norm.max(f64::MIN_POSITIVE)).min(1.0) / count)?;
        }
        Ok(())
    }
}

impl ValueModel {
    /// A baseline for `policy`, zero everywhere at first; with `decoder`, on a copy of it.
    ///
    /// # Errors
    /// When the device has no room.
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

    /// Values `[N]` of the states before the targets of `pack`, whose hidden states in the policy are `hidden` `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn values(&self, hidden: &Tensor, pack: &Pack) -> Result<Tensor> {
        let features = match &self.trunk {
            None => hidden.detach(),
            Some(trunk) => trunk.model.predicting(pack)?,
        };
        let features = features.to_dtype(DType::F32)?;
        Ok(features.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?.squeeze(1)?)
    }

    /// Adds the gradient of Σ slope·value to the batch's.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn accumulate(&mut self, values: &Tensor, slopes: &Tensor) -> Result<()> {
        let mut accumulators: Vec<&mut Gradients> = self.parts().map(|part| &mut part.gradients).collect();
        kernels::backward(&(values * slopes)?.sum_all()?, &mut accumulators)?;
        Ok(())
    }

    /// One optimizer step on the mean over `count`, the head at `head_lr`, a decoder of its own at `lr` with its gradient
    /// bounded by `max_norm`.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn step(&mut self, count: usize, lr: f64, head_lr: f64, max_norm: f64) -> Result<()> {
        let count = count.max(1) as f64;
        if let Some(trunk) = &mut self.trunk {
            trunk.part.step(count, lr, max_norm)?;
        }
        self.head.step(count, head_lr, f64::INFINITY)
    }

    /// Forgets the batch's gradient.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn discard(&mut self) -> Result<()> {
        self.parts().try_for_each(|part| Ok(part.gradients.zero()?))
    }

    /// DeviceReplicas of the parameters by name, those of a decoder of its own as the policy names them.
    ///
    /// # Errors
    /// When memory for the copies cannot be had.
    pub fn copies(&self) -> Result<Vec<(String, Frozen)>> {
        let params = self.shared_parts().flat_map(|part| &part.params);
        params.map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach().into()))).collect()
    }

    /// The state of the optimizers, as [`AdamW::export`]; names begin with the part's.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn export(&self) -> Result<Vec<(String, Frozen)>> {
        let mut all = Vec::new();
        for (part, place) in self.shared_parts().zip(["head", "trunk"]) {
            let state = part.optimizer.export()?;
            all.extend(state.into_iter().map(|(name, one)| (format!("{place}/{name}"), one)));
        }
        Ok(all)
    }

    /// Goes on from what [`Self::copies`] and [`Self::export`] gave.
    ///
    /// # Errors
    /// Names the tensor that is missing or of another shape.
    pub fn restore(&mut self, params: &HashMap<String, Tensor>, optimizer: &HashMap<String, Tensor>) -> Result<()> {
        let parts = std::iter::once(&mut self.head).chain(self.trunk.as_mut().map(|trunk| &mut trunk.part));
        for (part, place) in parts.zip(["head/", "trunk/"]) {
            restore_params(&part.params, params)?;
            let own =
                optimizer.iter().filter_map(|(name, one)| Some((name.strip_prefix(place)?.to_owned(), one.clone())));
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

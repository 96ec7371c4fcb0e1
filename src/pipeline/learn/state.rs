//! What a step of training changes, kept apart from the actors so that it outlives a restart of the graph.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::publish::PendingStep;
use super::value::ValueModel;
use crate::lm::model::{Decoder, Lora, ModelConfig};
use crate::types::RewardScale;
use kernels::{AdamW, AdamWConfig, Frozen, Gradients};

/// Policy, optimizer, value head and counters. Between steps it is consistent; `stepping` tells whether it is not.
pub struct TrainState {
    /// Learner steps taken; also the version of the weights.
    pub step: u64,
    /// Scale of the rewards as of the last group trained.
    pub scale: RewardScale,
    /// Value baseline, where the algorithm has one.
    pub value: Option<ValueModel>,
    /// True from the first change of a weight until the step is counted: what fails in between leaves weights of no version.
    pub stepping: bool,
    /// The last step, until it is published.
    pub unpublished: Option<PendingStep>,
    /// Steps in a row whose loss or gradient was not finite.
    pub nonfinite_in_row: u32,
    /// Mean length in tokens of the first batch's completions, once there was one: what drift is measured against.
    pub first_length: Option<f64>,
    /// The trainable model; its tensors are private to the learner, only copies leave it.
    pub model: Decoder,
    /// The batch's gradient so far, a sum.
    pub gradients: Gradients,
    params: Vec<(String, Var)>,
    optimizer: AdamW,
    published: Arc<Decoder>,
    /// The step whose weights the published ones are.
    published_at: u64,
}

/// The numbers of a [`TrainState`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Learner steps taken.
    pub step: u64,
    /// Scale of the rewards.
    pub scale: RewardScale,
    /// Steps in a row whose loss or gradient was not finite.
    pub nonfinite_in_row: u32,
    /// Mean length of the first batch's completions.
    pub first_length: Option<f64>,
}

/// A [`TrainState`] between two steps, for a checkpoint to write while training goes on.
pub struct Saved {
    /// Its numbers.
    pub counters: Counters,
    /// The policy as it was last published, adapters included.
    pub policy: Arc<Decoder>,
    /// What of it is trained, by name.
    pub params: Vec<(String, Frozen)>,
    /// The optimizer's state.
    pub optimizer: Vec<(String, Frozen)>,
    /// The value baseline's parameters, where there is one.
    pub value: Option<Vec<(String, Frozen)>>,
    /// The state of its optimizers.
    pub value_optimizer: Vec<(String, Frozen)>,
}

/// Tensors of a [`Saved`], read back.
pub struct Restored {
    /// What is trained of the policy.
    pub params: HashMap<String, Tensor>,
    /// The optimizer's state.
    pub optimizer: HashMap<String, Tensor>,
    /// The value baseline's parameters, where there is one.
    pub value: Option<HashMap<String, Tensor>>,
    /// The state of its optimizers.
    pub value_optimizer: HashMap<String, Tensor>,
}

impl TrainState {
    /// Starts from `initial`, which stays as it is. With adapters, made from the seed beside them, these are all that is
    /// trained, and `initial` is shared.
    ///
    /// # Errors
    /// When memory for the copies cannot be had.
    pub fn new(
        initial: &Arc<Decoder>,
        adam: AdamWConfig,
        value: Option<ValueModel>,
        lora: Option<&(Lora, u64)>,
    ) -> Result<Self> {
        let (model, params) = match lora {
            None => initial.trainable(true)?,
            Some((lora, seed)) => initial.adapted(lora, *seed)?,
        };
        Ok(Self {
            step: 0,
            scale: RewardScale::default(),
            value,
            stepping: false,
            unpublished: None,
            nonfinite_in_row: 0,
            first_length: None,
            model,
            gradients: Gradients::new(&params)?,
            optimizer: AdamW::new(params.clone(), adam)?,
            params,
            published: Arc::clone(initial),
            // Adapters, even fresh ones, are not in what it starts from.
            published_at: if lora.is_some() { u64::MAX } else { 0 },
        })
    }

    /// The state as it is, between two steps: what a checkpoint writes. The policy and the optimizer's moments are shared,
    /// not copied.
    ///
    /// # Errors
    /// When memory for a copy of the value baseline, or of adapters that were never published, cannot be had.
    pub fn save(&self) -> Result<Saved> {
        let policy =
            if self.published_at == self.step { Arc::clone(&self.published) } else { Arc::new(self.model.snapshot()?) };
        let weights = policy.weights();
        let params = self.params.iter().map(|(name, _)| {
            let tensor = weights.0.get(name).with_context(|| format!("the policy has no tensor {name}"))?;
            Ok((name.clone(), tensor.clone().into()))
        });
        Ok(Saved {
            counters: Counters {
                step: self.step,
                scale: self.scale,
                nonfinite_in_row: self.nonfinite_in_row,
                first_length: self.first_length,
            },
            params: params.collect::<Result<_>>()?,
            policy,
            optimizer: self.optimizer.export()?,
            value: self.value.as_ref().map(ValueModel::copies).transpose()?,
            value_optimizer: self.value.as_ref().map_or(Ok(Vec::new()), ValueModel::export)?,
        })
    }

    /// Goes on from what [`Self::save`] gave, read back. The policy is published anew by the caller.
    ///
    /// # Errors
    /// Names the tensor that is missing or of another shape.
    pub fn restore(&mut self, counters: &Counters, tensors: Restored) -> Result<()> {
        restore_params(&self.params, &tensors.params)?;
        self.optimizer.import(tensors.optimizer)?;
        match (&mut self.value, tensors.value) {
            (Some(model), Some(params)) => model.restore(&params, &tensors.value_optimizer)?,
            (None, None) => {}
            (own, _) => {
                let (has, should) = if own.is_some() { ("no ", "a ") } else { ("a ", "no ") };
                anyhow::bail!("the checkpoint has {has}value baseline, and the configuration asks for {should}one")
            }
        }
        let Counters { step, scale, nonfinite_in_row, first_length } = counters.clone();
        (self.step, self.scale, self.nonfinite_in_row, self.first_length) =
            (step, scale, nonfinite_in_row, first_length);
        self.snapshot()?;
        Ok(())
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Applies the batch's gradient, scaled by `scale`, at rate `lr`.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn apply(&mut self, lr: f64, scale: f64) -> Result<()> {
        Ok(self.optimizer.step(&self.gradients, lr, scale)?)
    }

    /// Forgets the batch's gradient: of a batch that was stepped, skipped, or cut off by a restart.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn discard(&mut self) -> Result<()> {
        self.gradients.zero()?;
        self.value.as_mut().map_or(Ok(()), ValueModel::discard)
    }

    /// An immutable copy of the policy as it is now.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn snapshot(&mut self) -> Result<Arc<Decoder>> {
        self.published = Arc::new(self.model.snapshot()?);
        self.published_at = self.step;
        Ok(Arc::clone(&self.published))
    }

    /// The last copy that was made; the initial weights before any.
    pub fn published(&self) -> &Arc<Decoder> {
        &self.published
    }
}

/// Writes saved values into parameters.
///
/// # Errors
/// Names the tensor that is missing or of another shape; parameters before it are then written already.
pub fn restore_params(params: &[(String, Var)], saved: &HashMap<String, Tensor>) -> Result<()> {
    for (name, var) in params {
        let tensor = saved.get(name).with_context(|| format!("it has no tensor {name}"))?;
        ensure!(tensor.dims() == var.dims(), "its {name} is {:?}, not {:?}", tensor.dims(), var.dims());
        var.set(&tensor.to_device(var.device())?.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

//! What a step of training changes, kept apart from the actors so that it outlives a restart of the graph.

use std::sync::Arc;

use anyhow::Result;

use super::value::ValueModel;
use crate::model::{Decoder, Lora, ModelConfig};
use crate::ops::{AdamW, AdamWConfig, Gradients};
use crate::rollout::RewardScale;

/// Policy, optimizer, value head and counters. Between steps it is consistent; `stepping` tells whether it is not.
pub struct TrainState {
    /// Learner steps taken; also the version of the weights.
    pub step: u64,
    /// Scale of the rewards as of the last group trained.
    pub scale: RewardScale,
    /// Value baseline, where the algorithm has one.
    pub value: Option<ValueModel>,
    /// True while parameters are being written: a panic then leaves them half updated.
    pub stepping: bool,
    /// Steps in a row whose loss or gradient was not finite.
    pub nonfinite_in_row: u32,
    /// Mean length in tokens of the first batch's completions, once there was one: what drift is measured against.
    pub first_length: Option<f64>,
    /// The trainable model; its tensors are private to the learner, only copies leave it.
    pub model: Decoder,
    /// The batch's gradient so far, a sum.
    pub gradients: Gradients,
    optimizer: AdamW,
    published: Arc<Decoder>,
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
            nonfinite_in_row: 0,
            first_length: None,
            model,
            gradients: Gradients::new(&params)?,
            optimizer: AdamW::new(params, adam)?,
            published: Arc::clone(initial),
        })
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
        // A batch of several steps is unfinished before this one and after it.
        let unfinished = std::mem::replace(&mut self.stepping, true);
        self.optimizer.step(&self.gradients, lr, scale)?;
        self.stepping = unfinished;
        Ok(())
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
        Ok(Arc::clone(&self.published))
    }

    /// The last copy that was made; the initial weights before any.
    pub fn published(&self) -> &Arc<Decoder> {
        &self.published
    }
}

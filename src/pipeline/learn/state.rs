//! State that training changes, kept outside the actors so that it survives a restart of the graph.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::publish::PendingStep;
use super::replicas::Sums;
use super::value::ValueModel;
use crate::lm::model::{Decoder, Lora, ModelConfig};
use crate::types::RewardScale;
use crate::util::mutex::lock;
use kernels::{AdamW, AdamWConfig, Frozen, Gradients};

/// Policy, optimizer, value head and counters. The state is consistent between steps; `stepping` marks it as
/// inconsistent.
pub struct TrainState {
    /// Number of learner steps taken; also the version of the weights.
    pub step: u64,
    /// Scale of the rewards after the last trained group.
    pub scale: RewardScale,
    /// Value baseline, if the algorithm has one.
    pub value: Option<ValueModel>,
    /// True from the first change of a weight until the step is counted: after a failure in between, the weights belong
    /// to no version.
    pub stepping: bool,
    /// The last step, until it is published.
    pub unpublished: Option<PendingStep>,
    /// Number of consecutive steps whose loss or gradient was not finite.
    pub nonfinite_in_row: u32,
    /// Mean length in tokens of the first batch's completions; the reference for the length drift.
    pub first_length: Option<f64>,
    /// Trainable model; its tensors are private to the learner and its replicas, and only copies leave it.
    pub model: Arc<Decoder>,
    /// Sums of the gradients of the batch so far, one entry for each replica of the learner.
    pub sums: Vec<Arc<Mutex<Sums>>>,
    params: Vec<(String, Var)>,
    optimizer: AdamW,
    published: Arc<Decoder>,
    /// Step of the published weights.
    published_at: u64,
}

/// Serialisable counters of a [`TrainState`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Number of learner steps taken.
    pub step: u64,
    /// Scale of the rewards.
    pub scale: RewardScale,
    /// Number of consecutive steps whose loss or gradient was not finite.
    pub nonfinite_in_row: u32,
    /// Mean length in tokens of the first batch's completions.
    pub first_length: Option<f64>,
}

/// State of a [`TrainState`] between two steps, for a checkpoint to write while training continues.
pub struct Saved {
    /// Counters of the state.
    pub counters: Counters,
    /// The last published policy, including adapters.
    pub policy: Arc<Decoder>,
    /// Trained parameters of the policy, by name.
    pub params: Vec<(String, Frozen)>,
    /// State of the policy's optimizer.
    pub optimizer: Vec<(String, Frozen)>,
    /// Parameters of the value baseline, if any.
    pub value: Option<Vec<(String, Frozen)>>,
    /// State of the value baseline's optimizers.
    pub value_optimizer: Vec<(String, Frozen)>,
}

/// Tensors of a [`Saved`], read from a checkpoint.
pub struct Restored {
    /// Trained parameters of the policy.
    pub params: HashMap<String, Tensor>,
    /// State of the policy's optimizer.
    pub optimizer: HashMap<String, Tensor>,
    /// Parameters of the value baseline, if any.
    pub value: Option<HashMap<String, Tensor>>,
    /// State of the value baseline's optimizers.
    pub value_optimizer: HashMap<String, Tensor>,
}

impl TrainState {
    /// Creates the state of training from `initial`, which is not changed. With LoRA, the adapters are initialised from
    /// the seed, only they are trained, and `initial` is shared.
    ///
    /// # Errors
    /// If memory for the copies cannot be allocated.
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
        let mut state = Self {
            step: 0,
            scale: RewardScale::default(),
            value,
            stepping: false,
            unpublished: None,
            nonfinite_in_row: 0,
            first_length: None,
            model: Arc::new(model),
            sums: Vec::new(),
            optimizer: AdamW::new(params.clone(), adam)?,
            params,
            published: Arc::clone(initial),
            // The initial weights include no adapters, not even untrained ones.
            published_at: if lora.is_some() { u64::MAX } else { 0 },
        };
        state.set_replicas(1)?;
        Ok(state)
    }

    /// Sets the number of replicas whose sums of gradients the state has. The sums are zero afterwards if the number changes.
    ///
    /// # Errors
    /// If memory for the sums cannot be allocated.
    pub fn set_replicas(&mut self, count: usize) -> Result<()> {
        if self.sums.len() == count {
            return Ok(());
        }
        let one = |_| {
            let mut sums = vec![Gradients::new(&self.params)?];
            sums.extend(self.value.as_ref().map_or(Ok(Vec::new()), ValueModel::accumulators)?);
            Ok(Arc::new(Mutex::new(sums)))
        };
        self.sums = (0..count).map(one).collect::<Result<_>>()?;
        Ok(())
    }

    /// Returns the present state between two steps, for a checkpoint. The policy and the optimizer's moments are
    /// shared, not copied.
    ///
    /// # Errors
    /// If memory for a copy of the value baseline, or of adapters that were never published, cannot be allocated.
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

    /// Restores the state returned by [`Self::save`]. The caller must publish the policy again.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape; the error names it.
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

    /// Returns the model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Returns the Euclidean norm of the policy's gradient in the first replica's sums.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn gradient_norm(&self) -> Result<f64> {
        Ok(lock(&self.sums[0])[0].global_norm()?)
    }

    /// Applies the policy's gradient in the first replica's sums, scaled by `scale`, with learning rate `lr`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&mut self, lr: f64, scale: f64) -> Result<()> {
        Ok(self.optimizer.step(&lock(&self.sums[0])[0], lr, scale)?)
    }

    /// Makes a step of the value baseline, if there is one, with the gradients in the first replica's sums; see
    /// [`ValueModel::step`].
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply_value(&mut self, count: usize, lr: f64, head_lr: f64, max_norm: f64) -> Result<()> {
        let sums = lock(&self.sums[0]);
        self.value.as_mut().map_or(Ok(()), |value| value.step(&sums[1..], count, lr, head_lr, max_norm))
    }

    /// Clears the batch's gradient after a step, a skipped step or a restart.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn discard(&mut self) -> Result<()> {
        for sums in &self.sums {
            lock(sums).iter_mut().try_for_each(Gradients::zero)?;
        }
        Ok(())
    }

    /// Returns an immutable copy of the present policy, which [`Self::published`] returns from then on.
    ///
    /// # Errors
    /// If memory for the copy cannot be allocated.
    pub fn snapshot(&mut self) -> Result<Arc<Decoder>> {
        self.published = Arc::new(self.model.snapshot()?);
        self.published_at = self.step;
        Ok(Arc::clone(&self.published))
    }

    /// Returns the last snapshot; the initial weights before the first.
    pub fn published(&self) -> &Arc<Decoder> {
        &self.published
    }
}

/// Copies saved values into parameters.
///
/// # Errors
/// If a tensor is missing or has another shape; the error names it. Earlier parameters have then been written already.
pub fn restore_params(params: &[(String, Var)], saved: &HashMap<String, Tensor>) -> Result<()> {
    for (name, var) in params {
        let tensor = saved.get(name).with_context(|| format!("it has no tensor {name}"))?;
        ensure!(tensor.dims() == var.dims(), "its {name} is {:?}, not {:?}", tensor.dims(), var.dims());
        var.set(&tensor.to_device(var.device())?.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

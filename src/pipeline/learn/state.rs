//! State that training changes, kept outside the actors so that it survives a restart of the graph.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::collective::{Collective, DeviceCopies, Params, SharedWeights};
use super::publish::PendingStep;
use super::replicas::Sums;
use super::value::ValueModel;
use super::work::Nets;
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
    /// Trainable model. Its variables never change their values: a step replaces them, and the published policy shares
    /// their memory.
    pub model: Arc<Decoder>,
    /// Sums of the gradients of the batch so far, one entry for each replica of the learner.
    pub sums: Vec<Arc<Mutex<Sums>>>,
    /// Devices of the replicas, the first that of [`Self::model`]. Empty if all replicas share the weights.
    devices: Vec<Device>,
    /// Copies of the weights for all replicas but the first, if they have devices of their own.
    copies: Vec<Copied>,
    collective: Box<dyn Collective>,
    params: Vec<(String, Var)>,
    optimizer: AdamW,
    published: Arc<Decoder>,
    /// Step of the published weights.
    published_at: u64,
}

/// Copy of the weights for a replica.
struct Copied {
    nets: Nets,
    /// The same weights without a computation graph.
    frozen: Arc<Decoder>,
    params: Params,
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
        // The initial weights include no adapters, not even untrained ones. Otherwise the published weights share the memory of
        // the variables from the start, so that `initial` can be freed.
        let (published, published_at) =
            if lora.is_some() { (Arc::clone(initial), u64::MAX) } else { (Arc::new(model.detached()?), 0) };
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
            devices: Vec::new(),
            copies: Vec::new(),
            collective: Box::new(SharedWeights),
            optimizer: AdamW::new(params.clone(), adam)?,
            params,
            published,
            published_at,
        };
        state.set_replicas(1)?;
        Ok(state)
    }

    /// Gives each replica a device, with a copy of the weights on it; the first is the device of the policy. Without this, all
    /// replicas share the weights.
    pub fn place(&mut self, devices: Vec<Device>) {
        if devices.len() > 1 {
            self.devices = devices;
            self.collective = Box::new(DeviceCopies);
            self.sums.clear();
        }
    }

    /// Prepares for `count` replicas: their sums of gradients, which are zero afterwards if the number changes, and their
    /// copies of the weights.
    ///
    /// # Errors
    /// If there is not enough memory, or the devices of [`Self::place`] are not `count`.
    pub fn set_replicas(&mut self, count: usize) -> Result<()> {
        ensure!(
            self.devices.is_empty() || self.devices.len() == count,
            "internal error: {count} replicas of the learner on {} devices",
            self.devices.len()
        );
        if self.sums.len() != count {
            let one = || -> Sums {
                let mut sums = vec![Gradients::new(&self.params)];
                sums.extend(self.value.iter().flat_map(ValueModel::accumulators));
                sums
            };
            let mut all = Vec::with_capacity(count);
            if self.devices.is_empty() {
                all.resize_with(count, one);
            } else {
                all.push(one());
                self.copies.clear();
                for device in &self.devices[1..] {
                    let (copied, sums) = self.copy_on(device)?;
                    self.copies.push(copied);
                    all.push(sums);
                }
            }
            self.sums = all.into_iter().map(|sums| Arc::new(Mutex::new(sums))).collect();
        }
        self.broadcast()
    }

    /// Returns a copy of the weights on `device`, and its sums of gradients.
    fn copy_on(&self, device: &Device) -> Result<(Copied, Sums)> {
        let (policy, mut params) = self.model.trainable_on(&self.params, device)?;
        let mut sums = vec![Gradients::new(&params)];
        let mut value = None;
        if let Some(model) = &self.value {
            let copy = model.copy_on(device)?;
            value = Some(copy.net);
            sums.extend(copy.sums);
            params.extend(copy.params);
        }
        let frozen = Arc::new(policy.detached()?);
        Ok((Copied { nets: Nets { policy: Arc::new(policy), value }, frozen, params }, sums))
    }

    /// Gives the present weights to the replicas with copies.
    fn broadcast(&self) -> Result<()> {
        if self.copies.is_empty() {
            return Ok(());
        }
        let values = self.value.iter().flat_map(ValueModel::variables);
        let from: Params = self.params.iter().chain(values).cloned().collect();
        let to: Vec<Params> = self.copies.iter().map(|copied| copied.params.clone()).collect();
        self.collective.broadcast(&from, &to)
    }

    /// Returns the weights that the replica `rank` trains.
    pub(super) fn nets(&self, rank: usize) -> Nets {
        match rank.checked_sub(1).and_then(|copy| self.copies.get(copy)) {
            Some(copied) => copied.nets.clone(),
            None => {
                Nets { policy: Arc::clone(&self.model), value: self.value.as_ref().map(|value| value.net().clone()) }
            }
        }
    }

    /// Returns the policy that the replica `rank` trains.
    pub fn policy(&self, rank: usize) -> Arc<Decoder> {
        self.nets(rank).policy
    }

    /// Returns the weights of the replica `rank` between two steps, without a computation graph that would be kept needlessly.
    pub(super) fn frozen(&self, rank: usize) -> Nets {
        let policy = match rank.checked_sub(1).and_then(|copy| self.copies.get(copy)) {
            Some(copied) => Arc::clone(&copied.frozen),
            // The published copy has the same weights.
            None => Arc::clone(&self.published),
        };
        Nets { policy, ..self.nets(rank) }
    }

    /// Adds the sums of all replicas to those of the first.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn reduce(&self) -> Result<()> {
        self.collective.reduce(&self.sums)
    }

    /// Returns the present state between two steps, for a checkpoint. The policy and the optimizer's moments are
    /// shared, not copied.
    ///
    /// # Errors
    /// If memory for a copy of the value baseline cannot be allocated.
    pub fn save(&self) -> Result<Saved> {
        let policy =
            if self.published_at == self.step { Arc::clone(&self.published) } else { Arc::new(self.model.detached()?) };
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
        let restored = |(name, var): &(String, Var)| {
            Ok((name.clone(), Var::from_tensor(&saved_value(name, var, &tensors.params)?)?))
        };
        self.params = self.params.iter().map(restored).collect::<Result<_>>()?;
        self.optimizer.follow(&self.params)?;
        self.follow()?;
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

    /// Applies the policy's gradient in the first replica's sums, scaled by `scale`, with learning rate `lr`. The old weights
    /// stay as they are for whoever still has them. Replicas with copies have them until [`Self::discard`].
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&mut self, lr: f64, scale: f64) -> Result<()> {
        self.params = self.optimizer.replace(&mut lock(&self.sums[0])[0], lr, scale)?;
        self.follow()
    }

    /// Makes the model and the sums those of the present variables.
    fn follow(&mut self) -> Result<()> {
        self.model = Arc::new(self.model.with_variables(&self.params)?);
        // Replicas with copies have variables of their own.
        let shared = if self.devices.is_empty() { self.sums.len() } else { self.sums.len().min(1) };
        Ok(self.sums[..shared].iter().try_for_each(|sums| lock(sums)[0].follow(&self.params))?)
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

    /// Clears the batch's gradient after a step, a skipped step or a restart, and gives the present weights to all replicas.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn discard(&mut self) -> Result<()> {
        for sums in &self.sums {
            lock(sums).iter_mut().try_for_each(Gradients::zero)?;
        }
        self.broadcast()
    }

    /// Returns the present policy, which [`Self::published`] returns from then on. It shares the memory of the learner's
    /// variables, which no step changes.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn snapshot(&mut self) -> Result<Arc<Decoder>> {
        self.published = Arc::new(self.model.detached()?);
        self.published_at = self.step;
        Ok(Arc::clone(&self.published))
    }

    /// Returns the last snapshot; before the first, weights of the same values as the initial ones.
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
        var.set(&saved_value(name, var, saved)?)?;
    }
    Ok(())
}

/// Returns the saved value of the parameter `name`, with the device and the dtype of `var`.
///
/// # Errors
/// If it is missing or has another shape; the error names it.
fn saved_value(name: &str, var: &Var, saved: &HashMap<String, Tensor>) -> Result<Tensor> {
    let tensor = saved.get(name).with_context(|| format!("it has no tensor {name}"))?;
    ensure!(tensor.dims() == var.dims(), "its {name} is {:?}, not {:?}", tensor.dims(), var.dims());
    Ok(tensor.to_device(var.device())?.to_dtype(var.dtype())?)
}

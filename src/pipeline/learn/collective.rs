//! The exchange between the replicas of a learner: sums of gradients before a step, and weights after it.

use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use candle_core::Var;

use super::replicas::Sums;
use crate::util::mutex::lock;

/// Named parameters of one replica.
pub type Params = Vec<(String, Var)>;

/// Exchange between replicas. The first replica makes the optimizer steps.
pub trait Collective: Send {
    /// Adds the sums of all replicas to those of the first, in the order of their ranks, so that the result does not depend
    /// on which replica ended first.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn reduce(&self, sums: &[Arc<Mutex<Sums>>]) -> Result<()>;

    /// Gives the weights `from` of the first replica to the others.
    ///
    /// # Errors
    /// If a tensor operation fails, or a replica has other parameters.
    fn broadcast(&self, from: &Params, to: &[Params]) -> Result<()>;
}

/// Replicas that share the weights in the memory of one device: there are only sums to exchange.
pub struct SharedWeights;

/// Replicas with copies of the weights, each on a device of its own. Tensors pass from card to card through
/// [`candle_core::Tensor::to_device`].
pub struct DeviceCopies;

impl Collective for SharedWeights {
    fn reduce(&self, sums: &[Arc<Mutex<Sums>>]) -> Result<()> {
        add_in_order(sums)
    }

    fn broadcast(&self, _from: &Params, _to: &[Params]) -> Result<()> {
        Ok(())
    }
}

impl Collective for DeviceCopies {
    fn reduce(&self, sums: &[Arc<Mutex<Sums>>]) -> Result<()> {
        add_in_order(sums)
    }

    fn broadcast(&self, from: &Params, to: &[Params]) -> Result<()> {
        for params in to {
            ensure!(params.len() == from.len(), "a replica of the learner has other parameters than the first");
            for ((name, source), (copy, var)) in from.iter().zip(params) {
                ensure!(name == copy, "a replica of the learner has {copy} in place of {name}");
                var.set(&source.to_device(var.device())?)?;
            }
        }
        // The originals may change only after the copies are complete.
        to.iter().filter_map(|params| params.first()).try_for_each(|(_, var)| Ok(var.device().synchronize()?))
    }
}

fn add_in_order(sums: &[Arc<Mutex<Sums>>]) -> Result<()> {
    let Some((first, others)) = sums.split_first() else { return Ok(()) };
    let mut total = lock(first);
    for other in others {
        for (sum, addend) in total.iter_mut().zip(lock(other).iter()) {
            sum.add(addend)?;
        }
    }
    Ok(())
}

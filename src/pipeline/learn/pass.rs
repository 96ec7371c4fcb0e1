//! One pass over a group: what the model makes of its tokens, and the way back from slopes to gradients.

use std::ops::Range;

use anyhow::Result;
use candle_core::Tensor;

use super::TrainState;
use crate::lm::model::Pack;
use crate::rl::algo::{GroupLoss, GroupView};
use crate::types::Rewarded;

/// A group of the batch as the weights that it arrived at see it; outer length: completions, inner: tokens.
pub(super) struct Measured {
    /// Place in the batch.
    pub(super) place: usize,
    pub(super) behaviour: Vec<Vec<f32>>,
    pub(super) proximal: Vec<Vec<f32>>,
    pub(super) values: Vec<Vec<f32>>,
}

impl Measured {
    /// Nothing of a group yet; `place` is the group's in the batch.
    pub(super) fn new(place: usize, group: &Rewarded) -> Self {
        let behaviour = group.group.completions.iter().map(|completion| completion.logprobs.clone()).collect();
        Self { place, behaviour, proximal: Vec::new(), values: Vec::new() }
    }

    /// The group's next completions, as a pass saw them.
    pub(super) fn add(&mut self, pass: &Pass) -> Result<()> {
        self.proximal.extend(pass.pack.split(&pass.logprobs.to_vec1()?));
        if let Some(values) = &pass.values {
            self.values.extend(pass.pack.split(&values.to_vec1()?));
        }
        Ok(())
    }

    pub(super) fn view<'a>(&'a self, group: &'a Rewarded) -> GroupView<'a> {
        GroupView {
            rewards: &group.rewards,
            behaviour: &self.behaviour,
            // Without one nothing is charged: the KL to what sampled stands for it and counts for nothing.
            reference: if group.reference.is_empty() { &self.behaviour } else { &group.reference },
            proximal: &self.proximal,
            policy: &self.proximal,
            preferences: &group.preferences,
            values: &self.values,
        }
    }
}

/// One forward pass over a group.
pub(super) struct Pass {
    pub(super) pack: Pack,
    pub(super) logprobs: Tensor,
    pub(super) entropy: Tensor,
    pub(super) values: Option<Tensor>,
}

/// Puts the loss's slopes by the completions `part` at the end of the graph and adds up what comes out at the parameters.
pub(super) fn accumulate(state: &mut TrainState, loss: &GroupLoss, pass: &Pass, part: Range<usize>) -> Result<()> {
    let shaped = |slopes: &[Vec<f32>]| {
        Tensor::from_vec(slopes[part.clone()].concat(), pass.logprobs.dims(), pass.logprobs.device())
    };
    let own = |slopes: &[Vec<f32>]| slopes.get(part.clone()).is_some_and(|own| own.iter().flatten().any(|d| *d != 0.0));
    // Completions that all fared alike have nothing to teach; their backward pass would add zeros.
    if own(&loss.d_policy) || own(&loss.d_entropy) {
        let mut sum = (&pass.logprobs * shaped(&loss.d_policy)?)?.sum_all()?;
        if !loss.d_entropy.is_empty() {
            sum = (sum + (&pass.entropy * shaped(&loss.d_entropy)?)?.sum_all()?)?;
        }
        kernels::backward(&sum, &mut [&mut state.gradients])?;
    }
    if let (Some(values), Some(model)) = (&pass.values, &mut state.value) {
        model.accumulate(values, &shaped(&loss.d_value)?)?;
    }
    Ok(())
}

//! One pass over a group: evaluation of its tokens under the model, and backpropagation of the loss's gradients.

use std::ops::Range;

use anyhow::Result;
use candle_core::Tensor;
use kernels::Gradients;

use super::replicas::Sums;
use crate::lm::model::Pack;
use crate::rl::algo::{GroupLoss, GroupView};
use crate::types::Rewarded;

/// Evaluation of a group under the proximal policy. Outer length: completions, inner: tokens.
pub(super) struct Measured {
    /// Index in the batch.
    pub(super) place: usize,
    pub(super) behaviour: Vec<Vec<f32>>,
    pub(super) proximal: Vec<Vec<f32>>,
    pub(super) values: Vec<Vec<f32>>,
}

impl Measured {
    /// Creates an empty evaluation of a group; `place` is the group's index in the batch.
    pub(super) fn new(place: usize, group: &Rewarded) -> Self {
        let behaviour = group.group.completions.iter().map(|completion| completion.logprobs.clone()).collect();
        Self { place, behaviour, proximal: Vec::new(), values: Vec::new() }
    }

    /// Adds the evaluation of the group's next completions from a pass.
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
            // Without a reference, the KL to the sampling policy is used in its place; its coefficient is zero.
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

/// Multiplies the loss's gradients for the completions `part` into the graph, runs the backward pass and adds the gradients
/// to `sums`.
pub(super) fn accumulate(sums: &mut Sums, loss: &GroupLoss, pass: &Pass, part: Range<usize>) -> Result<()> {
    let shaped = |gradients: &[Vec<f32>]| {
        Tensor::from_vec(gradients[part.clone()].concat(), pass.logprobs.dims(), pass.logprobs.device())
    };
    let own =
        |gradients: &[Vec<f32>]| gradients.get(part.clone()).is_some_and(|own| own.iter().flatten().any(|d| *d != 0.0));
    // If all completions have zero gradient, for example because their rewards are equal, the backward pass would only
    // add zeros.
    if own(&loss.d_policy) || own(&loss.d_entropy) {
        let mut sum = (&pass.logprobs * shaped(&loss.d_policy)?)?.sum_all()?;
        if !loss.d_entropy.is_empty() {
            sum = (sum + (&pass.entropy * shaped(&loss.d_entropy)?)?.sum_all()?)?;
        }
        kernels::backward(&sum, &mut [&mut sums[0]])?;
    }
    if let Some(values) = &pass.values {
        let mut parts: Vec<&mut Gradients> = sums[1..].iter_mut().collect();
        kernels::backward(&(values * shaped(&loss.d_value)?)?.sum_all()?, &mut parts)?;
    }
    Ok(())
}

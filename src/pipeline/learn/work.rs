//! The work of a replica on one group: its evaluation under a model, its loss, and its gradient.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

use super::pass::{Measured, Pass, accumulate};
use super::replicas::Sums;
use super::value::ValueNet;
use crate::lm::model::{Decoder, Pack};
use crate::rl::algo::{Algorithm, GroupLoss, GroupView, Targets};
use crate::types::Rewarded;
use crate::util::failpoints;

/// Settings that the work on all groups shares.
pub(super) struct Work {
    pub(super) algorithm: Box<dyn Algorithm>,
    /// Sampling temperature of the rollouts.
    pub(super) temperature: f64,
    /// Maximum number of completions per forward pass.
    pub(super) micro_batch: AtomicUsize,
}

/// Model and value baseline, if there is one, under which a group is evaluated. A clone shares the weights.
#[derive(Clone)]
pub(super) struct Nets {
    pub(super) policy: Arc<Decoder>,
    pub(super) value: Option<ValueNet>,
}

/// Result of the work on one group.
pub(super) enum Outcome {
    /// The group was evaluated, and its gradient was added.
    Trained { group: Arc<Rewarded>, measured: Measured, targets: Targets, learned: Learned },
    /// The group was evaluated under the proximal policy.
    Measured(Measured),
    /// The gradient of a group that was evaluated before was added.
    Again(Learned),
}

/// Loss of a group, and the entropy of each of its tokens, in nats.
pub(super) struct Learned {
    pub(super) loss: GroupLoss,
    pub(super) entropy: Vec<f32>,
}

impl Work {
    /// Evaluates group `place` of the batch and adds its gradient to `sums`.
    pub(super) fn train(&self, nets: &Nets, group: Arc<Rewarded>, place: usize, sums: &mut Sums) -> Result<Outcome> {
        let (pass, measured) = self.pass(nets, &group, place)?;
        let view = measured.view(&group);
        let targets = self.algorithm.targets(&[view]).pop().unwrap_or_default();
        let learned = self.learn(nets, pass, &group, &view, &targets, sums)?;
        Ok(Outcome::Trained { group, measured, targets, learned })
    }

    /// Evaluates group `place` of the batch.
    pub(super) fn measure(&self, nets: &Nets, group: &Rewarded, place: usize) -> Result<Outcome> {
        let value = nets.value.as_ref().filter(|_| self.algorithm.needs_values());
        self.evaluate(&nets.policy, value, group, place).map(Outcome::Measured)
    }

    /// Runs another pass, with the present weights, over a group that was `measured` on arrival, and adds its gradient to
    /// `sums`.
    pub(super) fn train_again(
        &self,
        nets: &Nets,
        group: &Rewarded,
        measured: &Measured,
        targets: &Targets,
        sums: &mut Sums,
    ) -> Result<Outcome> {
        let (pass, now) = self.pass(nets, group, measured.place)?;
        let view = GroupView { policy: &now.proximal, values: &now.values, ..measured.view(group) };
        self.learn(nets, pass, group, &view, targets, sums).map(Outcome::Again)
    }

    /// Returns the ranges of completions in which a group is processed.
    fn parts(&self, group: &Rewarded) -> Vec<Range<usize>> {
        let (k, most) = (group.group.completions.len(), self.micro_batch.load(Ordering::SeqCst));
        (0..k).step_by(most.min(k).max(1)).map(|i| i..(i.saturating_add(most)).min(k)).collect()
    }

    /// Runs the completions `part` of a group through `model`, with a computation graph if its tensors have one.
    fn forward(&self, model: &Decoder, value: Option<&ValueNet>, group: &Rewarded, part: Range<usize>) -> Result<Pass> {
        failpoints::point("learn.forward")?;
        let completions = &group.group.completions[part];
        let ids: Vec<&[u32]> = completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let pack = Pack::new(&group.group.prompt.ids, &ids);
        let hidden = model.predicting(&pack)?;
        let (logprobs, entropy) = model.logprobs_of(&hidden, &pack.targets, self.temperature)?;
        let values = value.map(|value| value.values(&hidden, &pack)).transpose()?;
        Ok(Pass { pack, logprobs, entropy, values })
    }

    /// Evaluates a group under a model, without keeping a computation graph.
    fn evaluate(&self, model: &Decoder, value: Option<&ValueNet>, group: &Rewarded, place: usize) -> Result<Measured> {
        let mut measured = Measured::new(place, group);
        for part in self.parts(group) {
            measured.add(&self.forward(model, value, group, part)?)?;
        }
        Ok(measured)
    }

    /// Evaluates a group under the present weights. A single pass is returned with its graph for the backward; several
    /// passes are run again one by one.
    fn pass(&self, nets: &Nets, group: &Rewarded, place: usize) -> Result<(Option<Pass>, Measured)> {
        let value = nets.value.as_ref();
        let [part] = &self.parts(group)[..] else {
            return Ok((None, self.evaluate(&nets.policy, value, group, place)?));
        };
        let pass = self.forward(&nets.policy, value, group, part.clone())?;
        let mut measured = Measured::new(place, group);
        measured.add(&pass)?;
        Ok((Some(pass), measured))
    }

    /// Computes the loss of one pass over one group with the given view, and adds its gradient to `sums`. `pass` is the
    /// forward pass of the view, if the complete group was in one.
    fn learn(
        &self,
        nets: &Nets,
        pass: Option<Pass>,
        group: &Rewarded,
        view: &GroupView<'_>,
        targets: &Targets,
        sums: &mut Sums,
    ) -> Result<Learned> {
        let loss = self.algorithm.loss(view, targets);
        let mut entropy = Vec::new();
        match pass {
            Some(pass) => {
                accumulate(sums, &loss, &pass, 0..group.group.completions.len())?;
                entropy = pass.entropy.to_vec1()?;
            }
            None => {
                for part in self.parts(group) {
                    let pass = self.forward(&nets.policy, nets.value.as_ref(), group, part.clone())?;
                    accumulate(sums, &loss, &pass, part)?;
                    entropy.extend(pass.entropy.to_vec1::<f32>()?);
                }
            }
        }
        Ok(Learned { loss, entropy })
    }
}

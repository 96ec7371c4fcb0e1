//! Training of a reward model on preference pairs.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::model::RewardModel;
use crate::lm::model::Decoder;
use crate::observe::telemetry;
use crate::pipeline::learn::collective::{Collective, SharedWeights};
use crate::pipeline::learn::replicas::{Job, Sums};
use crate::rl::algo::preference::soft_label;
use crate::types::{Group, Prompt};
use crate::util::mutex::lock;
use crate::util::seed::{self, mix};
use kernels::{AdamW, AdamWConfig, Frozen, Gradients, clip_factor};

/// Number of most recent held-out pairs in the live accuracy.
const WINDOW: usize = 256;

/// Training settings of a reward model.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerPlan {
    /// Learning rate of the decoder.
    pub lr: f64,
    /// Learning rate of the scalar head, which starts at zero.
    pub head_lr: f64,
    /// Number of pairs per optimizer step.
    pub batch_pairs: usize,
    /// Maximum global norm of the gradient.
    pub max_grad_norm: f64,
    /// Trains on the preferred completion instead of the probability if set; a label of exactly ½ is then ignored.
    pub hard: bool,
    /// Fraction of prompts whose pairs are never trained on and measure the accuracy.
    pub holdout: f64,
    /// Seed of the choice of held-out prompts.
    pub seed: u64,
}

/// Result of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainerStep {
    /// Version after the step.
    pub version: u64,
    /// Mean loss over the step's pairs.
    pub loss: f64,
    /// Share of the step's pairs ranked as labeled, before the step.
    pub accuracy: f64,
    /// Global norm of the gradient, before clipping.
    pub gradient_norm: f64,
}

/// A reward model in training. The loss is that of the soft label over (r₁ − r₂) ([`soft_label`]), averaged over pairs.
pub struct RewardTrainer {
    plan: TrainerPlan,
    model: Arc<RewardModel>,
    params: Vec<(String, Var)>,
    /// Gradients of the decoder and of the head under accumulation, one entry for each replica.
    sums: Vec<Arc<Mutex<Sums>>>,
    optimizer: AdamW,
    head_optimizer: AdamW,
    counters: Counters,
    /// True while parameters or gradients are being written: a failure then leaves them half updated.
    stepping: bool,
}

/// Serialisable counters of a [`RewardTrainer`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    version: u64,
    trained: u64,
    /// First group of the run that was not learned from yet, so that a group issued again after a restart is not
    /// learned from twice.
    next: u64,
    pending: Pending,
    held_out: VecDeque<f64>,
    /// The last observed group, the version that scored it, and its scores. If the caller failed before recording them,
    /// the group is asked about again and gets the same scores.
    last: Option<(u64, u64, Vec<f64>)>,
}

/// Result of [`RewardTrainer::observe`]: the scores of a group, and the optimizer step that followed.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Scores of the group's completions.
    pub scores: Vec<f64>,
    /// Model version that computed the scores.
    pub version: u64,
    /// Optimizer step that followed, if any.
    pub step: Option<TrainerStep>,
}

/// Result of the work on one group ([`RewardTrainer::work`]).
pub struct Judged {
    /// Scores of the group's completions.
    pub scores: Vec<f64>,
    /// Sums over the pairs whose gradient was added.
    sums: Pending,
}

/// Labeled pairs of a group: two completions and P(first is better).
pub type Pairs = [(usize, usize, f64)];

/// Sums over the pairs of the optimizer step under accumulation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Pending {
    pairs: usize,
    loss: f64,
    right: f64,
}

/// State of a [`RewardTrainer`] between two groups, for a checkpoint to write while training continues.
pub struct Saved {
    /// Counters of the trainer.
    pub counters: Counters,
    /// The model.
    pub model: RewardModel,
    /// Optimizer states, and the gradient under accumulation.
    pub state: Vec<(String, Frozen)>,
}

/// Prefixes of the tensor names of each part of the state.
const PARTS: [&str; 4] = ["decoder/", "head/", "decoder_gradient/", "head_gradient/"];

impl RewardTrainer {
    /// Sets the metrics of the reward model, after `step` if an optimizer step was taken.
    pub fn publish(&self, step: Option<&TrainerStep>) {
        let (accuracy, pairs) = self.accuracy();
        let accuracy = Some(accuracy).filter(|_| pairs > 0);
        telemetry::reward_model(self.trained(), self.version(), accuracy, step.map(|step| step.loss));
    }

    /// Creates a reward model with a copy of the decoder of `initial`, and with `head` or a head of zeros.
    ///
    /// # Errors
    /// If memory for the copies cannot be allocated.
    pub fn new(initial: &Decoder, head: Option<&Tensor>, plan: TrainerPlan, adam: AdamWConfig) -> Result<Self> {
        // The language-model head is neither used nor trained.
        let (model, params) = initial.trainable(false)?;
        let zeros = Tensor::zeros((1, model.config().hidden_size), DType::F32, initial.device())?;
        let head = Var::from_tensor(&head.unwrap_or(&zeros).detach())?;
        let head_params = vec![(super::model::HEAD.to_owned(), head.clone())];
        let mut trainer = Self {
            plan,
            model: Arc::new(RewardModel { model, head: head.as_tensor().clone() }),
            sums: Vec::new(),
            optimizer: AdamW::new(params.clone(), adam)?,
            head_optimizer: AdamW::new(head_params.clone(), AdamWConfig { weight_decay: 0.0, ..adam })?,
            params: params.into_iter().chain(head_params).collect(),
            counters: Counters::default(),
            stepping: false,
        };
        trainer.set_replicas(1);
        Ok(trainer)
    }

    /// Sets the number of replicas that compute gradients between two optimizer steps; returns their sums, which are zero if
    /// the number changes.
    pub fn set_replicas(&mut self, count: usize) -> &[Arc<Mutex<Sums>>] {
        if self.sums.len() != count {
            let (head, decoder) = self
                .params
                .split_last()
                .map_or((&[][..], &[][..]), |(head, decoder)| (std::slice::from_ref(head), decoder));
            let one = || Arc::new(Mutex::new(vec![Gradients::new(decoder), Gradients::new(head)]));
            self.sums = std::iter::repeat_with(one).take(count).collect();
        }
        &self.sums
    }

    /// Returns the present state. The optimizers' moments are shared; the weights and a gradient under accumulation are
    /// copied.
    ///
    /// # Errors
    /// If memory for the copies cannot be allocated.
    pub fn save(&self) -> Result<Saved> {
        let [decoder, head, decoder_gradient, head_gradient] = PARTS;
        let named = |part: &'static str, all: Vec<(String, Frozen)>| {
            all.into_iter().map(move |(name, tensor)| (format!("{part}{name}"), tensor))
        };
        let mut state: Vec<(String, Frozen)> = named(decoder, self.optimizer.export()?).collect();
        state.extend(named(head, self.head_optimizer.export()?));
        if self.counters.pending.pairs > 0 {
            let sums = lock(&self.sums[0]);
            for (part, gradients) in [decoder_gradient, head_gradient].into_iter().zip(&*sums) {
                let copies = gradients.copies()?.into_iter().map(|(name, copy)| (name, copy.into()));
                state.extend(named(part, copies.collect()));
            }
        }
        let model = RewardModel { model: self.model.model.snapshot()?, head: self.model.head.copy()?.detach() };
        Ok(Saved { counters: self.counters.clone(), model, state })
    }

    /// Restores the state returned by [`Self::save`]; `params` are the model's tensors, including the head.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape; the error names it.
    pub fn restore(
        &mut self,
        counters: Counters,
        params: &HashMap<String, Tensor>,
        state: &HashMap<String, Tensor>,
    ) -> Result<()> {
        for (name, var) in &self.params {
            let tensor = params.get(name).with_context(|| format!("it has no tensor {name}"))?;
            ensure!(tensor.dims() == var.dims(), "its {name} is {:?}, not {:?}", tensor.dims(), var.dims());
            var.set(&tensor.to_device(var.device())?.to_dtype(var.dtype())?)?;
        }
        let part = |prefix: &str| -> HashMap<String, Tensor> {
            let own =
                state.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone())));
            own.collect()
        };
        let [decoder, head, decoder_gradient, head_gradient] = PARTS.map(part);
        self.optimizer.import(decoder)?;
        self.head_optimizer.import(head)?;
        if counters.pending.pairs > 0 {
            let mut sums = lock(&self.sums[0]);
            for (gradients, saved) in sums.iter_mut().zip([decoder_gradient, head_gradient]) {
                gradients.restore(&saved)?;
            }
        }
        self.counters = counters;
        Ok(())
    }

    /// Returns the present model, which changes with the next step.
    pub fn model(&self) -> &RewardModel {
        &self.model
    }

    /// Returns the number of optimizer steps taken.
    pub fn version(&self) -> u64 {
        self.counters.version
    }

    /// Returns the number of pairs trained on.
    pub fn trained(&self) -> u64 {
        self.counters.trained
    }

    /// Returns the share of the most recent held-out pairs that were ranked as labeled, and the number of these pairs.
    pub fn accuracy(&self) -> (f64, usize) {
        let right = self.counters.held_out.iter().fold(0.0, |sum, right| sum + right);
        (right / self.counters.held_out.len().max(1) as f64, self.counters.held_out.len())
    }

    /// Returns whether pairs about `prompt` are excluded from training. This is a function of the prompt's text, so
    /// that a repeated prompt is always on the same side.
    pub fn holds_out(&self, prompt: &Prompt) -> bool {
        let fraction = (mix(self.plan.seed ^ seed::text(&prompt.text)) >> 11) as f64 / (1u64 << 53) as f64;
        fraction < self.plan.holdout
    }

    /// Returns the scores of a group's completions under the present model.
    ///
    /// # Errors
    /// If a sequence exceeds the model's context.
    pub fn score(&self, group: &Group) -> Result<Vec<f64>> {
        Ok(values(&scores(&self.model, group)?)?)
    }

    /// Scores a group as [`Self::score`] does, and learns from its `preferences` (two completions and P(first is
    /// better)) unless it is held out or was learned from before. The scores are those before any resulting step.
    ///
    /// # Errors
    /// The same as for [`Self::score`].
    pub fn observe(&mut self, group: &Group, preferences: &Pairs) -> Result<Observed> {
        self.ensure_usable()?;
        let (seq, version) = (group.prompt.seq, self.counters.version);
        if let Some((_, version, scores)) = self.counters.last.as_ref().filter(|(last, ..)| *last == seq) {
            return Ok(Observed { scores: scores.clone(), version: *version, step: None });
        }
        if seq < self.counters.next {
            return Ok(Observed { scores: self.score(group)?, version, step: None });
        }
        self.counters.next = seq + 1;
        let (scores, step) = if self.holds_out(&group.prompt) || preferences.is_empty() {
            let scores = self.score(group)?;
            self.measure(&scores, preferences);
            (scores, None)
        } else {
            self.learn(group, preferences)?
        };
        self.counters.last = Some((seq, version, scores.clone()));
        Ok(Observed { scores, version, step })
    }

    /// Counts which labeled pairs of a held-out group its `scores` rank as labeled.
    pub fn measure(&mut self, scores: &[f64], preferences: &Pairs) {
        for (first, second, p) in preferences.iter().filter(|(_, _, p)| *p != 0.5) {
            self.counters.held_out.push_back(agreement(scores[*first] - scores[*second], *p));
        }
        while self.counters.held_out.len() > WINDOW {
            self.counters.held_out.pop_front();
        }
    }

    fn ensure_usable(&self) -> Result<()> {
        ensure!(
            !self.stepping,
            "the reward model failed while its weights were being written; they are only partly updated and cannot be used"
        );
        Ok(())
    }

    /// Learns from `preferences` even if the group was learned from before, for several epochs over the same pairs.
    ///
    /// # Errors
    /// The same as for [`Self::score`].
    pub fn learn(&mut self, group: &Group, preferences: &Pairs) -> Result<(Vec<f64>, Option<TrainerStep>)> {
        self.stepping = true;
        let judged = judge(&self.model, group, preferences, self.plan.hard, &mut lock(&self.sums[0]))?;
        self.stepping = false;
        let step = self.settle(&judged)?;
        Ok((judged.scores, step))
    }

    /// Returns the work on a group for a replica: it scores the group with the present weights, and adds the gradient of
    /// its pairs, if any, to the replica's sums. [`Self::settle`] takes the result, before the next step.
    ///
    /// # Errors
    /// If an earlier failure left the weights only partly updated.
    pub fn work(&mut self, group: Arc<Group>, preferences: Arc<Pairs>) -> Result<Job<Judged>> {
        self.ensure_usable()?;
        let (model, hard) = (Arc::clone(&self.model), self.plan.hard);
        Ok(Box::new(move |sums| judge(&model, &group, &preferences, hard, sums)))
    }

    /// Returns the number of pairs in `preferences` that would be trained on.
    pub fn usable(&self, preferences: &Pairs) -> usize {
        preferences.iter().filter(|(_, _, p)| is_usable(*p, self.plan.hard)).count()
    }

    /// Returns the number of pairs per optimizer step.
    pub fn batch_pairs(&self) -> usize {
        self.plan.batch_pairs
    }

    /// Returns the number of pairs that an optimizer step still lacks.
    pub fn missing(&self) -> usize {
        self.plan.batch_pairs.saturating_sub(self.counters.pending.pairs)
    }

    /// Adds the result of the work on a group to the step under accumulation, and makes the step if it is complete.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn settle(&mut self, judged: &Judged) -> Result<Option<TrainerStep>> {
        let pending = &mut self.counters.pending;
        pending.pairs += judged.sums.pairs;
        pending.loss += judged.sums.loss;
        pending.right += judged.sums.right;
        if pending.pairs >= self.plan.batch_pairs { self.step() } else { Ok(None) }
    }

    /// Makes an optimizer step on the accumulated pairs; returns `None` without pairs, or if the gradient is not
    /// finite.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn step(&mut self) -> Result<Option<TrainerStep>> {
        let pending = std::mem::take(&mut self.counters.pending);
        let pairs = pending.pairs as f64;
        if pending.pairs == 0 {
            return Ok(None);
        }
        SharedWeights.reduce(&self.sums)?;
        let mut sums = lock(&self.sums[0]);
        let norm = sums[0].global_norm()?.hypot(sums[1].global_norm()?) / pairs;
        let finite = norm.is_finite() && pending.loss.is_finite();
        if finite {
            self.stepping = true;
            let scale = clip_factor(norm, self.plan.max_grad_norm) / pairs;
            self.optimizer.step(&sums[0], self.plan.lr, scale)?;
            self.head_optimizer.step(&sums[1], self.plan.head_lr, scale)?;
            self.stepping = false;
            self.counters.version += 1;
            self.counters.trained += pending.pairs as u64;
        }
        sums.iter_mut().try_for_each(Gradients::zero)?;
        for others in &self.sums[1..] {
            lock(others).iter_mut().try_for_each(Gradients::zero)?;
        }
        let (loss, accuracy) = (pending.loss / pairs, pending.right / pairs);
        Ok(finite.then_some(TrainerStep { version: self.counters.version, loss, accuracy, gradient_norm: norm }))
    }

    /// Resets the group counters after a warm-up, so that the run's groups are counted from zero. The live accuracy
    /// keeps the warm-up's pairs until the run's own pairs replace them.
    pub fn begin_run(&mut self) {
        self.counters.next = 0;
        self.counters.last = None;
    }
}

/// Returns whether a label P(first is better) = `p` can be trained on: a tie has no preferred completion.
fn is_usable(p: f64, hard: bool) -> bool {
    !(hard && p == 0.5)
}

/// Scores a group, and adds the gradient of its pairs to `sums`, those of the decoder and of the head.
fn judge(model: &RewardModel, group: &Group, preferences: &Pairs, hard: bool, sums: &mut Sums) -> Result<Judged> {
    let scores = scores(model, group)?;
    let values = values(&scores)?;
    let (mut gradients, mut counted) = (vec![0f64; values.len()], Pending::default());
    for (first, second, p) in preferences.iter().filter(|(_, _, p)| is_usable(*p, hard)) {
        let p = if hard { f64::from(u8::from(*p > 0.5)) } else { *p };
        let margin = values[*first] - values[*second];
        let (loss, gradient) = soft_label(margin, p);
        gradients[*first] += gradient;
        gradients[*second] -= gradient;
        counted.pairs += 1;
        counted.loss += loss;
        counted.right += agreement(margin, p);
    }
    if gradients.iter().any(|gradient| *gradient != 0.0) {
        let gradients: Vec<f32> = gradients.iter().map(|gradient| *gradient as f32).collect();
        let gradients = Tensor::from_vec(gradients, scores.dims(), scores.device())?;
        let loss = (scores * gradients)?.sum_all()?;
        kernels::backward(&loss, &mut sums.iter_mut().collect::<Vec<_>>())?;
    }
    Ok(Judged { scores: values, sums: counted })
}

fn scores(model: &RewardModel, group: &Group) -> Result<Tensor> {
    let ids: Vec<&[u32]> = group.completions.iter().map(|completion| completion.ids.as_slice()).collect();
    model.scores(&group.prompt.ids, &ids)
}

fn values(scores: &Tensor) -> candle_core::Result<Vec<f64>> {
    Ok(scores.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// Returns 1 if a margin ranks a pair as its label does, 0 if not, and ½ for a margin of zero, which ranks nothing.
pub fn agreement(margin: f64, p: f64) -> f64 {
    if margin == 0.0 { 0.5 } else { f64::from(u8::from((margin > 0.0) == (p > 0.5))) }
}

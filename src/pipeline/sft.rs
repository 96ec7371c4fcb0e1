//! Supervised fine-tuning on reference answers, the phase that produces π_SFT before reinforcement learning.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow};
use kernels::clip_factor;
use preceptor_actors::{Emitter, Item, Stage, StageContext, StageError, StageResult};

use crate::lm::model::{Decoder, Pack};
use crate::lm::tokens::Tokenizer;
use crate::observe::telemetry;
use crate::pipeline::learn::TrainState;
use crate::pipeline::learn::replicas::{Job, Layout, Replicas};
use crate::types::Prompt;
use crate::util::failpoints;
use crate::util::mutex::lock;

/// Observer of fine-tuning steps.
pub trait SftObserver: Send {
    /// Called after a step that led to `state`, with the mean loss per token in nats over its references before the
    /// step, and the norm of its gradient.
    fn step(&mut self, state: &TrainState, loss: f64, gradient_norm: f64);
}

/// Stage that trains on prompts with references. Each batch is one optimizer step on −Σ log π(reference | prompt),
/// averaged over tokens, including the end token.
pub struct FineTune {
    /// Training state; one step per batch.
    pub state: Arc<Mutex<TrainState>>,
    /// Number of references per step.
    pub batch: u64,
    /// Tokenizer of the references.
    pub tokenizer: Tokenizer,
    /// True if prompts are wrapped in the chat template, so that a reference ends as the template's turns do.
    pub chat: bool,
    /// Learning rate.
    pub lr: f64,
    /// Maximum global norm of the gradient.
    pub max_grad_norm: f64,
    /// Observer that is called after each step.
    pub observer: Arc<Mutex<dyn SftObserver>>,
    /// Number of replicas that compute gradients, and their threads.
    pub layout: Layout,
    /// Threads of the replicas, once the actor has started.
    pub replicas: Option<Replicas<(f64, usize)>>,
    /// Sums over the present batch.
    pub sums: BatchSums,
}

/// Sums over the references of a batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct BatchSums {
    references: u64,
    loss: f64,
    tokens: usize,
}

impl FineTune {
    /// Returns the job that adds the gradient of one reference to that of `model`. Its result are the summed loss and the number of tokens.
    fn job(&self, model: Arc<Decoder>, prompt: &Prompt) -> Result<Job<(f64, usize)>> {
        let text = prompt.reference.as_ref().ok_or_else(|| anyhow!("line {} has no reference", prompt.row + 1))?;
        let (kept, mut ids) = self.tokenizer.encode_after(&prompt.ids, text)?;
        ids.extend(self.tokenizer.end(self.chat));
        // A reference beyond the context is truncated to its beginning.
        ids.truncate(model.config().context.saturating_sub(kept));
        let pack = Pack::new(&prompt.ids[..kept], &[ids]);
        Ok(Box::new(move |sums| {
            let (logprobs, _) = model.logprobs(&pack, 1.0)?;
            let loss = -logprobs.to_vec1::<f32>()?.iter().map(|p| f64::from(*p)).sum::<f64>();
            kernels::backward(&logprobs.sum_all()?.neg()?, &mut [&mut sums[0]])?;
            Ok((loss, pack.targets.len()))
        }))
    }

    /// Adds the results of jobs until the replica `rank` is free, or all of them.
    fn settle(&mut self, rank: Option<usize>) -> Result<()> {
        let Some(replicas) = &mut self.replicas else { return Ok(()) };
        while rank.is_none_or(|rank| replicas.is_busy(rank)) {
            let Some(result) = replicas.take() else { break };
            let (loss, tokens) = result?;
            self.sums.loss += loss;
            self.sums.tokens += tokens;
        }
        Ok(())
    }
}

impl Stage for FineTune {
    type In = Prompt;
    type Out = ();

    fn start(&mut self, _ctx: &StageContext) -> StageResult<()> {
        let mut state = lock(&self.state);
        if state.stepping {
            return Err(StageError::fatal(
                "fine-tuning failed while it was writing the weights; they are only partly updated and cannot be used",
            ));
        }
        state.set_replicas(self.layout.replicas)?;
        state.discard()?;
        let most = usize::try_from(self.batch).unwrap_or(usize::MAX);
        self.replicas = Some(Replicas::start(state.sums.clone(), self.layout.threads, most)?);
        Ok(())
    }

    fn process(&mut self, item: Item<Prompt>, _out: &Emitter<'_, ()>) -> StageResult<()> {
        let shared = Arc::clone(&self.state);
        let mut state = lock(&shared);
        let (place, count) = (self.sums.references as usize, self.layout.replicas);
        let job = self.job(state.policy(place % count), &item.body)?;
        let replicas = self.replicas.as_mut().context("internal error: fine-tuning has not started")?;
        replicas.submit(place % count, job);
        self.sums.references += 1;
        if self.sums.references < self.batch {
            self.settle(Some((place + 1) % count))?;
            return Ok(());
        }
        self.settle(None)?;
        let BatchSums { loss, tokens, .. } = std::mem::take(&mut self.sums);
        state.reduce()?;
        let norm = state.gradient_norm()? / tokens.max(1) as f64;
        let loss = loss / tokens.max(1) as f64;
        if !norm.is_finite() || !loss.is_finite() {
            return Err(StageError::fatal(format!(
                "step {} of supervised fine-tuning has a loss or gradient that is not finite; lower sft.lr",
                state.step + 1
            )));
        }
        failpoints::point("sft.step")?;
        let scale = clip_factor(norm, self.max_grad_norm) / tokens.max(1) as f64;
        state.stepping = true;
        state.apply(self.lr, scale)?;
        state.step += 1;
        state.stepping = false;
        state.discard()?;
        telemetry::fine_tuned(loss);
        lock(&self.observer).step(&state, loss, norm);
        Ok(())
    }
}

//! The rollout actor: takes prompts, samples groups, says which weights it ran.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use preceptor_actors::{Emitter, Item, SnapshotReader, Stage, StageContext, StageResult};

use super::sampler::Sampling;
use super::{Request, Weighted, generate, stop};
use crate::model::Decoder;
use crate::rollout::{Completion, Group, Prompt};
use crate::tokens::Tokenizer;
use crate::{seed, telemetry};

/// Samples `group_size` completions of each prompt it is handed.
pub struct Rollout {
    /// Where new weights are seen.
    pub reader: SnapshotReader<Decoder>,
    /// What it runs now.
    pub running: Option<(u64, Arc<Decoder>)>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Completions of one prompt.
    pub group_size: usize,
    /// Whether weights may change between decode steps, or only between calls.
    pub in_flight: bool,
    /// The run's seed.
    pub seed: u64,
    /// For the text that judges read.
    pub tokenizer: Tokenizer,
}

impl Stage for Rollout {
    type In = Vec<Prompt>;
    type Out = Group;

    fn process(&mut self, item: Item<Vec<Prompt>>, out: &Emitter<'_, Group>) -> StageResult<()> {
        let started = out.ctx().clock().now();
        let requests: Vec<Request> = item
            .body
            .iter()
            .map(|prompt| Request {
                prompt: &prompt.ids,
                prefix: None,
                seeds: (0..self.group_size).map(|k| seed::completion(self.seed, prompt.seq, k)).collect(),
            })
            .collect();
        let mut weights = Live {
            reader: &mut self.reader,
            in_flight: self.in_flight,
            ctx: out.ctx(),
            running: &mut self.running,
            pinned: false,
        };
        let sampled = match generate(&mut weights, &requests, &self.sampling) {
            Err(_) if out.ctx().halted() => return Ok(()),
            sampled => sampled?,
        };
        drop(requests);
        for (prompt, sampled) in item.body.into_iter().zip(sampled) {
            let completions = sampled
                .into_iter()
                .map(|one| {
                    Ok(Completion {
                        text: stop::text(&self.tokenizer, &one.ids, self.sampling.stop.as_deref())?,
                        finish: one.finish.ok_or_else(|| anyhow!("a completion ended without a reason"))?,
                        ids: one.ids,
                        logprobs: one.logprobs,
                        versions: one.versions,
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            let tokens: usize = completions.iter().map(|completion| completion.ids.len()).sum();
            telemetry::generated(tokens);
            let version = completions.iter().map(Completion::oldest_version).min().unwrap_or(0);
            let seq = prompt.seq;
            let body = Group { prompt, completions };
            out.emit(Item { seq, incarnation: item.incarnation, version, body })?;
        }
        telemetry::generation_took(out.ctx().clock().now().saturating_sub(started));
        Ok(())
    }
}

/// The snapshot cell, read at decode-step boundaries.
struct Live<'a> {
    reader: &'a mut SnapshotReader<Decoder>,
    in_flight: bool,
    ctx: &'a StageContext,
    running: &'a mut Option<(u64, Arc<Decoder>)>,
    /// Whether this call has its weights.
    pinned: bool,
}

impl Weighted for Live<'_> {
    fn weights(&mut self) -> Result<(u64, Arc<Decoder>)> {
        self.ctx.beat();
        if self.ctx.halted() {
            return Err(anyhow!("halted"));
        }
        let due = self.in_flight || !std::mem::replace(&mut self.pinned, true);
        if due && let Some(snapshot) = self.reader.refresh() {
            let fingerprint = snapshot.value.weights().fingerprint()?;
            self.reader.acknowledge(&snapshot, fingerprint);
            *self.running = Some((snapshot.version, snapshot.value));
        }
        self.running.clone().ok_or_else(|| anyhow!("no weights were published yet"))
    }
}

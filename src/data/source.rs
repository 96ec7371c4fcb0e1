//! The source of the graph: hands out prompts in order, as fast as staleness admits.

use std::sync::Arc;

use preceptor_actors::{AdmissionGate, Ended, Item, Source, StageContext, StageResult};

use super::Dataset;
use crate::rollout::Prompt;

/// Emits the prompts `next..end` in lots of `lot`, each when the gate lets it in.
pub struct PromptSource {
    data: Arc<Dataset>,
    gate: Arc<AdmissionGate>,
    lot: u64,
    next: u64,
    end: u64,
    epoch: Option<(u64, Vec<usize>)>,
}

impl PromptSource {
    /// `next` must be a multiple of `lot`: what is generated side by side is part of the run's identity.
    pub fn new(data: Arc<Dataset>, gate: Arc<AdmissionGate>, lot: u64, next: u64, end: u64) -> Self {
        Self { data, gate, lot, next, end, epoch: None }
    }
}

impl Source for PromptSource {
    type Out = Vec<Prompt>;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Vec<Prompt>>>> {
        let count = self.lot.min(self.end.saturating_sub(self.next));
        if count == 0 {
            return Ok(None);
        }
        match self.gate.admit(ctx, count) {
            Ok(_) => {}
            Err(Ended::Drained) => return Ok(None),
            Err(ended) => return Err(ended.into()),
        }
        let mut lot = Vec::with_capacity(count as usize);
        for seq in self.next..self.next + count {
            let epoch = seq / self.data.len() as u64;
            if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
                self.epoch = Some((epoch, self.data.order(epoch)));
            }
            let (_, order) = self.epoch.as_ref().expect("set just above");
            lot.push(self.data.prompt(seq, order)?);
        }
        let seq = self.next;
        self.next += count;
        Ok(Some(Item { seq, incarnation: ctx.incarnation(), version: self.gate.version(), body: lot }))
    }
}

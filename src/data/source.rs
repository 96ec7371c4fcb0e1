//! The source of the graph: hands out prompts in order, as fast as staleness admits.

use std::sync::Arc;

use preceptor_actors::{AdmissionGate, Ended, Item, Source, StageContext, StageResult};

use super::Dataset;
use crate::rollout::Prompt;

/// Emits the prompts `next..end`, each when the gate lets it in.
pub struct PromptSource {
    data: Arc<Dataset>,
    gate: Arc<AdmissionGate>,
    next: u64,
    end: u64,
    epoch: Option<(u64, Vec<usize>)>,
}

impl PromptSource {
    /// A source that goes on with prompt `next`.
    pub fn new(data: Arc<Dataset>, gate: Arc<AdmissionGate>, next: u64, end: u64) -> Self {
        Self { data, gate, next, end, epoch: None }
    }
}

impl Source for PromptSource {
    type Out = Prompt;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Prompt>>> {
        if self.next >= self.end {
            return Ok(None);
        }
        match self.gate.admit(ctx, 1) {
            Ok(_) => {}
            Err(Ended::Drained) => return Ok(None),
            Err(ended) => return Err(ended.into()),
        }
        let seq = self.next;
        let epoch = seq / self.data.len() as u64;
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, self.data.order(epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("set just above");
        let body = self.data.prompt(seq, order)?;
        self.next += 1;
        Ok(Some(Item { seq, incarnation: ctx.incarnation(), version: self.gate.version(), body }))
    }
}

//! Sources of the graph: prompts in order, as fast as the staleness bound admits them, and groups left over by an
//! earlier graph.

use std::sync::Arc;
use std::vec::IntoIter;

use preceptor_actors::{AdmissionGate, Ended, Item, Source, StageContext, StageResult};

use super::Dataset;
use crate::rl::ledger::LedgerWriter;
use crate::types::{Completion, Group, Labeled, Prompt};
use crate::util::failpoints;

/// Source of the prompts `next..end`, each emitted when the gate admits it, unless the ledger already has its
/// completions.
pub struct PromptSource {
    data: Arc<Dataset>,
    gate: Arc<AdmissionGate>,
    entries: LedgerWriter,
    next: u64,
    end: u64,
    epoch: Option<(u64, Vec<usize>)>,
}

impl PromptSource {
    /// Creates a source that continues with prompt `next`.
    pub fn new(data: Arc<Dataset>, gate: Arc<AdmissionGate>, entries: LedgerWriter, next: u64, end: u64) -> Self {
        Self { data, gate, entries, next, end, epoch: None }
    }
}

impl Source for PromptSource {
    type Out = Prompt;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Prompt>>> {
        let seq = loop {
            if self.next >= self.end {
                return Ok(None);
            }
            match self.gate.admit(ctx, 1) {
                Ok(_) => {}
                Err(Ended::Drained) => return Ok(None),
                Err(ended) => return Err(ended.into()),
            }
            self.next += 1;
            if self.entries.admit(self.next - 1) {
                break self.next - 1;
            }
        };
        let epoch = seq / self.data.len() as u64;
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, self.data.order(epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("set just above");
        failpoints::point("prompts.next")?;
        let body = self.data.prompt(seq, order)?;
        Ok(Some(Item { seq, incarnation: ctx.incarnation(), version: self.gate.version(), body }))
    }
}

/// Source of the groups that an earlier graph left over: groups to be labeled, or labeled ones to be rewarded.
pub struct LeftOver<T>(IntoIter<Arc<T>>);

impl<T> LeftOver<T> {
    /// Creates a source of `items`, in this order.
    pub fn new(items: Vec<Arc<T>>) -> Self {
        Self(items.into_iter())
    }
}

/// Items that contain a group, which determines their sequence number and version.
pub trait OfGroup {
    /// Returns the group.
    fn group(&self) -> &Group;
}

impl OfGroup for Group {
    fn group(&self) -> &Group {
        self
    }
}

impl OfGroup for Labeled {
    fn group(&self) -> &Group {
        &self.group
    }
}

impl<T: OfGroup + Clone + Send + Sync + 'static> Source for LeftOver<T> {
    type Out = T;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<T>>> {
        let Some(one) = self.0.next() else { return Ok(None) };
        let group = one.group();
        let version = group.completions.iter().map(Completion::oldest_version).min().unwrap_or(0);
        Ok(Some(Item { seq: group.prompt.seq, incarnation: ctx.incarnation(), version, body: T::clone(&one) }))
    }
}

//! The workers of a run as the engine of its rollout actor.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use preceptor_actors::transport::Lease;
use preceptor_actors::{StageContext, StageError, StageResult};

use super::coordinator::{Arrived, Coordinator};
use super::protocol::Work;
use crate::pipeline::generate::Sampled;
use crate::pipeline::generate::stage::{RolloutEngine, SampledGroup};
use crate::types::Prompt;

/// Time to wait for a result before prompts are accepted again, and the same while none can be accepted.
const WAIT: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];

/// Bit that distinguishes the numbers of work of the warm-up.
const WARM_UP: u64 = 1 << 63;

/// Lease of a result, with the number of its work.
type NumberedLease = (u64, Box<dyn Lease>);

/// Engine that gives groups to workers, each as one or several pieces of work.
pub struct ClusterEngine {
    coordinator: Arc<Coordinator>,
    /// True for the warm-up of the reward model.
    warm_up: bool,
    slots: usize,
    limit: usize,
    used: usize,
    /// Groups under way.
    under_way: HashMap<u64, Parts>,
    /// Leases of the results of groups that are not recorded yet, with the numbers of their work.
    leases: HashMap<u64, Vec<NumberedLease>>,
    ctx: Option<StageContext>,
}

/// A group whose completions come as results of several pieces of work.
#[derive(Default)]
struct Parts {
    /// Results by the place of their completions in the group; `None` until they come.
    found: Vec<Option<Vec<Sampled>>>,
    /// Number of completions that have not come.
    missing: usize,
}

impl ClusterEngine {
    /// Creates an engine with up to `slots` completions under way, which must be a group at least. Groups of the warm-up
    /// (`warm_up`) are sampled by any version, and the numbers of their work are those of training with the highest bit set.
    pub fn new(coordinator: Arc<Coordinator>, slots: usize, warm_up: bool) -> Self {
        let (under_way, leases) = (HashMap::new(), HashMap::new());
        Self { coordinator, warm_up, slots, limit: slots, used: 0, under_way, leases, ctx: None }
    }

    /// Returns the number of the work on part `part` of group `seq`.
    fn number(&self, seq: u64, part: usize) -> u64 {
        let number = seq * self.coordinator.plan.parts() as u64 + part as u64;
        if self.warm_up { number | WARM_UP } else { number }
    }

    /// Returns the group and the part of a piece of work; `None` if it is of the warm-up and this engine is not, or the
    /// reverse.
    fn place(&self, number: u64) -> Option<(u64, usize)> {
        let number = if self.warm_up { number.checked_sub(WARM_UP)? } else { number };
        let parts = self.coordinator.plan.parts() as u64;
        Some((number / parts, (number % parts) as usize))
    }

    /// Takes a result; returns its group if that is complete now.
    fn take(&mut self, arrived: Arrived) -> Option<SampledGroup> {
        let Arrived { seq: number, sampled, lease } = arrived;
        // A late result of the warm-up is not one of training.
        let (seq, part) = self.place(number)?;
        let parts = self.under_way.get_mut(&seq)?;
        let place = parts.found.get_mut(part).filter(|place| place.is_none())?;
        self.used -= sampled.len();
        parts.missing -= sampled.len();
        *place = Some(sampled);
        self.leases.entry(seq).or_default().push((number, lease));
        if parts.missing > 0 {
            return None;
        }
        let group = self.under_way.remove(&seq)?.found.into_iter().flatten().flatten().collect();
        Some((seq, group))
    }
}

impl RolloutEngine for ClusterEngine {
    fn start(&mut self, ctx: &StageContext) {
        self.ctx = Some(ctx.clone());
    }

    fn accepts(&self) -> bool {
        true
    }

    fn submit(&mut self, prompt: &Prompt, seeds: Vec<u64>) -> Result<()> {
        let (seq, count) = (prompt.seq, seeds.len());
        let min_version = if self.warm_up { 0 } else { self.coordinator.min_version(seq) };
        let (lineage, mut found) = (self.coordinator.plan.lineage, Vec::new());
        for (part, seeds) in seeds.chunks(self.coordinator.plan.part).enumerate() {
            let (ids, seeds) = (prompt.ids.to_vec(), seeds.to_vec());
            self.coordinator.submit(Work { lineage, seq: self.number(seq, part), min_version, ids, seeds });
            found.push(None);
        }
        self.used += count;
        self.under_way.insert(seq, Parts { found, missing: count });
        Ok(())
    }

    fn advance(&mut self) -> StageResult<Vec<SampledGroup>> {
        if let Some(ctx) = &self.ctx {
            if ctx.halted() {
                return Err(StageError::new("halted"));
            }
            ctx.note(&self.coordinator.reasons_of_wait());
        }
        self.coordinator.offer_open();
        let mut arrived = self.coordinator.next(WAIT[usize::from(self.free() == 0)]);
        let mut ended = Vec::new();
        while let Some(one) = arrived {
            ended.extend(self.take(one));
            arrived = self.coordinator.next(Duration::ZERO);
        }
        Ok(ended)
    }

    fn recorded(&mut self, seq: u64) {
        for (number, lease) in self.leases.remove(&seq).into_iter().flatten() {
            self.coordinator.recorded(number, lease);
        }
    }

    fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    fn slots(&self) -> usize {
        self.slots
    }

    fn used(&self) -> usize {
        self.used
    }

    fn free(&self) -> usize {
        self.slots.min(self.limit).saturating_sub(self.used)
    }

    fn limit(&mut self, limit: usize) {
        self.limit = limit;
    }
}

impl Drop for ClusterEngine {
    fn drop(&mut self) {
        let open = self.under_way.iter().flat_map(|(seq, parts)| (0..parts.found.len()).map(|part| (*seq, part)));
        let open: Vec<u64> = open.map(|(seq, part)| self.number(seq, part)).collect();
        let taken = std::mem::take(&mut self.leases).into_values().flatten();
        // Without their leases, results come again once these have expired.
        self.coordinator.forget(open.into_iter().chain(taken.map(|(number, _)| number)));
    }
}

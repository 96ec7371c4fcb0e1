//! The workers of a run as the engine of its rollout actor.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use preceptor_actors::transport::Lease;
use preceptor_actors::{StageContext, StageError, StageResult};

use super::coordinator::{Arrived, Coordinator};
use super::protocol::Work;
use crate::pipeline::generate::stage::{RolloutEngine, SampledGroup};
use crate::types::Prompt;

/// Time to wait for a result before prompts are accepted again, and the same while none can be accepted.
const WAIT: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];

/// Bit that distinguishes the numbers of groups of the warm-up.
const WARM_UP: u64 = 1 << 63;

/// Engine that gives each group to a worker.
pub struct ClusterEngine {
    coordinator: Arc<Coordinator>,
    /// True for the warm-up of the reward model.
    warm_up: bool,
    slots: usize,
    limit: usize,
    used: usize,
    /// Number of completions of each group under way.
    under_way: HashMap<u64, usize>,
    /// Leases of results that are not recorded yet.
    leases: HashMap<u64, Box<dyn Lease>>,
    ctx: Option<StageContext>,
}

impl ClusterEngine {
    /// Creates an engine with up to `slots` completions under way, which must be a group at least. Groups of the warm-up
    /// (`warm_up`) are sampled by any version, and their numbers are those of training with the highest bit set.
    pub fn new(coordinator: Arc<Coordinator>, slots: usize, warm_up: bool) -> Self {
        let (under_way, leases) = (HashMap::new(), HashMap::new());
        Self { coordinator, warm_up, slots, limit: slots, used: 0, under_way, leases, ctx: None }
    }

    /// Returns the number of group `seq` among the workers.
    fn number(&self, seq: u64) -> u64 {
        if self.warm_up { seq | WARM_UP } else { seq }
    }

    fn take(&mut self, arrived: Arrived) -> Option<SampledGroup> {
        let Arrived { seq, sampled, lease } = arrived;
        // A late result of the warm-up is not one of training.
        let seq = if self.warm_up { seq.checked_sub(WARM_UP)? } else { seq };
        self.used -= self.under_way.remove(&seq)?;
        self.leases.insert(seq, lease);
        Some((seq, sampled))
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
        let (lineage, ids) = (self.coordinator.plan.lineage, prompt.ids.to_vec());
        self.coordinator.submit(Work { lineage, seq: self.number(seq), min_version, ids, seeds });
        self.used += count;
        self.under_way.insert(seq, count);
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
        if let Some(lease) = self.leases.remove(&seq) {
            self.coordinator.recorded(self.number(seq), lease);
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
        let seqs = self.under_way.keys().chain(self.leases.keys());
        self.coordinator.forget(seqs.map(|seq| self.number(*seq)));
    }
}

//! The servers as the engine of a rollout actor.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use preceptor_actors::{StageContext, StageError, StageResult};
use tokio::task::AbortHandle;

use super::fleet::Fleet;
use crate::pipeline::generate::Sampled;
use crate::pipeline::generate::stage::{RolloutEngine, SampledGroup};
use crate::types::Prompt;

/// Time to wait for an answer before prompts are accepted again, and the same while none can be accepted.
const WAIT: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];

/// Engine that sends each group to a server of a [`Fleet`].
pub struct ServedEngine {
    fleet: Arc<Fleet>,
    slots: usize,
    limit: usize,
    /// True if all groups may use any version, as in the warm-up.
    any_version: bool,
    used: usize,
    /// Groups under way.
    under_way: Vec<(u64, usize, AbortHandle)>,
    answers: (Sender<Answer>, Receiver<Answer>),
    ctx: Option<StageContext>,
}

type Answer = (u64, Result<Vec<Sampled>>);

impl ServedEngine {
    /// Creates an engine with up to `slots` completions under way, which must be a group at least. With `any_version`, groups
    /// are not bound to recent versions of the weights.
    pub fn new(fleet: Arc<Fleet>, slots: usize, any_version: bool) -> Self {
        Self {
            fleet,
            slots,
            limit: slots,
            any_version,
            used: 0,
            under_way: Vec::new(),
            // Each group under way sends one answer, so that the channel is never full.
            answers: bounded(slots.max(1)),
            ctx: None,
        }
    }

    /// Starts `n` completions of `prompt`, with weights of at least the version `min_version`.
    pub fn submit_from(&mut self, seq: u64, prompt: Arc<[u32]>, n: usize, min_version: u64) {
        let (fleet, answers) = (Arc::clone(&self.fleet), self.answers.0.clone());
        let work = async move {
            let sampled = fleet.sample(&prompt, n, min_version).await;
            // If the engine was dropped, nobody needs the answer.
            let _ = answers.send((seq, sampled));
        };
        let task = self.fleet.runtime.spawn(work);
        self.used += n;
        self.under_way.push((seq, n, task.abort_handle()));
    }

    fn take(&mut self, (seq, sampled): Answer) -> StageResult<Option<SampledGroup>> {
        let Some(at) = self.under_way.iter().position(|(of, ..)| *of == seq) else { return Ok(None) };
        self.used -= self.under_way.swap_remove(at).1;
        // The fleet has repeated what a repetition can help.
        sampled.map(|sampled| Some((seq, sampled))).map_err(|error| StageError::fatal(format!("{error:#}")))
    }
}

impl RolloutEngine for ServedEngine {
    fn start(&mut self, ctx: &StageContext) {
        self.ctx = Some(ctx.clone());
    }

    fn accepts(&self) -> bool {
        true
    }

    fn submit(&mut self, prompt: &Prompt, seeds: Vec<u64>) -> Result<()> {
        let min_version = if self.any_version { 0 } else { self.fleet.min_version(prompt.seq) };
        self.submit_from(prompt.seq, Arc::clone(&prompt.ids), seeds.len(), min_version);
        Ok(())
    }

    fn advance(&mut self) -> StageResult<Vec<SampledGroup>> {
        if let Some(ctx) = &self.ctx {
            if ctx.halted() {
                return Err(StageError::new("halted"));
            }
            let reasons = self.fleet.reasons_of_wait();
            ctx.note(&reasons);
        }
        let wait = WAIT[usize::from(self.free() == 0)];
        let mut ended = Vec::new();
        match self.answers.1.recv_timeout(wait) {
            Ok(answer) => ended.extend(self.take(answer)?),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(ended),
        }
        while let Ok(answer) = self.answers.1.try_recv() {
            ended.extend(self.take(answer)?);
        }
        Ok(ended)
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
        self.limit = limit.max(1);
    }
}

impl Drop for ServedEngine {
    fn drop(&mut self) {
        for (.., task) in &self.under_way {
            task.abort();
        }
    }
}

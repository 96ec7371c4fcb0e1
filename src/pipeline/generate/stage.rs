//! The rollout actor, which samples groups of completions for prompts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use preceptor_actors::{Emitter, Item, Stage, StageContext, StageResult};

use super::Sampled;
use super::stop::{self, Stop};
use crate::lm::tokens::Tokenizer;
use crate::observe::telemetry;
use crate::rl::ledger::LedgerWriter;
use crate::types::{Completion, Group, Prompt};
use crate::util::failpoints;
use crate::util::limit::AdjustableLimit;
use crate::util::seed;

/// Sequence number of a prompt, and its completions.
pub type SampledGroup = (u64, Vec<Sampled>);

/// Engine that samples the completions of a rollout actor: [`super::local::LocalEngine`] in this process, or one behind
/// servers. It takes up published weights by itself; each sampled token carries the version that sampled it.
pub trait RolloutEngine: Send {
    /// Called once, on the actor's thread, before the first prompt.
    fn start(&mut self, ctx: &StageContext);

    /// Returns whether a prompt may be submitted now. If not, it must wait until the engine is idle.
    fn accepts(&self) -> bool;

    /// Starts one completion of `prompt` for each seed.
    ///
    /// # Errors
    /// If the prompt does not fit the model's context, or no weights are available.
    fn submit(&mut self, prompt: &Prompt, seeds: Vec<u64>) -> Result<()>;

    /// Works on the submitted prompts for a short time, and returns those whose completions have all ended.
    ///
    /// # Errors
    /// If sampling failed, or the graph halts.
    fn advance(&mut self) -> StageResult<Vec<SampledGroup>>;

    /// Called when the completions of group `seq` are recorded in the ledger.
    fn recorded(&mut self, _seq: u64) {}

    /// Returns whether no completion is under way or waiting.
    fn is_idle(&self) -> bool;

    /// Returns the maximum number of concurrent completions.
    fn slots(&self) -> usize;

    /// Returns the number of completions under way.
    fn used(&self) -> usize;

    /// Returns the number of slots that no submitted completion needs.
    fn free(&self) -> usize;

    /// Limits the number of concurrent completions from now on; completions under way continue.
    fn limit(&mut self, limit: usize);
}

/// Stage that samples `group_size` completions of each prompt, for several prompts concurrently.
pub struct Rollout {
    engine: Box<dyn RolloutEngine>,
    plan: RolloutPlan,
    tokenizer: Tokenizer,
    /// Prompts under way, by sequence number.
    open: HashMap<u64, OpenGroup>,
    /// A prompt that the engine did not accept yet.
    held: Option<Item<Prompt>>,
    /// Gauge of used slots, set when the stage starts.
    slots: Option<telemetry::Slots>,
}

struct OpenGroup {
    prompt: Prompt,
    incarnation: u64,
    at: Duration,
}

/// Settings of a rollout actor.
pub struct RolloutPlan {
    /// Stop strings, which the texts of completions omit.
    pub stop: Option<Arc<Stop>>,
    /// Adjustable limit on used slots, if a controller sets it.
    pub slot_limit: Option<Arc<AdjustableLimit>>,
    /// Number of completions per prompt.
    pub group_size: usize,
    /// The run's seed.
    pub seed: u64,
    /// Ledger that records groups once they are sampled.
    pub entries: LedgerWriter,
}

impl Rollout {
    /// Creates an actor that samples with `engine`; `tokenizer` decodes completions for judges.
    pub fn new(engine: Box<dyn RolloutEngine>, tokenizer: Tokenizer, plan: RolloutPlan) -> Self {
        Self { engine, plan, tokenizer, open: HashMap::new(), held: None, slots: None }
    }

    fn begin(&mut self, item: Item<Prompt>, at: Duration) -> Result<()> {
        failpoints::point("rollout.begin")?;
        let Item { seq, incarnation, body: prompt, .. } = item;
        let seeds = (0..self.plan.group_size).map(|k| seed::completion(self.plan.seed, seq, k)).collect();
        self.engine.submit(&prompt, seeds)?;
        self.open.insert(seq, OpenGroup { prompt, incarnation, at });
        Ok(())
    }

    fn completion(&self, sampled: Sampled) -> Result<Completion> {
        Ok(Completion {
            text: stop::text(&self.tokenizer, &sampled.ids, self.plan.stop.as_deref())?,
            finish: sampled.finish.ok_or_else(|| anyhow!("a completion ended without a reason"))?,
            ids: sampled.ids,
            logprobs: sampled.logprobs,
            versions: sampled.versions,
        })
    }
}

impl Stage for Rollout {
    type In = Prompt;
    type Out = Group;

    fn start(&mut self, ctx: &StageContext) -> StageResult<()> {
        self.engine.start(ctx);
        self.slots = Some(telemetry::Slots::new(ctx.name(), self.engine.slots()));
        Ok(())
    }

    fn process(&mut self, item: Item<Prompt>, out: &Emitter<'_, Group>) -> StageResult<()> {
        if !self.engine.accepts() {
            self.held = Some(item);
            return Ok(());
        }
        Ok(self.begin(item, out.ctx().clock().now())?)
    }

    fn busy(&self) -> bool {
        self.held.is_some() || !self.engine.is_idle()
    }

    fn open(&self) -> bool {
        self.held.is_none() && self.engine.free() > 0
    }

    fn advance(&mut self, out: &Emitter<'_, Group>) -> StageResult<()> {
        let clock = out.ctx().clock();
        if self.engine.is_idle()
            && let Some(item) = self.held.take()
        {
            self.begin(item, clock.now())?;
        }
        if let Some(slot_limit) = &self.plan.slot_limit {
            self.engine.limit(slot_limit.get());
        }
        let ended = match self.engine.advance() {
            Err(_) if out.ctx().halted() => return Ok(()),
            ended => ended?,
        };
        if let Some(slots) = &self.slots {
            slots.set(self.engine.used());
        }
        for (seq, sampled) in ended {
            let Some(OpenGroup { prompt, incarnation, at }) = self.open.remove(&seq) else { continue };
            let completions =
                sampled.into_iter().map(|sampled| self.completion(sampled)).collect::<Result<Vec<_>>>()?;
            telemetry::generated(prompt.ids.len(), &completions);
            telemetry::generation_took(clock.now().saturating_sub(at));
            let version = completions.iter().map(Completion::oldest_version).min().unwrap_or(0);
            let body = Group { prompt, completions };
            self.plan.entries.generated(&body);
            self.engine.recorded(seq);
            out.emit(Item { seq, incarnation, version, body })?;
        }
        Ok(())
    }
}

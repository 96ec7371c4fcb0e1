//! The rollout actor, which samples groups of completions for prompts and acknowledges the weights that it uses.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use candle_core::Device;
use preceptor_actors::{Emitter, Item, SnapshotReader, Stage, StageContext, StageResult};

use super::sampler::Sampling;
use super::stop::{self, Stop};
use super::{Engine, Request, Sampled, WeightSource};
use crate::lm::model::{Decoder, DeviceReplicas};
use crate::lm::tokens::Tokenizer;
use crate::observe::telemetry;
use crate::rl::ledger::LedgerWriter;
use crate::types::{Completion, Group, Prompt};
use crate::util::failpoints;
use crate::util::limit::AdjustableLimit;
use crate::util::seed;
use kernels::Format;

/// Stage that samples `group_size` completions of each prompt, for several prompts concurrently.
pub struct Rollout {
    weights: LiveWeights,
    engine: Engine<'static>,
    slot_limit: Option<Arc<AdjustableLimit>>,
    group_size: usize,
    seed: u64,
    tokenizer: Tokenizer,
    stop: Option<Arc<Stop>>,
    entries: LedgerWriter,
    /// Prompts under way, by sequence number.
    open: HashMap<u64, OpenGroup>,
    /// A prompt that arrived while weights older than the latest had to be kept for sequences under way.
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
    /// Sampling settings.
    pub sampling: Sampling,
    /// Number of concurrent sequences.
    pub slots: usize,
    /// Adjustable limit on used slots, if a controller sets it.
    pub slot_limit: Option<Arc<AdjustableLimit>>,
    /// Number of completions per prompt.
    pub group_size: usize,
    /// True if weights may change between decode steps, false if only when no sequence is under way.
    pub in_flight: bool,
    /// Reduced-precision format of the matrices for sampling; `None` samples with them unchanged.
    pub format: Option<Format>,
    /// Device of the sampling.
    pub device: Device,
    /// The run's seed.
    pub seed: u64,
    /// Ledger that records groups once they are sampled.
    pub entries: LedgerWriter,
}

impl Rollout {
    /// Creates an actor that receives weights through `reader`; `tokenizer` decodes completions for judges.
    pub fn new(reader: SnapshotReader<Decoder>, tokenizer: Tokenizer, plan: RolloutPlan) -> Self {
        let RolloutPlan { sampling, slots, slot_limit, group_size, in_flight, format, device, seed, entries } = plan;
        Self {
            weights: LiveWeights {
                reader,
                in_flight,
                format,
                copies: DeviceReplicas::new(device),
                running: None,
                pinned: false,
                ctx: None,
            },
            engine: Engine::new(&sampling, slots),
            slot_limit,
            group_size,
            seed,
            tokenizer,
            stop: sampling.stop,
            entries,
            open: HashMap::new(),
            held: None,
            slots: None,
        }
    }

    fn begin(&mut self, item: Item<Prompt>, at: Duration) -> Result<()> {
        failpoints::point("rollout.begin")?;
        let Item { seq, incarnation, body: prompt, .. } = item;
        let seeds = (0..self.group_size).map(|k| seed::completion(self.seed, seq, k)).collect();
        let request = Request::new(prompt.ids.to_vec(), seeds);
        if self.engine.is_idle() {
            self.weights.pinned = false;
        }
        let (_, model) = self.weights.latest()?;
        self.engine.submit(seq, request, model.config())?;
        self.open.insert(seq, OpenGroup { prompt, incarnation, at });
        Ok(())
    }

    fn completion(&self, sampled: Sampled) -> Result<Completion> {
        Ok(Completion {
            text: stop::text(&self.tokenizer, &sampled.ids, self.stop.as_deref())?,
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
        self.weights.ctx = Some(ctx.clone());
        self.slots = Some(telemetry::Slots::new(ctx.name(), self.engine.slots()));
        Ok(())
    }

    fn process(&mut self, item: Item<Prompt>, out: &Emitter<'_, Group>) -> StageResult<()> {
        // The prompt may have been admitted for newer weights than those kept for sequences under way.
        if self.weights.is_behind() && !self.engine.is_idle() {
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
        if let Some(slot_limit) = &self.slot_limit {
            self.engine.limit(slot_limit.get());
        }
        let ended = match self.engine.step(&mut self.weights) {
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
            self.entries.generated(&body);
            out.emit(Item { seq, incarnation, version, body })?;
        }
        Ok(())
    }
}

/// Weights from the snapshot cell, refreshed at decode-step boundaries.
struct LiveWeights {
    reader: SnapshotReader<Decoder>,
    in_flight: bool,
    format: Option<Format>,
    /// Copies of the weights on the sampling device.
    copies: DeviceReplicas,
    /// Weights in use, with their version.
    running: Option<(u64, Arc<Decoder>)>,
    /// True if the weights must be kept for sequences under way.
    pinned: bool,
    ctx: Option<StageContext>,
}

impl LiveWeights {
    /// Returns whether newer weights exist that must not be used yet.
    fn is_behind(&self) -> bool {
        self.pinned && !self.in_flight && self.reader.refresh().is_some()
    }

    /// Returns the weights to use, after switching to new ones if that is allowed.
    fn latest(&mut self) -> Result<(u64, Arc<Decoder>)> {
        if (self.in_flight || !self.pinned)
            && let Some(snapshot) = self.reader.refresh()
        {
            // The publisher computed a fingerprint, so all kernels that write the weights have completed.
            let model = self.copies.of(&snapshot.value)?;
            self.reader.acknowledge(&snapshot, model.weights().fingerprint()?);
            let model = self.format.map_or(Ok(model.clone()), |format| model.quantized(format).map(Arc::new))?;
            self.running = Some((snapshot.version, model));
        }
        self.running.clone().ok_or_else(|| anyhow!("no weights were published yet"))
    }
}

impl WeightSource for LiveWeights {
    fn weights(&mut self) -> Result<(u64, Arc<Decoder>)> {
        if let Some(ctx) = &self.ctx {
            ctx.beat();
            if ctx.halted() {
                return Err(anyhow!("halted"));
            }
        }
        failpoints::point("rollout.step")?;
        let weights = self.latest()?;
        self.pinned = true;
        Ok(weights)
    }
}

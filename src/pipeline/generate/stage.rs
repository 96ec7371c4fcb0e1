//! The rollout actor: takes prompts, samples groups, says which weights it ran.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use candle_core::Device;
use preceptor_actors::{Emitter, Item, SnapshotReader, Stage, StageContext, StageResult};

use super::sampler::Sampling;
use super::stop::{self, Stop};
use super::{Engine, Request, Sampled, Weighted};
use crate::lm::model::{Decoder, DeviceReplicas};
use crate::lm::tokens::Tokenizer;
use crate::observe::telemetry;
use crate::rl::ledger::LedgerWriter;
use crate::types::{Completion, Group, Prompt};
use crate::util::failpoints;
use crate::util::limit::AdjustableLimit;
use crate::util::seed;
use kernels::Format;

/// Samples `group_size` completions of each prompt it is handed, those of several prompts side by side.
pub struct Rollout {
    weights: LiveWeights,
    engine: Engine<'static>,
    knob: Option<Arc<AdjustableLimit>>,
    group_size: usize,
    seed: u64,
    tokenizer: Tokenizer,
    stop: Option<Arc<Stop>>,
    entries: LedgerWriter,
    /// Prompts under way, by sequence number.
    open: HashMap<u64, Begun>,
    /// A prompt that came while older weights than the latest had to be kept for those under way.
    held: Option<Item<Prompt>>,
    /// Where it tells how many of its slots are used, once it has begun.
    slots: Option<telemetry::Slots>,
}

struct Begun {
    prompt: Prompt,
    incarnation: u64,
    at: Duration,
}

/// How a rollout actor samples.
pub struct RolloutPlan {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Sequences side by side.
    pub slots: usize,
    /// How many of these are used for now, where somebody decides.
    pub knob: Option<Arc<AdjustableLimit>>,
    /// Completions of one prompt.
    pub group_size: usize,
    /// Whether weights may change between decode steps, or only when nothing is under way.
    pub in_flight: bool,
    /// What to sample with the matrices in, if not as they are.
    pub format: Option<Format>,
    /// Where to sample.
    pub device: Device,
    /// The run's seed.
    pub seed: u64,
    /// Where groups are written down once they are sampled.
    pub entries: LedgerWriter,
}

impl Rollout {
    /// An actor that sees new weights through `reader`; `tokenizer` is for the text that judges read.
    pub fn new(reader: SnapshotReader<Decoder>, tokenizer: Tokenizer, plan: RolloutPlan) -> Self {
        let RolloutPlan { sampling, slots, knob, group_size, in_flight, format, device, seed, entries } = plan;
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
            knob,
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
        self.open.insert(seq, Begun { prompt, incarnation, at });
        Ok(())
    }

    fn completion(&self, one: Sampled) -> Result<Completion> {
        Ok(Completion {
            text: stop::text(&self.tokenizer, &one.ids, self.stop.as_deref())?,
            finish: one.finish.ok_or_else(|| anyhow!("a completion ended without a reason"))?,
            ids: one.ids,
            logprobs: one.logprobs,
            versions: one.versions,
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
        // It may have been let in for weights newer than those that have to be kept for what is under way.
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
        if let Some(knob) = &self.knob {
            self.engine.limit(knob.get());
        }
        let ended = match self.engine.step(&mut self.weights) {
            Err(_) if out.ctx().halted() => return Ok(()),
            ended => ended?,
        };
        if let Some(slots) = &self.slots {
            slots.set(self.engine.used());
        }
        for (seq, sampled) in ended {
            let Some(Begun { prompt, incarnation, at }) = self.open.remove(&seq) else { continue };
            let completions = sampled.into_iter().map(|one| self.completion(one)).collect::<Result<Vec<_>>>()?;
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

/// The snapshot cell, read at decode-step boundaries.
struct LiveWeights {
    reader: SnapshotReader<Decoder>,
    in_flight: bool,
    format: Option<Format>,
    /// The weights where it samples.
    copies: DeviceReplicas,
    /// What it runs now.
    running: Option<(u64, Arc<Decoder>)>,
    /// Whether the weights have to stay for what is under way.
    pinned: bool,
    ctx: Option<StageContext>,
}

impl LiveWeights {
    /// Whether there are newer weights that may not be taken up yet.
    fn is_behind(&self) -> bool {
        self.pinned && !self.in_flight && self.reader.refresh().is_some()
    }

    /// The weights to run, taken up if they are new and may be.
    fn latest(&mut self) -> Result<(u64, Arc<Decoder>)> {
        if (self.in_flight || !self.pinned)
            && let Some(snapshot) = self.reader.refresh()
        {
            // What a publisher told a fingerprint of is computed.
            let model = self.copies.of(&snapshot.value)?;
            self.reader.acknowledge(&snapshot, model.weights().fingerprint()?);
            let model = self.format.map_or(Ok(model.clone()), |format| model.narrowed(format).map(Arc::new))?;
            self.running = Some((snapshot.version, model));
        }
        self.running.clone().ok_or_else(|| anyhow!("no weights were published yet"))
    }
}

impl Weighted for LiveWeights {
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

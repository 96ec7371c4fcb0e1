//! The engine of this process as the engine of a rollout actor, with weights from the learner's snapshot cell.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use candle_core::Device;
use kernels::Format;
use preceptor_actors::{SnapshotReader, StageContext, StageResult};

use super::sampler::Sampling;
use super::stage::{RolloutEngine, SampledGroup};
use super::{Engine, Request, WeightSource};
use crate::lm::model::{Decoder, DeviceReplicas};
use crate::types::Prompt;
use crate::util::failpoints;

/// Engine that samples in this process with the published weights.
pub struct LocalEngine {
    weights: LiveWeights,
    engine: Engine<'static>,
}

/// Settings of a [`LocalEngine`].
pub struct LocalPlan {
    /// Number of concurrent sequences.
    pub slots: usize,
    /// Number of concurrent sequences of the engine whose samples this one is to give, to the last bit; see
    /// [`Engine::with_kernels_for`].
    pub kernels_for: usize,
    /// True if weights may change between decode steps, false if only when no sequence is under way.
    pub in_flight: bool,
    /// Reduced-precision format of the matrices for sampling; `None` samples with them unchanged.
    pub format: Option<Format>,
    /// Device of the sampling.
    pub device: Device,
}

impl LocalEngine {
    /// Creates an engine that receives weights through `reader`.
    pub fn new(reader: SnapshotReader<Decoder>, sampling: &Sampling, plan: LocalPlan) -> Self {
        let LocalPlan { slots, kernels_for, in_flight, format, device } = plan;
        let engine = Engine::on(&device, sampling, slots).with_kernels_for(kernels_for);
        let copies = DeviceReplicas::new(device);
        Self {
            weights: LiveWeights {
                reader,
                in_flight,
                format,
                copies,
                running: None,
                acknowledged: None,
                are_shared: false,
                pinned: false,
                ctx: None,
            },
            engine,
        }
    }
}

impl RolloutEngine for LocalEngine {
    fn start(&mut self, ctx: &StageContext) {
        self.weights.ctx = Some(ctx.clone());
    }

    fn accepts(&self) -> bool {
        // The prompt may have been admitted for newer weights than those kept for sequences under way.
        self.engine.is_idle() || !self.weights.is_behind()
    }

    fn submit(&mut self, prompt: &Prompt, seeds: Vec<u64>) -> Result<()> {
        if self.engine.is_idle() {
            self.weights.pinned = false;
        }
        let (_, model) = self.weights.latest()?;
        self.engine.submit(prompt.seq, Request::new(prompt.ids.to_vec(), seeds), model.config())
    }

    fn advance(&mut self) -> StageResult<Vec<SampledGroup>> {
        let ended = self.engine.step(&mut self.weights)?;
        if self.engine.is_idle() {
            self.weights.release();
        }
        Ok(ended)
    }

    fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    fn slots(&self) -> usize {
        self.engine.slots()
    }

    fn used(&self) -> usize {
        self.engine.used()
    }

    fn free(&self) -> usize {
        self.engine.free()
    }

    fn limit(&mut self, limit: usize) {
        self.engine.limit(limit);
    }
}

/// Weights from the snapshot cell, refreshed at decode-step boundaries.
struct LiveWeights {
    reader: SnapshotReader<Decoder>,
    in_flight: bool,
    format: Option<Format>,
    /// Copies of the weights on the sampling device.
    copies: DeviceReplicas,
    /// Weights in use, with their version; `None` before the first sequence, and while the engine is idle.
    running: Option<(u64, Arc<Decoder>)>,
    /// Version that was acknowledged last.
    acknowledged: Option<u64>,
    /// True if the weights in use are the published ones, not a copy.
    are_shared: bool,
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
        if let Some(running) = &self.running
            && (self.pinned && !self.in_flight || self.reader.refresh().is_none())
        {
            return Ok(running.clone());
        }
        let snapshot = self.reader.latest();
        // The publisher computed a fingerprint, so all kernels that write the weights have completed.
        let copied = self.copies.of(&snapshot.value)?;
        let model = self.format.map_or(Ok(copied.clone()), |format| copied.quantized(format).map(Arc::new))?;
        if self.acknowledged != Some(snapshot.version) {
            self.reader.acknowledge(&snapshot, copied.weights().fingerprint()?);
            self.acknowledged = Some(snapshot.version);
        }
        self.are_shared = Arc::ptr_eq(&model, &snapshot.value);
        Ok(self.running.insert((snapshot.version, model)).clone())
    }

    /// Drops the weights if they are the published ones, so that the memory of a version that the learner replaces is free for
    /// its next gradients. A copy on another device or in another format takes time to make, and stays.
    fn release(&mut self) {
        if self.are_shared {
            self.running = None;
            self.pinned = false;
        }
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

#[cfg(test)]
mod tests {
    use preceptor_actors::SnapshotCell;

    use super::*;
    use crate::lm::model::{ModelConfig, Weights};

    #[test]
    fn an_idle_engine_keeps_no_weights_and_begins_with_the_newest() {
        let config = ModelConfig::tiny(90);
        let model = |seed| {
            Arc::new(Decoder::new(&config, &Weights::scratch(&config, 0.02, seed, &Device::Cpu).unwrap()).unwrap())
        };
        for in_flight in [false, true] {
            let first = model(1);
            let old = Arc::downgrade(&first);
            let cell = Arc::new(SnapshotCell::new(0, first.weights().fingerprint().unwrap(), first));
            let plan = LocalPlan { slots: 2, kernels_for: 2, in_flight, format: None, device: Device::Cpu };
            let sampling = Sampling { max_new_tokens: 3, vocabulary: 90, ..Sampling::default() };
            let mut engine = LocalEngine::new(cell.reader("a"), &sampling, plan);
            let mut versions = |seq| {
                engine.submit(&Prompt::new(seq, "", vec![1, 2, 3]), vec![seq, seq + 9]).unwrap();
                let mut ended = Vec::new();
                while !engine.is_idle() {
                    ended.extend(engine.advance().unwrap());
                }
                ended.remove(0).1.into_iter().flat_map(|sampled| sampled.versions).collect::<Vec<_>>()
            };
            let acknowledged = || cell.acks().iter().map(|ack| (ack.version, ack.lag)).collect::<Vec<_>>();
            assert_eq!(versions(0), [0; 6]);
            assert_eq!(versions(1), [0; 6]);
            assert_eq!(acknowledged(), [(0, 0)]);
            let newer = model(2);
            cell.publish(1, newer.weights().fingerprint().unwrap(), newer);
            assert!(old.upgrade().is_none(), "an idle engine keeps the old version");
            assert_eq!(acknowledged(), [(0, 1)]);
            assert_eq!(versions(2), [1; 6]);
            assert_eq!(acknowledged(), [(1, 0)]);
            assert!(cell.acks()[0].fingerprint_matches);
        }
    }
}

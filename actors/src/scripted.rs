//! Stages that simulate devices, for tests and benchmarks: they take time, and fail on request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::edge::Ended;
use crate::item::Item;
use crate::stage::{Emitter, Source, Stage, StageContext, StageError, StageResult};
use crate::staleness::AdmissionGate;

/// Source of the numbers `next..end`, each admitted by `gate`.
pub struct ScriptedSource {
    /// Next number.
    pub next: u64,
    /// End of the range, exclusive.
    pub end: u64,
    /// Gate that bounds the staleness, if any.
    pub gate: Option<Arc<AdmissionGate>>,
}

impl Source for ScriptedSource {
    type Out = u64;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<u64>>> {
        if self.next == self.end || ctx.draining() {
            return Ok(None);
        }
        let mut version = 0;
        if let Some(gate) = &self.gate {
            match gate.admit(ctx, 1) {
                Err(Ended::Drained) => return Ok(None),
                admitted => admitted?,
            };
            version = gate.version();
        }
        let seq = self.next;
        self.next += 1;
        Ok(Some(Item { seq, incarnation: ctx.incarnation(), version, body: seq }))
    }
}

/// Fault that a scripted stage simulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// No fault.
    #[default]
    None,
    /// Returns an error.
    Error,
    /// Returns a fatal error.
    Fatal,
    /// Panics.
    Panic,
    /// Waits until the graph halts.
    Hang,
}

/// Stage that takes `duration` for each item and forwards it.
#[derive(Debug, Clone, Default)]
pub struct ScriptedStage {
    /// Time per item.
    pub duration: Duration,
    /// Number of the item at which the fault occurs, and the fault.
    pub fault: (u64, Fault),
}

impl ScriptedStage {
    /// Returns a stage that takes `duration` per item and never fails.
    pub fn taking(duration: Duration) -> Self {
        Self { duration, ..Self::default() }
    }

    fn work(&self, item: &Item<u64>, ctx: &StageContext) -> StageResult<()> {
        ctx.sleep(self.duration);
        match self.fault {
            (seq, fault) if seq != item.seq || fault == Fault::None => Ok(()),
            (_, Fault::Error) => Err(StageError::new("scripted failure")),
            (_, Fault::Fatal) => Err(StageError::fatal("scripted fatal failure")),
            (_, Fault::Panic) => panic!("scripted panic"),
            (_, Fault::Hang | Fault::None) => {
                while !ctx.halted() {
                    ctx.sleep(Duration::from_secs(3600));
                }
                Err(Ended::Halted.into())
            }
        }
    }
}

impl Stage for ScriptedStage {
    type In = u64;
    type Out = u64;

    fn process(&mut self, item: Item<u64>, out: &Emitter<'_, u64>) -> StageResult<()> {
        self.work(&item, out.ctx())?;
        Ok(out.emit(item)?)
    }
}

/// Learner that consumes batches of `batch` items in order of their numbers, `stage.duration` each, and publishes a
/// version after each batch.
pub struct ScriptedSink<F> {
    /// Time per item and faults.
    pub stage: ScriptedStage,
    /// Number of items per version.
    pub batch: u64,
    /// Gate to which each version is reported, if any.
    pub gate: Option<Arc<AdmissionGate>>,
    /// Number of the next item to consume.
    pub next: u64,
    /// Items that arrived before their turn.
    pub early: BTreeMap<u64, Item<u64>>,
    /// Callback for each consumed item, with the version at which it is consumed.
    pub each: F,
}

impl<F: FnMut(&Item<u64>, u64) + Send + 'static> ScriptedSink<F> {
    /// Creates a sink that begins at item zero.
    pub fn new(stage: ScriptedStage, batch: u64, gate: Option<Arc<AdmissionGate>>, each: F) -> Self {
        Self { stage, batch, gate, next: 0, early: BTreeMap::new(), each }
    }
}

impl<F: FnMut(&Item<u64>, u64) + Send + 'static> Stage for ScriptedSink<F> {
    type In = u64;
    type Out = ();

    fn process(&mut self, item: Item<u64>, out: &Emitter<'_, ()>) -> StageResult<()> {
        self.early.insert(item.seq, item);
        while let Some(item) = self.early.remove(&self.next) {
            self.stage.work(&item, out.ctx())?;
            (self.each)(&item, self.next / self.batch);
            self.next += 1;
            if let Some(gate) = self.gate.as_ref().filter(|_| self.next.is_multiple_of(self.batch)) {
                gate.set_version(self.next / self.batch);
            }
        }
        Ok(())
    }
}

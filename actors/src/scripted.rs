//! Stages that stand for devices: they take time, and fail when told to. For tests and benches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::edge::Ended;
use crate::item::Item;
use crate::stage::{Emitter, Source, Stage, StageContext, StageError, StageResult};
use crate::staleness::AdmissionGate;

/// Gives `count` numbers, from `next`, each when `gate` admits it.
pub struct ScriptedSource {
    /// The next number.
    pub next: u64,
    /// The first number that is not given.
    pub end: u64,
    /// Staleness bound, if any.
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

/// What a scripted stage does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Returns an error.
    Error,
    /// Returns an error that no restart mends.
    Fatal,
    /// Panics.
    Panic,
    /// Does nothing until the graph halts.
    Hang,
}

/// Takes `duration` for each item and hands it on.
#[derive(Debug, Clone, Default)]
pub struct ScriptedStage {
    /// Time per item.
    pub duration: Duration,
    /// What goes wrong, and at which item.
    pub fault: (u64, Fault),
}

impl ScriptedStage {
    /// A stage that takes `duration` per item and never fails.
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

/// A learner: takes batches of `batch` items in order of their number, `stage.duration` each, and publishes a
/// version after each batch.
pub struct ScriptedSink<F> {
    /// Time per item and faults.
    pub stage: ScriptedStage,
    /// Items per version.
    pub batch: u64,
    /// Told of each version.
    pub gate: Option<Arc<AdmissionGate>>,
    /// The next number due.
    pub next: u64,
    /// Items that came early.
    pub early: BTreeMap<u64, Item<u64>>,
    /// Called with each item as it is consumed, and the version it is consumed at.
    pub each: F,
}

impl<F: FnMut(&Item<u64>, u64) + Send + 'static> ScriptedSink<F> {
    /// A sink that begins at item zero.
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

//! Traits and context of stages.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded, select};

use crate::clock::{Clock, Simulation, Slot};
use crate::control::Control;
use crate::edge::{Ended, Outlet};
use crate::item::Item;
use crate::pending::Pending;
use crate::pulse::{Pulse, State};

/// Result of a stage's method; see [`StageError`] for the effect of an error.
pub type StageResult<T> = Result<T, StageError>;

/// Reason why a stage stopped. Every error type converts into it with `?`, including [`Ended`], which is not a failure
/// if an edge has drained or the graph halts.
#[derive(Debug)]
pub struct StageError {
    source: Box<dyn Error + Send + Sync>,
    fatal: bool,
}

impl StageError {
    /// Creates a failure that a restart may repair.
    pub fn new(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: source.into(), fatal: false }
    }

    /// Creates a failure that a restart would repeat; it ends the run.
    pub fn fatal(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: source.into(), fatal: true }
    }

    /// Returns whether a restart would not help.
    pub fn is_fatal(&self) -> bool {
        self.fatal
    }

    /// Returns the end of an edge, if that is the reason.
    pub fn ended(&self) -> Option<Ended> {
        self.source.downcast_ref().copied()
    }
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for StageError {
    fn from(source: E) -> Self {
        Self::new(source)
    }
}

impl std::fmt::Display for StageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.source)?;
        let mut cause = self.source.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Worker that takes items and emits items, on its own thread.
pub trait Stage: Send + 'static {
    /// Type of the items that it takes.
    type In: Send + 'static;
    /// Type of the items that it emits.
    type Out: Send + 'static;

    /// Prepares the stage. Called once, on the stage's thread, before the first item.
    ///
    /// # Errors
    /// Every error ends the graph's incarnation.
    fn start(&mut self, _ctx: &StageContext) -> StageResult<()> {
        Ok(())
    }

    /// Processes one item and emits any number of items to `out`.
    ///
    /// # Errors
    /// Every error ends the graph's incarnation, except the end of an edge.
    fn process(&mut self, item: Item<Self::In>, out: &Emitter<'_, Self::Out>) -> StageResult<()>;

    /// Returns whether unfinished work exists that [`Self::advance`] continues. A stage that works on many items at
    /// once only begins with each in `process`. It is then advanced, and given more items as they arrive, until this
    /// returns false.
    fn busy(&self) -> bool {
        false
    }

    /// Returns whether the stage accepts another item now; checked while it is busy.
    fn open(&self) -> bool {
        true
    }

    /// Continues unfinished work for a short time, during which no item is taken.
    ///
    /// # Errors
    /// The same as for [`Self::process`].
    fn advance(&mut self, _out: &Emitter<'_, Self::Out>) -> StageResult<()> {
        Ok(())
    }

    /// Finishes the stage. Called once, when the input has drained, but not when the graph halts.
    ///
    /// # Errors
    /// The same as for [`Self::process`].
    fn finish(&mut self, _out: &Emitter<'_, Self::Out>) -> StageResult<()> {
        Ok(())
    }
}

/// Stage without input, which brings items into the graph.
pub trait Source: Send + 'static {
    /// Type of the items that it gives.
    type Out: Send + 'static;

    /// Returns the next item, or `None` at the end of the stream.
    ///
    /// # Errors
    /// Every error ends the graph's incarnation, except the end of an edge.
    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Self::Out>>>;
}

/// Output of a stage, through which it emits items to the next stage.
pub struct Emitter<'a, T> {
    pub(crate) outlet: Option<&'a Outlet<T>>,
    pub(crate) ctx: &'a StageContext,
    pub(crate) pending: &'a Pending,
}

impl<T> Emitter<'_, T> {
    /// Sends `item` to the next stage, waiting for room. Items of a sink are dropped.
    ///
    /// # Errors
    /// [`Ended`] if the graph halts or all consumers have ended; return it with `?`.
    pub fn emit(&self, item: Item<T>) -> Result<(), Ended> {
        let seq = item.seq;
        let sent = match self.outlet {
            Some(outlet) => outlet.send(self.ctx, item)?,
            None => self.ctx.clock.now(),
        };
        self.pending.end(seq, || sent);
        self.ctx.pulse.items_out.fetch_add(1, Relaxed);
        self.ctx.pulse.beat(sent);
        Ok(())
    }

    /// Returns the stage's context.
    pub fn ctx(&self) -> &StageContext {
        self.ctx
    }
}

/// Access of a stage to its graph: clock, halt and drain signals, progress reports.
#[derive(Clone)]
pub struct StageContext {
    pub(crate) name: Arc<str>,
    pub(crate) incarnation: u64,
    pub(crate) clock: Clock,
    pub(crate) control: Arc<Control>,
    pub(crate) pulse: Arc<Pulse>,
}

impl StageContext {
    /// Returns the stage's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of the graph's incarnation, from zero.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Returns whether the graph is halting. The check is cheap; long computations should make it repeatedly.
    pub fn halted(&self) -> bool {
        self.control.halted()
    }

    /// Returns whether the graph is draining, so that sources must end.
    pub fn draining(&self) -> bool {
        self.control.draining()
    }

    /// Reports progress within a long computation to the watchdog.
    pub fn beat(&self) {
        self.pulse.beat(self.clock.now());
    }

    /// Sets a one-line description of the stage's current work.
    pub fn note(&self, text: &str) {
        self.pulse.note(text);
    }

    /// Returns the graph's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Sleeps for `duration` of the graph's clock; returns early if the graph halts.
    pub fn sleep(&self, duration: Duration) {
        match self.clock.simulation() {
            // An abandoned stage must not sleep in the virtual time of the next incarnation.
            Some(_) if self.halted() => {}
            Some(simulation) => simulation.sleep(duration),
            None => {
                // The channel closes on a halt, which ends the wait early.
                let _ = self.halt_signal().recv_timeout(duration);
            }
        }
    }

    /// Enters `state` and returns the previous state.
    pub(crate) fn enter(&self, state: State) -> State {
        let before = self.pulse.state();
        self.pulse.enter(state, self.clock.now());
        before
    }

    pub(crate) fn halt_signal(&self) -> &Receiver<()> {
        self.control.halt_signal()
    }

    /// Creates a wait for something other than an edge, and the handle that ends it.
    pub(crate) fn waiter(&self) -> (Waker, Waiting) {
        match self.clock.simulation() {
            Some(simulation) => {
                let slot = Simulation::slot();
                (
                    Waker(WakeSender::Simulated(Arc::clone(simulation), Arc::clone(&slot))),
                    Waiting(WakeReceiver::Simulated(slot)),
                )
            }
            None => {
                let (sender, receiver) = bounded(1);
                (Waker(WakeSender::Real(sender)), Waiting(WakeReceiver::Real(receiver)))
            }
        }
    }

    /// Waits until woken, or until the graph halts or drains.
    pub(crate) fn wait(&self, waiting: &Waiting) {
        match (&waiting.0, self.clock.simulation()) {
            (WakeReceiver::Simulated(slot), Some(simulation)) => self.control.park(simulation, slot),
            (WakeReceiver::Real(receiver), _) => select! {
                recv(receiver) -> _ => {}
                recv(self.control.drain_signal()) -> _ => {}
                recv(self.halt_signal()) -> _ => {}
            },
            (WakeReceiver::Simulated(_), None) => {}
        }
    }
}

/// Handle that ends a wait.
pub(crate) struct Waker(WakeSender);

/// A wait that has not begun yet.
pub(crate) struct Waiting(WakeReceiver);

enum WakeSender {
    Real(crossbeam::channel::Sender<()>),
    Simulated(Arc<Simulation>, Arc<Slot>),
}

enum WakeReceiver {
    Real(Receiver<()>),
    Simulated(Arc<Slot>),
}

impl Waker {
    pub(crate) fn wake(&self) {
        match &self.0 {
            // If the waiter has ended, nothing needs to be woken.
            WakeSender::Real(sender) => drop(sender.try_send(())),
            WakeSender::Simulated(simulation, slot) => simulation.wake(slot),
        }
    }
}

/// Name, role and thread settings of a stage.
#[derive(Debug, Clone)]
pub struct StageSpec {
    pub(crate) name: String,
    pub(crate) role: String,
    pub(crate) threads: Option<usize>,
    pub(crate) stack: Option<usize>,
}

impl StageSpec {
    /// Creates the settings of a stage called `name`, whose role is its name by default.
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { role: name.clone(), name, threads: None, stack: None }
    }

    /// Sets the role, which several workers may share.
    pub fn role(mut self, role: impl Into<String>) -> Self {
        self.role = role.into();
        self
    }

    /// Runs the stage's work in its own rayon pool with this many threads. It waits for items outside the pool.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// Sets the stack size of the stage's thread in bytes, for graphs of very many stages.
    pub fn stack(mut self, bytes: usize) -> Self {
        self.stack = Some(bytes);
        self
    }
}

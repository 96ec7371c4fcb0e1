//! What a stage is, and what it is given.

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

/// What a stage's work returns.
pub type StageResult<T> = Result<T, StageError>;

/// Why a stage stopped. Any error converts into one with `?`, [`Ended`] included: that an edge has drained or the
/// graph halts is no failure.
#[derive(Debug)]
pub struct StageError {
    source: Box<dyn Error + Send + Sync>,
    fatal: bool,
}

impl StageError {
    /// A failure that a restart may mend.
    pub fn new(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: source.into(), fatal: false }
    }

    /// A failure that a restart would only repeat: it ends the run.
    pub fn fatal(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: source.into(), fatal: true }
    }

    /// Whether a restart would be of no use.
    pub fn is_fatal(&self) -> bool {
        self.fatal
    }

    /// The end of an edge, when that is all it was.
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

/// Takes items, gives items, on a thread of its own.
pub trait Stage: Send + 'static {
    /// What it takes.
    type In: Send + 'static;
    /// What it gives.
    type Out: Send + 'static;

    /// Once, on the stage's thread, before the first item.
    ///
    /// # Errors
    /// Ends the graph's incarnation.
    fn start(&mut self, _ctx: &StageContext) -> StageResult<()> {
        Ok(())
    }

    /// One item; gives any number of items through `out`.
    ///
    /// # Errors
    /// Ends the graph's incarnation, unless it is the end of an edge.
    fn process(&mut self, item: Item<Self::In>, out: &Emitter<'_, Self::Out>) -> StageResult<()>;

    /// Whether work is begun that [`Self::advance`] goes on with. A stage that works on many items at once only begins with
    /// each in `process`; it is then called on, and given more items as they come, until this is false.
    fn busy(&self) -> bool {
        false
    }

    /// Whether it takes another item now; asked while it is busy.
    fn open(&self) -> bool {
        true
    }

    /// Goes on with what is begun, for a moment: no item is taken meanwhile.
    ///
    /// # Errors
    /// As [`Self::process`].
    fn advance(&mut self, _out: &Emitter<'_, Self::Out>) -> StageResult<()> {
        Ok(())
    }

    /// Once, when the input has drained; not when the graph halts.
    ///
    /// # Errors
    /// As [`Self::process`].
    fn finish(&mut self, _out: &Emitter<'_, Self::Out>) -> StageResult<()> {
        Ok(())
    }
}

/// Gives items that come from outside the graph.
pub trait Source: Send + 'static {
    /// What it gives.
    type Out: Send + 'static;

    /// The next item, or `None` at the end of the stream.
    ///
    /// # Errors
    /// Ends the graph's incarnation, unless it is the end of an edge.
    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Self::Out>>>;
}

/// Where a stage puts what it gives.
pub struct Emitter<'a, T> {
    pub(crate) outlet: Option<&'a Outlet<T>>,
    pub(crate) ctx: &'a StageContext,
    pub(crate) pending: &'a Pending,
}

impl<T> Emitter<'_, T> {
    /// Hands `item` to the next stage, waiting for room. A sink's items go nowhere.
    ///
    /// # Errors
    /// [`Ended`] when the graph halts or nobody is left to take it; pass it on with `?`.
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

    /// The stage's context.
    pub fn ctx(&self) -> &StageContext {
        self.ctx
    }
}

/// What a stage knows of its graph.
#[derive(Clone)]
pub struct StageContext {
    pub(crate) name: Arc<str>,
    pub(crate) incarnation: u64,
    pub(crate) clock: Clock,
    pub(crate) control: Arc<Control>,
    pub(crate) pulse: Arc<Pulse>,
}

impl StageContext {
    /// The stage's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which incarnation of the graph this is, from zero.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether the graph halts; cheap, for long computations to look at.
    pub fn halted(&self) -> bool {
        self.control.halted()
    }

    /// Whether sources are to end.
    pub fn draining(&self) -> bool {
        self.control.draining()
    }

    /// A sign of progress inside a long computation.
    pub fn beat(&self) {
        self.pulse.beat(self.clock.now());
    }

    /// Says in a line what the stage is doing.
    pub fn note(&self, text: &str) {
        self.pulse.note(text);
    }

    /// The graph's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Lets `duration` pass, or returns early when the graph halts.
    pub fn sleep(&self, duration: Duration) {
        match self.clock.simulation() {
            // An abandoned stage must not sleep in the time of the next incarnation.
            Some(_) if self.halted() => {}
            Some(simulation) => simulation.sleep(duration),
            None => {
                // The channel closes on halt, which ends the wait early.
                let _ = self.halt_signal().recv_timeout(duration);
            }
        }
    }

    /// Enters `state` and returns the one before.
    pub(crate) fn enter(&self, state: State) -> State {
        let before = self.pulse.state();
        self.pulse.enter(state, self.clock.now());
        before
    }

    pub(crate) fn halt_signal(&self) -> &Receiver<()> {
        self.control.halt_signal()
    }

    /// A wait for something other than an edge, and the means to end it.
    pub(crate) fn waiter(&self) -> (Waker, Waiting) {
        match self.clock.simulation() {
            Some(simulation) => {
                let slot = Simulation::slot();
                (Waker(Bell::Simulated(Arc::clone(simulation), Arc::clone(&slot))), Waiting(Ring::Simulated(slot)))
            }
            None => {
                let (bell, ring) = bounded(1);
                (Waker(Bell::Real(bell)), Waiting(Ring::Real(ring)))
            }
        }
    }

    /// Waits until woken, or until the graph halts or drains.
    pub(crate) fn wait(&self, waiting: &Waiting) {
        match (&waiting.0, self.clock.simulation()) {
            (Ring::Simulated(slot), Some(simulation)) => self.control.park(simulation, slot),
            (Ring::Real(ring), _) => select! {
                recv(ring) -> _ => {}
                recv(self.control.drain_signal()) -> _ => {}
                recv(self.halt_signal()) -> _ => {}
            },
            (Ring::Simulated(_), None) => {}
        }
    }
}

/// Ends a wait.
pub(crate) struct Waker(Bell);

/// One wait, not yet begun.
pub(crate) struct Waiting(Ring);

enum Bell {
    Real(crossbeam::channel::Sender<()>),
    Simulated(Arc<Simulation>, Arc<Slot>),
}

enum Ring {
    Real(Receiver<()>),
    Simulated(Arc<Slot>),
}

impl Waker {
    pub(crate) fn wake(&self) {
        match &self.0 {
            // A waiter that has gone needs no bell.
            Bell::Real(bell) => drop(bell.try_send(())),
            Bell::Simulated(simulation, slot) => simulation.wake(slot),
        }
    }
}

/// A stage's name, role and threads.
#[derive(Debug, Clone)]
pub struct StageSpec {
    pub(crate) name: String,
    pub(crate) role: String,
    pub(crate) threads: Option<usize>,
    pub(crate) stack: Option<usize>,
}

impl StageSpec {
    /// A stage called `name`, which is its role too until told otherwise.
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { role: name.clone(), name, threads: None, stack: None }
    }

    /// The role it shares with other workers.
    pub fn role(mut self, role: impl Into<String>) -> Self {
        self.role = role.into();
        self
    }

    /// Runs its work inside a rayon pool of its own with this many threads. Waiting happens outside it.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// Size of its thread's stack in bytes, for graphs of very many stages.
    pub fn stack(mut self, bytes: usize) -> Self {
        self.stack = Some(bytes);
        self
    }
}

//! The two signals that reach every stage of an incarnation: drain and halt.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::clock::{Simulation, Slot};

/// Drain and halt signals. Closing a channel wakes every thread that selects on it, now and later.
pub(crate) struct Control {
    halt: Signal,
    drain: Signal,
    simulation: Option<Arc<Simulation>>,
    /// Waits in simulated time that a drain ends.
    until_drain: Mutex<Vec<Arc<Slot>>>,
}

struct Signal {
    sent: AtomicBool,
    hold: Mutex<Option<Sender<()>>>,
    signal: Receiver<()>,
}

impl Signal {
    fn new() -> Self {
        let (hold, signal) = bounded(0);
        Self { sent: AtomicBool::new(false), hold: Mutex::new(Some(hold)), signal }
    }

    fn send(&self) {
        self.sent.store(true, Ordering::SeqCst);
        self.hold.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Control {
    pub(crate) fn new(simulation: Option<Arc<Simulation>>) -> Self {
        Self { halt: Signal::new(), drain: Signal::new(), simulation, until_drain: Mutex::default() }
    }

    pub(crate) fn halt(&self) {
        self.halt.send();
        if let Some(simulation) = &self.simulation {
            simulation.stop();
        }
    }

    pub(crate) fn drain(&self) {
        self.drain.send();
        if let Some(simulation) = &self.simulation {
            for slot in self.until_drain.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                simulation.wake(&slot);
            }
        }
    }

    /// Waits in simulated time until `slot` is woken, or until the graph drains or halts.
    pub(crate) fn park(&self, simulation: &Simulation, slot: &Arc<Slot>) {
        let waits = || self.until_drain.lock().unwrap_or_else(PoisonError::into_inner);
        waits().push(Arc::clone(slot));
        // The flag is set before the list is drained, so a wait that is added too late sees the flag here.
        if !self.draining() {
            simulation.park(slot);
        }
        waits().retain(|other| !Arc::ptr_eq(other, slot));
    }

    pub(crate) fn halted(&self) -> bool {
        self.halt.sent.load(Ordering::SeqCst)
    }

    pub(crate) fn draining(&self) -> bool {
        self.drain.sent.load(Ordering::SeqCst)
    }

    pub(crate) fn halt_signal(&self) -> &Receiver<()> {
        &self.halt.signal
    }

    pub(crate) fn drain_signal(&self) -> &Receiver<()> {
        &self.drain.signal
    }
}

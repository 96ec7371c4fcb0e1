//! Real and simulated time.
//!
//! Under simulated time a sleep takes no real time: virtual time jumps to the earliest sleeper as soon as every
//! registered thread waits. A thread counts as running from the moment it is woken, not from when the system schedules
//! it. The waker counts it under the clock's only lock, so at no instant do all threads seem to wait.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Clock of a graph, real or simulated.
#[derive(Clone)]
pub struct Clock(Kind);

#[derive(Clone)]
enum Kind {
    Real(Instant),
    Simulated(Arc<Simulation>),
}

impl Clock {
    /// Creates a clock that follows the machine's monotonic clock, from zero.
    pub fn real() -> Self {
        Self(Kind::Real(Instant::now()))
    }

    /// Creates a clock with virtual time, from zero.
    pub fn simulated() -> Self {
        Self(Kind::Simulated(Arc::default()))
    }

    /// Returns the time since the clock was created.
    pub fn now(&self) -> Duration {
        match &self.0 {
            Kind::Real(start) => start.elapsed(),
            Kind::Simulated(simulation) => simulation.lock().now,
        }
    }

    /// Returns whether time is virtual.
    pub fn is_simulated(&self) -> bool {
        matches!(self.0, Kind::Simulated(_))
    }

    pub(crate) fn simulation(&self) -> Option<&Arc<Simulation>> {
        match &self.0 {
            Kind::Real(_) => None,
            Kind::Simulated(simulation) => Some(simulation),
        }
    }
}

/// Virtual time and the threads that run in it.
#[derive(Default)]
pub(crate) struct Simulation {
    state: Mutex<Time>,
}

#[derive(Default)]
struct Time {
    now: Duration,
    running: usize,
    sleepers: BinaryHeap<Reverse<(Duration, u64)>>,
    parked: HashMap<u64, Arc<Slot>>,
    stopped: bool,
}

/// One wait of one thread.
pub(crate) struct Slot {
    id: u64,
    woken: Mutex<bool>,
    condition: Condvar,
}

impl Simulation {
    fn lock(&self) -> MutexGuard<'_, Time> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an incarnation of `threads` threads, which count as running before they are started. Time continues from
    /// its current value; waits of an earlier incarnation are discarded.
    pub(crate) fn begin(&self, threads: usize) {
        let mut time = self.lock();
        *time = Time { now: time.now, running: threads, ..Time::default() };
    }

    /// Unregisters a thread that has ended.
    pub(crate) fn leave(&self) {
        let mut time = self.lock();
        time.running = time.running.saturating_sub(1);
        self.advance(&mut time);
    }

    /// Creates a wait that can be woken at any time, even before it begins.
    pub(crate) fn slot() -> Arc<Slot> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Arc::new(Slot { id, woken: Mutex::new(false), condition: Condvar::new() })
    }

    /// Waits until the slot is woken or the simulation is stopped.
    pub(crate) fn park(&self, slot: &Arc<Slot>) {
        {
            let mut time = self.lock();
            if time.stopped || slot.is_woken() {
                return;
            }
            time.parked.insert(slot.id, Arc::clone(slot));
            time.running = time.running.saturating_sub(1);
            self.advance(&mut time);
        }
        slot.wait();
    }

    /// Ends a wait; its thread counts as running at once.
    pub(crate) fn wake(&self, slot: &Slot) {
        let mut time = self.lock();
        Self::wake_locked(&mut time, slot);
    }

    fn wake_locked(time: &mut Time, slot: &Slot) {
        if time.parked.remove(&slot.id).is_some() {
            time.running += 1;
        }
        slot.set_woken();
    }

    /// Lets `duration` of virtual time pass for this thread.
    pub(crate) fn sleep(&self, duration: Duration) {
        let slot = Self::slot();
        {
            let mut time = self.lock();
            if time.stopped {
                return;
            }
            let until = time.now + duration;
            time.sleepers.push(Reverse((until, slot.id)));
            time.parked.insert(slot.id, Arc::clone(&slot));
            time.running = time.running.saturating_sub(1);
            self.advance(&mut time);
        }
        slot.wait();
    }

    /// Ends every wait, now and until the next incarnation begins, because the graph halts.
    pub(crate) fn stop(&self) {
        let mut time = self.lock();
        time.stopped = true;
        let parked: Vec<Arc<Slot>> = time.parked.values().cloned().collect();
        for slot in parked {
            Self::wake_locked(&mut time, &slot);
        }
    }

    /// Advances time to the first sleeper if no thread runs. Sleepers are woken one at a time, so that their order is
    /// deterministic.
    fn advance(&self, time: &mut Time) {
        while time.running == 0 {
            let Some(Reverse((until, id))) = time.sleepers.pop() else { return };
            let Some(slot) = time.parked.get(&id).cloned() else { continue };
            time.now = time.now.max(until);
            Self::wake_locked(time, &slot);
        }
    }
}

impl Slot {
    fn is_woken(&self) -> bool {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_woken(&self) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.condition.notify_one();
    }

    fn wait(&self) {
        let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        while !*woken {
            woken = self.condition.wait(woken).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

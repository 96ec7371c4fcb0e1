//! Bounded edges between stages, which account for the time that either side waits.
//!
//! A full edge makes its senders wait, which is the back-pressure of the graph. Every wait ends when the graph halts.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, Select, SelectedOperation, Sender, TryRecvError, TrySendError};
use crossbeam::utils::CachePadded;

use crate::clock::{Simulation, Slot};
use crate::item::Item;
use crate::pulse::State;
use crate::stage::StageContext;

/// Reason why an edge accepts or delivers no more items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// Every producer has ended and the edge is empty; or, for a sender, all consumers have ended.
    #[error("the edge has drained")]
    Drained,
    /// The graph is halting.
    #[error("the graph is halting")]
    Halted,
    /// The item belongs to another incarnation. Unlike the other two this is a failure of the stage that sent it: as a
    /// normal end, it would let the run finish without some of its items.
    #[error("an item of incarnation {item} is refused by incarnation {graph}; tag it with the context's incarnation")]
    Refused {
        /// Incarnation of the item.
        item: u64,
        /// Incarnation of the graph.
        graph: u64,
    },
}

/// Counters of an edge, shared by its ends and its observers. The counters of the two sides are on separate cache
/// lines, because both sides write for every item.
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) capacity: usize,
    pub(crate) incarnation: u64,
    pub(crate) sent: CachePadded<SendCounters>,
    pub(crate) received: CachePadded<ReceiveCounters>,
    simulated: Option<Waiters>,
}

/// Counters of the senders. Times are in nanoseconds.
#[derive(Default)]
pub(crate) struct SendCounters {
    pub(crate) items: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) blocked: AtomicU64,
    pub(crate) high_water: AtomicU64,
    /// Times at which the last items were put on the edge, by item number modulo the capacity.
    since: Box<[AtomicU64]>,
}

/// Counters of the receivers. Times are in nanoseconds.
#[derive(Default)]
pub(crate) struct ReceiveCounters {
    items: AtomicU64,
    pub(crate) blocked: AtomicU64,
    /// Total time that the items taken so far spent on the edge.
    pub(crate) waited: AtomicU64,
}

/// Item on the edge, with the time at which it was put there.
struct Queued<T> {
    since: Duration,
    item: Item<T>,
}

/// Threads that wait at this edge in simulated time.
struct Waiters {
    simulation: Arc<Simulation>,
    lists: Mutex<WaitLists>,
}

#[derive(Default)]
struct WaitLists {
    senders: VecDeque<Arc<Slot>>,
    receivers: VecDeque<Arc<Slot>>,
    ends: [usize; 2],
}

impl WaitLists {
    /// Adds a wait to `waiting`.
    fn join(waiting: &mut VecDeque<Arc<Slot>>) -> Arc<Slot> {
        let slot = Simulation::slot();
        waiting.push_back(Arc::clone(&slot));
        slot
    }
}

impl Waiters {
    fn lock(&self) -> MutexGuard<'_, WaitLists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sending end of an edge; each producer has a clone.
pub struct Outlet<T> {
    sender: Option<Sender<Queued<T>>>,
    pub(crate) account: Arc<Account>,
}

/// Receiving end of an edge; each consumer has a clone, and each item goes to one of them.
pub struct Inlet<T> {
    receiver: Option<Receiver<Queued<T>>>,
    pub(crate) account: Arc<Account>,
}

pub(crate) fn edge<T>(
    name: &str,
    capacity: usize,
    incarnation: u64,
    simulation: Option<&Arc<Simulation>>,
) -> (Outlet<T>, Inlet<T>) {
    let (sender, receiver) = crossbeam::channel::bounded(capacity.max(1));
    let simulated = simulation.map(|simulation| Waiters {
        simulation: Arc::clone(simulation),
        lists: Mutex::new(WaitLists { ends: [1, 1], ..WaitLists::default() }),
    });
    let capacity = capacity.max(1);
    let sent = SendCounters { since: (0..capacity).map(|_| AtomicU64::new(0)).collect(), ..SendCounters::default() };
    let account = Arc::new(Account {
        name: name.to_owned(),
        capacity,
        incarnation,
        sent: sent.into(),
        received: ReceiveCounters::default().into(),
        simulated,
    });
    (Outlet { sender: Some(sender), account: Arc::clone(&account) }, Inlet { receiver: Some(receiver), account })
}

impl<T> Outlet<T> {
    /// Sends `item`, waiting for room if the edge is full. Returns the time at which it was put on the edge.
    ///
    /// # Errors
    /// `Drained` if all consumers have ended, `Halted` if the graph halts, `Refused` if the item is of another
    /// incarnation.
    pub(crate) fn send(&self, ctx: &StageContext, item: Item<T>) -> Result<Duration, Ended> {
        let account = &*self.account;
        if ctx.halted() {
            return Err(Ended::Halted);
        }
        if item.incarnation != account.incarnation {
            account.sent.refused.fetch_add(1, Relaxed);
            tracing::warn!(
                edge = account.name,
                "item {} of incarnation {} is refused by incarnation {}",
                item.seq,
                item.incarnation,
                account.incarnation
            );
            return Err(Ended::Refused { item: item.incarnation, graph: account.incarnation });
        }
        let sender = self.sender.as_ref().expect("an outlet has its sender until it is dropped");
        let mut now = ctx.clock().now();
        let mut queued = Queued { since: now, item };
        loop {
            let mut lists = account.simulated.as_ref().map(Waiters::lock);
            match sender.try_send(queued) {
                Ok(()) => {
                    account.wake(lists.as_mut().and_then(|lists| lists.receivers.pop_front()));
                    break;
                }
                Err(TrySendError::Disconnected(_)) => return Err(Ended::Drained),
                Err(TrySendError::Full(back)) => queued = back,
            }
            let blocked = &account.sent.blocked;
            if let (Some(waiters), Some(mut lists)) = (&account.simulated, lists) {
                let slot = WaitLists::join(&mut lists.senders);
                drop(lists);
                ((), now) = timed(ctx, State::Output, blocked, || waiters.simulation.park(&slot));
                if ctx.halted() {
                    return Err(Ended::Halted);
                }
                queued.since = now;
                continue;
            }
            let selected;
            (selected, now) = select(ctx, State::Output, blocked, |either| either.send(sender))?;
            queued.since = now;
            selected.send(sender, queued).map_err(|_| Ended::Drained)?;
            break;
        }
        account.count_sent(now);
        Ok(now)
    }
}

impl<T> Inlet<T> {
    /// Takes the next item and returns it with the current time. If the edge is empty, waits for an item if `waits`,
    /// otherwise returns `None`.
    ///
    /// # Errors
    /// `Drained` if all producers have ended and the edge is empty, `Halted` if the graph halts.
    pub(crate) fn next(&self, ctx: &StageContext, waits: bool) -> Result<Option<(Item<T>, Duration)>, Ended> {
        let account = &*self.account;
        let receiver = self.receiver.as_ref().expect("an inlet has its receiver until it is dropped");
        if ctx.halted() {
            return Err(Ended::Halted);
        }
        loop {
            let mut lists = account.simulated.as_ref().map(Waiters::lock);
            match receiver.try_recv() {
                Ok(queued) => {
                    account.wake(lists.as_mut().and_then(|lists| lists.senders.pop_front()));
                    drop(lists);
                    return Ok(Some(account.count_received(queued, ctx.clock().now())));
                }
                Err(TryRecvError::Disconnected) => return Err(Ended::Drained),
                Err(TryRecvError::Empty) if !waits => return Ok(None),
                Err(TryRecvError::Empty) => {}
            }
            let blocked = &account.received.blocked;
            if let (Some(waiters), Some(mut lists)) = (&account.simulated, lists) {
                let slot = WaitLists::join(&mut lists.receivers);
                drop(lists);
                timed(ctx, State::Input, blocked, || waiters.simulation.park(&slot));
                if ctx.halted() {
                    return Err(Ended::Halted);
                }
                continue;
            }
            let (selected, now) = select(ctx, State::Input, blocked, |either| either.recv(receiver))?;
            let queued = selected.recv(receiver).map_err(|_| Ended::Drained)?;
            return Ok(Some(account.count_received(queued, now)));
        }
    }
}

/// Waits in `state` for the operation that `arm` registers, adds the length of the wait to `total`, and returns the
/// time of its end.
fn select<'a>(
    ctx: &'a StageContext,
    state: State,
    total: &AtomicU64,
    arm: impl FnOnce(&mut Select<'a>) -> usize,
) -> Result<(SelectedOperation<'a>, Duration), Ended> {
    let mut either = Select::new();
    let wanted = arm(&mut either);
    either.recv(ctx.halt_signal());
    let (selected, now) = timed(ctx, state, total, || either.select());
    if selected.index() == wanted {
        return Ok((selected, now));
    }
    // Nothing is ever sent on this channel: it only closes.
    let _ = selected.recv(ctx.halt_signal());
    Err(Ended::Halted)
}

/// Runs `wait` in `state`, adds its length to `total`, and returns the time of its end.
fn timed<R>(ctx: &StageContext, state: State, total: &AtomicU64, wait: impl FnOnce() -> R) -> (R, Duration) {
    let before = ctx.clock().now();
    let back = ctx.pulse.state();
    ctx.pulse.enter(state, before);
    let result = wait();
    let after = ctx.clock().now();
    ctx.pulse.enter(back, after);
    total.fetch_add(after.saturating_sub(before).as_nanos() as u64, Relaxed);
    (result, after)
}

impl Account {
    fn add_end(&self, side: usize) {
        if let Some(waiters) = &self.simulated {
            waiters.lock().ends[side] += 1;
        }
    }

    /// Unregisters one end. If it was the last on its side, wakes everything that waits on the other side.
    fn remove_end(&self, side: usize) {
        let Some(waiters) = &self.simulated else { return };
        let mut lists = waiters.lock();
        lists.ends[side] -= 1;
        if lists.ends[side] == 0 {
            let waiting = if side == 0 { &mut lists.receivers } else { &mut lists.senders };
            for slot in waiting.drain(..) {
                waiters.simulation.wake(&slot);
            }
        }
    }

    /// Ends a wait in simulated time, if one is given.
    fn wake(&self, slot: Option<Arc<Slot>>) {
        if let (Some(waiters), Some(slot)) = (&self.simulated, slot) {
            waiters.simulation.wake(&slot);
        }
    }

    /// Counts an item put on the edge.
    fn count_sent(&self, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let number = self.sent.items.fetch_add(1, Relaxed);
        self.sent.since[number as usize % self.capacity].store(now.as_nanos() as u64, Relaxed);
        self.sent.high_water.fetch_max(self.depth(), Relaxed);
    }

    /// Counts an item taken from the edge.
    fn count_received<T>(&self, Queued { since, item }: Queued<T>, now: Duration) -> (Item<T>, Duration) {
        if !cfg!(feature = "unobserved") {
            self.received.items.fetch_add(1, Relaxed);
            self.received.waited.fetch_add(now.saturating_sub(since).as_nanos() as u64, Relaxed);
        }
        (item, now)
    }

    /// Returns the number of items on the edge, as far as both sides have counted.
    pub(crate) fn depth(&self) -> u64 {
        let received = self.received.items.load(Relaxed);
        self.sent.items.load(Relaxed).saturating_sub(received).min(self.capacity as u64)
    }

    /// Returns the time that the oldest item has been on the edge; zero if it is empty.
    pub(crate) fn age(&self, now: Duration) -> Duration {
        let oldest = self.received.items.load(Relaxed) as usize % self.capacity;
        let since = self.sent.since[oldest].load(Relaxed);
        // Zero if the sender has counted the item but not yet stored its time.
        let waits = self.depth() > 0 && since > 0;
        if waits { now.saturating_sub(Duration::from_nanos(since)) } else { Duration::ZERO }
    }

    pub(crate) fn seconds(total: &AtomicU64) -> f64 {
        Duration::from_nanos(total.load(Relaxed)).as_secs_f64()
    }
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        self.account.add_end(0);
        Self { sender: self.sender.clone(), account: Arc::clone(&self.account) }
    }
}

impl<T> Clone for Inlet<T> {
    fn clone(&self) -> Self {
        self.account.add_end(1);
        Self { receiver: self.receiver.clone(), account: Arc::clone(&self.account) }
    }
}

impl<T> Drop for Outlet<T> {
    fn drop(&mut self) {
        drop(self.sender.take());
        self.account.remove_end(0);
    }
}

impl<T> Drop for Inlet<T> {
    fn drop(&mut self) {
        drop(self.receiver.take());
        self.account.remove_end(1);
    }
}

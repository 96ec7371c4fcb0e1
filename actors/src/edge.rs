//! Bounded edges between stages, with an account of who waited for whom.
//!
//! A full edge makes its senders wait: that is the back-pressure of the graph. Every wait ends when the graph halts.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvError, Sender, TryRecvError, TrySendError, select};

use crate::clock::{Simulation, Slot};
use crate::item::Item;
use crate::pulse::State;
use crate::stage::StageContext;

/// Why an edge gives or takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// Every producer has finished and the edge is empty; or, for a sender, no consumer is left.
    #[error("the edge has drained")]
    Drained,
    /// The graph halts.
    #[error("the graph halts")]
    Halted,
    /// The item belongs to another incarnation. Unlike the other two this is a failure of the stage that sent it:
    /// were it a quiet end, the stage would leave and the run would finish short of its items.
    #[error("an item of incarnation {item} is refused by incarnation {graph}; tag it with the context's incarnation")]
    Refused {
        /// The item's incarnation.
        item: u64,
        /// The graph's incarnation.
        graph: u64,
    },
}

/// What is known of an edge, shared by its ends and its reader.
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) capacity: usize,
    pub(crate) incarnation: u64,
    pub(crate) items: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) send_blocked: AtomicU64,
    pub(crate) recv_blocked: AtomicU64,
    pub(crate) high_water: AtomicU64,
    pub(crate) depth: AtomicU64,
    /// Time that items spent on the edge, those that were taken.
    pub(crate) waited: AtomicU64,
    aboard: Mutex<Aboard>,
    simulated: Option<Waiters>,
}

/// When the items on an edge came, oldest first.
#[derive(Default)]
struct Aboard {
    since: VecDeque<Duration>,
    /// Items that were taken before their sender had noted them.
    owed: usize,
}

/// Threads that wait at this edge in simulated time.
struct Waiters {
    simulation: Arc<Simulation>,
    lists: Mutex<Lists>,
}

#[derive(Default)]
struct Lists {
    senders: VecDeque<Arc<Slot>>,
    receivers: VecDeque<Arc<Slot>>,
    ends: [usize; 2],
}

impl Waiters {
    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The producers' end; a clone for each producer.
pub struct Outlet<T> {
    sender: Option<Sender<Item<T>>>,
    pub(crate) account: Arc<Account>,
}

/// The consumers' end; a clone for each consumer, each item goes to one of them.
pub struct Inlet<T> {
    receiver: Option<Receiver<Item<T>>>,
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
        lists: Mutex::new(Lists { ends: [1, 1], ..Lists::default() }),
    });
    let account = Arc::new(Account {
        name: name.to_owned(),
        capacity: capacity.max(1),
        incarnation,
        items: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        send_blocked: AtomicU64::new(0),
        recv_blocked: AtomicU64::new(0),
        high_water: AtomicU64::new(0),
        depth: AtomicU64::new(0),
        waited: AtomicU64::new(0),
        aboard: Mutex::default(),
        simulated,
    });
    (Outlet { sender: Some(sender), account: Arc::clone(&account) }, Inlet { receiver: Some(receiver), account })
}

impl<T> Outlet<T> {
    /// Hands `item` on, waiting for room if there is none.
    ///
    /// # Errors
    /// `Drained` when no consumer is left, `Halted` when the graph halts, `Refused` when the item is of another
    /// incarnation.
    pub fn send(&self, ctx: &StageContext, item: Item<T>) -> Result<(), Ended> {
        let account = &*self.account;
        if ctx.halted() {
            return Err(Ended::Halted);
        }
        if item.incarnation != account.incarnation {
            account.refused.fetch_add(1, Relaxed);
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
        let sent = match &account.simulated {
            Some(waiters) => self.send_simulated(ctx, item, sender, waiters),
            None => match sender.try_send(item) {
                Ok(()) => Ok(()),
                Err(TrySendError::Disconnected(_)) => Err(Ended::Drained),
                Err(TrySendError::Full(item)) => timed(ctx, State::Output, &account.send_blocked, || {
                    select! {
                        send(sender, item) -> sent => sent.map_err(|_| Ended::Drained),
                        recv(ctx.halt_signal()) -> _ => Err(Ended::Halted),
                    }
                }),
            },
        };
        if sent.is_ok() {
            account.came(ctx.clock().now());
            account.items.fetch_add(1, Relaxed);
            let depth = sender.len() as u64;
            account.depth.store(depth, Relaxed);
            account.high_water.fetch_max(depth, Relaxed);
        }
        sent
    }

    fn send_simulated(
        &self,
        ctx: &StageContext,
        mut item: Item<T>,
        sender: &Sender<Item<T>>,
        waiters: &Waiters,
    ) -> Result<(), Ended> {
        loop {
            let slot = {
                let mut lists = waiters.lock();
                match sender.try_send(item) {
                    Ok(()) => {
                        if let Some(slot) = lists.receivers.pop_front() {
                            waiters.simulation.wake(&slot);
                        }
                        return Ok(());
                    }
                    Err(TrySendError::Disconnected(_)) => return Err(Ended::Drained),
                    Err(TrySendError::Full(back)) => item = back,
                }
                let slot = Simulation::slot();
                lists.senders.push_back(Arc::clone(&slot));
                slot
            };
            timed(ctx, State::Output, &self.account.send_blocked, || waiters.simulation.park(&slot));
            if ctx.halted() {
                return Err(Ended::Halted);
            }
        }
    }
}

impl<T> Inlet<T> {
    /// Takes the next item, waiting for it if there is none.
    ///
    /// # Errors
    /// `Drained` when all producers have finished and nothing is left, `Halted` when the graph halts.
    pub fn recv(&self, ctx: &StageContext) -> Result<Item<T>, Ended> {
        if ctx.halted() {
            return Err(Ended::Halted);
        }
        let receiver = self.receiver.as_ref().expect("an inlet has its receiver until it is dropped");
        let received = match &self.account.simulated {
            Some(waiters) => self.recv_simulated(ctx, receiver, waiters),
            None => match receiver.try_recv() {
                Ok(item) => Ok(item),
                Err(TryRecvError::Disconnected) => Err(Ended::Drained),
                Err(TryRecvError::Empty) => timed(ctx, State::Input, &self.account.recv_blocked, || {
                    select! {
                        recv(receiver) -> item => item.map_err(|RecvError| Ended::Drained),
                        recv(ctx.halt_signal()) -> _ => Err(Ended::Halted),
                    }
                }),
            },
        };
        self.account.depth.store(receiver.len() as u64, Relaxed);
        if received.is_ok() {
            self.account.went(ctx.clock().now());
        }
        received
    }

    /// Takes the next item if there is one, and does not wait.
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub fn try_recv(&self, ctx: &StageContext) -> Result<Option<Item<T>>, Ended> {
        if ctx.halted() {
            return Err(Ended::Halted);
        }
        let receiver = self.receiver.as_ref().expect("an inlet has its receiver until it is dropped");
        let mut lists = self.account.simulated.as_ref().map(|waiters| (waiters, waiters.lock()));
        let received = match receiver.try_recv() {
            Ok(item) => Ok(Some(item)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Ended::Drained),
        };
        if let (Ok(Some(_)), Some((waiters, lists))) = (&received, &mut lists)
            && let Some(slot) = lists.senders.pop_front()
        {
            waiters.simulation.wake(&slot);
        }
        self.account.depth.store(receiver.len() as u64, Relaxed);
        drop(lists);
        if matches!(received, Ok(Some(_))) {
            self.account.went(ctx.clock().now());
        }
        received
    }

    fn recv_simulated(
        &self,
        ctx: &StageContext,
        receiver: &Receiver<Item<T>>,
        waiters: &Waiters,
    ) -> Result<Item<T>, Ended> {
        loop {
            let slot = {
                let mut lists = waiters.lock();
                match receiver.try_recv() {
                    Ok(item) => {
                        if let Some(slot) = lists.senders.pop_front() {
                            waiters.simulation.wake(&slot);
                        }
                        return Ok(item);
                    }
                    Err(TryRecvError::Disconnected) => return Err(Ended::Drained),
                    Err(TryRecvError::Empty) => {}
                }
                let slot = Simulation::slot();
                lists.receivers.push_back(Arc::clone(&slot));
                slot
            };
            timed(ctx, State::Input, &self.account.recv_blocked, || waiters.simulation.park(&slot));
            if ctx.halted() {
                return Err(Ended::Halted);
            }
        }
    }
}

/// Runs a wait in state `state`, adding its length to `total`.
fn timed<R>(ctx: &StageContext, state: State, total: &AtomicU64, wait: impl FnOnce() -> R) -> R {
    let before = ctx.clock().now();
    let back = ctx.enter(state);
    let result = wait();
    ctx.enter(back);
    total.fetch_add(ctx.clock().now().saturating_sub(before).as_nanos() as u64, Relaxed);
    result
}

impl Account {
    fn joined(&self, side: usize) {
        if let Some(waiters) = &self.simulated {
            waiters.lock().ends[side] += 1;
        }
    }

    /// One end has gone; when it was the last on its side, whoever waits on the other side must look again.
    fn left(&self, side: usize) {
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

    fn aboard(&self) -> MutexGuard<'_, Aboard> {
        self.aboard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An item was put on the edge.
    fn came(&self, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let mut aboard = self.aboard();
        match aboard.owed.checked_sub(1) {
            Some(owed) => aboard.owed = owed,
            None => aboard.since.push_back(now),
        }
    }

    /// The oldest item was taken.
    fn went(&self, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let mut aboard = self.aboard();
        match aboard.since.pop_front() {
            Some(since) => {
                self.waited.fetch_add(now.saturating_sub(since).as_nanos() as u64, Relaxed);
            }
            None => aboard.owed += 1,
        }
    }

    /// How long the oldest item has been on the edge; zero where there is none.
    pub(crate) fn age(&self, now: Duration) -> Duration {
        self.aboard().since.front().map_or(Duration::ZERO, |since| now.saturating_sub(*since))
    }

    pub(crate) fn seconds(total: &AtomicU64) -> f64 {
        Duration::from_nanos(total.load(Relaxed)).as_secs_f64()
    }
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        self.account.joined(0);
        Self { sender: self.sender.clone(), account: Arc::clone(&self.account) }
    }
}

impl<T> Clone for Inlet<T> {
    fn clone(&self) -> Self {
        self.account.joined(1);
        Self { receiver: self.receiver.clone(), account: Arc::clone(&self.account) }
    }
}

impl<T> Drop for Outlet<T> {
    fn drop(&mut self) {
        drop(self.sender.take());
        self.account.left(0);
    }
}

impl<T> Drop for Inlet<T> {
    fn drop(&mut self) {
        drop(self.receiver.take());
        self.account.left(1);
    }
}

//! The events of a simulation, in the order of their times.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use preceptor_actors::transport::LeaseId;

/// An event of the simulation.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// One that may be scheduled any time ahead.
    Timer(Timer),
    /// A worker, in this life, has received a version.
    Received(u32, u32, u64),
    /// A worker acknowledges work.
    Acknowledged(u32, u32, LeaseId),
    /// A worker gives a sign of life for its work.
    Extended(u32, u32, LeaseId),
}

/// An event that may be scheduled any time ahead.
#[derive(Debug, Clone, Copy)]
pub enum Timer {
    /// The learner has trained on a group.
    Trained,
    /// Leases may have expired.
    Expiry,
    /// A worker has sampled all completions of its work.
    Sampled(u32, u32),
    /// A worker dies.
    Died(u32, u32),
    /// A worker loses its connection to the broker.
    Cut(u32, u32),
    /// A worker is connected again.
    Connected(u32, u32),
}

/// Scheduled events. Those of one kind that are scheduled a fixed time ahead are in order already, and need no heap.
#[derive(Default)]
pub struct Events {
    scheduled: u64,
    timers: BinaryHeap<Reverse<Scheduled<Timer>>>,
    received: VecDeque<Scheduled<Event>>,
    acknowledged: VecDeque<Scheduled<Event>>,
    extended: VecDeque<Scheduled<Event>>,
}

/// An event at a time in nanoseconds. Events at the same time are in the order in which they were scheduled.
struct Scheduled<T> {
    nanos: u64,
    number: u64,
    event: T,
}

impl<T> Scheduled<T> {
    fn key(&self) -> (u64, u64) {
        (self.nanos, self.number)
    }
}

impl<T> PartialEq for Scheduled<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Scheduled<T> {}

impl<T> PartialOrd for Scheduled<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Scheduled<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Events {
    /// Adds an event at a time.
    pub fn schedule(&mut self, at: Duration, event: Event) {
        self.scheduled += 1;
        let (nanos, number) = (at.as_nanos() as u64, self.scheduled);
        let queue = match event {
            Event::Timer(event) => return self.timers.push(Reverse(Scheduled { nanos, number, event })),
            Event::Received(..) => &mut self.received,
            Event::Acknowledged(..) => &mut self.acknowledged,
            Event::Extended(..) => &mut self.extended,
        };
        queue.push_back(Scheduled { nanos, number, event });
    }

    /// Removes and returns the first event, with its time.
    pub fn pop(&mut self) -> Option<(Duration, Event)> {
        let mut first = None;
        for queue in [&mut self.received, &mut self.acknowledged, &mut self.extended] {
            if let Some(key) = queue.front().map(Scheduled::key)
                && first.as_ref().is_none_or(|(earliest, _)| key < *earliest)
            {
                first = Some((key, queue));
            }
        }
        if let Some(timer) = self.timers.peek()
            && first.as_ref().is_none_or(|(earliest, _)| timer.0.key() < *earliest)
        {
            let timer = self.timers.pop()?.0;
            return Some((Duration::from_nanos(timer.nanos), Event::Timer(timer.event)));
        }
        let next = first?.1.pop_front()?;
        Some((Duration::from_nanos(next.nanos), next.event))
    }
}

//! The rules of a queue with leases, without threads and with the time as an argument.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::{Depth, Offered, QueueLimits, TransportError};

/// Time for which a queue remembers the identifiers of messages that it no longer has.
const REMEMBERED: Duration = Duration::from_secs(120);

/// Identifier of one lease of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId {
    message: u64,
    delivery: u64,
}

/// A leased message.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// The lease.
    pub lease: LeaseId,
    /// Identifier that the message was offered with.
    pub id: Arc<str>,
    /// The message.
    pub body: Arc<[u8]>,
    /// How often the message was delivered, at least once.
    pub deliveries: u64,
}

/// A queue with leases.
#[derive(Debug)]
pub struct LeasedQueue {
    name: String,
    limits: QueueLimits,
    /// Messages by the order in which they were offered.
    messages: BTreeMap<u64, Message>,
    /// Order numbers of the messages that wait.
    waiting: BTreeSet<u64>,
    /// Ends of leases, with the order numbers of their messages.
    leases: BTreeSet<(Duration, u64)>,
    next: u64,
    /// Identifiers of all messages that the queue has or remembers.
    known: HashSet<Arc<str>>,
    /// Identifiers of messages that it had, with the end of the time for which it remembers them.
    past: VecDeque<(Duration, Arc<str>)>,
}

#[derive(Debug)]
struct Message {
    id: Arc<str>,
    body: Arc<[u8]>,
    deliveries: u64,
    /// End of the present lease.
    until: Option<Duration>,
}

impl LeasedQueue {
    /// Creates an empty queue.
    pub fn new(name: &str, limits: QueueLimits) -> Self {
        Self {
            name: name.to_owned(),
            limits,
            messages: BTreeMap::new(),
            waiting: BTreeSet::new(),
            leases: BTreeSet::new(),
            next: 0,
            known: HashSet::new(),
            past: VecDeque::new(),
        }
    }

    /// Sets the limits. Messages beyond them stay.
    pub fn set_limits(&mut self, limits: QueueLimits) {
        self.limits = limits;
    }

    /// Puts a message; see [`super::Transport::offer`].
    ///
    /// # Errors
    /// If the queue is full or the message too large.
    pub fn offer(&mut self, id: &str, body: Arc<[u8]>, now: Duration) -> Result<Offered, TransportError> {
        while let Some((_, id)) = self.past.pop_front_if(|(until, _)| *until <= now) {
            self.known.remove(&id);
        }
        if body.len() > self.limits.bytes {
            let (queue, bytes, limit) = (self.name.clone(), body.len(), self.limits.bytes);
            return Err(TransportError::TooLarge { queue, bytes, limit });
        }
        if self.known.contains(id) {
            return Ok(Offered::Duplicate);
        }
        if self.messages.len() >= self.limits.messages {
            return Err(TransportError::Full { queue: self.name.clone(), limit: self.limits.messages });
        }
        let id: Arc<str> = id.into();
        self.known.insert(Arc::clone(&id));
        self.messages.insert(self.next, Message { id, body, deliveries: 0, until: None });
        self.waiting.insert(self.next);
        self.next += 1;
        Ok(Offered::Accepted)
    }

    /// Leases up to `most` waiting messages, the oldest first.
    pub fn pull(&mut self, most: usize, now: Duration) -> Vec<Delivered> {
        self.expire(now);
        let mut pulled = Vec::new();
        while pulled.len() < most
            && let Some(number) = self.waiting.pop_first()
        {
            let Some(message) = self.messages.get_mut(&number) else { continue };
            message.deliveries += 1;
            let until = now + self.limits.lease;
            message.until = Some(until);
            self.leases.insert((until, number));
            pulled.push(Delivered {
                lease: LeaseId { message: number, delivery: message.deliveries },
                id: Arc::clone(&message.id),
                body: Arc::clone(&message.body),
                deliveries: message.deliveries,
            });
        }
        pulled
    }

    /// Begins a lease again.
    ///
    /// # Errors
    /// If it has expired.
    pub fn extend(&mut self, lease: LeaseId, now: Duration) -> Result<(), TransportError> {
        let until = now + self.limits.lease;
        let old = self.leased(lease, now)?.until.replace(until);
        self.end_lease(old, lease);
        self.leases.insert((until, lease.message));
        Ok(())
    }

    /// Removes a leased message.
    ///
    /// # Errors
    /// If the lease has expired.
    pub fn acknowledge(&mut self, lease: LeaseId, now: Duration) -> Result<(), TransportError> {
        let message = self.leased(lease, now)?;
        let (id, old) = (Arc::clone(&message.id), message.until);
        self.end_lease(old, lease);
        self.messages.remove(&lease.message);
        let until = now + REMEMBERED;
        self.past.push_back((until, id));
        Ok(())
    }

    /// Makes a leased message wait again.
    ///
    /// # Errors
    /// If the lease has expired.
    pub fn give_back(&mut self, lease: LeaseId, now: Duration) -> Result<(), TransportError> {
        let old = self.leased(lease, now)?.until.take();
        self.end_lease(old, lease);
        self.waiting.insert(lease.message);
        Ok(())
    }

    /// Returns the number of messages.
    pub fn depth(&mut self, now: Duration) -> Depth {
        self.expire(now);
        Depth { waiting: self.waiting.len(), leased: self.messages.len() - self.waiting.len() }
    }

    /// Returns the end of the lease that expires first.
    pub fn first_expiry(&self) -> Option<Duration> {
        self.leases.first().map(|(until, _)| *until)
    }

    fn end_lease(&mut self, until: Option<Duration>, lease: LeaseId) {
        if let Some(until) = until {
            self.leases.remove(&(until, lease.message));
        }
    }

    /// Makes messages whose lease has expired wait again.
    fn expire(&mut self, now: Duration) {
        while let Some((until, number)) = self.leases.first().copied().filter(|(until, _)| *until <= now) {
            self.leases.remove(&(until, number));
            if let Some(message) = self.messages.get_mut(&number) {
                message.until = None;
                self.waiting.insert(number);
            }
        }
    }

    fn leased(&mut self, lease: LeaseId, now: Duration) -> Result<&mut Message, TransportError> {
        self.expire(now);
        self.messages
            .get_mut(&lease.message)
            .filter(|message| message.until.is_some() && message.deliveries == lease.delivery)
            .ok_or(TransportError::Expired)
    }
}

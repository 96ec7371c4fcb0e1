//! The rules of a queue with leases, without threads and with the time as an argument.

use std::collections::{BTreeSet, HashSet, VecDeque};
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
    /// Messages by the order in which they were offered; `None` where one is removed. The first one is not removed, so that
    /// a message that is kept for long keeps the places of all that came after it.
    messages: VecDeque<Option<Message>>,
    /// Order number of the first entry of `messages`.
    first: u64,
    /// Number of messages that are not removed.
    count: usize,
    /// Order number of the first message that was never delivered. All later ones were not delivered either.
    fresh: u64,
    /// Order numbers of the messages that were delivered and wait again.
    returned: BTreeSet<u64>,
    /// Leases in the order of their ends. Those that were ended or begun again stay for a while.
    leases: VecDeque<Term>,
    /// Number of leases that were begun.
    begun: u64,
    /// Identifiers of all messages that the queue has or remembers.
    known: HashSet<Arc<str>>,
    /// Identifiers of messages that it had, with the end of the time for which it remembers them.
    past: VecDeque<(Duration, Arc<str>)>,
}

/// Term of a lease.
#[derive(Debug, Clone, Copy)]
struct Term {
    /// End of the lease.
    until: Duration,
    /// Order number of the leased message.
    message: u64,
    /// Number of the lease.
    number: u64,
}

#[derive(Debug)]
struct Message {
    id: Arc<str>,
    body: Arc<[u8]>,
    deliveries: u64,
    /// Number of the present lease.
    lease: Option<u64>,
}

impl LeasedQueue {
    /// Creates an empty queue.
    pub fn new(name: &str, limits: QueueLimits) -> Self {
        Self {
            name: name.to_owned(),
            limits,
            messages: VecDeque::new(),
            first: 0,
            count: 0,
            fresh: 0,
            returned: BTreeSet::new(),
            leases: VecDeque::new(),
            begun: 0,
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
        if self.count >= self.limits.messages {
            return Err(TransportError::Full { queue: self.name.clone(), limit: self.limits.messages });
        }
        let id: Arc<str> = id.into();
        self.known.insert(Arc::clone(&id));
        self.messages.push_back(Some(Message { id, body, deliveries: 0, lease: None }));
        self.count += 1;
        Ok(Offered::Accepted)
    }

    /// Leases up to `most` waiting messages, the oldest first.
    pub fn pull(&mut self, most: usize, now: Duration) -> Vec<Delivered> {
        self.expire(now);
        let mut pulled = Vec::new();
        while pulled.len() < most
            && let Some(number) = self.pop_waiting()
        {
            let lease = self.begin_lease(number, now);
            let Some(message) = self.message(number) else { continue };
            message.deliveries += 1;
            message.lease = Some(lease);
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
        self.leased(lease, now)?;
        let begun = self.begin_lease(lease.message, now);
        self.leased(lease, now)?.lease = Some(begun);
        Ok(())
    }

    /// Removes a leased message.
    ///
    /// # Errors
    /// If the lease has expired.
    pub fn acknowledge(&mut self, lease: LeaseId, now: Duration) -> Result<(), TransportError> {
        let id = Arc::clone(&self.leased(lease, now)?.id);
        if let Some(slot) = self.place(lease.message).and_then(|place| self.messages.get_mut(place)) {
            *slot = None;
        }
        self.count -= 1;
        while self.messages.pop_front_if(|message| message.is_none()).is_some() {
            self.first += 1;
        }
        self.past.push_back((now + REMEMBERED, id));
        Ok(())
    }

    /// Makes a leased message wait again.
    ///
    /// # Errors
    /// If the lease has expired.
    pub fn give_back(&mut self, lease: LeaseId, now: Duration) -> Result<(), TransportError> {
        self.leased(lease, now)?.lease = None;
        self.returned.insert(lease.message);
        Ok(())
    }

    /// Returns the number of messages.
    pub fn depth(&mut self, now: Duration) -> Depth {
        self.expire(now);
        let never_delivered = (self.first + self.messages.len() as u64).saturating_sub(self.fresh) as usize;
        let waiting = never_delivered + self.returned.len();
        Depth { waiting, leased: self.count - waiting }
    }

    /// Returns the end of the lease that expires first.
    pub fn first_expiry(&mut self) -> Option<Duration> {
        while let Some(term) = self.leases.front().copied() {
            if self.is_current(term) {
                return Some(term.until);
            }
            self.leases.pop_front();
        }
        None
    }

    /// Removes and returns the order number of the oldest waiting message.
    fn pop_waiting(&mut self) -> Option<u64> {
        // A message that was delivered is older than all that were not.
        if let Some(number) = self.returned.pop_first() {
            return Some(number);
        }
        let number = self.fresh;
        (number < self.first + self.messages.len() as u64).then(|| {
            self.fresh += 1;
            number
        })
    }

    fn place(&self, message: u64) -> Option<usize> {
        usize::try_from(message.checked_sub(self.first)?).ok()
    }

    fn message(&mut self, number: u64) -> Option<&mut Message> {
        let place = self.place(number)?;
        self.messages.get_mut(place)?.as_mut()
    }

    /// Records the term of a lease that begins now, and returns the lease's number.
    fn begin_lease(&mut self, message: u64, now: Duration) -> u64 {
        self.begun += 1;
        let term = Term { until: now + self.limits.lease, message, number: self.begun };
        if self.leases.len() > 2 * self.count + 64 {
            let leases = std::mem::take(&mut self.leases);
            self.leases = leases.into_iter().filter(|term| self.is_current(*term)).collect();
        }
        // A later lease ends earlier only if the limit was made shorter.
        let place = self.leases.iter().rposition(|earlier| earlier.until <= term.until).map_or(0, |place| place + 1);
        self.leases.insert(place, term);
        self.begun
    }

    /// Returns whether the lease of a term has neither ended nor begun again.
    fn is_current(&self, term: Term) -> bool {
        let message = self.place(term.message).and_then(|place| self.messages.get(place)?.as_ref());
        message.is_some_and(|message| message.lease == Some(term.number))
    }

    /// Makes messages whose lease has expired wait again.
    fn expire(&mut self, now: Duration) {
        while let Some(term) = self.leases.pop_front_if(|term| term.until <= now) {
            if self.is_current(term)
                && let Some(message) = self.message(term.message)
            {
                message.lease = None;
                self.returned.insert(term.message);
            }
        }
    }

    fn leased(&mut self, lease: LeaseId, now: Duration) -> Result<&mut Message, TransportError> {
        self.expire(now);
        self.message(lease.message)
            .filter(|message| message.lease.is_some() && message.deliveries == lease.delivery)
            .ok_or(TransportError::Expired)
    }
}

//! Queues of messages between a coordinator and workers that come and go.
//!
//! A message is leased to a worker, not removed: it is delivered again if the worker gives it back, or gives no sign of
//! life for as long as the queue's lease lasts. It is removed when it is acknowledged. A message may therefore be
//! delivered more than once, and is never lost while its queue exists. [`MemoryTransport`] is the transport within one
//! process, and the reference for others.

mod memory;
mod queue;

use std::time::Duration;

pub use memory::MemoryTransport;
pub use queue::{Delivered, LeaseId, LeasedQueue};

/// Limits of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Time after which a message without a sign of life is delivered again.
    pub lease: Duration,
    /// Maximum number of messages, waiting and leased.
    pub messages: usize,
    /// Maximum size of a message in bytes.
    pub bytes: usize,
}

/// Number of messages of a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Messages that no worker has.
    pub waiting: usize,
    /// Messages that are leased to a worker.
    pub leased: usize,
}

/// Failure of a transport.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The queue has its maximum number of messages.
    #[error("the queue {queue} is full: {limit} messages")]
    Full {
        /// Name of the queue.
        queue: String,
        /// Its maximum number of messages.
        limit: usize,
    },
    /// The message is larger than the queue allows.
    #[error("a message of {bytes} bytes is larger than the {limit} that the queue {queue} allows")]
    TooLarge {
        /// Name of the queue.
        queue: String,
        /// Size of the message.
        bytes: usize,
        /// Maximum size of a message.
        limit: usize,
    },
    /// There is no such queue.
    #[error("there is no queue {0}")]
    Unknown(String),
    /// The lease has expired, and the message may have been delivered to another worker.
    #[error("the lease of the message has expired")]
    Expired,
    /// The other side cannot be reached, or does not answer. A later attempt may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// The other side refuses the request. A later attempt fails as well.
    #[error("{0}")]
    Refused(String),
}

/// Result of [`Transport::offer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offered {
    /// The message was put into the queue.
    Accepted,
    /// The queue has or had a message with this identifier, so nothing was put.
    Duplicate,
}

/// Queues between processes. Calls block the calling thread for at most the time that they state.
pub trait Transport: Send + Sync {
    /// Creates a queue, or sets the limits of one that exists.
    ///
    /// # Errors
    /// If the transport is not available, or refuses the limits.
    fn create(&self, queue: &str, limits: QueueLimits) -> Result<(), TransportError>;

    /// Puts a message into a queue, once: a message with the same `id` that is in the queue, or was put there within the
    /// last two minutes at least, is not put again.
    ///
    /// # Errors
    /// If the queue is full or unknown, the message too large, or the transport not available. After
    /// [`TransportError::Unavailable`] the message may or may not be in the queue; offering it again is safe.
    fn offer(&self, queue: &str, id: &str, body: &[u8]) -> Result<Offered, TransportError>;

    /// Leases up to `most` messages, the oldest first; waits up to `wait` for the first.
    ///
    /// # Errors
    /// If the queue is unknown or the transport not available.
    fn pull(&self, queue: &str, most: usize, wait: Duration) -> Result<Vec<Box<dyn Lease>>, TransportError>;

    /// Returns the number of messages of a queue.
    ///
    /// # Errors
    /// If the queue is unknown or the transport not available.
    fn depth(&self, queue: &str) -> Result<Depth, TransportError>;

    /// Removes a queue with all of its messages. A queue that does not exist is no error.
    ///
    /// # Errors
    /// If the transport is not available.
    fn remove(&self, queue: &str) -> Result<(), TransportError>;
}

/// A message that is leased to this worker. Dropping it is no sign of life: the message is delivered again when the lease
/// expires.
pub trait Lease: Send {
    /// Returns the message's identifier.
    fn id(&self) -> &str;

    /// Returns the message.
    fn body(&self) -> &[u8];

    /// Returns how often the message was delivered, at least once.
    fn deliveries(&self) -> u64;

    /// Gives a sign of life: the lease begins again.
    ///
    /// # Errors
    /// If the lease has expired or the transport is not available.
    fn extend(&self) -> Result<(), TransportError>;

    /// Removes the message from the queue. When this returns, it is not delivered again.
    ///
    /// # Errors
    /// If the transport is not available, or knows that the lease has expired; the message may then be delivered again.
    fn acknowledge(self: Box<Self>) -> Result<(), TransportError>;

    /// Gives the message back, so that another worker gets it at once.
    ///
    /// # Errors
    /// If the transport is not available; the message is then delivered again when the lease expires.
    fn give_back(self: Box<Self>) -> Result<(), TransportError>;
}

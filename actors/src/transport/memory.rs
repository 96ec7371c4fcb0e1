//! The transport within one process.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Delivered, Depth, Lease, LeaseId, LeasedQueue, Offered, QueueLimits, Transport, TransportError};

/// Queues in the memory of this process. A clone shares them.
#[derive(Clone, Default)]
pub struct MemoryTransport(Arc<Shared>);

struct Shared {
    began: Instant,
    queues: Mutex<HashMap<String, LeasedQueue>>,
    /// Notified when a message begins to wait.
    changed: Condvar,
}

impl Default for Shared {
    fn default() -> Self {
        Self { began: Instant::now(), queues: Mutex::default(), changed: Condvar::new() }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, LeasedQueue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, queue: &str, act: impl FnOnce(&mut LeasedQueue, Duration) -> T) -> Result<T, TransportError> {
        let mut queues = self.lock();
        let queue = queues.get_mut(queue).ok_or_else(|| TransportError::Unknown(queue.to_owned()))?;
        Ok(act(queue, self.began.elapsed()))
    }
}

impl Transport for MemoryTransport {
    fn create(&self, queue: &str, limits: QueueLimits) -> Result<(), TransportError> {
        let mut queues = self.0.lock();
        queues.entry(queue.to_owned()).or_insert_with(|| LeasedQueue::new(queue, limits)).set_limits(limits);
        Ok(())
    }

    fn offer(&self, queue: &str, id: &str, body: &[u8]) -> Result<Offered, TransportError> {
        let offered = self.0.with(queue, |queue, now| queue.offer(id, body.into(), now))?;
        self.0.changed.notify_all();
        offered
    }

    fn pull(&self, queue: &str, most: usize, wait: Duration) -> Result<Vec<Box<dyn Lease>>, TransportError> {
        let end = self.0.began.elapsed() + wait;
        let mut queues = self.0.lock();
        loop {
            let leased = queues.get_mut(queue).ok_or_else(|| TransportError::Unknown(queue.to_owned()))?;
            let now = self.0.began.elapsed();
            let pulled = leased.pull(most, now);
            if !pulled.is_empty() || now >= end {
                let lease = |delivered| -> Box<dyn Lease> {
                    Box::new(MemoryLease { shared: Arc::clone(&self.0), queue: queue.to_owned(), delivered })
                };
                return Ok(pulled.into_iter().map(lease).collect());
            }
            let until = leased.first_expiry().map_or(end, |expiry| expiry.min(end));
            let pause = until.saturating_sub(now).max(Duration::from_millis(1));
            queues = self.0.changed.wait_timeout(queues, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn depth(&self, queue: &str) -> Result<Depth, TransportError> {
        self.0.with(queue, LeasedQueue::depth)
    }

    fn remove(&self, queue: &str) -> Result<(), TransportError> {
        self.0.lock().remove(queue);
        Ok(())
    }
}

struct MemoryLease {
    shared: Arc<Shared>,
    queue: String,
    delivered: Delivered,
}

impl MemoryLease {
    fn act(
        &self,
        act: impl FnOnce(&mut LeasedQueue, LeaseId, Duration) -> Result<(), TransportError>,
    ) -> Result<(), TransportError> {
        self.shared.with(&self.queue, |queue, now| act(queue, self.delivered.lease, now))?
    }
}

impl Lease for MemoryLease {
    fn id(&self) -> &str {
        &self.delivered.id
    }

    fn body(&self) -> &[u8] {
        &self.delivered.body
    }

    fn deliveries(&self) -> u64 {
        self.delivered.deliveries
    }

    fn extend(&self) -> Result<(), TransportError> {
        self.act(LeasedQueue::extend)
    }

    fn acknowledge(self: Box<Self>) -> Result<(), TransportError> {
        self.act(LeasedQueue::acknowledge)
    }

    fn give_back(self: Box<Self>) -> Result<(), TransportError> {
        self.act(LeasedQueue::give_back)?;
        self.shared.changed.notify_all();
        Ok(())
    }
}

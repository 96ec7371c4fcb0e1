//! The leases of a worker's work, which a separate thread extends while the work makes progress.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use preceptor_actors::transport::Lease;

use super::{LOOK, STUCK};
use crate::util::mutex::lock;

/// Leases by the numbers of their work.
#[derive(Default)]
pub(super) struct Leases {
    held: Mutex<HashMap<u64, Box<dyn Lease>>>,
    /// Time of the engine's last progress; `None` while it has nothing to do.
    progress: Mutex<Option<Instant>>,
    ended: AtomicBool,
}

impl Leases {
    /// Extends all leases three times in each period of a lease while the engine makes progress, until [`Self::end`].
    pub(super) fn keep(&self, lease: Duration) {
        let mut last = Instant::now();
        while !self.ended.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK.min(lease / 10));
            let alive = lock(&self.progress).is_none_or(|at| at.elapsed() < STUCK);
            if last.elapsed() < lease / 3 || !alive {
                continue;
            }
            last = Instant::now();
            for (seq, lease) in &*lock(&self.held) {
                if let Err(error) = lease.extend() {
                    tracing::debug!("the lease of group {seq} cannot be extended: {error}");
                }
            }
        }
    }

    /// Ends [`Self::keep`].
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Adds the lease of the work `seq`, or replaces it by that of a later delivery.
    pub(super) fn hold(&self, seq: u64, lease: Box<dyn Lease>) {
        lock(&self.held).insert(seq, lease);
    }

    /// Removes and returns the lease of the work `seq`, which is extended no longer.
    pub(super) fn remove(&self, seq: u64) -> Option<Box<dyn Lease>> {
        lock(&self.held).remove(&seq)
    }

    /// Returns the identifier of the work `seq` and how often it was delivered.
    pub(super) fn delivery(&self, seq: u64) -> Option<(String, u64)> {
        lock(&self.held).get(&seq).map(|lease| (lease.id().to_owned(), lease.deliveries()))
    }

    /// Returns the numbers of all work with a lease.
    pub(super) fn numbers(&self) -> Vec<u64> {
        lock(&self.held).keys().copied().collect()
    }

    /// Notes that the engine made progress.
    pub(super) fn progressed(&self) {
        *lock(&self.progress) = Some(Instant::now());
    }

    /// Notes that the engine has nothing to do.
    pub(super) fn rests(&self) {
        *lock(&self.progress) = None;
    }
}

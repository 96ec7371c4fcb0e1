//! A concurrency limit that can be adjusted at run time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use crate::util::mutex::lock;
use tokio::sync::Notify;

/// A limit on the number of concurrent operations, adjustable within bounds.
#[derive(Debug)]
pub struct AdjustableLimit {
    low: usize,
    high: usize,
    value: AtomicUsize,
    under_way: Mutex<usize>,
    changed: Notify,
}

impl AdjustableLimit {
    /// Creates a limit with the bounds `low` to `high`, both raised to at least one, and the value `high`.
    pub fn new(low: usize, high: usize) -> Self {
        let high = high.max(1);
        let (value, under_way) = (AtomicUsize::new(high), Mutex::new(0));
        Self { low: low.clamp(1, high), high, value, under_way, changed: Notify::new() }
    }

    /// Returns the lowest and the highest value.
    pub fn bounds(&self) -> (usize, usize) {
        (self.low, self.high)
    }

    /// Returns the current value.
    pub fn get(&self) -> usize {
        self.value.load(SeqCst)
    }

    /// Sets the limit to `value`, clamped to the bounds. Operations in progress beyond the limit continue.
    pub fn set(&self, value: usize) {
        self.value.store(value.clamp(self.low, self.high), SeqCst);
        self.changed.notify_waiters();
    }

    /// Waits until the limit admits one more operation, which lasts until the returned guard is dropped.
    pub async fn enter(&self) -> UnderWay<'_> {
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            // Registers for notifications before the check, so that none is missed between check and wait.
            notified.as_mut().enable();
            {
                let mut under_way = lock(&self.under_way);
                if *under_way < self.get() {
                    *under_way += 1;
                    return UnderWay(self);
                }
            }
            notified.await;
        }
    }
}

/// Guard of an operation in progress.
pub struct UnderWay<'a>(&'a AdjustableLimit);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        *lock(&self.0.under_way) -= 1;
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_limit_is_kept_and_every_operation_completes() {
        let limit = Arc::new(AdjustableLimit::new(1, 4));
        let most = Arc::new(AtomicUsize::new(0));
        let spawn = || {
            let (limit, most) = (Arc::clone(&limit), Arc::clone(&most));
            tokio::spawn(async move {
                let _under_way = limit.enter().await;
                most.fetch_max(*limit.under_way.lock().unwrap(), SeqCst);
                tokio::time::sleep(Duration::from_millis(1)).await;
            })
        };
        limit.set(2);
        let all: Vec<_> = (0..20).map(|_| spawn()).collect();
        for one in all {
            one.await.unwrap();
        }
        assert_eq!(most.load(SeqCst), 2);
        limit.set(99);
        assert_eq!(limit.get(), 4);
        let all: Vec<_> = (0..20).map(|_| spawn()).collect();
        for one in all {
            one.await.unwrap();
        }
        assert_eq!((most.load(SeqCst), *limit.under_way.lock().unwrap()), (4, 0));
    }
}

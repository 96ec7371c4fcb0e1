//! A number that is read while work goes on and may be changed meanwhile, within bounds.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

/// How many of something may be under way at once.
#[derive(Debug)]
pub struct AdjustableLimit {
    low: usize,
    high: usize,
    value: AtomicUsize,
    under_way: Mutex<usize>,
    bell: Notify,
}

impl AdjustableLimit {
    /// At the top of `low` to `high`, both at least one.
    pub fn new(low: usize, high: usize) -> Self {
        let high = high.max(1);
        let (value, under_way) = (AtomicUsize::new(high), Mutex::new(0));
        Self { low: low.clamp(1, high), high, value, under_way, bell: Notify::new() }
    }

    /// Lowest and highest value.
    pub fn bounds(&self) -> (usize, usize) {
        (self.low, self.high)
    }

    /// Its value.
    pub fn get(&self) -> usize {
        self.value.load(SeqCst)
    }

    /// Turns it to `value`, within its bounds; what is under way beyond that goes on.
    pub fn set(&self, value: usize) {
        self.value.store(value.clamp(self.low, self.high), SeqCst);
        self.bell.notify_waiters();
    }

    /// Waits until one more may be under way, which it is until the guard is dropped.
    pub async fn enter(&self) -> UnderWay<'_> {
        loop {
            let rung = self.bell.notified();
            tokio::pin!(rung);
            // From here on a bell is heard, so none is missed between looking and waiting.
            rung.as_mut().enable();
            {
                let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
                if *under_way < self.get() {
                    *under_way += 1;
                    return UnderWay(self);
                }
            }
            rung.await;
        }
    }
}

/// One that is under way.
pub struct UnderWay<'a>(&'a AdjustableLimit);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        *self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.bell.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn no_more_are_under_way_than_it_says_and_all_come_through() {
        let knob = Arc::new(AdjustableLimit::new(1, 4));
        let most = Arc::new(AtomicUsize::new(0));
        let spawn = || {
            let (knob, most) = (Arc::clone(&knob), Arc::clone(&most));
            tokio::spawn(async move {
                let _under_way = knob.enter().await;
                most.fetch_max(*knob.under_way.lock().unwrap(), SeqCst);
                tokio::time::sleep(Duration::from_millis(1)).await;
            })
        };
        knob.set(2);
        let all: Vec<_> = (0..20).map(|_| spawn()).collect();
        for one in all {
            one.await.unwrap();
        }
        assert_eq!(most.load(SeqCst), 2);
        knob.set(99);
        assert_eq!(knob.get(), 4);
        let all: Vec<_> = (0..20).map(|_| spawn()).collect();
        for one in all {
            one.await.unwrap();
        }
        assert_eq!((most.load(SeqCst), *knob.under_way.lock().unwrap()), (4, 0));
    }
}

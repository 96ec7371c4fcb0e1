//! Items that a stage is working on, and the spans of those that it finished last.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Number of finished spans that a stage keeps; newer ones overwrite the oldest.
pub(crate) const KEPT: usize = 1024;

/// One stage's items: those under way and those finished. Each stage has its own, so that no stage waits for another to
/// write.
#[derive(Default)]
pub(crate) struct Pending(Mutex<Items>);

#[derive(Default)]
struct Items {
    begun: Vec<Work>,
    done: VecDeque<Work>,
    /// Total number of items finished.
    count: u64,
}

/// Span of an item in a stage, in nanoseconds of the graph's clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    pub(crate) seq: u64,
    pub(crate) version: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Pending {
    /// Records that the stage has taken an item.
    pub(crate) fn begin(&self, seq: u64, version: u64, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let start = now.as_nanos() as u64;
        self.lock().begun.push(Work { seq, version, start, end: start });
    }

    /// Records that the stage has finished an item. Has no effect if the item is not under way.
    pub(crate) fn end(&self, seq: u64, now: impl FnOnce() -> Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let mut items = self.lock();
        let Some(at) = items.begun.iter().position(|work| work.seq == seq) else { return };
        let begun = items.begun.swap_remove(at);
        if items.done.len() == KEPT {
            items.done.pop_front();
        }
        items.done.push_back(Work { end: now().as_nanos() as u64, ..begun });
        items.count += 1;
    }

    /// Discards the items under way.
    pub(crate) fn clear(&self) {
        self.lock().begun.clear();
    }

    /// Returns the spans finished since the count was `seen`, oldest first, at most the last `most`, and the current
    /// count. Fewer spans than the counts' difference mean that the others were overwritten.
    pub(crate) fn since(&self, seen: u64, most: usize) -> (Vec<Work>, u64) {
        let items = self.lock();
        let new = usize::try_from(items.count.saturating_sub(seen)).unwrap_or(usize::MAX);
        let skipped = items.done.len().saturating_sub(new.min(most));
        (items.done.iter().skip(skipped).copied().collect(), items.count)
    }

    fn lock(&self) -> MutexGuard<'_, Items> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! What a stage has taken and not yet given on, and the last that it gave.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Spans that a stage keeps, until they are read or the next ones need their room.
pub(crate) const KEPT: usize = 1024;

/// One stage's items: those under way, and those it is done with. Each stage has its own, so that none waits for another to
/// write.
#[derive(Default)]
pub(crate) struct Pending(Mutex<Items>);

#[derive(Default)]
struct Items {
    begun: Vec<Work>,
    done: VecDeque<Work>,
    /// Items it was ever done with.
    count: u64,
}

/// An item in a stage, in nanoseconds of the graph's clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    pub(crate) seq: u64,
    pub(crate) version: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Pending {
    /// The stage turns to an item.
    pub(crate) fn begin(&self, seq: u64, version: u64, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let start = now.as_nanos() as u64;
        self.lock().begun.push(Work { seq, version, start, end: start });
    }

    /// It is done with it; nothing happens where that is known, or the item was never begun.
    pub(crate) fn end(&self, seq: u64, now: impl FnOnce() -> Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let mut items = self.lock();
        let Some(at) = items.begun.iter().position(|one| one.seq == seq) else { return };
        let begun = items.begun.swap_remove(at);
        if items.done.len() == KEPT {
            items.done.pop_front();
        }
        items.done.push_back(Work { end: now().as_nanos() as u64, ..begun });
        items.count += 1;
    }

    /// Nothing is under way any more.
    pub(crate) fn clear(&self) {
        self.lock().begun.clear();
    }

    /// What was done since `seen` items were, oldest first, at most the last `most`; and the items done by now. Where fewer come
    /// than were done, the others' room was needed before anybody read them.
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

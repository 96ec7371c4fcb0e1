//! Limit on how far work may run ahead of the learner: a pure rule, and the gate that applies it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::edge::Ended;
use crate::pulse::State;
use crate::stage::{StageContext, Waker};

/// Admission rule: with staleness bound η and batches of B groups, a group may start only while `accepted + running <
/// (η + version + 1)·B` (AReaL, arXiv 2505.24298, eq. 3).
///
/// If batches are consumed in order of admission, a group admitted at version `v` has an index below `(η + v + 1)·B`
/// and is consumed at version `index / B ≤ η + v`: at most η versions late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Staleness bound η, in versions; 0 is synchronous.
    pub eta: u64,
    /// Number of groups per batch, B.
    pub batch: u64,
}

impl Admission {
    /// Returns whether one more group may start.
    pub fn may_start(&self, accepted_plus_running: u64, version: u64) -> bool {
        self.room(accepted_plus_running, version) > 0
    }

    /// Returns the number of further groups that may start.
    pub fn room(&self, accepted_plus_running: u64, version: u64) -> u64 {
        let limit = self.eta.saturating_add(version).saturating_add(1).saturating_mul(self.batch);
        limit.saturating_sub(accepted_plus_running)
    }

    /// Returns the oldest version that the group with this index may start with: ⌊index/B⌋ − η. It depends on the index alone,
    /// so that issuing a group again changes nothing.
    pub fn min_version(&self, index: u64) -> u64 {
        (index / self.batch.max(1)).saturating_sub(self.eta)
    }
}

/// Admission rule with its state, shared between the source that asks and the learner that publishes versions.
pub struct AdmissionGate {
    rule: Admission,
    inner: Mutex<Inner>,
}

struct Inner {
    admitted: u64,
    version: u64,
    waiting: Vec<Waker>,
}

impl Inner {
    fn admit(&mut self, rule: Admission, n: u64) -> Option<u64> {
        let first = self.admitted;
        (rule.room(first, self.version) >= n).then(|| {
            self.admitted += n;
            first
        })
    }
}

impl AdmissionGate {
    /// Creates a gate that has admitted `admitted` groups at `version`.
    pub fn new(rule: Admission, admitted: u64, version: u64) -> Self {
        Self { rule, inner: Mutex::new(Inner { admitted, version, waiting: Vec::new() }) }
    }

    /// Waits until `n` groups may start, admits them, and returns the index of the first.
    ///
    /// # Errors
    /// `Drained` if the graph drains, `Halted` if it halts.
    pub fn admit(&self, ctx: &StageContext, n: u64) -> Result<u64, Ended> {
        let mut before = None;
        let result = loop {
            if ctx.halted() {
                break Err(Ended::Halted);
            }
            if ctx.draining() {
                break Err(Ended::Drained);
            }
            let waiting = {
                let mut inner = self.lock();
                if let Some(first) = inner.admit(self.rule, n) {
                    break Ok(first);
                }
                let (waker, waiting) = ctx.waiter();
                inner.waiting.push(waker);
                waiting
            };
            if before.is_none() {
                before = Some(ctx.enter(State::Admission));
            }
            ctx.wait(&waiting);
        };
        if let Some(before) = before {
            ctx.enter(before);
        }
        result
    }

    /// Admits `n` groups if they may start now, and returns the index of the first.
    pub fn try_admit(&self, n: u64) -> Option<u64> {
        self.lock().admit(self.rule, n)
    }

    /// Reports that the learner has reached `version`, and wakes the waiting sources.
    pub fn set_version(&self, version: u64) {
        let mut inner = self.lock();
        inner.version = inner.version.max(version);
        for waker in inner.waiting.drain(..) {
            waker.wake();
        }
    }

    /// Returns the highest version reported so far.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// Returns the number of groups admitted so far.
    pub fn admitted(&self) -> u64 {
        self.lock().admitted
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_order_batches_are_never_staler_than_the_bound() {
        // A seeded random walk: each step either admits as many groups as a random worker requests, or finishes a
        // batch.
        let mut state = 7u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for eta in 0..5 {
            for batch in 1..6 {
                let rule = Admission { eta, batch };
                let (mut started, mut version) = (Vec::new(), 0u64);
                for _ in 0..2000 {
                    if random(2) == 0 {
                        let room = rule.room(started.len() as u64, version);
                        assert_eq!(room > 0, rule.may_start(started.len() as u64, version));
                        started.extend(std::iter::repeat_n(version, random(room + 1) as usize));
                    } else if started.len() as u64 >= (version + 1) * batch {
                        let first = version * batch;
                        assert_eq!(rule.min_version(first), version.saturating_sub(eta));
                        for born in &started[first as usize..(first + batch) as usize] {
                            assert!(version - born <= eta, "a group of version {born} was trained at {version}");
                        }
                        version += 1;
                    }
                }
                assert!(version > 10);
            }
        }
    }
}

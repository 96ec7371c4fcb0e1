//! State of a stage, and the time spent in each state.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

/// Activity of a stage: working, or waiting for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum State {
    /// Its thread is being started.
    Starting,
    /// It is working.
    Busy,
    /// It waits for input.
    Input,
    /// It waits for room in its output edge.
    Output,
    /// It waits for the staleness bound.
    Admission,
    /// Its thread has ended.
    Ended,
}

const STATES: [State; 6] = [State::Starting, State::Busy, State::Input, State::Output, State::Admission, State::Ended];

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Busy => "busy",
            Self::Input => "waiting for input",
            Self::Output => "waiting for room in its output",
            Self::Admission => "waiting for admission",
            Self::Ended => "ended",
        })
    }
}

/// Counters of one stage, written by its thread and read by any. Times are nanoseconds of the graph's clock.
#[derive(Default)]
pub(crate) struct Pulse {
    state: AtomicU8,
    since: AtomicU64,
    spent: [AtomicU64; 6],
    beat: AtomicU64,
    pub(crate) items_in: AtomicU64,
    pub(crate) items_out: AtomicU64,
    note: Mutex<String>,
}

impl Pulse {
    /// Enters `state`, which counts as progress.
    pub(crate) fn enter(&self, state: State, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let now = now.as_nanos() as u64;
        let (old, since) = (self.state.swap(state as u8, Relaxed), self.since.swap(now, Relaxed));
        self.spent[old as usize].fetch_add(now.saturating_sub(since), Relaxed);
        self.beat.store(now, Relaxed);
    }

    pub(crate) fn beat(&self, now: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        self.beat.store(now.as_nanos() as u64, Relaxed);
    }

    pub(crate) fn note(&self, text: &str) {
        text.clone_into(&mut self.note.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn read_note(&self) -> String {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn state(&self) -> State {
        STATES[self.state.load(Relaxed) as usize]
    }

    /// Returns the time spent in `state` up to `now`, including the current stay.
    pub(crate) fn spent(&self, state: State, now: Duration) -> Duration {
        let present = if self.state() == state { self.in_state(now) } else { Duration::ZERO };
        Duration::from_nanos(self.spent[state as usize].load(Relaxed)) + present
    }

    /// Returns the time in the current state.
    pub(crate) fn in_state(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_nanos(self.since.load(Relaxed)))
    }

    /// Returns the time since the last sign of progress.
    pub(crate) fn since_beat(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_nanos(self.beat.load(Relaxed)))
    }
}

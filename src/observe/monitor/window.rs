//! The last minute of a graph: where its roles' time went, and how fast it is.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use preceptor_actors::report::shares;
use preceptor_actors::{GraphReport, RoleShare, StageReport};
use serde::Serialize;

use crate::observe::telemetry::TOTALS;

/// How far back it reaches.
const LENGTH: Duration = Duration::from_secs(60);

/// A graph at one moment, with the process's totals.
#[derive(Clone)]
pub(super) struct Observation {
    at: Instant,
    incarnation: u64,
    stages: Vec<StageReport>,
    totals: [u64; 3],
}

impl Observation {
    /// A report that was just made.
    pub(super) fn now(report: GraphReport) -> Self {
        let totals = [&TOTALS.generated, &TOTALS.trained, &TOTALS.completions];
        Self {
            at: Instant::now(),
            incarnation: report.incarnation,
            stages: report.stages,
            totals: totals.map(|total| total.load(Relaxed)),
        }
    }
}

/// What was seen of it, oldest first.
#[derive(Default)]
pub(super) struct Window(VecDeque<Observation>);

/// How fast the node is.
#[derive(Debug, Default, Serialize)]
pub(super) struct Rates {
    generated_tokens_per_s: f64,
    pub(super) trained_tokens_per_s: f64,
    completions_per_s: f64,
}

impl Window {
    /// Forgets all: another graph is looked at.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes in what was seen, and lets go of what is too old.
    pub(super) fn push(&mut self, seen: Observation) {
        if self.0.back().is_some_and(|last| last.incarnation != seen.incarnation) {
            self.0.clear();
        }
        // One of the entries beyond the window's length stays, so that the window is never shorter than that.
        while self.0.get(1).is_some_and(|second| seen.at.duration_since(second.at) >= LENGTH) {
            self.0.pop_front();
        }
        self.0.push_back(seen);
    }

    /// Time between the first and the last that was seen.
    pub(super) fn length(&self) -> Duration {
        self.ends().map_or(Duration::ZERO, |(first, last)| last.at.duration_since(first.at))
    }

    /// Where the time went; empty until the graph was seen twice.
    pub(super) fn shares(&self) -> Vec<RoleShare> {
        self.ends().map_or_else(Vec::new, |(first, last)| shares(&last.stages, &first.stages))
    }

    /// How fast it was.
    pub(super) fn rates(&self) -> Rates {
        let Some((first, last)) = self.ends() else { return Rates::default() };
        let seconds = last.at.duration_since(first.at).as_secs_f64();
        let rate = |i: usize| (last.totals[i] - first.totals[i]) as f64 / seconds;
        Rates { generated_tokens_per_s: rate(0), trained_tokens_per_s: rate(1), completions_per_s: rate(2) }
    }

    fn ends(&self) -> Option<(&Observation, &Observation)> {
        let (first, last) = (self.0.front()?, self.0.back()?);
        (last.at > first.at).then_some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(at: Instant, incarnation: u64, generated: u64) -> Observation {
        Observation { at, incarnation, stages: Vec::new(), totals: [generated, 0, 0] }
    }

    #[test]
    fn it_reaches_a_minute_back_and_not_beyond_an_incarnation() {
        let (mut window, start) = (Window::default(), Instant::now());
        for second in 0..100 {
            window.push(seen(start + Duration::from_secs(second), 0, 10 * second.min(50)));
        }
        assert_eq!(window.length(), LENGTH);
        // The counter stood at 390 a minute ago and stands at 500.
        assert!((window.rates().generated_tokens_per_s - 110.0 / 60.0).abs() < 1e-9);
        window.push(seen(start + Duration::from_secs(100), 1, 500));
        assert_eq!(window.length(), Duration::ZERO);
        assert_eq!(window.rates().generated_tokens_per_s, 0.0);
    }
}

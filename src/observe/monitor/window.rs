//! The last minute of a graph: its roles' time shares and its rates.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use preceptor_actors::report::shares;
use preceptor_actors::{GraphReport, RoleShare, StageReport};
use serde::Serialize;

use crate::observe::telemetry::TOTALS;

/// Length of the window.
const LENGTH: Duration = Duration::from_secs(60);

/// A sample of a graph's state, with the process's totals.
#[derive(Clone)]
pub(super) struct Observation {
    at: Instant,
    incarnation: u64,
    stages: Vec<StageReport>,
    totals: [u64; 3],
}

impl Observation {
    /// Creates the observation of a report that was just made.
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

/// The observations of the last minute, oldest first.
#[derive(Default)]
pub(super) struct Window(VecDeque<Observation>);

/// Throughput of the node.
#[derive(Debug, Default, Serialize)]
pub(super) struct Rates {
    generated_tokens_per_s: f64,
    pub(super) trained_tokens_per_s: f64,
    completions_per_s: f64,
}

impl Window {
    /// Removes all observations, for example because another graph is observed.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds an observation, and removes those that are too old or of an earlier incarnation.
    pub(super) fn push(&mut self, seen: Observation) {
        if self.0.back().is_some_and(|last| last.incarnation != seen.incarnation) {
            self.0.clear();
        }
        // One entry older than the window's length is kept, so that the window is never shorter than its length.
        while self.0.get(1).is_some_and(|second| seen.at.duration_since(second.at) >= LENGTH) {
            self.0.pop_front();
        }
        self.0.push_back(seen);
    }

    /// Returns the time between the first and the last observation.
    pub(super) fn length(&self) -> Duration {
        self.ends().map_or(Duration::ZERO, |(first, last)| last.at.duration_since(first.at))
    }

    /// Returns the time shares of the roles. Empty until the graph was observed twice.
    pub(super) fn shares(&self) -> Vec<RoleShare> {
        self.ends().map_or_else(Vec::new, |(first, last)| shares(&last.stages, &first.stages))
    }

    /// Returns the mean rates. Zero until the graph was observed twice.
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
    fn the_window_spans_a_minute_and_one_incarnation() {
        let (mut window, start) = (Window::default(), Instant::now());
        for second in 0..100 {
            window.push(seen(start + Duration::from_secs(second), 0, 10 * second.min(50)));
        }
        assert_eq!(window.length(), LENGTH);
        // The counter was 390 a minute ago and is 500.
        assert!((window.rates().generated_tokens_per_s - 110.0 / 60.0).abs() < 1e-9);
        window.push(seen(start + Duration::from_secs(100), 1, 500));
        assert_eq!(window.length(), Duration::ZERO);
        assert_eq!(window.rates().generated_tokens_per_s, 0.0);
    }
}

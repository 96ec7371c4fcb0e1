//! A circuit breaker: requests to a judge that keeps failing are held back for a while, then a single one is let
//! through.

use std::time::Duration;

/// Circuit breaker. Closed lets requests through, open holds them back, half-open lets one through as a probe. Time is
/// passed in.
#[derive(Debug, Clone)]
pub struct Breaker {
    threshold: u32,
    cooldown: Duration,
    failures: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Closed,
    Open {
        until: Duration,
    },
    /// One probe is under way. If it is lost, another may be sent at `until`.
    Probing {
        until: Duration,
    },
}

/// Decision of [`Breaker::admit`]: send the request, or wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// The request may be sent.
    Go,
    /// The request must ask again after this time.
    Wait(Duration),
}

impl Breaker {
    /// Creates a breaker that opens for `cooldown` after `threshold` consecutive failures.
    pub fn new(threshold: u32, cooldown: Duration) -> Self {
        Self { threshold: threshold.max(1), cooldown, failures: 0, state: State::Closed }
    }

    /// Returns whether a request may be sent at `now`.
    pub fn admit(&mut self, now: Duration) -> Admit {
        match self.state {
            State::Closed => Admit::Go,
            State::Open { until } | State::Probing { until } if now < until => Admit::Wait(until - now),
            State::Open { .. } | State::Probing { .. } => {
                self.state = State::Probing { until: now + self.cooldown };
                Admit::Go
            }
        }
    }

    /// Records that a request ended at `now`, with an answer or with a failure of the server or the network.
    pub fn record(&mut self, now: Duration, success: bool) {
        if success {
            self.failures = 0;
            self.state = State::Closed;
            return;
        }
        self.failures += 1;
        if self.failures >= self.threshold || matches!(self.state, State::Probing { .. }) {
            self.state = State::Open { until: now + self.cooldown };
        }
    }

    /// Opens the breaker at `now`, because the judge was found to answer no questions.
    pub fn trip(&mut self, now: Duration) {
        self.state = State::Open { until: now + self.cooldown };
    }

    /// Records that the server refused a request at `now`. The server is up, so this does not count as a failure. A
    /// probe is not answered by this, so the other requests stay held back.
    pub fn refused(&mut self, now: Duration) {
        self.failures = 0;
        if matches!(self.state, State::Probing { .. }) {
            self.trip(now);
        }
    }

    /// Returns whether requests are held back: the breaker is open or half-open.
    pub fn is_open(&self) -> bool {
        self.state != State::Closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_opens_probes_and_closes() {
        let mut breaker = Breaker::new(3, at(10));
        for now in 0..2 {
            breaker.record(at(now), false);
            assert_eq!(breaker.admit(at(now)), Admit::Go);
        }
        breaker.record(at(2), false);
        assert!(breaker.is_open());
        assert_eq!(breaker.admit(at(5)), Admit::Wait(at(7)));
        // Half-open: one is sent, the others wait for it.
        assert_eq!(breaker.admit(at(12)), Admit::Go);
        assert_eq!(breaker.admit(at(12)), Admit::Wait(at(10)));
        breaker.record(at(13), false);
        assert_eq!(breaker.admit(at(14)), Admit::Wait(at(9)));
        assert_eq!(breaker.admit(at(23)), Admit::Go);
        breaker.record(at(24), true);
        assert!(!breaker.is_open());
        breaker.record(at(25), false);
        assert_eq!(breaker.admit(at(25)), Admit::Go, "one failure is below the threshold");
    }

    #[test]
    fn a_refusal_neither_opens_nor_closes_the_breaker() {
        let mut breaker = Breaker::new(2, at(10));
        for now in 0..5 {
            breaker.refused(at(now));
            assert_eq!(breaker.admit(at(now)), Admit::Go);
        }
        breaker.trip(at(5));
        assert_eq!(breaker.admit(at(6)), Admit::Wait(at(9)));
        assert_eq!(breaker.admit(at(15)), Admit::Go);
        breaker.refused(at(16));
        assert_eq!(breaker.admit(at(17)), Admit::Wait(at(9)));
    }

    #[test]
    fn a_lost_probe_does_not_lock_the_breaker() {
        let mut breaker = Breaker::new(1, at(10));
        breaker.record(at(0), false);
        assert_eq!(breaker.admit(at(10)), Admit::Go);
        assert_eq!(breaker.admit(at(20)), Admit::Go);
    }
}

//! Rate limits as token buckets, on a clock that is passed in.

use crate::config::RemoteJudge;

/// Waits shorter than this many seconds are rounding errors.
const ROUNDING: f64 = 1e-9;

/// Rate limits of one judge: requests and tokens per minute, each with bursts of up to a tenth of that.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    requests: Option<Rate>,
    tokens: Option<Rate>,
}

/// A bucket that fills at a steady rate and holds one burst.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    burst: f64,
}

/// State of the buckets. All times are seconds of one clock.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct State {
    /// Time at which the bucket of requests is full again.
    pub requests: f64,
    /// Time at which the bucket of tokens is full again.
    pub tokens: f64,
    /// Time until which the server asked not to be sent anything (Retry-After).
    pub hold: f64,
}

/// Decision of [`Limits::take`]: send the request, or wait.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Turn {
    /// The request may be sent, and counts as sent.
    Now,
    /// The limits leave no room; there may be room after this many seconds.
    Later(f64),
    /// The server asked not to be sent anything for this many seconds.
    Held(f64),
}

impl Limits {
    /// Returns the limits of the configuration, or `None` if it sets none.
    pub fn of(judge: &RemoteJudge) -> Option<Self> {
        let (requests, tokens) = (Rate::new(judge.requests_per_minute), Rate::new(judge.tokens_per_minute));
        (requests.is_some() || tokens.is_some()).then_some(Self { requests, tokens })
    }

    /// Takes room for a request of `tokens` tokens at `now`, if there is room. Nothing is reserved for later, so that a
    /// process that ends while it waits has no effect.
    pub fn take(&self, state: &mut State, now: f64, tokens: f64) -> Turn {
        if state.hold > now {
            return Turn::Held(state.hold - now);
        }
        let wait = |rate: &Option<Rate>, full, amount| rate.map_or(0.0, |rate| rate.wait(full, now, amount));
        let wait = wait(&self.requests, state.requests, 1.0).max(wait(&self.tokens, state.tokens, tokens));
        if wait > ROUNDING {
            return Turn::Later(wait);
        }
        if let Some(rate) = &self.requests {
            state.requests = rate.after(state.requests, now, 1.0);
        }
        if let Some(rate) = &self.tokens {
            state.tokens = rate.after(state.tokens, now, tokens);
        }
        Turn::Now
    }
}

impl Rate {
    fn new(per_minute: u64) -> Option<Self> {
        (per_minute > 0)
            .then(|| Self { per_second: per_minute as f64 / 60.0, burst: (per_minute as f64 / 10.0).max(1.0) })
    }

    /// Returns the seconds until there is room for `amount`, if the bucket is full at `full`. An amount above one burst
    /// needs a full bucket; later requests wait until the excess is recovered.
    fn wait(&self, full: f64, now: f64, amount: f64) -> f64 {
        full.max(now) - now - (self.burst - amount.min(self.burst)) / self.per_second
    }

    /// Returns the time at which the bucket is full again after `amount` is taken.
    fn after(&self, full: f64, now: f64, amount: f64) -> f64 {
        full.max(now) + amount / self.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests_per_minute: u64, tokens_per_minute: u64) -> Limits {
        Limits::of(&RemoteJudge { requests_per_minute, tokens_per_minute, ..RemoteJudge::default() }).unwrap()
    }

    #[test]
    fn a_burst_is_let_through_and_then_the_rate_applies() {
        // 60 a minute: one a second, bursts of six.
        let (limits, mut state) = (limits(60, 0), State::default());
        for _ in 0..6 {
            assert_eq!(limits.take(&mut state, 0.0, 1e9), Turn::Now);
        }
        assert_eq!(limits.take(&mut state, 0.0, 0.0), Turn::Later(1.0));
        assert_eq!(limits.take(&mut state, 0.5, 0.0), Turn::Later(0.5), "a waiting request reserves nothing");
        assert_eq!(limits.take(&mut state, 1.0, 0.0), Turn::Now);
        assert_eq!(limits.take(&mut state, 1.0, 0.0), Turn::Later(1.0));
        for _ in 0..6 {
            assert_eq!(limits.take(&mut state, 1000.0, 0.0), Turn::Now);
        }
        assert_eq!(limits.take(&mut state, 1000.0, 0.0), Turn::Later(1.0), "no more than a burst is saved up");
        assert!(Limits::of(&RemoteJudge::default()).is_none());
    }

    #[test]
    fn a_question_larger_than_a_burst_is_sent_and_later_ones_wait() {
        // One token a second, bursts of six.
        let (limits, mut state) = (limits(0, 60), State::default());
        assert_eq!(limits.take(&mut state, 100.0, 30.0), Turn::Now);
        assert_eq!(limits.take(&mut state, 100.0, 2.0), Turn::Later(26.0));
        assert_eq!(limits.take(&mut state, 126.0, 2.0), Turn::Now);
    }

    #[test]
    fn both_limits_apply_and_a_pause_of_the_server_takes_precedence() {
        let (limits, mut state) = (limits(60, 600), State::default());
        // A tenth of a second per token, bursts of 60 tokens.
        assert_eq!(limits.take(&mut state, 0.0, 60.0), Turn::Now);
        assert_eq!(limits.take(&mut state, 0.0, 20.0), Turn::Later(2.0));
        let before = state;
        assert_eq!(before, State { requests: 1.0, tokens: 6.0, hold: 0.0 }, "nothing is taken of either");
        state.hold = 10.0;
        assert_eq!(limits.take(&mut state, 4.0, 20.0), Turn::Held(6.0));
        assert_eq!(limits.take(&mut state, 10.0, 20.0), Turn::Now);
    }
}

//! Pure rule for how often, and after what pause, a failed graph is rebuilt.

use std::time::Duration;

/// Limit on consecutive restarts of a failed graph, and the pauses before them.
#[derive(Debug, Clone, PartialEq)]
pub struct RestartPolicy {
    /// Number of consecutive failures that lead to a restart; the next one ends the run. The default is 3.
    pub max_restarts: u32,
    /// Pause before the first restart, which doubles each time. The default is 1 s.
    pub initial_backoff: Duration,
    /// Longest pause. The default is 60 s.
    pub max_backoff: Duration,
    /// Life of an incarnation after which the count of failures starts again. The default is 600 s.
    pub healthy_after: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            max_restarts: 3,
            initial_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(60),
            healthy_after: Duration::from_secs(600),
        }
    }
}

impl RestartPolicy {
    /// Returns the number of consecutive failures, given the number before and how long the failed incarnation lived.
    pub fn count(&self, before: u32, lived: Duration) -> u32 {
        if lived >= self.healthy_after { 1 } else { before + 1 }
    }

    /// Returns the pause before the restart after consecutive failure number `failures`; `None` if no restart is left.
    pub fn pause(&self, failures: u32) -> Option<Duration> {
        if failures > self.max_restarts {
            return None;
        }
        let doubled =
            self.initial_backoff.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
        Some(doubled.min(self.max_backoff))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_cap_within_the_budget() {
        let seconds = Duration::from_secs;
        let policy = RestartPolicy {
            max_restarts: 4,
            initial_backoff: seconds(1),
            max_backoff: seconds(5),
            healthy_after: seconds(100),
        };
        let pauses: Vec<_> = (1..=5).map(|n| policy.pause(n)).collect();
        assert_eq!(pauses, [Some(seconds(1)), Some(seconds(2)), Some(seconds(4)), Some(seconds(5)), None]);
        assert_eq!(policy.count(3, seconds(99)), 4);
        assert_eq!(policy.count(3, seconds(100)), 1);
    }
}

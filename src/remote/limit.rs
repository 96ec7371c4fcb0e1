//! A rate limit by token bucket.

use std::time::Duration;

/// Fills at a steady rate up to a minute's worth; what is taken beyond it must be waited for. Time is passed in.
#[derive(Debug, Clone)]
pub struct Bucket {
    per_second: f64,
    capacity: f64,
    level: f64,
    at: Duration,
}

impl Bucket {
    /// A bucket that gives `per_minute`, in bursts of up to a tenth of that; `None` for no limit (zero).
    pub fn new(per_minute: u64) -> Option<Self> {
        (per_minute > 0).then(|| {
            let capacity = (per_minute as f64 / 10.0).max(1.0);
            Self { per_second: per_minute as f64 / 60.0, capacity, level: capacity, at: Duration::ZERO }
        })
    }

    /// Takes `amount` at `now` and says how long to wait before using it. Who comes later waits behind.
    pub fn take(&mut self, now: Duration, amount: f64) -> Duration {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.capacity);
        self.at = self.at.max(now);
        self.level -= amount;
        Duration::from_secs_f64((-self.level / self.per_second).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_the_rate_holds() {
        // 60 a minute: one a second, bursts of six.
        let mut bucket = Bucket::new(60).unwrap();
        for _ in 0..6 {
            assert_eq!(bucket.take(Duration::ZERO, 1.0), Duration::ZERO);
        }
        assert_eq!(bucket.take(Duration::ZERO, 1.0), Duration::from_secs(1));
        assert_eq!(bucket.take(Duration::ZERO, 1.0), Duration::from_secs(2));
        assert_eq!(bucket.take(Duration::from_secs(5), 1.0), Duration::ZERO);
        // A question larger than a burst goes, and those behind it pay.
        assert_eq!(bucket.take(Duration::from_secs(100), 30.0), Duration::from_secs(24));
        assert!(Bucket::new(0).is_none());
    }
}

//! The online controller, which adjusts the number of concurrent completions and judge requests by the pressure in the
//! queues. Additive increase and multiplicative decrease (Chiu and Jain 1989) make it settle near the rate of the next
//! stage.

use std::sync::Arc;
use std::time::{Duration, Instant};

use preceptor_actors::RoleShare;
use serde_json::{Value, json};

use crate::observe::telemetry;
use crate::util::limit::AdjustableLimit;

/// Share of time from which a stage counts as waiting for its neighbour.
const WAITING_SHARE: f64 = 0.2;

/// Share of time from which a stage counts as fully busy.
const BUSY_SHARE: f64 = 0.8;

/// Share of failed exchanges from which a server counts as overloaded.
const FAILING_SHARE: f64 = 0.05;

/// The limits that are adjusted; `None` for a limit that does not exist in this graph.
#[derive(Debug, Clone, Default)]
pub struct AdjustableLimits {
    /// Concurrent sequences per rollout actor.
    pub rollout: Option<Arc<AdjustableLimit>>,
    /// Concurrent requests to remote judges.
    pub labeler: Option<Arc<AdjustableLimit>>,
}

/// Measurements since the previous call of [`Controller::adjust`].
#[derive(Debug, Clone, Copy)]
pub struct Pressure<'a> {
    /// Shares of each role's time by state.
    pub shares: &'a [RoleShare],
    /// Exchanges with remote judges that succeeded, and those that failed or were rate-limited.
    pub exchanges: [u64; 2],
}

/// A change of one limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adjustment {
    /// Name of the limit: `rollout` or `labeler`.
    pub limit: &'static str,
    /// Value before the change.
    pub from: usize,
    /// Value after the change.
    pub to: usize,
    /// Reason, as a clause for the log.
    pub reason: String,
}

impl Adjustment {
    /// Formats the change as a line of the log.
    pub fn line(&self) -> String {
        format!("controller: {} concurrency {} → {}: {}", self.limit, self.from, self.to, self.reason)
    }
}

/// Controller of a run's concurrency limits. The caller measures and calls [`Self::adjust`] when [`Self::is_due`].
pub struct Controller {
    limits: AdjustableLimits,
    every: Duration,
    /// Increment of the rollout limit: one group.
    group_size: usize,
    last: Instant,
    last_adjustments: [String; 2],
}

impl Controller {
    /// Creates a controller that is due again `every` interval, and sets the gauges of its limits.
    pub fn new(limits: AdjustableLimits, every: Duration, group_size: usize) -> Self {
        let controller = Self { limits, every, group_size, last: Instant::now(), last_adjustments: Default::default() };
        for (name, limit) in controller.named() {
            telemetry::controller_begins(name, limit.get());
        }
        controller
    }

    /// Returns whether the interval since the last adjustment has passed.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.every
    }

    /// Moves each limit up or down, or leaves it, by `pressure`, the measurements since the previous call, and restarts
    /// the interval of [`Self::is_due`]. Returns the changes, at most one for each limit.
    pub fn adjust(&mut self, pressure: Pressure<'_>) -> Vec<Adjustment> {
        self.last = Instant::now();
        let adjustments: Vec<Adjustment> =
            [self.rollout(pressure), self.labeler(pressure)].into_iter().flatten().collect();
        for (i, name) in ["rollout", "labeler"].into_iter().enumerate() {
            if let Some(one) = adjustments.iter().find(|one| one.limit == name) {
                telemetry::controller_move(name, one.to > one.from, one.to);
                self.last_adjustments[i] = format!("{} → {}: {}", one.from, one.to, one.reason);
            }
        }
        adjustments
    }

    /// Returns the limits with their bounds and last changes, for `/status`.
    pub fn to_json(&self) -> Value {
        let limit = |(name, limit): (&'static str, &Arc<AdjustableLimit>)| {
            let ((low, high), last) = (limit.bounds(), &self.last_adjustments[usize::from(name == "labeler")]);
            json!({ "knob": name, "value": limit.get(), "low": low, "high": high, "last_move": last })
        };
        self.named().map(limit).collect()
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &Arc<AdjustableLimit>)> {
        let limits = [("rollout", &self.limits.rollout), ("labeler", &self.limits.labeler)];
        limits.into_iter().filter_map(|(name, limit)| Some((name, limit.as_ref()?)))
    }

    /// Decreases the rollout limit while the next stage is full, since queued samples only become stale. Increases it
    /// while later stages wait for input.
    fn rollout(&self, pressure: Pressure<'_>) -> Option<Adjustment> {
        let share = |role: &str| pressure.shares.iter().find(|share| share.role == role);
        let own = share("rollout")?;
        let limit = self.limits.rollout.as_ref()?;
        if own.blocked >= WAITING_SHARE {
            let reason = format!("it is blocked on its output {:.0} % of the time", 100.0 * own.blocked);
            return set_limit("rollout", limit, 3 * limit.get() / 4, reason);
        }
        let waiting =
            ["label", "reward", "learn"].into_iter().filter_map(share).find(|one| one.idle >= WAITING_SHARE)?;
        let reason = format!("{} waits for input {:.0} % of the time", waiting.role, 100.0 * waiting.idle);
        if own.busy >= BUSY_SHARE { set_limit("rollout", limit, limit.get() + self.group_size, reason) } else { None }
    }

    /// Decreases the labeler limit while the server fails or limits the rate, and increases it while the label stage is
    /// busy.
    fn labeler(&self, pressure: Pressure<'_>) -> Option<Adjustment> {
        let limit = self.limits.labeler.as_ref()?;
        let [succeeded, failed] = pressure.exchanges;
        let failing = failed as f64 / (succeeded + failed).max(1) as f64;
        if failing >= FAILING_SHARE {
            let reason = format!("{:.0} % of the exchanges failed or were rate-limited", 100.0 * failing);
            return set_limit("labeler", limit, limit.get() / 2, reason);
        }
        let own = pressure.shares.iter().find(|share| share.role == "label").filter(|own| own.busy >= BUSY_SHARE)?;
        set_limit("labeler", limit, limit.get() + 1, format!("it is busy {:.0} % of the time", 100.0 * own.busy))
    }
}

/// Sets a limit. Returns `None` if its bounds leave the value unchanged.
fn set_limit(name: &'static str, limit: &AdjustableLimit, to: usize, reason: String) -> Option<Adjustment> {
    let from = limit.get();
    limit.set(to);
    let to = limit.get();
    (to != from).then_some(Adjustment { limit: name, from, to, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(role: &str, busy: f64, blocked: f64) -> RoleShare {
        RoleShare {
            role: role.into(),
            workers: 1,
            busy,
            idle: 1.0 - busy - blocked,
            blocked,
            admission: 0.0,
            items_per_s: 1.0,
        }
    }

    fn controller() -> Controller {
        let limits = AdjustableLimits {
            rollout: Some(Arc::new(AdjustableLimit::new(8, 32))),
            labeler: Some(Arc::new(AdjustableLimit::new(1, 16))),
        };
        Controller::new(limits, Duration::ZERO, 8)
    }

    fn adjust(controller: &mut Controller, shares: &[RoleShare], exchanges: [u64; 2]) -> Vec<(&'static str, usize)> {
        let adjustments = controller.adjust(Pressure { shares, exchanges });
        adjustments.into_iter().map(|one| (one.limit, one.to)).collect()
    }

    #[test]
    fn the_rollout_limit_decreases_when_blocked_and_increases_while_later_stages_wait() {
        let mut controller = controller();
        let blocked = [share("rollout", 0.5, 0.5), share("learn", 0.99, 0.0)];
        let history: Vec<_> = (0..6).flat_map(|_| adjust(&mut controller, &blocked, [10, 0])).collect();
        assert_eq!(history, [("rollout", 24), ("rollout", 18), ("rollout", 13), ("rollout", 9), ("rollout", 8)]);
        let waited = [share("rollout", 0.95, 0.0), share("learn", 0.5, 0.0)];
        let history: Vec<_> = (0..4).flat_map(|_| adjust(&mut controller, &waited, [10, 0])).collect();
        assert_eq!(history, [("rollout", 16), ("rollout", 24), ("rollout", 32)]);
        // No pressure in either direction: the limit stays.
        assert_eq!(adjust(&mut controller, &[share("rollout", 0.9, 0.05), share("learn", 0.95, 0.0)], [10, 0]), []);
    }

    #[test]
    fn the_labeler_limit_is_halved_on_failures_and_incremented_later() {
        let mut controller = controller();
        let busy = [share("label", 0.95, 0.0)];
        assert_eq!(adjust(&mut controller, &busy, [90, 10]), [("labeler", 8)]);
        assert_eq!(adjust(&mut controller, &busy, [90, 10]), [("labeler", 4)]);
        assert_eq!(adjust(&mut controller, &busy, [100, 0]), [("labeler", 5)]);
        assert_eq!(adjust(&mut controller, &[share("label", 0.3, 0.0)], [100, 0]), []);
        assert!(controller.to_json()[1]["last_move"].as_str().unwrap().contains("busy 95 %"));
    }

    #[test]
    fn the_rollout_limit_settles_near_the_rate_of_the_next_stage() {
        // A learner that takes 20 concurrent completions: the sampler blocks above, the learner waits below.
        let mut controller = controller();
        let mut history = Vec::new();
        for _ in 0..60 {
            let now = controller.limits.rollout.as_ref().unwrap().get() as f64;
            let (made, taken) = (now, 20.0);
            let blocked = (1.0 - taken / made).max(0.0);
            let idle = (1.0 - made / taken).max(0.0);
            let shares = [share("rollout", 1.0 - blocked, blocked), share("learn", 1.0 - idle, 0.0)];
            controller.adjust(Pressure { shares: &shares, exchanges: [0, 0] });
            history.push(now);
        }
        let late = &history[20..];
        assert!(late.iter().all(|now| (14.0..=27.0).contains(now)), "{late:?}");
    }
}

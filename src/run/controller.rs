//! The online controller: moves how many completions are sampled and how many questions are asked at once, by the pressure in
//! the queues. Additive up, multiplicative down (Chiu and Jain 1989), so that it settles near what the next stage takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use preceptor_actors::RoleShare;
use serde_json::{Value, json};

use crate::observe::telemetry;
use crate::util::limit::AdjustableLimit;

/// A stage that waits at least this share of the time waits for somebody.
const WAITS: f64 = 0.2;

/// A stage that works at least this share of the time has no time left.
const FULL: f64 = 0.8;

/// Share of failed exchanges from which a server is asked too much.
const FAILING: f64 = 0.05;

/// What can be turned, where there is somebody to turn it for.
#[derive(Debug, Clone, Default)]
pub struct AdjustableLimits {
    /// Sequences that a rollout actor has side by side.
    pub rollout: Option<Arc<AdjustableLimit>>,
    /// Requests to remote judges in flight.
    pub labeler: Option<Arc<AdjustableLimit>>,
}

/// What is known of the time since it looked last.
#[derive(Debug, Clone, Copy)]
pub struct Pressure<'a> {
    /// Where each role's time went.
    pub shares: &'a [RoleShare],
    /// Exchanges with remote judges that ended well, and those that did not.
    pub exchanges: [u64; 2],
}

/// One change of a knob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Which: `rollout` or `labeler`.
    pub knob: &'static str,
    /// From this value.
    pub from: usize,
    /// To this one.
    pub to: usize,
    /// Why.
    pub why: String,
}

impl Move {
    /// In a line.
    pub fn line(&self) -> String {
        format!("controller: {} concurrency {} → {}: {}", self.knob, self.from, self.to, self.why)
    }
}

/// Turns the knobs from time to time.
pub struct Controller {
    knobs: AdjustableLimits,
    every: Duration,
    /// What one step up adds to the sequences side by side: a group.
    group_size: usize,
    last: Instant,
    moves: [String; 2],
}

impl Controller {
    /// Looks each `every`.
    pub fn new(knobs: AdjustableLimits, every: Duration, group_size: usize) -> Self {
        let controller = Self { knobs, every, group_size, last: Instant::now(), moves: Default::default() };
        for (name, knob) in controller.named() {
            telemetry::controller_begins(name, knob.get());
        }
        controller
    }

    /// Whether it is time to look.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.every
    }

    /// Looks, and turns what should be turned.
    pub fn look(&mut self, pressure: Pressure<'_>) -> Vec<Move> {
        self.last = Instant::now();
        let moves: Vec<Move> = [self.rollout(pressure), self.labeler(pressure)].into_iter().flatten().collect();
        for (i, name) in ["rollout", "labeler"].into_iter().enumerate() {
            if let Some(one) = moves.iter().find(|one| one.knob == name) {
                telemetry::controller_move(name, one.to > one.from, one.to);
                self.moves[i] = format!("{} → {}: {}", one.from, one.to, one.why);
            }
        }
        moves
    }

    /// Where the knobs stand.
    pub fn to_json(&self) -> Value {
        let knob = |(name, knob): (&'static str, &Arc<AdjustableLimit>)| {
            let ((low, high), last) = (knob.bounds(), &self.moves[usize::from(name == "labeler")]);
            json!({ "knob": name, "value": knob.get(), "low": low, "high": high, "last_move": last })
        };
        self.named().map(knob).collect()
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &Arc<AdjustableLimit>)> {
        let knobs = [("rollout", &self.knobs.rollout), ("labeler", &self.knobs.labeler)];
        knobs.into_iter().filter_map(|(name, knob)| Some((name, knob.as_ref()?)))
    }

    /// Fewer while nobody takes what is sampled: what waits only grows old. More while others wait for it.
    fn rollout(&self, pressure: Pressure<'_>) -> Option<Move> {
        let share = |role: &str| pressure.shares.iter().find(|share| share.role == role);
        let own = share("rollout")?;
        let knob = self.knobs.rollout.as_ref()?;
        if own.blocked >= WAITS {
            let why = format!("it waits for room in its output {:.0} % of the time", 100.0 * own.blocked);
            return turn("rollout", knob, 3 * knob.get() / 4, why);
        }
        let waits = ["label", "reward", "learn"].into_iter().filter_map(share).find(|one| one.idle >= WAITS)?;
        let why = format!("{} waits for input {:.0} % of the time", waits.role, 100.0 * waits.idle);
        if own.busy >= FULL { turn("rollout", knob, knob.get() + self.group_size, why) } else { None }
    }

    /// Fewer while the server fails or limits its rate, more while groups wait for it.
    fn labeler(&self, pressure: Pressure<'_>) -> Option<Move> {
        let knob = self.knobs.labeler.as_ref()?;
        let [well, failed] = pressure.exchanges;
        let failing = failed as f64 / (well + failed).max(1) as f64;
        if failing >= FAILING {
            let why = format!("{:.0} % of the exchanges failed or were refused for their rate", 100.0 * failing);
            return turn("labeler", knob, knob.get() / 2, why);
        }
        let own = pressure.shares.iter().find(|share| share.role == "label").filter(|own| own.busy >= FULL)?;
        turn("labeler", knob, knob.get() + 1, format!("it works {:.0} % of the time", 100.0 * own.busy))
    }
}

/// Turns a knob; nothing is said of one that is at its bound already.
fn turn(name: &'static str, knob: &AdjustableLimit, to: usize, why: String) -> Option<Move> {
    let from = knob.get();
    knob.set(to);
    let to = knob.get();
    (to != from).then_some(Move { knob: name, from, to, why })
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
        let knobs = AdjustableLimits {
            rollout: Some(Arc::new(AdjustableLimit::new(8, 32))),
            labeler: Some(Arc::new(AdjustableLimit::new(1, 16))),
        };
        Controller::new(knobs, Duration::ZERO, 8)
    }

    fn look(controller: &mut Controller, shares: &[RoleShare], exchanges: [u64; 2]) -> Vec<(&'static str, usize)> {
        let moves = controller.look(Pressure { shares, exchanges });
        moves.into_iter().map(|one| (one.knob, one.to)).collect()
    }

    #[test]
    fn sampling_falls_by_parts_while_nobody_takes_it_and_rises_by_groups_while_others_wait() {
        let mut controller = controller();
        let blocked = [share("rollout", 0.5, 0.5), share("learn", 0.99, 0.0)];
        let course: Vec<_> = (0..6).flat_map(|_| look(&mut controller, &blocked, [10, 0])).collect();
        assert_eq!(course, [("rollout", 24), ("rollout", 18), ("rollout", 13), ("rollout", 9), ("rollout", 8)]);
        let waited = [share("rollout", 0.95, 0.0), share("learn", 0.5, 0.0)];
        let course: Vec<_> = (0..4).flat_map(|_| look(&mut controller, &waited, [10, 0])).collect();
        assert_eq!(course, [("rollout", 16), ("rollout", 24), ("rollout", 32)]);
        // Neither: it stays.
        assert_eq!(look(&mut controller, &[share("rollout", 0.9, 0.05), share("learn", 0.95, 0.0)], [10, 0]), []);
    }

    #[test]
    fn a_server_that_refuses_is_asked_half_as_much_and_one_more_at_a_time_later() {
        let mut controller = controller();
        let busy = [share("label", 0.95, 0.0)];
        assert_eq!(look(&mut controller, &busy, [90, 10]), [("labeler", 8)]);
        assert_eq!(look(&mut controller, &busy, [90, 10]), [("labeler", 4)]);
        assert_eq!(look(&mut controller, &busy, [100, 0]), [("labeler", 5)]);
        assert_eq!(look(&mut controller, &[share("label", 0.3, 0.0)], [100, 0]), []);
        assert!(controller.to_json()[1]["last_move"].as_str().unwrap().contains("works 95 %"));
    }

    #[test]
    fn it_settles_where_the_next_stage_takes_all_and_no_more() {
        // What is sampled at once, against a learner that takes 20 at once: blocked above, waiting below.
        let mut controller = controller();
        let mut course = Vec::new();
        for _ in 0..60 {
            let now = controller.knobs.rollout.as_ref().unwrap().get() as f64;
            let (made, taken) = (now, 20.0);
            let blocked = (1.0 - taken / made).max(0.0);
            let idle = (1.0 - made / taken).max(0.0);
            let shares = [share("rollout", 1.0 - blocked, blocked), share("learn", 1.0 - idle, 0.0)];
            controller.look(Pressure { shares: &shares, exchanges: [0, 0] });
            course.push(now);
        }
        let late = &course[20..];
        assert!(late.iter().all(|now| (14.0..=27.0).contains(now)), "{late:?}");
    }
}

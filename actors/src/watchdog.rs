//! Who holds a run that makes no progress. Pure.

use std::time::Duration;

use crate::pulse::State;
use crate::report::{EdgeReport, StageReport, Stall};

/// Rules for stalls.
#[derive(Debug, Clone, PartialEq)]
pub struct WatchdogPolicy {
    /// Without any progress for this long, the run is stalled.
    pub stall_after: Duration,
    /// A stall of this length restarts the graph; `None` only tells.
    pub restart_after: Option<Duration>,
}

impl Default for WatchdogPolicy {
    fn default() -> Self {
        Self { stall_after: Duration::from_secs(120), restart_after: Some(Duration::from_secs(600)) }
    }
}

/// The stage that holds the run, when no stage has made progress for `stall_after`.
///
/// A stage that works and shows no progress holds it. If none works, waits are followed from the last stage:
/// one that waits for input waits for whoever gives to that edge, one that waits for room waits for whoever takes.
pub fn stalled(policy: &WatchdogPolicy, stages: &[StageReport], edges: &[EdgeReport]) -> Option<Stall> {
    let alive: Vec<&StageReport> = stages.iter().filter(|stage| stage.state != State::Ended).collect();
    let quiet = alive.iter().map(|stage| stage.last_beat_s).fold(f64::INFINITY, f64::min);
    if alive.is_empty() || quiet < policy.stall_after.as_secs_f64() {
        return None;
    }
    let working = alive.iter().filter(|stage| matches!(stage.state, State::Busy | State::Starting));
    let holder = working
        .max_by(|a, b| a.last_beat_s.total_cmp(&b.last_beat_s))
        .or_else(|| follow(alive.last()?, &alive, edges))
        .or(alive.last())?;
    Some(Stall { stage: holder.name.clone(), state: holder.state, for_s: quiet })
}

/// Follows waits from `stage` until they end or go in a circle.
fn follow<'a>(
    stage: &'a &'a StageReport,
    alive: &'a [&'a StageReport],
    edges: &[EdgeReport],
) -> Option<&'a &'a StageReport> {
    let mut at = stage;
    for _ in 0..alive.len() {
        let next = edges.iter().find_map(|edge| {
            let others = match at.state {
                State::Input if edge.to.contains(&at.name) => &edge.from,
                State::Output if edge.from.contains(&at.name) => &edge.to,
                _ => return None,
            };
            alive.iter().find(|other| others.contains(&other.name))
        });
        match next {
            Some(next) => at = next,
            None => break,
        }
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, state: State, last_beat_s: f64) -> StageReport {
        StageReport {
            name: name.into(),
            role: name.into(),
            state,
            note: String::new(),
            since_s: last_beat_s,
            items_in: 0,
            items_out: 0,
            busy_s: 0.0,
            idle_s: 0.0,
            blocked_s: 0.0,
            admission_s: 0.0,
            last_beat_s,
        }
    }

    fn edge(from: &str, to: &str) -> EdgeReport {
        EdgeReport {
            name: format!("{from}-{to}"),
            from: vec![from.into()],
            to: vec![to.into()],
            depth: 0,
            capacity: 1,
            items: 0,
            refused: 0,
            send_blocked_s: 0.0,
            recv_blocked_s: 0.0,
            high_water: 0,
            age_s: 0.0,
            waited_s: 0.0,
        }
    }

    #[test]
    fn names_who_holds_the_run() {
        let policy = WatchdogPolicy { stall_after: Duration::from_secs(10), restart_after: None };
        let edges = [edge("a", "b"), edge("b", "c")];
        let holder = |a, b, c| stalled(&policy, &[a, b, c], &edges).map(|stall| stall.stage);
        use State::{Admission, Busy, Ended, Input, Output};
        // Somebody moved a moment ago.
        assert_eq!(holder(stage("a", Busy, 99.0), stage("b", Input, 99.0), stage("c", Busy, 1.0)), None);
        // b works and shows nothing; the others wait for it.
        assert_eq!(holder(stage("a", Output, 50.0), stage("b", Busy, 60.0), stage("c", Input, 55.0)), Some("b".into()));
        // Nobody works: c waits for b, b for a, a for admission.
        assert_eq!(
            holder(stage("a", Admission, 50.0), stage("b", Input, 60.0), stage("c", Input, 55.0)),
            Some("a".into())
        );
        // The source has ended, so b waits for nobody.
        assert_eq!(holder(stage("a", Ended, 50.0), stage("b", Input, 60.0), stage("c", Input, 55.0)), Some("b".into()));
    }
}

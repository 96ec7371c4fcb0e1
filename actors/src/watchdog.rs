//! Pure rule that finds the stage that blocks a graph without progress.

use std::time::Duration;

use crate::pulse::State;
use crate::report::{EdgeReport, StageReport, Stall};

/// Times without progress after which a graph counts as stalled and is restarted.
#[derive(Debug, Clone, PartialEq)]
pub struct WatchdogPolicy {
    /// Time without any progress after which the graph is stalled. The default is 120 s.
    pub stall_after: Duration,
    /// Length of a stall after which the graph is restarted; with `None` stalls are only reported. The default is 600
    /// s.
    pub restart_after: Option<Duration>,
}

impl Default for WatchdogPolicy {
    fn default() -> Self {
        Self { stall_after: Duration::from_secs(120), restart_after: Some(Duration::from_secs(600)) }
    }
}

/// Returns the stage that blocks the graph if no stage has made progress for `stall_after`.
///
/// A stage that works without a sign of progress blocks the graph. If none works, waits are followed from the last
/// stage: a stage that waits for input waits for the producers of that edge, one that waits for room for its consumers.
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

/// Follows waits from `stage` until they end or form a cycle.
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
    fn names_the_stage_that_blocks_the_graph() {
        let policy = WatchdogPolicy { stall_after: Duration::from_secs(10), restart_after: None };
        let edges = [edge("a", "b"), edge("b", "c")];
        let holder = |a, b, c| stalled(&policy, &[a, b, c], &edges).map(|stall| stall.stage);
        use State::{Admission, Busy, Ended, Input, Output};
        // One stage made progress one second ago.
        assert_eq!(holder(stage("a", Busy, 99.0), stage("b", Input, 99.0), stage("c", Busy, 1.0)), None);
        // b works without a sign of progress; the others wait for it.
        assert_eq!(holder(stage("a", Output, 50.0), stage("b", Busy, 60.0), stage("c", Input, 55.0)), Some("b".into()));
        // No stage works: c waits for b, b for a, a for admission.
        assert_eq!(
            holder(stage("a", Admission, 50.0), stage("b", Input, 60.0), stage("c", Input, 55.0)),
            Some("a".into())
        );
        // The source has ended, so b waits for no stage.
        assert_eq!(holder(stage("a", Ended, 50.0), stage("b", Input, 60.0), stage("c", Input, 55.0)), Some("b".into()));
    }
}

//! Reports of a graph's state for observers.

use serde::Serialize;

use crate::pulse::State;

/// State of a graph at one moment. Times are in seconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GraphReport {
    /// Number of the incarnation, from zero.
    pub incarnation: u64,
    /// Time since this incarnation began.
    pub uptime_s: f64,
    /// Number of restarts so far.
    pub restarts: u32,
    /// Stages, in the order in which they were added.
    pub stages: Vec<StageReport>,
    /// Edges, in the order in which they were created.
    pub edges: Vec<EdgeReport>,
    /// Stall of the graph, if it makes no progress.
    pub stalled: Option<Stall>,
    /// The last spans of work, at most 256.
    pub timeline: Vec<Span>,
}

/// State of one stage. Times are in seconds.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// Name of the stage.
    pub name: String,
    /// Role, which several workers may share.
    pub role: String,
    /// Current state.
    pub state: State,
    /// Description of the current work, as set by the stage.
    pub note: String,
    /// Time in the current state.
    pub since_s: f64,
    /// Number of items taken and finished.
    pub items_in: u64,
    /// Number of items emitted.
    pub items_out: u64,
    /// Time spent working.
    pub busy_s: f64,
    /// Time spent waiting for input.
    pub idle_s: f64,
    /// Time spent waiting for room in the output edge.
    pub blocked_s: f64,
    /// Time spent waiting for the staleness bound.
    pub admission_s: f64,
    /// Time since the last sign of progress.
    pub last_beat_s: f64,
}

/// State of one edge. Times are in seconds.
#[derive(Debug, Clone, Serialize)]
pub struct EdgeReport {
    /// Name of the edge.
    pub name: String,
    /// Names of the producing stages.
    pub from: Vec<String>,
    /// Names of the consuming stages.
    pub to: Vec<String>,
    /// Number of items on the edge.
    pub depth: u64,
    /// Largest number of items that it can hold.
    pub capacity: usize,
    /// Number of items put on the edge so far.
    pub items: u64,
    /// Number of items that it refused because they were of another incarnation.
    pub refused: u64,
    /// Total time that senders waited.
    pub send_blocked_s: f64,
    /// Total time that receivers waited.
    pub recv_blocked_s: f64,
    /// Largest number of items that it has held.
    pub high_water: u64,
    /// Time that the oldest item has been on the edge.
    pub age_s: f64,
    /// Total time that the items taken so far had spent on the edge.
    pub waited_s: f64,
}

/// Stage that blocks a graph without progress.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stall {
    /// Name of the stage.
    pub stage: String,
    /// State of the stage.
    pub state: State,
    /// Time in seconds since any stage made progress.
    pub for_s: f64,
}

/// Work of one stage on one item.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Span {
    /// Name of the stage.
    pub stage: String,
    /// Sequence number of the item.
    pub seq: u64,
    /// Version of the item.
    pub version: u64,
    /// Start, in seconds since the incarnation began.
    pub start_s: f64,
    /// End, in seconds since the incarnation began.
    pub end_s: f64,
}

/// Position of a reader in the spans of all stages, so that it gets each span once.
#[derive(Debug, Clone, Default)]
pub struct SpanCursor {
    pub(crate) incarnation: Option<u64>,
    pub(crate) counts: Vec<u64>,
    pub(crate) lost: u64,
}

impl SpanCursor {
    /// Returns the number of spans that were overwritten before this reader read them.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// Returns each role once, in the order in which it was first added.
pub fn roles(stages: &[StageReport]) -> Vec<&str> {
    let mut roles = Vec::new();
    for stage in stages {
        if !roles.contains(&stage.role.as_str()) {
            roles.push(stage.role.as_str());
        }
    }
    roles
}

/// Shares of time that the workers of a role spent in each state; they add up to one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoleShare {
    /// Name of the role.
    pub role: String,
    /// Number of workers.
    pub workers: usize,
    /// Share of time spent working.
    pub busy: f64,
    /// Share of time spent waiting for input.
    pub idle: f64,
    /// Share of time spent waiting for room in their output.
    pub blocked: f64,
    /// Share of time spent waiting for the staleness bound.
    pub admission: f64,
    /// Items per second that the workers finished together.
    pub items_per_s: f64,
}

/// Returns the shares of each role between `earlier` and `stages`, two reports of one incarnation, or since its
/// beginning if `earlier` is empty. A role whose workers have no accounted time is omitted.
pub fn shares(stages: &[StageReport], earlier: &[StageReport]) -> Vec<RoleShare> {
    let share = |role: &str| {
        let of: Vec<&StageReport> = stages.iter().filter(|stage| stage.role == role).collect();
        let sum = |part: &dyn Fn(&StageReport) -> f64| -> f64 {
            let before = |stage: &StageReport| earlier.iter().find(|other| other.name == stage.name).map_or(0.0, part);
            of.iter().map(|stage| (part(stage) - before(stage)).max(0.0)).sum()
        };
        let parts = [sum(&|s| s.busy_s), sum(&|s| s.idle_s), sum(&|s| s.blocked_s), sum(&|s| s.admission_s)];
        let total: f64 = parts.iter().sum();
        let [busy, idle, blocked, admission] = parts.map(|part| part / total);
        (total > 0.0).then(|| RoleShare {
            role: role.to_owned(),
            workers: of.len(),
            busy,
            idle,
            blocked,
            admission,
            items_per_s: sum(&|s| s.items_in.max(s.items_out) as f64) * of.len() as f64 / total,
        })
    };
    roles(stages).into_iter().filter_map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn stage(name: &str, role: &str, busy: f64, idle: f64, blocked: f64) -> StageReport {
        StageReport {
            name: name.into(),
            role: role.into(),
            state: State::Busy,
            note: String::new(),
            since_s: 0.0,
            items_in: 0,
            items_out: 0,
            busy_s: busy,
            idle_s: idle,
            blocked_s: blocked,
            admission_s: 0.0,
            last_beat_s: 0.0,
        }
    }

    #[test]
    fn a_role_is_listed_once_in_any_order_of_workers() {
        let stages = [
            stage("r0", "rollout", 1.0, 1.0, 0.0),
            stage("l", "learn", 2.0, 0.0, 0.0),
            stage("r1", "rollout", 1.0, 1.0, 0.0),
        ];
        assert_eq!(roles(&stages), ["rollout", "learn"]);
    }

    #[test]
    fn shares_cover_the_time_between_two_reports() {
        let earlier = [stage("r0", "rollout", 100.0, 0.0, 0.0), stage("l", "learn", 0.0, 0.0, 0.0)];
        let mut now = [stage("r0", "rollout", 101.0, 3.0, 0.0), stage("l", "learn", 0.0, 0.0, 0.0)];
        now[0].items_in = 8;
        let [share] = &shares(&now, &earlier)[..] else { panic!("a role that has done nothing has no shares") };
        assert_eq!((share.busy, share.idle, share.blocked), (0.25, 0.75, 0.0));
        assert_eq!(share.items_per_s, 2.0);
    }
}

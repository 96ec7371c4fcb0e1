//! What can be seen of a graph from outside.

use serde::Serialize;

use crate::pulse::State;

/// A graph at one moment. Times are seconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GraphReport {
    /// Incarnation, from zero.
    pub incarnation: u64,
    /// Time since this incarnation began.
    pub uptime_s: f64,
    /// Restarts so far.
    pub restarts: u32,
    /// Every stage, in the order it was added.
    pub stages: Vec<StageReport>,
    /// Every edge, in the order it was made.
    pub edges: Vec<EdgeReport>,
    /// Who holds the run, when it makes no progress.
    pub stalled: Option<Stall>,
    /// The last few hundred spans of work.
    pub timeline: Vec<Span>,
}

/// One stage.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// The role it shares with other workers.
    pub role: String,
    /// What it is doing.
    pub state: State,
    /// What it says it is doing.
    pub note: String,
    /// How long it has been doing it.
    pub since_s: f64,
    /// Items it has finished.
    pub items_in: u64,
    /// Items it has given.
    pub items_out: u64,
    /// Time spent working.
    pub busy_s: f64,
    /// Time spent waiting for input.
    pub idle_s: f64,
    /// Time spent waiting for room in its output.
    pub blocked_s: f64,
    /// Time spent waiting for the staleness bound.
    pub admission_s: f64,
    /// Time since its last progress.
    pub last_beat_s: f64,
}

/// One edge.
#[derive(Debug, Clone, Serialize)]
pub struct EdgeReport {
    /// Its name.
    pub name: String,
    /// Stages that give to it.
    pub from: Vec<String>,
    /// Stages that take from it.
    pub to: Vec<String>,
    /// Items on it.
    pub depth: u64,
    /// Most items it holds.
    pub capacity: usize,
    /// Items that were put on it.
    pub items: u64,
    /// Items of another incarnation that it refused.
    pub refused: u64,
    /// Time that senders waited.
    pub send_blocked_s: f64,
    /// Time that receivers waited.
    pub recv_blocked_s: f64,
    /// Most items it has held.
    pub high_water: u64,
    /// How long the oldest item has been on it.
    pub age_s: f64,
    /// Time that the items taken from it had spent on it, together.
    pub waited_s: f64,
}

/// Who holds a run that makes no progress.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stall {
    /// The stage.
    pub stage: String,
    /// What it is doing.
    pub state: State,
    /// For how long nothing has moved.
    pub for_s: f64,
}

/// One `process` call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Span {
    /// The stage.
    pub stage: String,
    /// The item.
    pub seq: u64,
    /// The item's version.
    pub version: u64,
    /// When it began, in seconds since its incarnation did.
    pub start_s: f64,
    /// When it ended.
    pub end_s: f64,
}

/// Which spans a reader has had, so that it is given each once.
#[derive(Debug, Clone, Default)]
pub struct SpansSeen {
    pub(crate) incarnation: Option<u64>,
    pub(crate) counts: Vec<u64>,
    pub(crate) lost: u64,
}

impl SpansSeen {
    /// Spans that came and went between two readings, since this reader began.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// Each role once, in the order in which it was first added.
pub fn roles(stages: &[StageReport]) -> Vec<&str> {
    let mut roles = Vec::new();
    for stage in stages {
        if !roles.contains(&stage.role.as_str()) {
            roles.push(stage.role.as_str());
        }
    }
    roles
}

/// How the workers of a role spent their time; the shares add up to one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoleShare {
    /// The role.
    pub role: String,
    /// Its workers.
    pub workers: usize,
    /// Working.
    pub busy: f64,
    /// Waiting for input.
    pub idle: f64,
    /// Waiting for room in their output.
    pub blocked: f64,
    /// Waiting for the staleness bound.
    pub admission: f64,
    /// Items that they finished, together.
    pub items_per_s: f64,
}

/// How each role's workers spent their time between `earlier` and `stages`, two reports of one incarnation; since it
/// began where `earlier` is empty. A role whose workers did nothing yet is left out.
pub fn shares(stages: &[StageReport], earlier: &[StageReport]) -> Vec<RoleShare> {
    let share = |role: &str| {
        let of: Vec<&StageReport> = stages.iter().filter(|stage| stage.role == role).collect();
        let sum = |part: &dyn Fn(&StageReport) -> f64| -> f64 {
            let before = |stage: &StageReport| earlier.iter().find(|one| one.name == stage.name).map_or(0.0, part);
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
    fn a_role_is_told_once_wherever_its_workers_stand() {
        let stages = [
            stage("r0", "rollout", 1.0, 1.0, 0.0),
            stage("l", "learn", 2.0, 0.0, 0.0),
            stage("r1", "rollout", 1.0, 1.0, 0.0),
        ];
        assert_eq!(roles(&stages), ["rollout", "learn"]);
    }

    #[test]
    fn shares_are_those_of_the_time_between_two_reports() {
        let earlier = [stage("r0", "rollout", 100.0, 0.0, 0.0), stage("l", "learn", 0.0, 0.0, 0.0)];
        let mut now = [stage("r0", "rollout", 101.0, 3.0, 0.0), stage("l", "learn", 0.0, 0.0, 0.0)];
        now[0].items_in = 8;
        let [share] = &shares(&now, &earlier)[..] else { panic!("a role that has done nothing has no shares") };
        assert_eq!((share.busy, share.idle, share.blocked), (0.25, 0.75, 0.0));
        assert_eq!(share.items_per_s, 2.0);
    }
}

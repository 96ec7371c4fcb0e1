//! The workers of a run, as its coordinator sees them.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::protocol::Pulse;
use crate::observe::telemetry;
use crate::pipeline::served::ServerReport;
use crate::status;
use crate::util::mutex::lock;

/// Time without a sign of life after which a worker counts as gone.
const GONE: Duration = Duration::from_secs(30);
/// Time after which a worker that is gone is no longer shown.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// Number of refused results after which a worker is shut out.
pub(super) const REFUSALS: u64 = 3;

/// Time after which a worker that rests takes work again, because it may have become faster.
const REST: Duration = Duration::from_secs(600);
/// Number of workers with a known pace from which on slow ones rest. Among few, the work of a slow one counts more than the
/// time for which others wait for it.
const PACED: usize = 8;

/// Role of a worker that answers for judges.
pub(super) const LABEL: &str = "label";

/// Workers by name.
#[derive(Default)]
pub struct Roster(Mutex<BTreeMap<String, Worker>>);

#[derive(Default)]
struct Worker {
    pulse: Pulse,
    /// Number of results taken.
    results: u64,
    /// Number of results refused.
    refused: u64,
    /// Reason for which the last result was refused.
    why: String,
    /// Time of the last sign of life; `None` if only results are known.
    heard: Option<Instant>,
    /// True from a sign of life until the worker leaves or is gone.
    here: bool,
    tokens_per_s: f64,
    /// Time since when the worker rests because it is slow.
    rests: Option<Instant>,
    /// True once the worker was told to take work after it joined. It may rest by order of an earlier coordinator, or from
    /// before it left.
    freed: bool,
}

impl Worker {
    /// Sets the metrics of the worker.
    fn measure(&self, name: &str) {
        let pulse = &self.pulse;
        let slots = if self.here { [pulse.used, pulse.slots.saturating_sub(pulse.used)] } else { [0, 0] };
        telemetry::worker(name, self.here, slots, pulse.version, pulse.tokens, pulse.bytes);
    }

    fn report(&self, name: &str) -> ServerReport {
        let pulse = &self.pulse;
        let silent = self.heard.map_or(0, |heard| heard.elapsed().as_secs());
        let (condition, why) = if self.refused >= REFUSALS {
            ("rejected", format!("{} of its results were refused, the last one because {}", self.refused, self.why))
        } else if !self.here {
            ("down", format!("has given no sign of life for {silent} s"))
        } else if pulse.version.is_none() && pulse.role != LABEL {
            ("starting", pulse.waits.clone())
        } else {
            ("ready", pulse.waits.clone())
        };
        ServerReport {
            url: format!("{name} on {}", pulse.host),
            condition,
            why,
            version: pulse.version,
            under_way: if self.here { pulse.used } else { 0 },
            completions: pulse.completions,
            tokens: pulse.tokens,
            tokens_per_s: if self.here { self.tokens_per_s } else { 0.0 },
            canary: None,
            hand_over_s: None,
        }
    }
}

impl Roster {
    /// Takes signs of life, which are JSON objects by the name of the worker, and notes who is gone.
    pub(super) fn hear(&self, told: Vec<(String, Vec<u8>)>) {
        let mut workers = lock(&self.0);
        for (name, pulse) in told {
            let Ok(pulse) = serde_json::from_slice::<Pulse>(&pulse) else { continue };
            let worker = workers.entry(name.clone()).or_default();
            if pulse.leaves {
                status!("workers   {name} has left");
                worker.here = false;
                worker.measure(&name);
                workers.remove(&name);
                continue;
            }
            if !worker.here {
                (worker.rests, worker.freed) = (None, false);
                status!("workers   {name} has joined: {} on {}, {} slots", pulse.role, pulse.host, pulse.slots);
            }
            // A worker that starts again counts from zero.
            let passed = worker.heard.filter(|_| worker.here).map(|heard| heard.elapsed().as_secs_f64());
            worker.tokens_per_s = passed
                .filter(|passed| *passed > 0.0)
                .map_or(0.0, |passed| pulse.tokens.saturating_sub(worker.pulse.tokens) as f64 / passed);
            (worker.pulse, worker.heard, worker.here) = (pulse, Some(Instant::now()), true);
            worker.measure(&name);
        }
        for (name, worker) in workers.iter_mut().filter(|(_, worker)| worker.here) {
            if worker.heard.is_some_and(|heard| heard.elapsed() > GONE) {
                status!("workers   {name} has given no sign of life for {} s", GONE.as_secs());
                worker.here = false;
                worker.measure(name);
            }
        }
        workers.retain(|_, worker| {
            worker.here || worker.refused > 0 || worker.heard.is_none_or(|heard| heard.elapsed() < FORGOTTEN)
        });
    }

    /// Returns the workers that are to rest from now on, each with the reason, and those that are to take work again, with an
    /// empty text: a worker rests for [`REST`] if a token takes more than `slowest` times as long as the median.
    pub(super) fn rests(&self, slowest: f64) -> Vec<(String, String)> {
        let mut workers = lock(&self.0);
        let mut changes = Vec::new();
        for (name, worker) in workers.iter_mut() {
            let rested = worker.rests.is_some_and(|since| since.elapsed() >= REST);
            if rested {
                (worker.rests, worker.pulse.pace) = (None, None);
            }
            if rested || worker.here && !worker.freed {
                worker.freed = true;
                changes.push((name.clone(), String::new()));
            }
        }
        let pace = |worker: &Worker| worker.pulse.pace.filter(|pace| worker.here && *pace > 0.0);
        let mut paces: Vec<f64> = workers.values().filter_map(pace).collect();
        if slowest <= 0.0 || paces.len() < PACED {
            return changes;
        }
        paces.sort_by(f64::total_cmp);
        let median = paces[paces.len() / 2];
        for (name, worker) in workers.iter_mut().filter(|(_, worker)| worker.rests.is_none()) {
            let times = pace(worker).map_or(1.0, |pace| median / pace);
            if times > slowest {
                worker.rests = Some(Instant::now());
                let why =
                    format!("rests, because a token takes it {times:.1} times as long as the median of the workers");
                status!("workers   {name} {why}");
                changes.push((name.clone(), why));
            }
        }
        changes
    }

    /// Counts a result of `worker` that was taken.
    pub(super) fn taken(&self, worker: &str) {
        lock(&self.0).entry(worker.to_owned()).or_default().results += 1;
    }

    /// Counts a result of `worker` that was refused because of `why`. Returns true if the worker is to be shut out now.
    pub(super) fn refused(&self, worker: &str, why: &str) -> bool {
        let mut workers = lock(&self.0);
        let worker = workers.entry(worker.to_owned()).or_default();
        why.clone_into(&mut worker.why);
        worker.refused += 1;
        worker.refused == REFUSALS
    }

    pub(super) fn is_shut_out(&self, worker: &str) -> bool {
        lock(&self.0).get(worker).is_some_and(|worker| worker.refused >= REFUSALS)
    }

    /// Returns why workers of this role do no work: empty if they do, `None` if there is none.
    pub(super) fn reason_of_wait(&self, role: &str) -> Option<String> {
        let workers = lock(&self.0);
        let here: Vec<_> = workers.iter().filter(|(_, worker)| worker.here && worker.pulse.role == role).collect();
        if here.is_empty() {
            return None;
        }
        if here.iter().any(|(_, worker)| worker.pulse.waits.is_empty()) {
            return Some(String::new());
        }
        let reasons: Vec<String> = here.iter().map(|(name, worker)| format!("{name} {}", worker.pulse.waits)).collect();
        Some(reasons.join("; "))
    }

    /// Returns the state of each worker that was heard of lately, for the status page.
    pub fn report(&self) -> Vec<ServerReport> {
        lock(&self.0).iter().map(|(name, worker)| worker.report(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pulse(tokens: u64, waits: &str, leaves: bool) -> Vec<u8> {
        let pulse = Pulse {
            role: "rollout".into(),
            host: "h".into(),
            version: Some(3),
            tokens,
            waits: waits.into(),
            leaves,
            slots: 8,
            ..Pulse::default()
        };
        serde_json::to_vec(&pulse).unwrap()
    }

    #[test]
    fn workers_are_shown_while_they_are_here_and_when_they_are_shut_out() {
        let roster = Roster::default();
        assert_eq!(roster.reason_of_wait("rollout"), None);
        roster.hear(vec![("a".into(), pulse(0, "waits for weights", false)), ("b".into(), b"not json".to_vec())]);
        assert_eq!(roster.reason_of_wait("rollout"), Some("a waits for weights".into()));
        roster.hear(vec![("a".into(), pulse(100, "", false))]);
        assert_eq!(roster.reason_of_wait("rollout"), Some(String::new()));
        let shown = &roster.report()[0];
        assert_eq!((shown.url.as_str(), shown.condition, shown.version), ("a on h", "ready", Some(3)));
        assert!(shown.tokens_per_s > 0.0);
        assert_eq!([1, 2, 3, 4].map(|_| roster.refused("liar", "of its lies")), [false, false, true, false]);
        assert!(roster.is_shut_out("liar") && !roster.is_shut_out("a"));
        assert_eq!(roster.report()[1].condition, "rejected");
        roster.hear(vec![("a".into(), pulse(200, "", true))]);
        assert!(roster.report().iter().all(|worker| !worker.url.starts_with("a ")));
    }

    #[test]
    fn workers_that_are_much_slower_than_the_median_rest_for_a_while() {
        let roster = Roster::default();
        let paced = |pace: f64| {
            let pulse = Pulse { role: "rollout".into(), pace: Some(pace), ..Pulse::default() };
            serde_json::to_vec(&pulse).unwrap()
        };
        let paces = [30.0, 31.0, 9.0, 29.0, 33.0, 12.0, 30.0];
        let names = ["a", "b", "c", "d", "e", "f", "g"].map(String::from);
        roster.hear(names.into_iter().zip(paces.map(paced)).collect());
        let freed = roster.rests(3.0);
        assert_eq!(
            freed.len(),
            7,
            "a worker that joins may work, and seven are too few for another to rest: {freed:?}"
        );
        assert!(freed.iter().all(|(_, why)| why.is_empty()) && roster.rests(3.0).is_empty());
        roster.hear(vec![("h".into(), paced(28.0)), ("i".into(), serde_json::to_vec(&Pulse::default()).unwrap())]);
        assert_eq!(roster.rests(0.0).len(), 2, "those that have joined");
        assert!(roster.rests(0.0).is_empty());
        let changes = roster.rests(3.0);
        let [(name, why)] = changes.as_slice() else { panic!("{changes:?}") };
        assert!(name == "c" && why.contains("3.3 times as long"), "{name} {why}");
        assert!(roster.rests(3.0).is_empty(), "it is told once");
        lock(&roster.0).get_mut("c").unwrap().rests = Instant::now().checked_sub(REST);
        assert_eq!(roster.rests(3.0), [("c".to_owned(), String::new())]);
        // One that leaves while it rests, and comes again, may work.
        roster.hear(vec![("c".into(), paced(9.0))]);
        assert_eq!(roster.rests(3.0).len(), 1);
        let leaves = Pulse { role: "rollout".into(), leaves: true, ..Pulse::default() };
        roster.hear(vec![("c".into(), serde_json::to_vec(&leaves).unwrap()), ("c".into(), paced(30.0))]);
        assert_eq!(roster.rests(3.0), [("c".to_owned(), String::new())]);
    }
}

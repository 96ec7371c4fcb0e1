//! What is expected of a plan: the time of each stage for a group, by threads and company, and what limits the whole.

use super::plan::Plan;
use super::{Facts, Measured, Role};

/// How long a stage works on a group.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    /// Seconds that more threads do not shorten.
    serial: f64,
    /// Seconds that they share (Amdahl 1967).
    shared: f64,
}

impl Cost {
    fn with(self, threads: usize) -> f64 {
        self.serial + self.shared / threads as f64
    }
}

/// Fitted to what a machine was seen to do.
#[derive(Debug, Clone)]
pub struct Model {
    facts: Facts,
    costs: [Cost; 4],
    /// Share of a group's sampling time that groups side by side have in common: reading the weights.
    common: f64,
    /// Share of learning from a step of one group that is the step's: the optimizer, a new version of the weights.
    step: f64,
    /// Share of a group's time in each stage that does not grow with its completions: the prompt's.
    prompt: [f64; 4],
    /// Measured over predicted, of the plans that were tried as a whole.
    corrections: Vec<(Plan, f64)>,
}

impl Model {
    /// Of stages that were measured `alone` with one thread, with all of them, and of sampling that many groups at once.
    pub(super) fn fit(
        facts: Facts,
        alone: &Measured,
        threaded: Option<&Measured>,
        large_batch: Option<(usize, &Measured)>,
    ) -> Self {
        let cost = |role: Role| {
            let one = alone.work_s[role as usize];
            let many = threaded.map_or(one, |seen| seen.work_s[role as usize]).min(one);
            // serial + shared = one, serial + shared / cores = many.
            let shared = if facts.cores > 1 { (one - many) / (1.0 - 1.0 / facts.cores as f64) } else { 0.0 };
            let shared = shared.clamp(0.0, one);
            Cost { serial: one - shared, shared }
        };
        // One group alone takes `common + own`, n together take `common + n · own`; of both, learning takes a step.
        let in_common = |role: Role| {
            large_batch.map_or(0.0, |(n, seen)| {
                let (one, each) = (alone.work_s[role as usize], seen.work_s[role as usize]);
                shared_part(one, each, n as f64)
            })
        };
        let (common, step) = (in_common(Role::Rollout), in_common(Role::Learn));
        Self { facts, costs: Role::ALL.map(cost), common, step, prompt: [0.0; 4], corrections: Vec::new() }
    }

    /// Takes in what a group `times` as large took alone, beside one of the usual size.
    pub(super) fn sized(&mut self, alone: &Measured, larger: &Measured, times: f64) {
        // `prompt + completions` is one and `prompt + times · completions` the other. Where pairs are judged it grows faster
        // than the group does, which is a share below zero.
        let share = |one: f64, larger: f64| if one > 0.0 { (times - larger / one) / (times - 1.0) } else { 0.0 };
        self.prompt = std::array::from_fn(|i| share(alone.work_s[i], larger.work_s[i]).min(1.0));
    }

    /// Takes in what a plan did in fact: those like it are expected to be off by as much.
    pub(super) fn correct(&mut self, plan: &Plan, seen: &Measured) {
        let ratio = seen.groups_per_s / self.uncorrected(plan);
        if ratio.is_finite() && ratio > 0.0 {
            self.corrections.push((plan.clone(), ratio));
        }
    }

    /// Groups a second.
    pub fn predict(&self, plan: &Plan) -> f64 {
        let mut weights = 0.0;
        let mut logs = 0.0;
        // Of learning in parts nothing is known but what was seen of it, which says nothing of other parts.
        for (tried, ratio) in self.corrections.iter().filter(|(tried, _)| tried.micro_batch == plan.micro_batch) {
            let weight = (-distance(plan, tried)).exp2();
            weights += weight;
            logs += weight * ratio.ln();
        }
        let correction = if weights > 0.0 { (logs / weights).exp() } else { 1.0 };
        correction * self.uncorrected(plan)
    }

    /// Groups a second by the stages' costs alone.
    fn uncorrected(&self, plan: &Plan) -> f64 {
        let cores = self.facts.cores;
        let Plan { batch, group_size, .. } = *plan;
        let work = Role::ALL.map(|role| self.work(role, plan));
        // Time between two groups that leave a role.
        let pace: [f64; 4] = std::array::from_fn(|i| work[i] / plan.workers[i] as f64);
        // All that is computed here shares the cores, however it is divided.
        let shared: f64 = Role::ALL
            .into_iter()
            .filter(|role| *role != Role::Label || self.facts.labels_here)
            .map(|role| self.costs[role as usize].with(1) * self.scale(role, plan))
            .sum();
        let least = (shared / cores as f64).max(pace.iter().copied().fold(0.0, f64::max));
        // A step samples its batch in rounds of groups that end together. What follows overlaps with later rounds: the
        // first round and all that follows it, or all rounds and what follows the last.
        let side_by_side = (plan.slots / group_size).max(1) * plan.workers[0];
        let rounds = (batch as f64 / side_by_side as f64).ceil().max(1.0);
        let sampled = work[0] * (batch as f64 / plan.workers[0] as f64).max(1.0);
        // The first group goes through all that follows, the others come out behind it at the pace of the slowest stage.
        let first: f64 = work[1..].iter().sum();
        let slowest = pace[1..].iter().copied().fold(0.0, f64::max);
        let after = |groups: f64| first + slowest * (groups - 1.0).max(0.0);
        let batch = batch as f64;
        let step = (sampled / rounds + after(batch)).max(sampled + after(batch / rounds));
        // No more batches are under way than the staleness bound admits, each for as long as that (Little 1961).
        1.0 / (step / batch / (plan.eta + 1) as f64).max(least)
    }

    /// Seconds that one worker works on a group.
    fn work(&self, role: Role, plan: &Plan) -> f64 {
        self.costs[role as usize].with(plan.threads[role as usize]) * self.scale(role, plan)
    }

    /// What a group of this plan takes of a stage, as a share of one of the usual size alone in its step.
    fn scale(&self, role: Role, plan: &Plan) -> f64 {
        let prompt = self.prompt[role as usize];
        let size = prompt + (1.0 - prompt) * plan.group_size as f64 / self.facts.group_size as f64;
        match role {
            Role::Rollout => (size - self.common).max(0.0) + self.common / self.company(plan),
            Role::Learn => self.step / plan.batch as f64 + (size - self.step).max(0.0),
            Role::Label | Role::Reward => size,
        }
    }

    /// Groups that an actor samples side by side.
    fn company(&self, plan: &Plan) -> f64 {
        let room = plan.slots as f64 / plan.group_size as f64;
        // No more are under way than the staleness bound admits.
        let admitted = (plan.eta + 1) as f64 * plan.batch as f64 / plan.workers[0] as f64;
        room.min(admitted).max(room.min(1.0))
    }
}

/// Of a time `one`, the part that `n` together have in common, of whom each takes `each`, as a share of it.
fn shared_part(one: f64, each: f64, n: f64) -> f64 {
    if one > 0.0 { ((one - each) / one / (1.0 - 1.0 / n)).clamp(0.0, 1.0) } else { 0.0 }
}

/// How unlike two plans are: doublings between them.
fn distance(a: &Plan, b: &Plan) -> f64 {
    let doublings = |a: usize, b: usize| (a as f64 / b as f64).log2().abs();
    let pairs = a.workers.iter().zip(&b.workers).chain(a.threads.iter().zip(&b.threads));
    let sum: f64 = pairs.map(|(a, b)| doublings(*a, *b)).sum();
    let sizes = doublings(a.batch as usize, b.batch as usize) + doublings(a.group_size, b.group_size);
    sum + sizes + doublings(a.slots, b.slots) / 2.0 + doublings(1 + a.eta as usize, 1 + b.eta as usize)
}

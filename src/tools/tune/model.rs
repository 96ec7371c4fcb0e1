//! Performance model of a plan: the time of each stage per group, depending on threads and batch size, and the
//! resulting throughput.

use super::plan::Plan;
use super::{Facts, Measured, Role};

/// Time of a stage per group.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    /// Seconds that do not depend on the number of threads.
    serial: f64,
    /// Seconds of one thread that are divided by the number of threads (Amdahl 1967).
    shared: f64,
}

impl Cost {
    fn with(self, threads: usize) -> f64 {
        self.serial + self.shared / threads as f64
    }
}

/// A performance model fitted to measurements of a machine.
#[derive(Debug, Clone)]
pub struct Model {
    facts: Facts,
    costs: [Cost; 4],
    /// Share of a group's sampling time that concurrent groups share: reading the weights.
    common: f64,
    /// Share of the learning time of a one-group step that does not depend on the number of groups: the optimizer, and
    /// publishing the weights.
    step: f64,
    /// Share of a group's time in each stage that does not grow with its completions: processing the prompt.
    prompt: [f64; 4],
    /// Measured complete plans, with the ratio of measured to predicted speed.
    corrections: Vec<(Plan, f64)>,
}

impl Model {
    /// Fits a model to measurements of the stages alone: with one thread (`alone`), with one thread per core
    /// (`threaded`), and with several groups sampled concurrently (`is_large_batch`, with their number).
    pub(super) fn fit(
        facts: Facts,
        alone: &Measured,
        threaded: Option<&Measured>,
        large_batch: Option<(usize, &Measured)>,
    ) -> Self {
        let cost = |role: Role| {
            let one = alone.work_s[role as usize];
            let many = threaded.map_or(one, |measured| measured.work_s[role as usize]).min(one);
            // serial + shared = one, serial + shared / cores = many.
            let shared = if facts.cores > 1 { (one - many) / (1.0 - 1.0 / facts.cores as f64) } else { 0.0 };
            let shared = shared.clamp(0.0, one);
            Cost { serial: one - shared, shared }
        };
        // One group takes `common + own`, and n concurrent groups take `common + n · own`. For learning, `common` is
        // the step's.
        let in_common = |role: Role| {
            large_batch.map_or(0.0, |(n, measured)| {
                let (one, each) = (alone.work_s[role as usize], measured.work_s[role as usize]);
                shared_part(one, each, n as f64)
            })
        };
        let (common, step) = (in_common(Role::Rollout), in_common(Role::Learn));
        Self { facts, costs: Role::ALL.map(cost), common, step, prompt: [0.0; 4], corrections: Vec::new() }
    }

    /// Fits the dependence on the group size to the measurements of a usual group (`alone`) and of a group `times` as
    /// large.
    pub(super) fn sized(&mut self, alone: &Measured, larger: &Measured, times: f64) {
        // The times are `prompt + completions` and `prompt + times · completions`. Judging pairs grows faster than the
        // group size, which gives a share below zero.
        let share = |one: f64, larger: f64| if one > 0.0 { (times - larger / one) / (times - 1.0) } else { 0.0 };
        self.prompt = std::array::from_fn(|i| share(alone.work_s[i], larger.work_s[i]).min(1.0));
    }

    /// Corrects the model by the measurement of a plan. Similar plans get a similar correction.
    pub(super) fn correct(&mut self, plan: &Plan, measured: &Measured) {
        let ratio = measured.groups_per_s / self.uncorrected(plan);
        if ratio.is_finite() && ratio > 0.0 {
            self.corrections.push((plan.clone(), ratio));
        }
    }

    /// Returns the predicted number of groups trained per second under `plan`.
    pub fn predict(&self, plan: &Plan) -> f64 {
        let mut weights = 0.0;
        let mut logs = 0.0;
        // The model does not describe micro-batches, so a correction applies only to plans with the same micro-batch
        // size.
        for (tried, ratio) in self.corrections.iter().filter(|(tried, _)| tried.micro_batch == plan.micro_batch) {
            let weight = (-distance(plan, tried)).exp2();
            weights += weight;
            logs += weight * ratio.ln();
        }
        let correction = if weights > 0.0 { (logs / weights).exp() } else { 1.0 };
        correction * self.uncorrected(plan)
    }

    /// Returns the predicted groups per second without corrections.
    fn uncorrected(&self, plan: &Plan) -> f64 {
        let cores = self.facts.cores;
        let Plan { batch, group_size, .. } = *plan;
        let work = Role::ALL.map(|role| self.work(role, plan));
        // Seconds between two groups that leave a role.
        let pace: [f64; 4] = std::array::from_fn(|i| {
            let workers = if i == Role::Learn as usize { replicas(plan) } else { plan.workers[i] as f64 };
            work[i] / workers
        });
        // All computations on this machine share the cores, regardless of the allocation.
        let shared: f64 = Role::ALL
            .into_iter()
            .filter(|role| *role != Role::Label || self.facts.labels_here)
            .map(|role| self.costs[role as usize].with(1) * self.scale(role, plan))
            .sum();
        let least = (shared / cores as f64).max(pace.iter().copied().fold(0.0, f64::max));
        // A step samples its batch in rounds of concurrent groups. Later stages overlap with later rounds, so a step
        // takes the longer of two times: the first round with all later stages, or all rounds with the later stages of
        // the last round.
        let side_by_side = (plan.slots / group_size).max(1) * plan.workers[0];
        let rounds = (batch as f64 / side_by_side as f64).ceil().max(1.0);
        let sampled = work[0] * (batch as f64 / plan.workers[0] as f64).max(1.0);
        // The first group passes through all later stages; the others follow at the pace of the slowest stage. The replicas
        // of the learner train on several groups at the same time, so that the step ends with the last of them, or when
        // their rounds are complete.
        let first = work[1] + work[2];
        let slowest = pace[1].max(pace[2]);
        let after = |groups: f64| {
            let last_arrives = first + slowest * (groups - 1.0).max(0.0);
            (last_arrives + work[3]).max(first + pace[3] * groups.max(1.0))
        };
        let batch = batch as f64;
        let step = (sampled / rounds + after(batch)).max(sampled + after(batch / rounds));
        // The staleness bound admits η + 1 batches at the same time, each for the time of a step (Little 1961).
        1.0 / (step / batch / (plan.eta + 1) as f64).max(least)
    }

    /// Returns the seconds that one worker works on a group.
    fn work(&self, role: Role, plan: &Plan) -> f64 {
        self.costs[role as usize].with(plan.threads[role as usize]) * self.scale(role, plan)
    }

    /// Returns the time of a group of this plan in a stage, relative to a group of the usual size alone in its step.
    fn scale(&self, role: Role, plan: &Plan) -> f64 {
        let prompt = self.prompt[role as usize];
        let size = prompt + (1.0 - prompt) * plan.group_size as f64 / self.facts.group_size as f64;
        match role {
            Role::Rollout => (size - self.common).max(0.0) + self.common / self.concurrent_groups(plan),
            Role::Learn => self.step / plan.batch as f64 + (size - self.step).max(0.0),
            Role::Label | Role::Reward => size,
        }
    }

    /// Returns the number of groups that a rollout actor samples concurrently.
    fn concurrent_groups(&self, plan: &Plan) -> f64 {
        let room = plan.slots as f64 / plan.group_size as f64;
        // The staleness bound limits the number of groups in progress.
        let admitted = (plan.eta + 1) as f64 * plan.batch as f64 / plan.workers[0] as f64;
        room.min(admitted).max(room.min(1.0))
    }
}

/// Returns the number of groups of a step that the learner's replicas train on at the same time, on average: some have no
/// group at the end of a step if their number does not divide it.
pub fn replicas(plan: &Plan) -> f64 {
    plan.batch as f64 / plan.batch.div_ceil(plan.workers[Role::Learn as usize] as u64) as f64
}

/// Returns the share of the time `one` of a single item that `n` concurrent items share, if each of them takes `each`.
fn shared_part(one: f64, each: f64, n: f64) -> f64 {
    if one > 0.0 { ((one - each) / one / (1.0 - 1.0 / n)).clamp(0.0, 1.0) } else { 0.0 }
}

/// Returns the distance of two plans: the number of doublings between their values. Replicas of the learner in place of
/// threads are a small difference.
fn distance(a: &Plan, b: &Plan) -> f64 {
    let doublings = |a: usize, b: usize| (a as f64 / b as f64).log2().abs();
    let learn = Role::Learn as usize;
    let pairs = a.workers[..learn].iter().zip(&b.workers).chain(a.threads[..learn].iter().zip(&b.threads));
    let cores = |plan: &Plan| plan.workers[learn] * plan.threads[learn];
    let learner = doublings(cores(a), cores(b)) + doublings(a.workers[learn], b.workers[learn]) / 4.0;
    let sum = pairs.map(|(a, b)| doublings(*a, *b)).sum::<f64>() + learner;
    let sizes = doublings(a.batch as usize, b.batch as usize) + doublings(a.group_size, b.group_size);
    sum + sizes + doublings(a.slots, b.slots) / 2.0 + doublings(1 + a.eta as usize, 1 + b.eta as usize)
}

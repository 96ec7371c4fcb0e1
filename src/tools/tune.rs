//! `preceptor tune`: search for the fastest allocation of a machine's cores to the actors of a run.
//!
//! Each stage is measured alone, and the run is measured as configured. A [`model`] is fitted to both and rates every
//! allocation. The best few are measured before one is proposed. Proposed settings affect placement and timing, not the
//! training result. They include η, because stale tokens are corrected for. Batch and group sizes affect the training
//! result and are proposed only on request.

pub mod live;
pub mod model;
pub mod plan;

use anyhow::{Result, ensure};

use model::Model;
use plan::Plan;

/// Maximum number of plans with several replicas of the learner to measure.
const REPLICA_TRIALS: usize = 2;

/// Smallest relative gain that justifies a change. Smaller ones are within the noise of two measurements of the same
/// plan.
pub const NOTICEABLE: f64 = 0.05;

/// The stages that compute, in the order of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Sampling of completions.
    Rollout,
    /// Labeling by judges.
    Label,
    /// Scoring by the reference policy and the reward model.
    Reward,
    /// Gradients and optimizer steps.
    Learn,
}

impl Role {
    /// All roles, in the order of the data.
    pub const ALL: [Self; 4] = [Self::Rollout, Self::Label, Self::Reward, Self::Learn];

    /// Returns the role's name in the graph.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rollout => "rollout",
            Self::Label => "label",
            Self::Reward => "reward",
            Self::Learn => "learn",
        }
    }
}

/// A machine on which plans are measured.
pub trait Machine {
    /// Returns the properties that plans share.
    fn facts(&self) -> Facts;

    /// Runs `plan` for a while and measures it.
    ///
    /// # Errors
    /// If the run fails.
    fn measure(&mut self, plan: &Plan) -> Result<Measured>;

    /// Returns whether the memory suffices for `plan`.
    fn fits(&self, plan: &Plan) -> bool;
}

/// Properties of the machine and of the run that plans do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Number of cores to allocate.
    pub cores: usize,
    /// Number of completions per prompt.
    pub group_size: usize,
    /// Number of groups per step.
    pub batch: u64,
    /// True if labels are computed on this machine. Otherwise labelers wait for servers and need no core.
    pub labels_here: bool,
    /// True if the run has labelers.
    pub labels: bool,
    /// Maximum number of slots of a rollout actor.
    pub max_slots: usize,
    /// Largest useful number of replicas of the learner: the groups of a step, or 1 on a device.
    pub max_replicas: usize,
    /// Largest micro-batch of the learner, in completions, that fits into memory; zero is a complete group.
    pub micro_batch: usize,
}

/// Measured speed of a plan, in total and per role.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Trained groups per second.
    pub groups_per_s: f64,
    /// Busy seconds per group of a worker of each role, in the order of [`Role::ALL`].
    pub work_s: [f64; 4],
}

/// A plan with its predicted and its measured speed.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    /// The plan.
    pub plan: Plan,
    /// Groups per second predicted by the model.
    pub predicted: f64,
    /// Measured groups per second.
    pub measured: f64,
}

impl Tried {
    /// Returns the measured completions per second, which plans with different group sizes are compared by.
    pub fn completions_per_s(&self) -> f64 {
        self.measured * self.plan.group_size as f64
    }
}

/// Result of [`tune`]: the measured plans, and the fastest one.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// The configured plan.
    pub before: Tried,
    /// The fastest measured plan, which may be the configured one.
    pub best: Tried,
    /// The best synchronous plan, and the predicted speed of the best asynchronous plan relative to it.
    pub synchronous: (Plan, f64),
    /// All measured plans, in order of measurement.
    pub tried: Vec<Tried>,
}

impl Tuned {
    /// Returns the speed of the best plan relative to the configured one.
    pub fn gain(&self) -> f64 {
        self.best.completions_per_s() / self.before.completions_per_s()
    }

    /// Returns whether the best plan is noticeably faster than the configured one.
    pub fn is_better(&self) -> bool {
        self.gain() > 1.0 + NOTICEABLE
    }

    /// Returns whether asynchronous training is predicted to be noticeably faster than synchronous training.
    pub fn is_asynchronous_worth_it(&self) -> bool {
        self.synchronous.1 > 1.0 + NOTICEABLE
    }
}

/// Extent of the search of [`tune`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchScope {
    /// Maximum number of plans to measure, in addition to the configured one and to two with replicas of the learner.
    pub trials: usize,
    /// True if larger batches and groups are tried too.
    pub sizes: bool,
}

/// Searches for a plan that is faster on `machine` than `configured`. Calls `report` with a description before each
/// measurement.
///
/// # Errors
/// If a measurement fails, or trains nothing.
pub fn tune(
    machine: &mut dyn Machine,
    configured: &Plan,
    scope: SearchScope,
    mut report: impl FnMut(&str),
) -> Result<Tuned> {
    let facts = machine.facts();
    report("each stage alone, with one thread");
    let single = Plan { micro_batch: facts.micro_batch, ..Plan::single(facts.group_size) };
    let alone = machine.measure(&single)?;
    ensure!(alone.groups_per_s > 0.0, "no group was trained during the measurement");
    let threaded = if facts.cores > 1 {
        report("each stage alone, with all threads");
        Some(machine.measure(&single.clone().threads(facts.cores))?)
    } else {
        None
    };
    // Samples as many groups concurrently as there are slots for, to measure the effect of the batch size.
    let concurrent = (facts.max_slots / facts.group_size).clamp(1, 4);
    let large_batch = if concurrent > 1 {
        report(&format!("sampling {concurrent} groups concurrently"));
        let plan = Plan { slots: concurrent * facts.group_size, batch: concurrent as u64, ..single.clone() };
        Some((concurrent, machine.measure(&plan)?))
    } else {
        None
    };
    let mut model =
        Model::fit(facts, &alone, threaded.as_ref(), large_batch.as_ref().map(|(n, measured)| (*n, measured)));
    report("as configured");
    let measured = machine.measure(configured)?;
    model.correct(configured, &measured);
    let before =
        Tried { plan: configured.clone(), predicted: model.predict(configured), measured: measured.groups_per_s };
    let mut tried = vec![before];
    let candidates = Plan::all(&facts, configured);
    // Plans with several replicas of the learner are tried last, with the model that the other measurements corrected.
    for several in [false, true] {
        let limit = if several { tried.len() + REPLICA_TRIALS } else { 1 + scope.trials };
        while tried.len() < limit {
            // Each measurement corrects the model, so each choice uses all measurements so far.
            let untried = candidates.iter().filter(|plan| (plan.workers[Role::Learn as usize] > 1) == several);
            let untried = untried.filter(|plan| tried.iter().all(|other| other.plan != **plan));
            let Some(next) = untried.max_by(|a, b| compare_plans(&model, a, b)) else { break };
            let (predicted, best) = (model.predict(next), fastest(&tried).measured);
            if predicted < best * (1.0 + NOTICEABLE / 2.0) && (several || tried.len() > 1) {
                break;
            }
            tried.push(attempt(machine, &mut model, next, &mut report)?);
        }
    }
    let of = |synchronous: bool| {
        let plans = candidates.iter().filter(|plan| (plan.eta == 0) == synchronous);
        plans.max_by(|a, b| compare_plans(&model, a, b)).cloned()
    };
    let synchronous = of(true).unwrap_or_else(|| Plan { eta: 0, ..configured.clone() });
    let gain = of(false).map_or(1.0, |plan| model.predict(&plan) / model.predict(&synchronous));
    let mut best = fastest(&tried).clone();
    if scope.sizes
        && let Some(step) = larger_step(machine, &mut model, &best.plan, (&single, &alone), &mut report)?
    {
        if step.completions_per_s() > best.completions_per_s() * (1.0 + NOTICEABLE) {
            best = step.clone();
        }
        tried.push(step);
    }
    Ok(Tuned { before: tried[0].clone(), best, synchronous: (synchronous, gain), tried })
}

/// Measures `plan`, and corrects the model by the result.
fn attempt(machine: &mut dyn Machine, model: &mut Model, plan: &Plan, report: &mut impl FnMut(&str)) -> Result<Tried> {
    let predicted = model.predict(plan);
    let completions = predicted * plan.group_size as f64;
    report(&format!("{} ({completions:.2} completions/s predicted)", plan.describe(&machine.facts())));
    let measured = machine.measure(plan)?;
    model.correct(plan, &measured);
    Ok(Tried { plan: plan.clone(), predicted, measured: measured.groups_per_s })
}

/// Measures the smallest of the larger batch and group sizes whose predicted speed is close to the highest. Returns
/// `None` if that is the size of `plan` itself. `alone` is the measurement of the plan `single`.
fn larger_step(
    machine: &mut dyn Machine,
    model: &mut Model,
    plan: &Plan,
    (single, alone): (&Plan, &Measured),
    report: &mut impl FnMut(&str),
) -> Result<Option<Tried>> {
    let group_size = 2 * plan.group_size;
    let larger = Plan { group_size, slots: group_size.min(machine.facts().max_slots), ..single.clone() };
    if machine.fits(&larger) {
        report("a group of twice the size, alone");
        let measured = machine.measure(&larger)?;
        model.sized(alone, &measured, 2.0);
    }
    let plans: Vec<Plan> = plan.larger().into_iter().filter(|plan| machine.fits(plan)).collect();
    let rate = |plan: &Plan| model.predict(plan) * plan.group_size as f64;
    let most = plans.iter().map(rate).fold(0.0, f64::max);
    let Some(next) = plans.iter().find(|plan| rate(plan) * (1.0 + NOTICEABLE) >= most) else { return Ok(None) };
    if next == plan { Ok(None) } else { attempt(machine, model, next, report).map(Some) }
}

/// Compares plans by predicted speed, and within one percent by lower cost (threads, staleness, slots, replicas).
fn compare_plans(model: &Model, a: &Plan, b: &Plan) -> std::cmp::Ordering {
    let step = |plan: &Plan| (100.0 * model.predict(plan).ln()).round() as i64;
    step(a).cmp(&step(b)).then_with(|| b.cost().cmp(&a.cost()))
}

fn fastest(tried: &[Tried]) -> &Tried {
    let mut best = &tried[0];
    for candidate in tried {
        if candidate.measured > best.measured {
            best = candidate;
        }
    }
    best
}

//! `preceptor tune`: how a machine's cores are best divided among the actors of a run.
//!
//! Each stage is measured alone, the run is measured as it is configured, a [`model`] is fitted to both, every division
//! of the machine is rated by it, and the best few are measured before one is proposed. What is proposed changes where
//! and when things are computed, not what is learned; η is part of it, since older tokens are corrected for. The sizes of
//! a step change what is learned, and are proposed where that is asked for.

pub mod live;
pub mod model;
pub mod plan;

use anyhow::{Result, ensure};

use model::Model;
use plan::Plan;

/// A gain below this is within what two measurements of the same differ by, and is not worth a change.
pub const NOTICEABLE: f64 = 0.05;

/// The stages that compute, in the order of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Sampling.
    Rollout,
    /// Judging.
    Label,
    /// Scoring by the reference and the reward model.
    Reward,
    /// Gradients.
    Learn,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Rollout, Self::Label, Self::Reward, Self::Learn];

    /// As the graph calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rollout => "rollout",
            Self::Label => "label",
            Self::Reward => "reward",
            Self::Learn => "learn",
        }
    }
}

/// What a machine is and can be tried with.
pub trait Machine {
    /// What does not change.
    fn facts(&self) -> Facts;

    /// Runs `plan` for a while.
    ///
    /// # Errors
    /// A run that fails.
    fn measure(&mut self, plan: &Plan) -> Result<Measured>;

    /// Whether there is memory for it.
    fn fits(&self, plan: &Plan) -> bool;
}

/// What stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Cores to divide.
    pub cores: usize,
    /// Completions of a prompt.
    pub group_size: usize,
    /// Groups per step.
    pub batch: u64,
    /// Whether labels are computed here; elsewhere, a labeler waits and takes no core.
    pub labels_here: bool,
    /// Whether there are labelers at all.
    pub labels: bool,
    /// Most sequences that an actor has side by side.
    pub most_slots: usize,
    /// Most completions that there is memory for in the learner at a time; zero is a whole group.
    pub micro_batch: usize,
}

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Groups trained a second.
    pub groups_per_s: f64,
    /// Seconds that a worker of each role works on a group, in the order of [`Role::ALL`].
    pub work_s: [f64; 4],
}

/// A plan with what was expected of it and what came.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    /// The plan.
    pub plan: Plan,
    /// Groups a second by the model.
    pub predicted: f64,
    /// Groups a second in fact.
    pub measured: f64,
}

impl Tried {
    /// Completions a second in fact: what plans with groups of unlike sizes are compared by.
    pub fn completions_per_s(&self) -> f64 {
        self.measured * self.plan.group_size as f64
    }
}

/// What tuning came to.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// The plan that the configuration has.
    pub before: Tried,
    /// The best that was measured; it may be the same.
    pub best: Tried,
    /// The best synchronous plan, and by what factor the best asynchronous one is faster, by the model.
    pub synchronous: (Plan, f64),
    /// All that were tried, in order.
    pub tried: Vec<Tried>,
}

impl Tuned {
    /// How many times as fast the best is as what is configured.
    pub fn gain(&self) -> f64 {
        self.best.completions_per_s() / self.before.completions_per_s()
    }

    /// Whether the change is worth it.
    pub fn is_better(&self) -> bool {
        self.gain() > 1.0 + NOTICEABLE
    }

    /// Whether working on several versions at once is.
    pub fn is_asynchronous_worth_it(&self) -> bool {
        self.synchronous.1 > 1.0 + NOTICEABLE
    }
}

/// How far a search goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Divisions that are tried at most, besides the configured one.
    pub trials: usize,
    /// Whether larger steps are tried too.
    pub sizes: bool,
}

/// Finds a division of `machine` that is faster than `configured`; `tell` hears of each that is measured.
///
/// # Errors
/// Those of the machine.
pub fn tune(machine: &mut dyn Machine, configured: &Plan, reach: Reach, mut tell: impl FnMut(&str)) -> Result<Tuned> {
    let facts = machine.facts();
    tell("each stage alone, with one thread");
    let single = Plan { micro_batch: facts.micro_batch, ..Plan::single(facts.group_size) };
    let alone = machine.measure(&single)?;
    ensure!(alone.groups_per_s > 0.0, "nothing was trained while it was measured");
    let threaded = if facts.cores > 1 {
        tell("each stage alone, with all threads");
        Some(machine.measure(&single.clone().threads(facts.cores))?)
    } else {
        None
    };
    // As many groups side by side as there is room for, to see what the company costs.
    let company = (facts.most_slots / facts.group_size).clamp(1, 4);
    let large_batch = if company > 1 {
        tell(&format!("sampling {company} groups side by side"));
        let plan = Plan { slots: company * facts.group_size, batch: company as u64, ..single.clone() };
        Some((company, machine.measure(&plan)?))
    } else {
        None
    };
    let mut model = Model::fit(facts, &alone, threaded.as_ref(), large_batch.as_ref().map(|(n, seen)| (*n, seen)));
    tell("as configured");
    let seen = machine.measure(configured)?;
    model.correct(configured, &seen);
    let before = Tried { plan: configured.clone(), predicted: model.predict(configured), measured: seen.groups_per_s };
    let mut tried = vec![before];
    let candidates = Plan::all(&facts, configured);
    while tried.len() <= reach.trials {
        // What is measured corrects the model, so each choice is the best by all that is known.
        let untried = candidates.iter().filter(|plan| tried.iter().all(|one| one.plan != **plan));
        let Some(next) = untried.max_by(|a, b| by_worth(&model, a, b)) else { break };
        let (predicted, best) = (model.predict(next), fastest(&tried).measured);
        if predicted < best * (1.0 + NOTICEABLE / 2.0) && tried.len() > 1 {
            break;
        }
        tried.push(attempt(machine, &mut model, next, &mut tell)?);
    }
    let of = |synchronous: bool| {
        let plans = candidates.iter().filter(|plan| (plan.eta == 0) == synchronous);
        plans.max_by(|a, b| by_worth(&model, a, b)).cloned()
    };
    let synchronous = of(true).unwrap_or_else(|| Plan { eta: 0, ..configured.clone() });
    let gain = of(false).map_or(1.0, |plan| model.predict(&plan) / model.predict(&synchronous));
    let mut best = fastest(&tried).clone();
    if reach.sizes
        && let Some(step) = larger_step(machine, &mut model, &best.plan, (&single, &alone), &mut tell)?
    {
        if step.completions_per_s() > best.completions_per_s() * (1.0 + NOTICEABLE) {
            best = step.clone();
        }
        tried.push(step);
    }
    Ok(Tuned { before: tried[0].clone(), best, synchronous: (synchronous, gain), tried })
}

/// Measures `plan`, and has the model learn from it.
fn attempt(machine: &mut dyn Machine, model: &mut Model, plan: &Plan, tell: &mut impl FnMut(&str)) -> Result<Tried> {
    let predicted = model.predict(plan);
    let completions = predicted * plan.group_size as f64;
    tell(&format!("{} ({completions:.2} completions/s predicted)", plan.describe(&machine.facts())));
    let seen = machine.measure(plan)?;
    model.correct(plan, &seen);
    Ok(Tried { plan: plan.clone(), predicted, measured: seen.groups_per_s })
}

/// Of the larger steps that `plan` could take, the smallest that is about as fast as any, measured; none where that is its own.
/// `alone` is what one group was seen to take alone.
fn larger_step(
    machine: &mut dyn Machine,
    model: &mut Model,
    plan: &Plan,
    (single, alone): (&Plan, &Measured),
    tell: &mut impl FnMut(&str),
) -> Result<Option<Tried>> {
    let group_size = 2 * plan.group_size;
    let larger = Plan { group_size, slots: group_size.min(machine.facts().most_slots), ..single.clone() };
    if machine.fits(&larger) {
        tell("a group of twice the size, alone");
        let seen = machine.measure(&larger)?;
        model.sized(alone, &seen, 2.0);
    }
    let plans: Vec<Plan> = plan.larger().into_iter().filter(|plan| machine.fits(plan)).collect();
    let rate = |plan: &Plan| model.predict(plan) * plan.group_size as f64;
    let most = plans.iter().map(rate).fold(0.0, f64::max);
    let Some(next) = plans.iter().find(|plan| rate(plan) * (1.0 + NOTICEABLE) >= most) else { return Ok(None) };
    if next == plan { Ok(None) } else { attempt(machine, model, next, tell).map(Some) }
}

/// Faster first; among those as fast within a hundredth, who takes less of the machine and is less stale.
fn by_worth(model: &Model, a: &Plan, b: &Plan) -> std::cmp::Ordering {
    let step = |plan: &Plan| (100.0 * model.predict(plan).ln()).round() as i64;
    step(a).cmp(&step(b)).then_with(|| b.cost().cmp(&a.cost()))
}

fn fastest(tried: &[Tried]) -> &Tried {
    let mut best = &tried[0];
    for one in tried {
        if one.measured > best.measured {
            best = one;
        }
    }
    best
}

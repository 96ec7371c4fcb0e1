//! `preceptor tune`: how a machine's cores are best divided among the actors of a run.
//!
//! Each stage is measured alone, the run is measured as it is configured, a [`model`] is fitted to both, every division
//! of the machine is rated by it, and the best few are measured before one is proposed. What is proposed changes where
//! and when things are computed, not what is learned; η is part of it, since older tokens are corrected for.

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

    /// Runs `trial` for a while.
    ///
    /// # Errors
    /// A run that fails.
    fn measure(&mut self, trial: &Trial) -> Result<Measured>;
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
}

/// What is run to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The division of the machine.
    pub plan: Plan,
    /// Groups per step. One, with η = 0, lets one group through at a time, so that each stage works alone.
    pub batch: u64,
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
    /// Whether the change is worth it.
    pub fn is_better(&self) -> bool {
        self.best.measured > self.before.measured * (1.0 + NOTICEABLE)
    }

    /// Whether working on several versions at once is.
    pub fn is_asynchronous_worth_it(&self) -> bool {
        self.synchronous.1 > 1.0 + NOTICEABLE
    }
}

/// Finds a division of `machine` that is faster than `configured`, trying up to `trials` of them; `tell` hears of each.
///
/// # Errors
/// Those of the machine.
pub fn tune(machine: &mut dyn Machine, configured: &Plan, trials: usize, mut tell: impl FnMut(&str)) -> Result<Tuned> {
    let facts = machine.facts();
    tell("each stage alone, with one thread");
    let single = Plan::single(facts.group_size);
    let alone = machine.measure(&Trial { plan: single.clone(), batch: 1 })?;
    ensure!(alone.groups_per_s > 0.0, "nothing was trained while it was measured");
    let threaded = if facts.cores > 1 {
        tell("each stage alone, with all threads");
        Some(machine.measure(&Trial { plan: single.clone().threads(facts.cores), batch: 1 })?)
    } else {
        None
    };
    // As many groups side by side as there is room for, to see what the company costs.
    let company = (facts.most_slots / facts.group_size).clamp(1, 4);
    let crowded = if company > 1 {
        tell(&format!("sampling {company} groups side by side"));
        let plan = Plan { slots: company * facts.group_size, ..single };
        Some((company, machine.measure(&Trial { plan, batch: company as u64 })?))
    } else {
        None
    };
    let mut model = Model::fit(facts, &alone, threaded.as_ref(), crowded.as_ref().map(|(n, seen)| (*n, seen)));
    tell("as configured");
    let seen = machine.measure(&Trial { plan: configured.clone(), batch: facts.batch })?;
    model.correct(configured, &seen);
    let before = Tried { plan: configured.clone(), predicted: model.predict(configured), measured: seen.groups_per_s };
    let mut tried = vec![before];
    let candidates = Plan::all(&facts, configured);
    while tried.len() <= trials {
        // What is measured corrects the model, so each choice is the best by all that is known.
        let untried = candidates.iter().filter(|plan| tried.iter().all(|one| one.plan != **plan));
        let Some(next) = untried.max_by(|a, b| by_worth(&model, a, b)) else { break };
        let (predicted, best) = (model.predict(next), fastest(&tried).measured);
        if predicted < best * (1.0 + NOTICEABLE / 2.0) && tried.len() > 1 {
            break;
        }
        tell(&format!("{} ({predicted:.2} groups/s predicted)", next.describe(&facts)));
        let seen = machine.measure(&Trial { plan: next.clone(), batch: facts.batch })?;
        model.correct(next, &seen);
        tried.push(Tried { plan: next.clone(), predicted, measured: seen.groups_per_s });
    }
    let of = |synchronous: bool| {
        let plans = candidates.iter().filter(|plan| (plan.eta == 0) == synchronous);
        plans.max_by(|a, b| by_worth(&model, a, b)).cloned()
    };
    let synchronous = of(true).unwrap_or_else(|| Plan { eta: 0, ..configured.clone() });
    let gain = of(false).map_or(1.0, |plan| model.predict(&plan) / model.predict(&synchronous));
    Ok(Tuned { before: tried[0].clone(), best: fastest(&tried).clone(), synchronous: (synchronous, gain), tried })
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

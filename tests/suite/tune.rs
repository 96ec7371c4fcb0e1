//! Tuning on machines whose rates are known: scripted stages in simulated time, under the runtime's own edges and
//! staleness bound. What is found is held against a bound that no division of the machine can exceed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use preceptor::tools::tune::plan::Plan;
use preceptor::tools::tune::{Facts, Machine, Measured, Reach, Role, tune};
use preceptor_actors::scripted::{ScriptedSink, ScriptedSource, ScriptedStage};
use preceptor_actors::{Admission, AdmissionGate, Clock, GraphBuilder, GraphOptions, Outcome, StageSpec, spawn_graph};

/// A machine, by what a group takes of each stage with one thread, alone.
struct Scripted {
    facts: Facts,
    /// Seconds that threads do not shorten.
    serial: [f64; 4],
    /// Seconds that threads share.
    shared: [f64; 4],
    /// Share of sampling that groups side by side have in common.
    common: f64,
    /// Seconds of a learner's step, whatever its groups.
    step: f64,
    /// Share of each stage's time that does not grow with a group's completions.
    prompt: f64,
    runtime: tokio::runtime::Runtime,
}

impl Scripted {
    fn new(facts: Facts, serial: [f64; 4], shared: [f64; 4], common: f64) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { facts, serial, shared, common, step: 0.0, prompt: 0.0, runtime }
    }

    fn alone(&self, role: usize, threads: usize) -> f64 {
        self.serial[role] + self.shared[role] / threads as f64
    }

    /// How much longer a plan's groups take than those of the usual size.
    fn size(&self, plan: &Plan) -> f64 {
        self.prompt + (1.0 - self.prompt) * plan.group_size as f64 / self.facts.group_size as f64
    }

    /// Core seconds that a group costs with `beside` groups side by side.
    fn cores(&self, beside: usize) -> f64 {
        let here = |role: &usize| *role != Role::Label as usize || self.facts.labels_here;
        let company = self.common / beside as f64 + 1.0 - self.common;
        (0..4).filter(here).map(|role| self.alone(role, 1) * if role == 0 { company } else { 1.0 }).sum()
    }

    /// More groups a second than any division can have: cores shared without loss, and each stage on all of them.
    fn bound(&self) -> f64 {
        let Facts { cores, batch, most_slots, group_size, labels_here, .. } = self.facts;
        let beside = (most_slots / group_size).max(1);
        let single = (2..4).map(|role| 1.0 / self.alone(role, cores)).fold(f64::MAX, f64::min);
        let labels = if labels_here { cores } else { 32 } as f64 / self.alone(1, 1);
        // Of five batches, as many as η = 4 admits, each takes at least one group's way to the learner and all its learning.
        let way: f64 = (0..3).map(|role| self.alone(role, cores)).sum();
        let admitted = 5.0 * batch as f64 / (way + batch as f64 * self.alone(3, cores));
        (cores as f64 / self.cores(beside)).min(single).min(labels).min(admitted)
    }
}

impl Machine for Scripted {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn fits(&self, plan: &Plan) -> bool {
        plan.group_size <= 2 * self.facts.group_size
    }

    fn measure(&mut self, plan: &Plan) -> Result<Measured> {
        let plan = plan.clone();
        let batch = plan.batch;
        let groups = 48 * batch;
        let size = self.size(&plan);
        let beside = (plan.slots / plan.group_size).max(1);
        // A worker that samples several groups side by side is as many that take that much longer.
        let sampling = size * self.alone(0, plan.threads[0]) * (self.common + (1.0 - self.common) * beside as f64);
        let taking = |seconds: f64| ScriptedStage::taking(Duration::from_secs_f64(seconds));
        let label = taking(size * self.alone(1, plan.threads[1]));
        let reward = taking(size * self.alone(2, plan.threads[2]));
        // In parts, the prompt is computed with each.
        let parts = plan.group_size.checked_div(plan.micro_batch).unwrap_or(1);
        let learn = size * self.alone(3, plan.threads[3]) * (1.0 + (parts - 1) as f64 / 2.0);
        let learn = taking(learn + self.step / batch as f64);
        let clock = Clock::simulated();
        let options = GraphOptions { clock: clock.clone(), ..GraphOptions::default() };
        let workers = [plan.workers[0] * beside, plan.workers[1]];
        let admission = Admission { eta: plan.eta, batch };
        let wire = move |builder: &mut GraphBuilder| {
            let gate = Arc::new(AdmissionGate::new(admission, 0, 0));
            let (prompts_out, prompts) = builder.edge("prompts", 1);
            let (groups_out, sampled) = builder.edge("groups", 2);
            let (labeled_out, labeled) = builder.edge("labeled", 2);
            let (rewarded_out, rewarded) = builder.edge("rewarded", 2);
            let spec = |role: &str, n: usize| StageSpec::new(format!("{role}-{n}")).role(role).stack(1 << 17);
            let source = ScriptedSource { next: 0, end: groups, gate: Some(Arc::clone(&gate)) };
            builder.source(spec("prompts", 0), source, prompts_out);
            for n in 0..workers[0] {
                builder.stage(spec("rollout", n), taking(sampling), prompts.clone(), groups_out.clone());
            }
            for n in 0..workers[1] {
                builder.stage(spec("label", n), label.clone(), sampled.clone(), labeled_out.clone());
            }
            builder.stage(spec("reward", 0), reward.clone(), labeled, rewarded_out);
            builder.sink(spec("learn", 0), ScriptedSink::new(learn.clone(), batch, Some(gate), |_, _| {}), rewarded);
            Ok(())
        };
        let report = self.runtime.block_on(async {
            let graph = spawn_graph(options, wire);
            assert_eq!(graph.wait().await, Outcome::Finished);
            graph.report()
        });
        let rate = groups as f64 / clock.now().as_secs_f64();
        // Who has too few cores for all that works at once is slower by as much, everywhere.
        let cores = size * self.cores(beside) + self.step / batch as f64;
        let slower = (rate * cores / self.facts.cores as f64).max(1.0);
        let work = |role: Role| {
            let stages = report.stages.iter().filter(|stage| stage.role == role.name());
            let lanes = if role == Role::Rollout { beside as f64 } else { 1.0 };
            stages.map(|stage| stage.busy_s).sum::<f64>() / groups as f64 / lanes * slower
        };
        Ok(Measured { groups_per_s: rate / slower, work_s: Role::ALL.map(work) })
    }
}

fn facts(cores: usize) -> Facts {
    Facts { cores, group_size: 8, batch: 4, labels_here: true, labels: true, most_slots: 64, micro_batch: 0 }
}

/// One of everything, and nothing at once.
fn mis_set() -> Plan {
    Plan { batch: 4, ..Plan::single(8) }
}

const REACH: Reach = Reach { trials: 6, sizes: false };

#[test]
fn the_planted_optimum_is_found_on_five_machines() {
    for (name, mut machine) in [
        ("a learner that wants threads", Scripted::new(facts(8), [0.1; 4], [0.8, 0.4, 0.2, 7.0], 0.3)),
        (
            "a server that judges slowly",
            Scripted::new(Facts { labels_here: false, ..facts(4) }, [0.02, 4.0, 0.01, 0.05], [0.4, 0.0, 0.1, 0.5], 0.5),
        ),
        (
            "sampling that is cheap in company",
            Scripted::new(facts(2), [0.1, 0.02, 0.02, 0.1], [4.0, 0.1, 0.1, 0.3], 0.9),
        ),
        ("two halves that overlap", Scripted::new(facts(2), [1.0, 0.02, 0.02, 1.0], [0.0; 4], 0.0)),
        (
            "a large machine that judges most",
            Scripted::new(facts(16), [0.2, 0.2, 0.05, 0.1], [2.0, 12.0, 0.2, 2.0], 0.6),
        ),
    ] {
        let bound = machine.bound();
        let told = Mutex::new(Vec::new());
        let tuned = tune(&mut machine, &mis_set(), REACH, |text| told.lock().unwrap().push(text.to_owned())).unwrap();
        let found = tuned.best.measured;
        let plan = tuned.best.plan.describe(&machine.facts);
        println!("{name}: {:.3} → {found:.3} of at most {bound:.3} ({plan})", tuned.before.measured);
        assert!(tuned.before.measured < 0.85 * bound, "{name}: nothing to find");
        assert!(found >= 0.9 * bound, "{name}: {found} of {bound} by {plan}\n{:?}", told.lock().unwrap());
        assert!(tuned.is_better(), "{name}: {tuned:?}");
        // What was expected came, of the best and of the best that is synchronous.
        assert!((tuned.best.predicted / found - 1.0).abs() < 0.15, "{name}: {tuned:?}");
        let (plan, gain) = tuned.synchronous.clone();
        let synchronous = machine.measure(&plan).unwrap().groups_per_s;
        println!("    asynchronous: {gain:.3} times expected, {:.3} measured", found / synchronous);
        assert!(
            (gain / (found / synchronous) - 1.0).abs() < 0.15,
            "{name}: {gain}, {}: {tuned:?}",
            found / synchronous
        );
    }
}

#[test]
fn where_all_share_one_core_asynchronous_is_not_worth_it_and_nothing_is_changed() {
    let mut machine = Scripted::new(facts(1), [1.0, 0.5, 0.2, 1.0], [0.0; 4], 0.0);
    let tuned = tune(&mut machine, &mis_set(), REACH, |_| {}).unwrap();
    assert!(!tuned.is_better() && !tuned.is_asynchronous_worth_it(), "{tuned:?}");
    assert_eq!(tuned.best.plan, mis_set());
}

#[test]
fn larger_steps_are_proposed_where_they_are_asked_for_and_pay() {
    let sizes = Reach { sizes: true, ..REACH };
    let machine = |step: f64, prompt: f64| {
        let machine = Scripted::new(facts(1), [0.2, 0.1, 0.1, 0.2], [0.0; 4], 0.0);
        Scripted { step, prompt, ..machine }
    };
    let chosen = |machine: &mut Scripted, reach: Reach| {
        let tuned = tune(machine, &mis_set(), reach, |_| {}).unwrap();
        // What was expected of the larger step came.
        assert!((tuned.best.predicted / tuned.best.measured - 1.0).abs() < 0.1, "{tuned:?}");
        (tuned.best.plan.batch, tuned.best.plan.group_size, tuned.gain())
    };
    // Four groups take 2.4 s and the step 4 s more: sixteen take 9.6 s and 4 s.
    let (batch, group, gain) = chosen(&mut machine(4.0, 0.0), sizes);
    assert_eq!((batch, group), (16, 16));
    assert!((gain / (6.4 / ((19.2 + 4.0) / 8.0)) - 1.0).abs() < 0.05, "{gain}");
    assert_eq!(chosen(&mut machine(4.0, 0.0), REACH), (4, 8, 1.0), "it was not asked for");
    // Half of a group's time is its prompt's: twice the completions take 1.5 times as long.
    let (batch, group, gain) = chosen(&mut machine(0.0, 0.5), sizes);
    assert_eq!((batch, group), (4, 16));
    assert!((gain - 2.0 / 1.5).abs() < 0.07, "{gain}");
    assert_eq!(chosen(&mut machine(0.0, 0.0), sizes), (4, 8, 1.0), "larger steps are not faster here");
}

#[test]
fn a_learner_that_takes_few_at_a_time_is_given_all_that_there_is_memory_for() {
    let configured = Plan { micro_batch: 1, ..mis_set() };
    let mut machine = Scripted::new(facts(2), [0.2, 0.1, 0.1, 0.2], [0.0; 4], 0.0);
    let tuned = tune(&mut machine, &configured, REACH, |_| {}).unwrap();
    assert!(tuned.tried[1..].iter().all(|one| one.plan.micro_batch == 0), "{tuned:?}");
    assert!(tuned.gain() > 1.2 && (tuned.best.predicted / tuned.best.measured - 1.0).abs() < 0.1, "{tuned:?}");
    machine.facts.micro_batch = 2;
    let tuned = tune(&mut machine, &configured, REACH, |_| {}).unwrap();
    assert!(tuned.tried[1..].iter().all(|one| one.plan.micro_batch == 2), "{tuned:?}");
}

//! Tests of tuning on machines with known rates: scripted stages in simulated time, with the real runtime's edges and
//! staleness bound. Results are compared with a bound that no division of the machine can exceed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use preceptor::tools::tune::model::replicas;
use preceptor::tools::tune::plan::Plan;
use preceptor::tools::tune::{Facts, Machine, Measured, Role, SearchScope, tune};
use preceptor_actors::scripted::{ScriptedSink, ScriptedSource, ScriptedStage};
use preceptor_actors::{Admission, AdmissionGate, Clock, GraphBuilder, GraphOptions, Outcome, StageSpec, spawn_graph};

/// A simulated machine, given by a group's time in each stage with one thread, alone.
struct Scripted {
    facts: Facts,
    /// Seconds per stage that do not shrink with threads.
    serial: [f64; 4],
    /// Seconds per stage that are divided by the number of threads.
    shared: [f64; 4],
    /// Share of the sampling time that concurrent groups share.
    common: f64,
    /// Seconds of a learner step, independent of its number of groups.
    step: f64,
    /// Share of each stage's time that does not grow with the number of completions.
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

    /// Returns the time of a plan's groups relative to groups of the default size.
    fn size(&self, plan: &Plan) -> f64 {
        self.prompt + (1.0 - self.prompt) * plan.group_size as f64 / self.facts.group_size as f64
    }

    /// Returns the core seconds per group while `concurrent` groups are sampled at the same time.
    fn cores(&self, concurrent: usize) -> f64 {
        let here = |role: &usize| *role != Role::Label as usize || self.facts.labels_here;
        let factor = self.common / concurrent as f64 + 1.0 - self.common;
        (0..4).filter(here).map(|role| self.alone(role, 1) * if role == 0 { factor } else { 1.0 }).sum()
    }

    /// Returns the least time per group of the learner on all cores.
    fn learner(&self) -> f64 {
        let plans = (1..=self.facts.cores.min(self.facts.max_replicas)).map(|replicas| Plan {
            workers: [1, 1, 1, replicas],
            batch: self.facts.batch,
            ..Plan::single(self.facts.group_size)
        });
        plans.map(|plan| self.alone(3, self.facts.cores / plan.workers[3]) / replicas(&plan)).fold(f64::MAX, f64::min)
    }

    /// Returns an upper bound on groups per second: cores shared without loss, and each stage on all of them.
    fn bound(&self) -> f64 {
        let Facts { cores, batch, max_slots, group_size, labels_here, .. } = self.facts;
        let concurrent = (max_slots / group_size).max(1);
        let single = (1.0 / self.alone(2, cores)).min(1.0 / self.learner());
        let labels = if labels_here { cores } else { 32 } as f64 / self.alone(1, 1);
        // Of five batches, the number that η = 4 admits, each takes at least one group's path to the learner and its
        // complete training.
        let way: f64 = (0..3).map(|role| self.alone(role, cores)).sum();
        let admitted = 5.0 * batch as f64 / (way + batch as f64 * self.learner());
        (cores as f64 / self.cores(concurrent)).min(single).min(labels).min(admitted)
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
        let concurrent = (plan.slots / plan.group_size).max(1);
        // A worker that samples several groups concurrently is modelled as that many workers, each slower accordingly.
        let sampling = size * self.alone(0, plan.threads[0]) * (self.common + (1.0 - self.common) * concurrent as f64);
        let taking = |seconds: f64| ScriptedStage::taking(Duration::from_secs_f64(seconds));
        let label = taking(size * self.alone(1, plan.threads[1]));
        let reward = taking(size * self.alone(2, plan.threads[2]));
        // With micro-batches, the prompt is computed in each.
        let parts = plan.group_size.checked_div(plan.micro_batch).unwrap_or(1);
        let learn = size * self.alone(3, plan.threads[3]) * (1.0 + (parts - 1) as f64 / 2.0);
        // Several replicas are modelled as that many workers before the one that makes the steps.
        let lanes = plan.workers[3];
        let alone = if lanes == 1 { learn } else { 0.0 };
        let (gradient, learn) = (taking(learn), taking(alone + self.step / batch as f64));
        let clock = Clock::simulated();
        let options = GraphOptions { clock: clock.clone(), ..GraphOptions::default() };
        let workers = [plan.workers[0] * concurrent, plan.workers[1]];
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
            let learned = if lanes == 1 {
                rewarded
            } else {
                let (learned_out, learned) = builder.edge("gradients", 2);
                for n in 0..lanes {
                    builder.stage(spec("replica", n), gradient.clone(), rewarded.clone(), learned_out.clone());
                }
                learned
            };
            builder.sink(spec("learn", 0), ScriptedSink::new(learn.clone(), batch, Some(gate), |_, _| {}), learned);
            Ok(())
        };
        let report = self.runtime.block_on(async {
            let graph = spawn_graph(options, wire);
            assert_eq!(graph.wait().await, Outcome::Finished);
            graph.report()
        });
        let rate = groups as f64 / clock.now().as_secs_f64();
        // If the concurrent work needs more cores than exist, everything is slower by that ratio.
        let cores = size * self.cores(concurrent) + self.step / batch as f64;
        let slower = (rate * cores / self.facts.cores as f64).max(1.0);
        let work = |role: Role| {
            let stages = report.stages.iter().filter(|stage| stage.role == role.name());
            let lanes = if role == Role::Rollout { concurrent as f64 } else { 1.0 };
            stages.map(|stage| stage.busy_s).sum::<f64>() / groups as f64 / lanes * slower
        };
        Ok(Measured { groups_per_s: rate / slower, work_s: Role::ALL.map(work) })
    }
}

fn facts(cores: usize) -> Facts {
    Facts {
        cores,
        group_size: 8,
        batch: 4,
        labels_here: true,
        labels: true,
        max_slots: 64,
        max_replicas: 4,
        micro_batch: 0,
    }
}

/// One worker of each kind, and no concurrency.
fn mis_set() -> Plan {
    Plan { batch: 4, ..Plan::single(8) }
}

const REACH: SearchScope = SearchScope { trials: 6, sizes: false };

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn the_known_optimum_is_found_on_six_machines() {
    for (name, mut machine) in [
        ("a learner that wants threads", Scripted::new(facts(8), [0.1; 4], [0.8, 0.4, 0.2, 7.0], 0.3)),
        (
            "a server that judges slowly",
            Scripted::new(
                // The learner is on a device, so that it has no replicas.
                Facts { labels_here: false, max_replicas: 1, ..facts(4) },
                [0.02, 4.0, 0.01, 0.05],
                [0.4, 0.0, 0.1, 0.5],
                0.5,
            ),
        ),
        (
            "a learner that only replicas make faster",
            Scripted::new(facts(8), [0.1, 0.1, 0.05, 2.0], [0.4, 0.2, 0.1, 0.0], 0.3),
        ),
        (
            "sampling that is cheaper in large batches",
            Scripted::new(facts(2), [0.1, 0.02, 0.02, 0.1], [4.0, 0.1, 0.1, 0.3], 0.9),
        ),
        ("two halves that overlap", Scripted::new(facts(2), [1.0, 0.02, 0.02, 1.0], [0.0; 4], 0.0)),
        (
            "a large machine that judges most",
            Scripted::new(facts(16), [0.2, 0.2, 0.05, 0.1], [2.0, 12.0, 0.2, 2.0], 0.6),
        ),
    ] {
        let bound = machine.bound();
        let log = Mutex::new(Vec::new());
        let tuned = tune(&mut machine, &mis_set(), REACH, |text| log.lock().unwrap().push(text.to_owned())).unwrap();
        let found = tuned.best.measured;
        let plan = tuned.best.plan.describe(&machine.facts);
        println!("{name}: {:.3} → {found:.3} of at most {bound:.3} ({plan})", tuned.before.measured);
        assert!(tuned.before.measured < 0.85 * bound, "{name}: nothing to find");
        assert!(found >= 0.9 * bound, "{name}: {found} of {bound} by {plan}\n{:?}", log.lock().unwrap());
        assert!(tuned.is_better(), "{name}: {tuned:?}");
        // The predictions for the best plan and for the best synchronous one were accurate.
        assert!((tuned.best.predicted / found - 1.0).abs() < 0.15, "{name}: {tuned:?}");
        let (plan, gain) = tuned.synchronous.clone();
        let synchronous = machine.measure(&plan).unwrap().groups_per_s;
        println!(
            "    asynchronous: {gain:.3} times expected, {:.3} measured ({})",
            found / synchronous,
            plan.describe(&machine.facts)
        );
        assert!(
            (gain / (found / synchronous) - 1.0).abs() < 0.15,
            "{name}: {gain}, {}: {tuned:?}",
            found / synchronous
        );
    }
}

#[test]
fn on_a_single_core_asynchronous_training_is_not_proposed_and_nothing_changes() {
    let mut machine = Scripted::new(facts(1), [1.0, 0.5, 0.2, 1.0], [0.0; 4], 0.0);
    let tuned = tune(&mut machine, &mis_set(), REACH, |_| {}).unwrap();
    assert!(!tuned.is_better() && !tuned.is_asynchronous_worth_it(), "{tuned:?}");
    assert_eq!(tuned.best.plan, mis_set());
}

#[test]
fn larger_steps_are_proposed_if_they_are_requested_and_faster() {
    let sizes = SearchScope { sizes: true, ..REACH };
    let machine = |step: f64, prompt: f64| {
        let machine = Scripted::new(facts(1), [0.2, 0.1, 0.1, 0.2], [0.0; 4], 0.0);
        Scripted { step, prompt, ..machine }
    };
    let chosen = |machine: &mut Scripted, reach: SearchScope| {
        let tuned = tune(machine, &mis_set(), reach, |_| {}).unwrap();
        // The prediction for the larger step was accurate.
        assert!((tuned.best.predicted / tuned.best.measured - 1.0).abs() < 0.1, "{tuned:?}");
        (tuned.best.plan.batch, tuned.best.plan.group_size, tuned.gain())
    };
    // Four groups take 2.4 s and the step takes 4 s more; sixteen groups take 9.6 s and 4 s.
    let (batch, group, gain) = chosen(&mut machine(4.0, 0.0), sizes);
    assert_eq!((batch, group), (16, 16));
    assert!((gain / (6.4 / ((19.2 + 4.0) / 8.0)) - 1.0).abs() < 0.05, "{gain}");
    assert_eq!(chosen(&mut machine(4.0, 0.0), REACH), (4, 8, 1.0), "larger steps were not requested");
    // Half of a group's time is its prompt's: twice the completions take 1.5 times as long.
    let (batch, group, gain) = chosen(&mut machine(0.0, 0.5), sizes);
    assert_eq!((batch, group), (4, 16));
    assert!((gain - 2.0 / 1.5).abs() < 0.07, "{gain}");
    assert_eq!(chosen(&mut machine(0.0, 0.0), sizes), (4, 8, 1.0), "larger steps are not faster here");
}

#[test]
fn a_learner_with_a_small_micro_batch_gets_the_largest_that_fits_into_memory() {
    let configured = Plan { micro_batch: 1, ..mis_set() };
    let mut machine = Scripted::new(facts(2), [0.2, 0.1, 0.1, 0.2], [0.0; 4], 0.0);
    let tuned = tune(&mut machine, &configured, REACH, |_| {}).unwrap();
    assert!(tuned.tried[1..].iter().all(|one| one.plan.micro_batch == 0), "{tuned:?}");
    assert!(tuned.gain() > 1.2 && (tuned.best.predicted / tuned.best.measured - 1.0).abs() < 0.1, "{tuned:?}");
    machine.facts.micro_batch = 2;
    let tuned = tune(&mut machine, &configured, REACH, |_| {}).unwrap();
    assert!(tuned.tried[1..].iter().all(|one| one.plan.micro_batch == 2), "{tuned:?}");
}

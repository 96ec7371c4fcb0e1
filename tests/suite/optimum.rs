//! Tasks with a known best policy: every algorithm must find it on fresh samples, and those with an off-policy
//! correction must find it on stale ones.
//!
//! The policy is a table of logits, one row per position in the sequence and preceding token, so that its expected
//! reward can be computed exactly. Samples come from the weights of exactly `eta` steps ago. The following command
//! prints the table in benches/README.md:
//!
//! ```text
//! cargo test --release --test suite optimum -- --nocapture
//! ```

use preceptor::rl::algo::advantage::moments;
use preceptor::rl::algo::correction::{Correction, Level};
use preceptor::rl::algo::grpo::Grpo;
use preceptor::rl::algo::kl::{Estimator, Kl, Place};
use preceptor::rl::algo::online_dpo::{DpoLoss, OnlineDpo};
use preceptor::rl::algo::ppo::Ppo;
use preceptor::rl::algo::reinforce::Reinforce;
use preceptor::rl::algo::rloo::Rloo;
use preceptor::rl::algo::surrogate::{Average, Clip, Surrogate};
use preceptor::rl::algo::whiten::Whitened;
use preceptor::rl::algo::{Algorithm, GroupView};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEEDS: u64 = 5;
const GROUPS: usize = 8;
const COMPLETIONS: usize = 4;

/// A task of sequences of `length` tokens. Each token earns `worth` of its position, the preceding token and itself,
/// divided by the length. The best policy earns 1.
struct Task {
    name: &'static str,
    length: usize,
    tokens: usize,
    steps: usize,
    worth: fn(usize, usize, usize) -> f64,
}

const TASKS: [Task; 2] = [
    // Ten arms: the best earns 1, the next 0.9, and so on.
    Task {
        name: "bandit",
        length: 1,
        tokens: 10,
        steps: 60,
        worth: |_, _, token| 1.0 - 0.1 * ((token + 7) % 10) as f64,
    },
    // The right token depends on the position and the preceding token; a wrong one earns nothing.
    Task {
        name: "sequence",
        length: 4,
        tokens: 5,
        steps: 100,
        worth: |place, before, token| f64::from(u8::from(token == (2 * place + before + 1) % 5)),
    },
];

impl Task {
    fn row(&self, place: usize, before: usize) -> usize {
        place * self.tokens + before
    }

    fn rows(&self) -> usize {
        self.length * self.tokens
    }
}

/// Logits of a policy, one row after the other.
#[derive(Clone)]
struct Policy {
    logits: Vec<f64>,
    tokens: usize,
}

impl Policy {
    fn probabilities(&self, row: usize) -> Vec<f64> {
        let logits = &self.logits[row * self.tokens..][..self.tokens];
        let top = logits.iter().copied().fold(f64::MIN, f64::max);
        let exps: Vec<f64> = logits.iter().map(|x| (x - top).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.into_iter().map(|x| x / sum).collect()
    }

    /// Returns the expected reward.
    fn value(&self, task: &Task) -> f64 {
        let mut at = vec![0.0; task.tokens];
        at[0] = 1.0;
        let mut total = 0.0;
        for place in 0..task.length {
            let mut next = vec![0.0; task.tokens];
            for (before, share) in at.iter().enumerate() {
                for (token, p) in self.probabilities(task.row(place, before)).into_iter().enumerate() {
                    total += share * p * (task.worth)(place, before, token) / task.length as f64;
                    next[token] += share * p;
                }
            }
            at = next;
        }
        total
    }

    fn logprobs(&self, task: &Task, sequences: &[Vec<usize>]) -> Vec<Vec<f32>> {
        let of = |sequence: &Vec<usize>| {
            let before = std::iter::once(0).chain(sequence.iter().copied());
            let one = |(place, (before, token)): (usize, (usize, &usize))| {
                self.probabilities(task.row(place, before))[*token].ln() as f32
            };
            before.zip(sequence).enumerate().map(one).collect()
        };
        sequences.iter().map(of).collect()
    }

    fn sample(&self, task: &Task, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let mut sequence = Vec::new();
        for place in 0..task.length {
            let before = sequence.last().copied().unwrap_or(0);
            let mut left = rng.random::<f64>();
            let drawn = self.probabilities(task.row(place, before)).iter().position(|p| {
                left -= p;
                left < 0.0
            });
            sequence.push(drawn.unwrap_or(task.tokens - 1));
        }
        sequence
    }
}

/// Adam on a flat list of parameters.
struct Adam {
    rate: f64,
    moments: Vec<[f64; 2]>,
    steps: i32,
}

impl Adam {
    fn new(rate: f64, parameters: usize) -> Self {
        Self { rate, moments: vec![[0.0; 2]; parameters], steps: 0 }
    }

    fn step(&mut self, parameters: &mut [f64], gradient: &[f64]) {
        self.steps += 1;
        for ((parameter, g), [m, v]) in parameters.iter_mut().zip(gradient).zip(&mut self.moments) {
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.99 * *v + 0.01 * g * g;
            let (m, v) = (*m / (1.0 - 0.9f64.powi(self.steps)), *v / (1.0 - 0.99f64.powi(self.steps)));
            *parameter -= self.rate * m / (v.sqrt() + 1e-8);
        }
    }
}

/// Returns the policy's expected reward after training on samples that are `eta` steps old.
fn train(task: &Task, algorithm: &dyn Algorithm, epochs: usize, eta: usize, seed: u64) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut policy = Policy { logits: vec![0.0; task.rows() * task.tokens], tokens: task.tokens };
    let mut values = vec![0.0; task.rows()];
    let mut adam = (Adam::new(0.2, policy.logits.len()), Adam::new(0.05, values.len()));
    let mut versions = vec![policy.clone()];
    for step in 0..task.steps {
        let behind = versions[step.saturating_sub(eta)].clone();
        let groups: Vec<Vec<Vec<usize>>> =
            (0..GROUPS).map(|_| (0..COMPLETIONS).map(|_| behind.sample(task, &mut rng)).collect()).collect();
        let arrived: Vec<Seen> = groups.iter().map(|group| Seen::new(task, group, &behind, &policy, &values)).collect();
        let views: Vec<GroupView<'_>> = arrived.iter().map(|one| one.view(&one.proximal, &one.values)).collect();
        let targets = algorithm.targets(&views);
        for _ in 0..epochs {
            let mut gradient = (vec![0.0; policy.logits.len()], vec![0.0; values.len()]);
            let (mut terms, mut tokens) = (0, 0);
            for ((group, seen), targets) in groups.iter().zip(&arrived).zip(&targets) {
                let (now, worth) = (policy.logprobs(task, group), value_of(task, group, &values));
                let loss = algorithm.loss(&seen.view(&now, &worth), targets);
                terms += loss.terms;
                for (i, sequence) in group.iter().enumerate() {
                    let mut before = 0;
                    for (t, token) in sequence.iter().enumerate() {
                        let row = task.row(t, before);
                        let derivative = f64::from(loss.d_policy[i][t]);
                        for (other, p) in policy.probabilities(row).into_iter().enumerate() {
                            let hit = f64::from(u8::from(other == *token));
                            gradient.0[row * task.tokens + other] += derivative * (hit - p);
                        }
                        gradient.1[row] += loss.d_value.get(i).map_or(0.0, |gradients| f64::from(gradients[t]));
                        tokens += 1;
                        before = *token;
                    }
                }
            }
            gradient.0.iter_mut().for_each(|g| *g /= terms.max(1) as f64);
            gradient.1.iter_mut().for_each(|g| *g /= f64::from(tokens));
            adam.0.step(&mut policy.logits, &gradient.0);
            adam.1.step(&mut values, &gradient.1);
        }
        versions.push(policy.clone());
    }
    policy.value(task)
}

fn value_of(task: &Task, group: &[Vec<usize>], values: &[f64]) -> Vec<Vec<f32>> {
    let of = |sequence: &Vec<usize>| {
        let before = std::iter::once(0).chain(sequence.iter().copied());
        before.take(sequence.len()).enumerate().map(|(t, before)| values[task.row(t, before)] as f32).collect()
    };
    group.iter().map(of).collect()
}

/// A group as sampled.
struct Seen {
    rewards: Vec<f64>,
    preferences: Vec<(usize, usize, f64)>,
    behaviour: Vec<Vec<f32>>,
    proximal: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    reference: Vec<Vec<f32>>,
}

impl Seen {
    fn new(task: &Task, group: &[Vec<usize>], behind: &Policy, policy: &Policy, values: &[f64]) -> Self {
        let earned = |sequence: &Vec<usize>| -> f64 {
            let before = std::iter::once(0).chain(sequence.iter().copied());
            let each = before.zip(sequence).enumerate().map(|(t, (before, token))| (task.worth)(t, before, *token));
            each.sum::<f64>() / task.length as f64
        };
        let rewards: Vec<f64> = group.iter().map(earned).collect();
        let prefers = |i: usize, j: usize| match rewards[i].total_cmp(&rewards[j]) {
            std::cmp::Ordering::Less => 0.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Greater => 1.0,
        };
        let uniform = Policy { logits: vec![0.0; policy.logits.len()], tokens: policy.tokens };
        Self {
            preferences: (0..group.len())
                .flat_map(|j| (0..j).map(move |i| (i, j)))
                .map(|(i, j)| (i, j, prefers(i, j)))
                .collect(),
            behaviour: behind.logprobs(task, group),
            proximal: policy.logprobs(task, group),
            values: value_of(task, group, values),
            reference: uniform.logprobs(task, group),
            rewards,
        }
    }

    fn view<'a>(&'a self, policy: &'a [Vec<f32>], values: &'a [Vec<f32>]) -> GroupView<'a> {
        GroupView {
            rewards: &self.rewards,
            behaviour: &self.behaviour,
            reference: &self.reference,
            proximal: &self.proximal,
            policy,
            preferences: &self.preferences,
            values,
        }
    }
}

/// An algorithm with typical settings, its number of epochs per batch, and whether it corrects for staleness.
struct Entry {
    name: &'static str,
    algorithm: Box<dyn Algorithm>,
    epochs: usize,
    corrected: bool,
}

fn entries() -> Vec<Entry> {
    let surrogate = Surrogate {
        clip: None,
        correction: Correction::truncated(2.0),
        average: Average::SequenceSum,
        kl: Kl { coef: 0.0, estimator: Estimator::K1, place: Place::Reward },
        entropy: 0.0,
    };
    let clip = Some(Clip { low: 0.2, high: 0.2, level: Level::Token });
    let sequence = Correction { level: Level::Sequence, ..surrogate.correction };
    let untruncated = Correction { limit: f64::INFINITY, ..surrogate.correction };
    let ppo = |correction| -> Box<dyn Algorithm> {
        let surrogate = Surrogate { clip, correction, average: Average::TokenMean, ..surrogate };
        let inner = Box::new(Ppo { gamma: 1.0, lambda: 0.95, value_clip: f64::INFINITY, surrogate });
        Box::new(Whitened { inner, rewards: false, advantages: true })
    };
    let entry = |name, algorithm, epochs, corrected| Entry { name, algorithm, epochs, corrected };
    vec![
        entry("REINFORCE, TIS", Box::new(Reinforce { surrogate }), 1, true),
        entry("RLOO, TIS", Box::new(Rloo { surrogate }), 1, true),
        entry(
            "RLOO, TIS of sequences",
            Box::new(Rloo { surrogate: Surrogate { correction: sequence, ..surrogate } }),
            1,
            true,
        ),
        entry(
            "GRPO, TIS",
            Box::new(Grpo { scaled: true, surrogate: Surrogate { clip, average: Average::SequenceMean, ..surrogate } }),
            2,
            true,
        ),
        entry(
            "Dr.GRPO, TIS",
            Box::new(Grpo {
                scaled: false,
                surrogate: Surrogate { clip, average: Average::Constant(4.0), ..surrogate },
            }),
            2,
            true,
        ),
        entry("PPO, decoupled", ppo(untruncated), 2, true),
        entry("PPO, decoupled, TIS", ppo(surrogate.correction), 2, true),
        entry("Online DPO", Box::new(OnlineDpo { beta: 0.1, soft: false, loss_kind: DpoLoss::Sigmoid }), 1, true),
        entry("IPO", Box::new(OnlineDpo { beta: 0.02, soft: false, loss_kind: DpoLoss::Ipo }), 1, true),
        entry("PPO, naive", ppo(Correction::NONE), 2, false),
    ]
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn every_algorithm_finds_the_best_policy_and_corrected_ones_find_it_from_stale_samples() {
    let mut table = String::from("| task | algorithm | η = 0 | η = 4 | η = 16 |\n|---|---|---|---|---|\n");
    let mut missed = Vec::new();
    for task in &TASKS {
        for entry in entries() {
            let mut cells = Vec::new();
            for eta in [0, 4, 16] {
                let earned: Vec<f64> =
                    (0..SEEDS).map(|seed| train(task, entry.algorithm.as_ref(), entry.epochs, eta, seed)).collect();
                let (mean, std) = moments(earned.iter().copied());
                // Student's t for five samples, 95 %.
                let half = 2.776 * std / (SEEDS as f64).sqrt();
                cells.push(format!("{mean:.3} ± {half:.3}"));
                if mean < 0.95 && (eta == 0 || entry.corrected) {
                    missed.push(format!("{} {} at η = {eta}: {mean:.3} ± {half:.3}", task.name, entry.name));
                }
            }
            table.push_str(&format!("| {} | {} | {} |\n", task.name, entry.name, cells.join(" | ")));
        }
    }
    println!("{table}");
    assert!(missed.is_empty(), "{missed:#?}\n{table}");
}

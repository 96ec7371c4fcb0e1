//! Plans: an allocation of a machine's cores to the actors, with batch and group sizes.

use super::{Facts, Role};
use crate::config::Config;

/// Workers and threads of each role, slots, staleness bound, and batch sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Number of workers by role, in the order of [`Role::ALL`]; the reward actor has one, and those of the learner are its
    /// replicas.
    pub workers: [usize; 4],
    /// Number of threads per worker by role, in the same order.
    pub threads: [usize; 4],
    /// Number of sequences that a rollout actor samples concurrently.
    pub slots: usize,
    /// Staleness bound η.
    pub eta: u64,
    /// Number of groups per step. With one group and η = 0, only one stage works at a time.
    pub batch: u64,
    /// Number of completions per prompt.
    pub group_size: usize,
    /// Micro-batch size of the learner in completions; zero is a complete group.
    pub micro_batch: usize,
}

impl Plan {
    /// Returns the plan with one worker and one thread per role, one group per step, and η = 0.
    pub fn single(group_size: usize) -> Self {
        Self { workers: [1; 4], threads: [1; 4], slots: group_size, eta: 0, batch: 1, group_size, micro_batch: 0 }
    }

    /// Returns the plan that a configuration describes: its workers, threads, slots, batch and staleness bound.
    pub fn of(config: &Config) -> Self {
        let Config { rollout, labeler, reward, learner, .. } = config;
        Self {
            workers: [rollout.workers, labeler.workers, 1, learner.replicas],
            threads: [rollout.threads, labeler.threads, reward.threads, learner.threads],
            slots: rollout.slots,
            eta: learner.eta,
            batch: learner.batch_groups,
            group_size: rollout.group_size,
            micro_batch: learner.micro_batch,
        }
    }

    /// Returns the plan with `threads` threads per worker in every role.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = [threads; 4];
        self
    }

    /// Sets the keys of `config` that the plan determines.
    pub fn put(&self, config: &mut Config) {
        let Config { rollout, labeler, reward, learner, .. } = config;
        [rollout.workers, labeler.workers, _, learner.replicas] = self.workers;
        [rollout.threads, labeler.threads, reward.threads, learner.threads] = self.threads;
        rollout.slots = self.slots;
        learner.eta = self.eta;
        learner.batch_groups = self.batch;
        rollout.group_size = self.group_size;
        learner.micro_batch = self.micro_batch;
    }

    /// Returns the configuration keys of the plan with its values.
    pub fn keys(&self) -> [(&'static str, u64); 12] {
        [
            ("rollout.workers", self.workers[0] as u64),
            ("rollout.threads", self.threads[0] as u64),
            ("rollout.slots", self.slots as u64),
            ("labeler.workers", self.workers[1] as u64),
            ("labeler.threads", self.threads[1] as u64),
            ("reward.threads", self.threads[2] as u64),
            ("learner.threads", self.threads[3] as u64),
            ("learner.replicas", self.workers[3] as u64),
            ("learner.eta", self.eta),
            ("learner.batch_groups", self.batch),
            ("rollout.group_size", self.group_size as u64),
            ("learner.micro_batch", self.micro_batch as u64),
        ]
    }

    /// Returns the differences from `other`: key, value in `other`, value in this plan.
    pub fn changes(&self, other: &Self) -> Vec<(&'static str, u64, u64)> {
        let pairs = other.keys().into_iter().zip(self.keys());
        pairs.filter(|(was, is)| was.1 != is.1).map(|(was, is)| (was.0, was.1, is.1)).collect()
    }

    /// Returns a one-line description of the plan for messages.
    pub fn describe(&self, facts: &Facts) -> String {
        let role = |role: Role| {
            let (workers, threads) = (self.workers[role as usize], self.threads[role as usize]);
            format!("{} {workers}×{threads}", role.name())
        };
        let roles = Role::ALL.into_iter().filter(|role| *role != Role::Label || facts.labels);
        let roles: Vec<String> = roles.map(role).collect();
        let sizes = if (self.batch, self.group_size) == (facts.batch, facts.group_size) {
            String::new()
        } else {
            format!(", {} groups of {}", self.batch, self.group_size)
        };
        let at_a_time = if self.micro_batch == 0 { String::new() } else { format!(", {} at a time", self.micro_batch) };
        format!("{}, {} slots, η = {}{sizes}{at_a_time}", roles.join(", "), self.slots, self.eta)
    }

    /// Returns the number of completions per step.
    pub fn completions(&self) -> u64 {
        self.batch * self.group_size as u64
    }

    /// Returns plans with larger batches, up to four times the groups of twice the size, smallest first. Includes this
    /// plan.
    pub(super) fn larger(&self) -> Vec<Self> {
        let sizes = [1, 2, 4].into_iter().flat_map(|n| [(n, 1), (n, 2)]);
        let larger =
            |(n, m): (u64, usize)| Self { batch: n * self.batch, group_size: m * self.group_size, ..self.clone() };
        let mut plans: Vec<Self> = sizes.map(larger).collect();
        plans.sort_by_key(Self::completions);
        plans
    }

    /// Returns the cost for choices among equally fast plans: total threads, then η, then slots, then replicas, which need
    /// memory.
    pub(super) fn cost(&self) -> (usize, u64, usize, usize) {
        let threads = self.workers.iter().zip(&self.threads).map(|(workers, threads)| workers * threads).sum();
        (threads, self.eta, self.slots, self.workers[3])
    }

    /// Returns the candidate plans for a machine: powers of two for every number, and the values of `configured`.
    pub(super) fn all(facts: &Facts, configured: &Self) -> Vec<Self> {
        let up_to = |most: usize| -> Vec<usize> {
            let mut steps: Vec<usize> =
                std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < most).collect();
            steps.push(most.max(1));
            steps
        };
        let cores = up_to(facts.cores);
        let slots: Vec<usize> = {
            let least = facts.group_size.min(facts.max_slots);
            let mut slots: Vec<usize> =
                std::iter::successors(Some(least), |n| Some(2 * n)).take_while(|n| *n < facts.max_slots).collect();
            slots.extend([facts.max_slots, configured.slots]);
            slots.sort_unstable();
            slots.dedup();
            slots
        };
        let label_workers = match (facts.labels, facts.labels_here) {
            (false, _) => vec![configured.workers[1]],
            (true, true) => cores.clone(),
            (true, false) => up_to(32),
        };
        let label_threads = if facts.labels && facts.labels_here { cores.clone() } else { vec![configured.threads[1]] };
        // Algorithms with a correction were measured to lose nothing up to η = 4.
        let mut etas = vec![0, 1, 2, 4, configured.eta];
        etas.sort_unstable();
        etas.dedup();
        // Several replicas of several threads each are hardly faster than as many of one thread.
        let replicas = cores.iter().filter(|n| (2..=facts.max_replicas).contains(*n)).map(|n| (*n, 1));
        let learners: Vec<(usize, usize)> = cores.iter().map(|threads| (1, *threads)).chain(replicas).collect();
        let mut plans = Vec::new();
        for rollout in divisions(&cores, facts.cores) {
            for label in label_workers.iter().flat_map(|w| label_threads.iter().map(move |t| (*w, *t))) {
                if facts.labels && facts.labels_here && label.0 * label.1 > facts.cores {
                    continue;
                }
                for (reward, learn) in cores.iter().flat_map(|a| learners.iter().map(move |b| (*a, *b))) {
                    for slots in &slots {
                        for eta in &etas {
                            plans.push(Self {
                                workers: [rollout.0, label.0, 1, learn.0],
                                threads: [rollout.1, label.1, reward, learn.1],
                                slots: *slots,
                                eta: *eta,
                                batch: facts.batch,
                                group_size: facts.group_size,
                                micro_batch: facts.micro_batch,
                            });
                        }
                    }
                }
            }
        }
        if !plans.contains(configured) {
            plans.push(configured.clone());
        }
        plans
    }
}

/// Returns all numbers of workers and threads per worker whose product is at most `cores`.
fn divisions(steps: &[usize], cores: usize) -> Vec<(usize, usize)> {
    let all = steps.iter().flat_map(|workers| steps.iter().map(move |threads| (*workers, *threads)));
    all.filter(|(workers, threads)| workers * threads <= cores).collect()
}

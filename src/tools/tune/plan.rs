//! One division of a machine among the actors, and what a step is made of.

use super::{Facts, Role};
use crate::config::Config;

/// Workers and threads of each role, sequences side by side, the staleness bound, and the sizes of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Workers, in the order of [`Role::ALL`]; reward and learner have one each.
    pub workers: [usize; 4],
    /// Threads of each worker, in the same order.
    pub threads: [usize; 4],
    /// Sequences that a rollout actor has side by side.
    pub slots: usize,
    /// η.
    pub eta: u64,
    /// Groups per step. One, with η = 0, lets one group through at a time, so that each stage works alone.
    pub batch: u64,
    /// Completions of a prompt.
    pub group_size: usize,
    /// Completions that the learner takes at a time; zero is a whole group.
    pub micro_batch: usize,
}

impl Plan {
    /// One worker and one thread everywhere, one group at a time, in steps of one.
    pub fn single(group_size: usize) -> Self {
        Self { workers: [1; 4], threads: [1; 4], slots: group_size, eta: 0, batch: 1, group_size, micro_batch: 0 }
    }

    /// What a configuration has.
    pub fn of(config: &Config) -> Self {
        let Config { rollout, labeler, reward, learner, .. } = config;
        Self {
            workers: [rollout.workers, labeler.workers, 1, 1],
            threads: [rollout.threads, labeler.threads, reward.threads, learner.threads],
            slots: rollout.slots,
            eta: learner.eta,
            batch: learner.batch_groups,
            group_size: rollout.group_size,
            micro_batch: learner.micro_batch,
        }
    }

    /// The same with as many threads everywhere.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = [threads; 4];
        self
    }

    /// Puts it into a configuration.
    pub fn put(&self, config: &mut Config) {
        let Config { rollout, labeler, reward, learner, .. } = config;
        [rollout.workers, labeler.workers, ..] = self.workers;
        [rollout.threads, labeler.threads, reward.threads, learner.threads] = self.threads;
        rollout.slots = self.slots;
        learner.eta = self.eta;
        learner.batch_groups = self.batch;
        rollout.group_size = self.group_size;
        learner.micro_batch = self.micro_batch;
    }

    /// Keys of the configuration with this plan's values.
    pub fn keys(&self) -> [(&'static str, u64); 11] {
        [
            ("rollout.workers", self.workers[0] as u64),
            ("rollout.threads", self.threads[0] as u64),
            ("rollout.slots", self.slots as u64),
            ("labeler.workers", self.workers[1] as u64),
            ("labeler.threads", self.threads[1] as u64),
            ("reward.threads", self.threads[2] as u64),
            ("learner.threads", self.threads[3] as u64),
            ("learner.eta", self.eta),
            ("learner.batch_groups", self.batch),
            ("rollout.group_size", self.group_size as u64),
            ("learner.micro_batch", self.micro_batch as u64),
        ]
    }

    /// What differs from `other`: key, its value, this one's.
    pub fn changes(&self, other: &Self) -> Vec<(&'static str, u64, u64)> {
        let pairs = other.keys().into_iter().zip(self.keys());
        pairs.filter(|(was, is)| was.1 != is.1).map(|(was, is)| (was.0, was.1, is.1)).collect()
    }

    /// In a line.
    pub fn describe(&self, facts: &Facts) -> String {
        let role = |role: Role| {
            let (workers, threads) = (self.workers[role as usize], self.threads[role as usize]);
            format!("{} {workers}×{threads}", role.name())
        };
        let roles = Role::ALL.into_iter().filter(|one| *one != Role::Label || facts.labels);
        let roles: Vec<String> = roles.map(role).collect();
        let sizes = if (self.batch, self.group_size) == (facts.batch, facts.group_size) {
            String::new()
        } else {
            format!(", {} groups of {}", self.batch, self.group_size)
        };
        let at_a_time = if self.micro_batch == 0 { String::new() } else { format!(", {} at a time", self.micro_batch) };
        format!("{}, {} slots, η = {}{sizes}{at_a_time}", roles.join(", "), self.slots, self.eta)
    }

    /// Completions of a step.
    pub fn completions(&self) -> u64 {
        self.batch * self.group_size as u64
    }

    /// Steps that are larger, up to four times the groups of twice the size, smallest first; this one among them.
    pub(super) fn larger(&self) -> Vec<Self> {
        let sizes = [1, 2, 4].into_iter().flat_map(|n| [(n, 1), (n, 2)]);
        let larger =
            |(n, m): (u64, usize)| Self { batch: n * self.batch, group_size: m * self.group_size, ..self.clone() };
        let mut plans: Vec<Self> = sizes.map(larger).collect();
        plans.sort_by_key(Self::completions);
        plans
    }

    /// What it takes, for choices among equals: threads, then slots and staleness.
    pub(super) fn cost(&self) -> (usize, u64, usize) {
        let threads = self.workers.iter().zip(&self.threads).map(|(workers, threads)| workers * threads).sum();
        (threads, self.eta, self.slots)
    }

    /// Plans worth rating on a machine: powers of two of everything, and what `configured` has.
    pub(super) fn all(facts: &Facts, configured: &Self) -> Vec<Self> {
        let up_to = |most: usize| -> Vec<usize> {
            let mut steps: Vec<usize> =
                std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < most).collect();
            steps.push(most.max(1));
            steps
        };
        let cores = up_to(facts.cores);
        let slots: Vec<usize> = {
            let least = facts.group_size.min(facts.most_slots);
            let mut slots: Vec<usize> =
                std::iter::successors(Some(least), |n| Some(2 * n)).take_while(|n| *n < facts.most_slots).collect();
            slots.extend([facts.most_slots, configured.slots]);
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
        // Four versions are what algorithms with a correction were seen to bear without loss.
        let mut etas = vec![0, 1, 2, 4, configured.eta];
        etas.sort_unstable();
        etas.dedup();
        let mut plans = Vec::new();
        for rollout in divisions(&cores, facts.cores) {
            for label in label_workers.iter().flat_map(|w| label_threads.iter().map(move |t| (*w, *t))) {
                if facts.labels && facts.labels_here && label.0 * label.1 > facts.cores {
                    continue;
                }
                for (reward, learn) in cores.iter().flat_map(|a| cores.iter().map(move |b| (*a, *b))) {
                    for slots in &slots {
                        for eta in &etas {
                            plans.push(Self {
                                workers: [rollout.0, label.0, 1, 1],
                                threads: [rollout.1, label.1, reward, learn],
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

/// Workers and threads of each that the machine has cores for.
fn divisions(steps: &[usize], cores: usize) -> Vec<(usize, usize)> {
    let all = steps.iter().flat_map(|workers| steps.iter().map(move |threads| (*workers, *threads)));
    all.filter(|(workers, threads)| workers * threads <= cores).collect()
}

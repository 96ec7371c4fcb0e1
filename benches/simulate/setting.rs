//! The settings of a simulated run, and its result.

use std::time::Duration;

use preceptor::util::seed;

/// Deliberate violations of the rules, by which tests prove that the simulation would notice one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Violation {
    /// The rules hold.
    #[default]
    None,
    /// Workers acknowledge work when they begin it, and not when its result is handed over.
    EarlyAcknowledgement,
    /// Workers begin work with any weights, and the coordinator accepts it.
    AnyVersion,
}

/// Lengths of completions in tokens: log-normal with a maximum.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Median without the maximum.
    pub median: f64,
    /// Standard deviation of the logarithm.
    pub sigma: f64,
    /// Maximum (`rollout.max_new_tokens`).
    pub longest: f64,
}

impl Lengths {
    /// Returns the length of the completion with this seed. A completion that is sampled again has the same length.
    pub fn of(&self, seed: u64) -> f64 {
        let uniform = |x: u64| (seed::mix(x) >> 11) as f64 / (1u64 << 53) as f64;
        let (a, b) = (1.0 - uniform(seed), uniform(!seed));
        let normal = (-2.0 * a.ln()).sqrt() * (2.0 * std::f64::consts::PI * b).cos();
        (self.median * (self.sigma * normal).exp()).clamp(1.0, self.longest)
    }

    /// Returns the mean of the longest of `n` completions.
    pub fn mean_of_longest(&self, n: usize) -> f64 {
        const DRAWS: usize = 20_000;
        let longest = |i: usize| {
            (0..n).map(|k| self.of(seed::completion(77, i as u64, k))).fold(0.0, |longest: f64, one| longest.max(one))
        };
        (0..DRAWS).map(longest).sum::<f64>() / DRAWS as f64
    }
}

/// A simulated run.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Number of workers; one that dies is replaced at once by another, which has to fetch the weights first.
    pub workers: usize,
    /// Staleness bound η.
    pub eta: u64,
    /// Groups of a batch.
    pub batch: u64,
    /// Completions of a group.
    pub group: usize,
    /// Completions of one message of work. A worker samples those of one message at a time.
    pub part: usize,
    /// Number of steps.
    pub steps: u64,
    /// Number of first steps in which the rate is not measured.
    pub warm_up: u64,
    /// Time of the learner for a batch.
    pub step: Duration,
    /// Lease of work.
    pub lease: Duration,
    /// Completions per second of all workers without losses and waiting, as a multiple of what the learner consumes.
    pub capacity: f64,
    /// Lengths of completions.
    pub lengths: Lengths,
    /// Share of the workers that die per minute.
    pub deaths: f64,
    /// Share of the workers that lose their connection for 1.5 leases per minute.
    pub cuts: f64,
    /// Share of slow workers, and the factor by which they are slower.
    pub slow: (f64, f64),
    /// A worker whose time per token is more than this multiple of the fleet's median takes no work.
    pub slowest: Option<f64>,
    /// Completions are continued by another worker from the last sign of life of a worker that died.
    pub resumed: bool,
    /// Time in which a worker receives a version.
    pub transfer: Duration,
    /// Seed of all random draws.
    pub seed: u64,
    /// Violation of the rules.
    pub violation: Violation,
}

impl Setting {
    pub fn groups(&self) -> u64 {
        self.steps * self.batch
    }

    /// Returns the time per token in seconds of a worker that is not slow.
    pub fn token_s(&self) -> f64 {
        let workers = self.workers as f64 * (1.0 - self.slow.0 + self.slow.0 / self.slow.1);
        let parts = self.batch as f64 * (self.group / self.part) as f64;
        workers * self.step.as_secs_f64() / (self.capacity * parts * self.lengths.mean_of_longest(self.part))
    }
}

/// Result of a simulated run.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Rate of the learner as a share of its rate without waiting.
    pub share: f64,
    /// Sampled tokens that were not used, as a share of those that were.
    pub redone: f64,
    /// Largest age in versions of a trained completion's oldest token.
    pub oldest: u64,
    /// Mean age in versions of the trained completions' oldest tokens.
    pub age: f64,
    /// Groups that were not trained by the end.
    pub lost: u64,
    /// The simulation ended because no group was trained for a long time.
    pub stalled: bool,
    /// Groups that were trained more than once.
    pub doubled: u64,
    /// Completions that are not those of the group's prompt.
    pub foreign: u64,
    /// Results of work that had a result.
    pub repeated: u64,
    /// Results that were refused.
    pub refused: u64,
    /// Deaths of workers.
    pub deaths: u64,
    /// Transfers of a version to a worker.
    pub transfers: u64,
    /// Trained groups.
    pub groups: u64,
    /// Steps.
    pub steps: u64,
    /// Simulated time.
    pub time: Duration,
}

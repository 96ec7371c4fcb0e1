//! Drawing a token from logits, and saying how likely it was.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ops;

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; zero takes the most likely token.
    pub temperature: f64,
    /// Only this many of the likeliest tokens are drawn from; absent draws from all.
    pub top_k: Option<usize>,
    /// Limit of new tokens per completion, at least one.
    pub max_new_tokens: usize,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
}

/// One completion's random stream.
pub struct Sampler {
    temperature: f64,
    top_k: Option<usize>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A stream that is a function of `seed` alone.
    pub fn new(sampling: &Sampling, seed: u64) -> Self {
        Self { temperature: sampling.temperature, top_k: sampling.top_k, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Draws from softmax(logits/T), over the likeliest k where k is set, and returns the token with its
    /// log-probability in that distribution. At T = 0: the most likely token (the first of equals) and its log-probability at T = 1.
    pub fn draw(&mut self, logits: &[f32]) -> (u32, f32) {
        if self.temperature == 0.0 {
            let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            return (best as u32, logits[best] - ops::row_logsumexp(logits, 1.0));
        }
        let kept = self.top_k.filter(|k| *k < logits.len()).map(|k| likeliest(logits, k));
        let logits = kept.as_deref().unwrap_or(logits);
        let inverse = (1.0 / self.temperature) as f32;
        let total = ops::row_logsumexp(logits, inverse);
        let mut left = self.rng.random::<f64>();
        let mut chosen = None;
        for (i, logit) in logits.iter().enumerate() {
            let probability = f64::from((logit * inverse - total).exp());
            if probability > 0.0 {
                chosen = Some(i);
            }
            left -= probability;
            if left < 0.0 {
                break;
            }
        }
        // Rounding may leave a sliver after the last token; it falls to the last one that has any mass.
        let chosen = chosen.unwrap_or(0);
        (chosen as u32, logits[chosen] * inverse - total)
    }
}

/// `logits` with all but the `k` largest at −∞; of equals the first are kept.
fn likeliest(logits: &[f32], k: usize) -> Vec<f32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_rank = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let k = k.max(1);
    order.select_nth_unstable_by(k - 1, by_rank);
    let mut kept = vec![f32::NEG_INFINITY; logits.len()];
    for id in &order[..k] {
        kept[*id as usize] = logits[*id as usize];
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_k_draws_among_the_likeliest_and_says_so() {
        let logits = [0.0f32, 1.0, -2.0, 1.0, 0.5];
        let sampling = Sampling { temperature: 1.0, top_k: Some(2), max_new_tokens: 1, eos: vec![] };
        let mut seen = [0u32; 5];
        for seed in 0..200 {
            let (id, logprob) = Sampler::new(&sampling, seed).draw(&logits);
            seen[id as usize] += 1;
            assert!((logprob - 0.5f32.ln()).abs() < 1e-6);
        }
        assert!(seen[1] > 0 && seen[3] > 0 && seen[1] + seen[3] == 200, "{seen:?}");
    }

    #[test]
    fn draws_follow_the_tempered_distribution() {
        let logits = [0.0f32, 1.0, -2.0, 0.5];
        let sampling = Sampling { temperature: 0.7, top_k: None, max_new_tokens: 1, eos: vec![] };
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = [0u32; 4];
        let draws = 20_000u32;
        for seed in 0..draws {
            let (id, logprob) = Sampler::new(&sampling, u64::from(seed)).draw(&logits);
            counts[id as usize] += 1;
            assert!((f64::from(logprob) - (weights[id as usize] / total).ln()).abs() < 1e-5);
        }
        for (count, weight) in counts.iter().zip(&weights) {
            let p = weight / total;
            let error = (f64::from(draws) * p * (1.0 - p)).sqrt();
            assert!((f64::from(*count) - f64::from(draws) * p).abs() < 5.0 * error, "{counts:?} against {weights:?}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let sampling = Sampling { temperature: 0.0, top_k: None, max_new_tokens: 1, eos: vec![] };
        let (id, logprob) = Sampler::new(&sampling, 1).draw(&[1.0, 3.0, 3.0]);
        assert_eq!(id, 1);
        assert!((f64::from(logprob) - (1.0 / (2.0 + (-2f64).exp())).ln()).abs() < 1e-6);
    }
}

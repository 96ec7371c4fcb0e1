//! Sampling of a token from logits, with its log-probability.

use std::collections::HashSet;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::stop::Stop;

/// Sampling settings. Restrictions are applied in field order, as in `transformers`; the default has none.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// Repetition penalty: logits of tokens in the prompt or sampled before are divided by it if positive, and
    /// multiplied by it otherwise (Keskar et al. 2019, §4.1). 1 has no effect.
    pub repetition_penalty: f64,
    /// Temperature that logits are divided by; zero decodes greedily.
    pub temperature: f64,
    /// Top-k: sample among this many most likely tokens only.
    pub top_k: Option<usize>,
    /// Top-p: sample among the smallest set of tokens with at least this total probability (Holtzman et al. 2020,
    /// §3.1).
    pub top_p: Option<f64>,
    /// Min-p: sample among tokens with at least this share of the most likely token's probability (Nguyen et al. 2024).
    pub min_p: Option<f64>,
    /// Maximum number of new tokens per completion, at least one.
    pub max_new_tokens: usize,
    /// Number of sampled token ids: higher ids are never sampled, since a model's embedding may have more rows than its
    /// tokenizer has tokens.
    pub vocabulary: usize,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
    /// Texts that end a completion.
    pub stop: Option<Arc<Stop>>,
}

impl Default for Sampling {
    /// Returns settings that sample one token among all, at temperature 1.
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            max_new_tokens: 1,
            vocabulary: usize::MAX,
            eos: Vec::new(),
            stop: None,
        }
    }
}

impl Sampling {
    /// Returns whether sampling needs only the logits and a temperature.
    pub(super) fn is_plain(&self) -> bool {
        let is_unrestricted = self.top_k.is_none() && self.top_p.is_none() && self.min_p.is_none();
        is_unrestricted && self.repetition_penalty == 1.0 && self.temperature != 0.0
    }

    /// Returns the number of the `width` logits that are sampled from.
    pub(super) fn drawn(&self, width: usize) -> usize {
        self.vocabulary.clamp(1, width)
    }

    pub(super) fn inverse_temperature(&self) -> f32 {
        (1.0 / self.temperature) as f32
    }
}

/// Sampler of one completion, with its random stream.
pub struct Sampler {
    sampling: Sampling,
    /// Tokens that the repetition penalty applies to; empty without a penalty.
    penalised_ids: HashSet<u32>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Creates a sampler for a completion of `prompt`; its random stream is a function of `seed` alone.
    pub fn new(sampling: &Sampling, prompt: &[u32], seed: u64) -> Self {
        let penalised = sampling.repetition_penalty != 1.0;
        let penalised_ids = if penalised { prompt.iter().copied().collect() } else { HashSet::new() };
        Self { sampling: sampling.clone(), penalised_ids, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Samples a token and returns it with its log-probability, in nats, in the distribution of all tokens at the
    /// temperature. Rows beyond the vocabulary are included in that distribution, as in the learner's. At temperature
    /// 0, returns the most likely token (the first of equals) and its log-probability at temperature 1.
    ///
    /// Restrictions do not affect the log-probability: the learner computes its own without restrictions, so that their
    /// ratio shows only the change of the weights. TRL and verl do the same.
    pub fn draw(&mut self, logits: &[f32]) -> (u32, f32) {
        let (id, logprob) = match self.restricted(logits) {
            restricted if self.sampling.temperature == 0.0 => {
                let row = restricted.as_deref().unwrap_or(logits);
                let drawn = self.sampling.drawn(row.len());
                let best = (0..drawn).fold(0, |best, i| if row[i] > row[best] { i } else { best });
                (best as u32, logits[best] - kernels::row_logsumexp(logits, 1.0))
            }
            Some(restricted) => {
                let (id, _) = self.pick(&restricted);
                let inverse = self.sampling.inverse_temperature();
                (id, logits[id as usize] * inverse - kernels::row_logsumexp(logits, inverse))
            }
            None => self.pick(logits),
        };
        if self.sampling.repetition_penalty != 1.0 {
            self.penalised_ids.insert(id);
        }
        (id, logprob)
    }

    fn pick(&mut self, logits: &[f32]) -> (u32, f32) {
        let inverse = self.sampling.inverse_temperature();
        let drawn = &logits[..self.sampling.drawn(logits.len())];
        let (chosen, mut logprob) = kernels::draw_from_row(drawn, inverse, self.share());
        if drawn.len() < logits.len() {
            logprob += kernels::row_logsumexp(drawn, inverse) - kernels::row_logsumexp(logits, inverse);
        }
        (chosen as u32, logprob)
    }

    /// Returns a uniform random number in [0, 1): the point of the cumulative distribution at which the next token is
    /// sampled.
    pub(super) fn share(&mut self) -> f64 {
        self.rng.random()
    }

    /// Returns logits with the repetition penalty applied and excluded tokens at −∞; `None` if all are unchanged.
    pub fn restricted(&self, logits: &[f32]) -> Option<Vec<f32>> {
        let Sampling { repetition_penalty, temperature, top_k, top_p, min_p, .. } = &self.sampling;
        let (penalty, greedy) = (*repetition_penalty as f32, *temperature == 0.0);
        let filtered = !greedy && (top_k.is_some() || top_p.is_some() || min_p.is_some());
        if !filtered && penalty == 1.0 {
            return None;
        }
        let mut out = logits.to_vec();
        if filtered {
            // Ids beyond the vocabulary neither count nor are sampled.
            let drawn = self.sampling.drawn(out.len());
            out[drawn..].fill(f32::NEG_INFINITY);
        }
        if penalty != 1.0 {
            for id in &self.penalised_ids {
                if let Some(logit) = out.get_mut(*id as usize) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        if greedy {
            return Some(out);
        }
        if let Some(k) = top_k.filter(|k| *k < out.len()) {
            keep_likeliest(&mut out, k.max(1));
        }
        let inverse = (1.0 / temperature) as f32;
        if let Some(p) = top_p {
            keep_nucleus(&mut out, *p, inverse);
        }
        if let Some(share) = min_p {
            let top = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // p ≥ share·p_top, in logits.
            let floor = top + (share.ln() as f32) / inverse;
            out.iter_mut().filter(|logit| **logit < floor).for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        Some(out)
    }
}

/// Keeps the `k` largest logits; of equals, the first.
fn keep_likeliest(logits: &mut [f32], k: usize) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.select_nth_unstable_by(k - 1, |a, b| by_rank(logits, a, b));
    for id in &order[k..] {
        logits[*id as usize] = f32::NEG_INFINITY;
    }
}

/// Keeps the most likely tokens up to and including the one at which their total probability reaches `p`.
fn keep_nucleus(logits: &mut [f32], p: f64, inverse: f32) {
    let total = kernels::row_logsumexp(logits, inverse);
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|id| logits[*id as usize].is_finite()).collect();
    order.sort_unstable_by(|a, b| by_rank(logits, a, b));
    let mut mass = 0.0;
    for id in order {
        let logit = &mut logits[id as usize];
        if mass >= p {
            *logit = f32::NEG_INFINITY;
        } else {
            mass += f64::from((*logit * inverse - total).exp());
        }
    }
}

fn by_rank(logits: &[f32], a: &u32, b: &u32) -> std::cmp::Ordering {
    logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restricted_samples_have_the_log_probability_among_all_tokens() {
        let logits = [0.0f32, 1.0, -2.0, 1.0, 0.5];
        let sampling = Sampling { top_k: Some(2), temperature: 0.5, repetition_penalty: 2.0, ..Sampling::default() };
        let total: f64 = logits.iter().map(|logit| (2.0 * f64::from(*logit)).exp()).sum();
        let mut counts = [0u32; 5];
        for seed in 0..200 {
            let (id, logprob) = Sampler::new(&sampling, &[], seed).draw(&logits);
            counts[id as usize] += 1;
            assert!((f64::from(logprob) - (2.0 - total.ln())).abs() < 1e-6);
        }
        assert!(counts[1] > 0 && counts[3] > 0 && counts[1] + counts[3] == 200, "{counts:?}");
    }

    #[test]
    fn samples_follow_the_tempered_distribution() {
        let logits = [0.0f32, 1.0, -2.0, 0.5];
        let sampling = Sampling { temperature: 0.7, ..Sampling::default() };
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = [0u32; 4];
        let draws = 20_000u32;
        for seed in 0..draws {
            let (id, logprob) = Sampler::new(&sampling, &[], u64::from(seed)).draw(&logits);
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
    fn greedy_decoding_takes_the_first_of_equals() {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let (id, logprob) = Sampler::new(&sampling, &[], 1).draw(&[1.0, 3.0, 3.0]);
        assert_eq!(id, 1);
        assert!((f64::from(logprob) - (1.0 / (2.0 + (-2f64).exp())).ln()).abs() < 1e-6);
    }

    /// Reference distributions from `transformers`, for combinations of restrictions.
    #[test]
    fn restrictions_agree_with_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sampling/restricted.json");
        let reference: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = reference["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 72);
        for case in cases {
            let list = |name: &str| case[name].as_array().unwrap().iter();
            let prompt: Vec<u32> = list("seen").map(|id| id.as_u64().unwrap() as u32).collect();
            let logits: Vec<f32> = list("logits").map(|x| x.as_f64().unwrap() as f32).collect();
            let sampling = Sampling {
                repetition_penalty: case["repetition_penalty"].as_f64().unwrap(),
                temperature: case["temperature"].as_f64().unwrap(),
                top_k: case["top_k"].as_u64().map(|k| k as usize),
                top_p: case["top_p"].as_f64(),
                min_p: case["min_p"].as_f64(),
                ..Sampling::default()
            };
            let expected: Vec<Option<f64>> = list("logprobs").map(serde_json::Value::as_f64).collect();
            for seed in 0..40 {
                let (id, _) = Sampler::new(&sampling, &prompt, seed).draw(&logits);
                assert!(expected[id as usize].is_some(), "{id} was drawn with {sampling:?}");
            }
            let kept = Sampler::new(&sampling, &prompt, 0).restricted(&logits).unwrap_or(logits);
            let inverse = if sampling.temperature == 0.0 { 1.0 } else { sampling.inverse_temperature() };
            let total = kernels::row_logsumexp(&kept, inverse);
            for (id, theirs) in expected.iter().enumerate().filter_map(|(id, theirs)| Some((id, (*theirs)?))) {
                let logprob = f64::from(kept[id] * inverse - total);
                assert!((logprob - theirs).abs() < 1e-4, "{logprob}, {theirs} there, with {sampling:?}");
            }
            let ours = kept.iter().filter(|logit| logit.is_finite()).count();
            assert_eq!(ours, expected.iter().flatten().count(), "{sampling:?}");
        }
    }

    /// Holds for every restriction; the log-probability is that among all rows, as in the learner.
    #[test]
    fn rows_beyond_the_vocabulary_are_never_sampled() {
        let logits = [0.5f32, 1.0, -0.5, 4.0, 5.0];
        let plain = Sampling { vocabulary: 3, ..Sampling::default() };
        let is_unrestricted = kernels::row_logsumexp(&logits, 1.0);
        for sampling in [
            plain.clone(),
            Sampling { temperature: 0.0, ..plain.clone() },
            Sampling { top_k: Some(2), ..plain.clone() },
            Sampling { top_p: Some(0.5), ..plain.clone() },
            Sampling { min_p: Some(0.9), ..plain.clone() },
            Sampling { repetition_penalty: 1.5, ..plain.clone() },
        ] {
            let cut = sampling.top_k.is_some() || sampling.top_p.is_some() || sampling.min_p.is_some();
            for seed in 0..100 {
                let (id, logprob) = Sampler::new(&sampling, &[], seed).draw(&logits);
                assert!(id < 3, "{sampling:?} drew {id}");
                let expected = logits[id as usize] - is_unrestricted;
                assert!(cut || (logprob - expected).abs() < 1e-5, "{sampling:?}: {logprob} for {expected}");
            }
        }
    }

    /// A sampled token is penalised from then on.
    #[test]
    fn a_sampled_token_counts_for_the_repetition_penalty() {
        let sampling = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..Sampling::default() };
        let mut sampler = Sampler::new(&sampling, &[2], 0);
        let drawn: Vec<u32> = (0..3).map(|_| sampler.draw(&[1.5, 2.0, 3.5, 0.9]).0).collect();
        // 2 has 1.75 from the start; 1 has 1.0 once it is sampled, and 2 stays ahead of 0.
        assert_eq!(drawn, [1, 2, 2]);
    }
}

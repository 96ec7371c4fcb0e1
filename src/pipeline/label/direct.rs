//! Direct feedback: the judge rates each completion from 1 to 10 (Lee et al. 2023, d-RLAIF).

use std::sync::Arc;

use anyhow::Result;

use super::backend::{Alive, Ask, Backend, NoAnswer, Reply, Usage};
use super::templates::Rating;
use super::{Labeler, Labels, verdict};
use crate::types::Group;

/// Minimum total probability of the ten ratings; below it, the judge is not answering with a rating.
const MIN_MASS: f64 = 1e-3;

/// Labeler by direct rating: s = Σ_i i·P(i) over i = 1…10, with P from the judge's next-token distribution,
/// renormalised over the ten ratings. The score is (s − 5.5)/4.5, in [−1, 1].
pub struct Direct {
    backend: Arc<dyn Backend>,
    question: Rating,
}

impl Direct {
    /// Creates a labeler that asks `question` of `backend`.
    ///
    /// # Errors
    /// If the template cannot be filled in.
    pub fn new(backend: Arc<dyn Backend>, question: Rating) -> Result<Self> {
        let examples = ["A", "zebra"].map(|text| question.ask(text, text));
        backend.warm(&examples.into_iter().collect::<Result<Vec<_>>>()?)?;
        Ok(Self { backend, question })
    }

    fn ask(&self, groups: &[&Group], usage: &mut Usage) -> Result<Vec<Reply<Vec<f64>>>> {
        let answers: Vec<String> = (1..=10).map(|rating| rating.to_string()).collect();
        let mut asks = Vec::new();
        for group in groups {
            for completion in &group.completions {
                let prompt = self.question.ask(group.prompt.text.trim(), completion.text.trim())?;
                asks.push(Ask { prompt, answers: answers.clone() });
            }
        }
        Ok(self.backend.weigh(&asks, usage))
    }
}

impl Labeler for Direct {
    fn name(&self) -> &'static str {
        "direct"
    }

    fn template(&self) -> u64 {
        self.question.hash()
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.backend.register_liveness(name, alive);
    }

    fn waits(&self) -> bool {
        self.backend.waits()
    }

    fn model(&self) -> u64 {
        self.backend.identity()
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        self.label_many(&[group]).pop().unwrap_or_else(|| Ok(Labels::default()))
    }

    fn label_many(&self, groups: &[&Group]) -> Vec<Result<Labels>> {
        let mut usage = Usage::default();
        let mut replies = match self.ask(groups, &mut usage) {
            Ok(replies) => replies.into_iter(),
            Err(error) => return groups.iter().map(|_| Err(anyhow::anyhow!("{error:#}"))).collect(),
        };
        let mut labels: Vec<Labels> = groups
            .iter()
            .map(|group| {
                let mine = replies.by_ref().take(group.completions.len());
                Labels { scores: mine.map(|weights| verdict(rating(weights))).collect(), ..Labels::default() }
            })
            .collect();
        // The usage of the complete call is reported with the first group; the caller sums it.
        if let Some(first) = labels.first_mut() {
            first.usage = usage;
        }
        labels.into_iter().map(Ok).collect()
    }
}

/// Returns the expected rating under the probabilities of 1 to 10, mapped to [−1, 1].
fn rating(weights: Reply<Vec<f64>>) -> Reply<f64> {
    let weights = weights?;
    let mass: f64 = weights.iter().sum();
    if mass < MIN_MASS {
        return Err(NoAnswer::Abstention(format!(
            "the judge gives the ratings 1 to 10 a probability of {mass:.1e} together"
        )));
    }
    let expected: f64 = weights.iter().enumerate().map(|(i, p)| (i + 1) as f64 * p / mass).sum();
    Ok((expected - 5.5) / 4.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rating_is_renormalised_over_the_ten_answers() {
        let mut weights = vec![0.0; 10];
        (weights[0], weights[8], weights[9]) = (0.3, 0.1, 0.1);
        let expected = (1.0 * 0.3 + 9.0 * 0.1 + 10.0 * 0.1) / 0.5;
        assert!((rating(Ok(weights)).unwrap() - (expected - 5.5) / 4.5).abs() < 1e-12);
        assert!(matches!(rating(Ok(vec![1e-6; 10])), Err(NoAnswer::Abstention(_))));
    }
}

//! Questions for judges whose weights are on workers, and their answers.
//!
//! A question is an operation of a model: probabilities of given answers, free text, log-probabilities of given tokens, or
//! embeddings. Templates, the label cache, panels and the mathematics of labels stay with the labelers.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::super::backend::{Ask, Decoding, NoAnswer, Reply, Usage};
use super::super::likelihood::TokenScores;

/// Largest amount of text or numbers in bytes that is put into one question, and that is expected in one answer; a message
/// of a broker has 1 MiB at most.
pub const LARGEST: usize = 1 << 19;
/// Number of bytes that a token of free text is expected to have at most, on average.
const TOKEN_BYTES: usize = 16;

/// Operation of a judge's model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Question {
    /// Probabilities of given answers; see [`crate::pipeline::label::backend::Backend::weigh`].
    Weigh {
        /// The prompts with their possible answers.
        asks: Vec<Ask>,
        /// Number of bytes that all prompts of the template begin with, whose computation a worker may keep.
        common: usize,
    },
    /// Free text; see [`crate::pipeline::label::backend::Backend::write`].
    Write {
        /// The prompts.
        prompts: Vec<String>,
        /// Sampling of the texts.
        decoding: Decoding,
        /// Number of bytes that all prompts of the template begin with, whose computation a worker may keep.
        common: usize,
    },
    /// Log-probabilities of completions.
    Score {
        /// Token ids of the prompt.
        prompt: Vec<u32>,
        /// Token ids of each completion.
        completions: Vec<Vec<u32>>,
        /// Temperatures.
        temperatures: Vec<f64>,
    },
    /// Embeddings of texts.
    Embed(Vec<String>),
}

/// Result of an operation of a judge's model, in the order of the question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum LabelAnswer {
    /// Probabilities for each prompt, or why there are none; and what was computed.
    Weighed(Vec<Reply<Vec<f64>>>, Usage),
    /// Texts for each prompt, or why there is none; and what was computed.
    Written(Vec<Reply<String>>, Usage),
    /// Log-probabilities in nats.
    Scored(TokenScores),
    /// Embeddings of length 1.
    Embedded(Vec<Vec<f32>>),
    /// The worker could not compute the answer, for this reason.
    Failed(String),
}

impl Question {
    /// Divides a list of prompts with their answers into questions that fit into messages. `common` is the number of bytes
    /// that all prompts of the template begin with.
    pub fn weigh(asks: &[Ask], common: usize) -> Vec<Self> {
        let bytes = |ask: &Ask| ask.prompt.len() + ask.answers.iter().map(String::len).sum::<usize>();
        let lots = divide(asks.iter().map(bytes));
        lots.into_iter().map(|lot| Self::Weigh { asks: asks[lot].to_vec(), common }).collect()
    }

    /// Divides prompts of free text into questions that fit into messages, each with the indices of its prompts. Equal
    /// prompts stay in one question, because the seed of a text depends on the equal prompts before it in a call.
    pub fn write(prompts: &[String], decoding: &Decoding, common: usize) -> Vec<(Vec<usize>, Self)> {
        let mut distinct: Vec<(&str, Vec<usize>)> = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            match distinct.iter_mut().find(|(known, _)| known == prompt) {
                Some((_, places)) => places.push(i),
                None => distinct.push((prompt, vec![i])),
            }
        }
        let bytes = |(prompt, places): &(&str, Vec<usize>)| {
            places.len() * (prompt.len().max(decoding.max_tokens.saturating_mul(TOKEN_BYTES)))
        };
        let lots = divide(distinct.iter().map(bytes)).into_iter();
        lots.map(|lot| {
            let mut places: Vec<usize> = distinct[lot].iter().flat_map(|(_, places)| places).copied().collect();
            places.sort_unstable();
            let prompts = places.iter().map(|i| prompts[*i].clone()).collect();
            (places, Self::Write { prompts, decoding: decoding.clone(), common })
        })
        .collect()
    }

    /// Divides completions into questions whose answers fit into messages.
    pub fn score(prompt: &[u32], completions: &[&[u32]], temperatures: &[f64]) -> Vec<Self> {
        let bytes = |completion: &&[u32]| completion.len() * 5 * temperatures.len().max(1);
        let lots = divide(completions.iter().map(bytes)).into_iter();
        lots.map(|lot| Self::Score {
            prompt: prompt.to_vec(),
            completions: completions[lot].iter().map(|completion| completion.to_vec()).collect(),
            temperatures: temperatures.to_vec(),
        })
        .collect()
    }

    /// Divides texts into questions whose answers fit into messages, for embeddings of up to 8,192 numbers.
    pub fn embed(texts: &[&str]) -> Vec<Self> {
        let lots = divide(texts.iter().map(|text| text.len().max(8192 * 4))).into_iter();
        lots.map(|lot| Self::Embed(texts[lot].iter().map(|text| (*text).to_owned()).collect())).collect()
    }

    /// Checks an answer to this question as foreign input: its kind, the numbers of its parts, and their values.
    ///
    /// # Errors
    /// If anything is impossible; the error says what.
    pub fn check(&self, answer: &LabelAnswer) -> Result<()> {
        match (self, answer) {
            (_, LabelAnswer::Failed(_)) => Ok(()),
            (Self::Weigh { asks, .. }, LabelAnswer::Weighed(replies, usage)) => {
                same("answers", replies.len(), asks.len())?;
                check_usage(usage)?;
                for (ask, reply) in asks.iter().zip(replies) {
                    let Ok(weights) = reply else { continue };
                    same("probabilities", weights.len(), ask.answers.len())?;
                    let sum: f64 = weights.iter().sum();
                    let sound = weights.iter().all(|p| *p >= 0.0) && sum <= 1.0 + 1e-3;
                    ensure!(sound, "it has the probabilities {weights:?}, which sum to {sum}");
                }
                Ok(())
            }
            (Self::Write { prompts, .. }, LabelAnswer::Written(replies, usage)) => {
                same("texts", replies.len(), prompts.len())?;
                check_usage(usage)
            }
            (Self::Score { completions, temperatures, .. }, LabelAnswer::Scored(scores)) => {
                same("temperatures", scores.logprobs.len(), temperatures.len())?;
                for given in &scores.logprobs {
                    same("completions", given.len(), completions.len())?;
                    for (logprobs, completion) in given.iter().zip(completions) {
                        same("log-probabilities", logprobs.len(), completion.len())?;
                        // Rounding may leave the logarithm of a probability of one slightly above zero.
                        let wrong = logprobs.iter().find(|p| !(p.is_finite() && **p <= 1e-3));
                        ensure!(wrong.is_none(), "it has a log-probability of {}", wrong.copied().unwrap_or_default());
                    }
                }
                Ok(())
            }
            (Self::Embed(texts), LabelAnswer::Embedded(vectors)) => {
                same("embeddings", vectors.len(), texts.len())?;
                for vector in vectors {
                    same("numbers in an embedding", vector.len(), vectors[0].len())?;
                    let length: f64 = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    ensure!((length - 1.0).abs() < 1e-2, "it has an embedding of length {length}");
                }
                Ok(())
            }
            _ => anyhow::bail!("it answers another kind of question"),
        }
    }
}

fn same(what: &str, found: usize, expected: usize) -> Result<()> {
    ensure!(found == expected, "it has {found} {what}, and {expected} were asked for");
    Ok(())
}

fn check_usage(usage: &Usage) -> Result<()> {
    let sound = usage.cost == 0.0
        && [usage.requests, usage.prompt_tokens, usage.completion_tokens].iter().all(|n| *n < 1 << 40);
    ensure!(sound, "it claims an impossible use: {usage:?}");
    Ok(())
}

/// Divides items of the given sizes into consecutive ranges of at most [`LARGEST`] bytes, or of one item.
fn divide(sizes: impl Iterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
    let (mut lots, mut bytes): (Vec<std::ops::Range<usize>>, usize) = (Vec::new(), 0);
    for (i, size) in sizes.enumerate() {
        match lots.last_mut() {
            Some(lot) if bytes + size <= LARGEST => lot.end = i + 1,
            _ => {
                lots.push(i..i + 1);
                bytes = 0;
            }
        }
        bytes += size;
    }
    lots
}

/// Returns an answer of the kind that `select` takes out.
///
/// # Errors
/// If the answer is of another kind.
pub(super) fn of_kind<T>(answer: LabelAnswer, select: impl FnOnce(LabelAnswer) -> Option<T>) -> Result<T> {
    select(answer).context("internal error: an answer is of another kind than its question")
}

/// Returns the same failure for each of `count` prompts.
pub(super) fn failed<T>(count: usize, why: &str) -> Vec<Reply<T>> {
    (0..count).map(|_| Err(NoAnswer::Failure(why.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(prompt: &str) -> Ask {
        Ask { prompt: prompt.into(), answers: vec!["1".into(), "2".into()] }
    }

    fn decoding(max_tokens: usize) -> Decoding {
        Decoding { max_tokens, temperature: 0.5, top_k: None, seed: 1 }
    }

    #[test]
    fn questions_are_divided_so_that_they_fit_into_messages() {
        let long = "x".repeat(LARGEST / 2);
        let asks = [ask("a"), ask(&long), ask(&long), ask("b")];
        let divided = Question::weigh(&asks, 3);
        let Question::Weigh { asks: first, common: 3 } = &divided[0] else { panic!() };
        assert_eq!((divided.len(), first.as_slice()), (2, &asks[..2]));
        assert!(Question::weigh(&[], 0).is_empty());
        let tokens = vec![7; LARGEST / 20];
        let divided = Question::score(&[1], &[&tokens, &tokens, &tokens, &[2]], &[1.0, 0.7]);
        let counts: Vec<usize> = divided
            .iter()
            .map(|question| {
                let Question::Score { completions, temperatures, .. } = question else { panic!() };
                assert_eq!(temperatures, &[1.0, 0.7]);
                completions.len()
            })
            .collect();
        assert_eq!(counts, [2, 2]);
        assert_eq!(Question::embed(&["a", "b"]).len(), 1);
    }

    #[test]
    fn equal_prompts_of_free_text_stay_in_one_question() {
        let prompts = ["a", "b", "a", "c"].map(String::from);
        let divided = Question::write(&prompts, &decoding(LARGEST / 2 / TOKEN_BYTES), 0);
        let places: Vec<&[usize]> = divided.iter().map(|(places, _)| places.as_slice()).collect();
        assert_eq!(places, [&[0, 2][..], &[1, 3]]);
        let Question::Write { prompts, .. } = &divided[0].1 else { panic!() };
        assert_eq!(prompts, &["a", "a"]);
        assert_eq!(Question::write(&["a", "b"].map(String::from), &decoding(8), 0).len(), 1);
    }

    #[test]
    fn impossible_answers_are_refused() {
        let weigh = &Question::weigh(&[ask("a")], 0)[0];
        let usage = Usage::default();
        let weighed = |weights: Vec<f64>| LabelAnswer::Weighed(vec![Ok(weights)], usage);
        weigh.check(&weighed(vec![0.5, 0.4])).unwrap();
        weigh.check(&LabelAnswer::Weighed(vec![Err(NoAnswer::Abstention("long".into()))], usage)).unwrap();
        weigh.check(&LabelAnswer::Failed("out of memory".into())).unwrap();
        let write = &Question::write(&["a".into()], &decoding(8), 0)[0].1;
        let score = &Question::score(&[1], &[&[2, 3]], &[1.0])[0];
        let scored = |logprobs: Vec<f32>| LabelAnswer::Scored(TokenScores { logprobs: vec![vec![logprobs]], read: 3 });
        score.check(&scored(vec![-1.0, 0.0])).unwrap();
        let embed = &Question::embed(&["a", "b"])[0];
        embed.check(&LabelAnswer::Embedded(vec![vec![1.0, 0.0], vec![0.6, 0.8]])).unwrap();
        let paid = Usage { cost: 1.0, ..usage };
        for (question, answer, words) in [
            (weigh, weighed(vec![0.5]), "1 probabilities"),
            (weigh, weighed(vec![0.9, 0.4]), "sum to 1.3"),
            (weigh, weighed(vec![-0.1, 0.4]), "-0.1"),
            (weigh, weighed(vec![f64::NAN, 0.4]), "NaN"),
            (weigh, LabelAnswer::Weighed(vec![], usage), "0 answers"),
            (weigh, LabelAnswer::Weighed(vec![Ok(vec![0.1, 0.2])], paid), "impossible use"),
            (weigh, LabelAnswer::Embedded(vec![]), "another kind"),
            (write, LabelAnswer::Written(vec![], usage), "0 texts"),
            (score, scored(vec![-1.0]), "1 log-probabilities"),
            (score, scored(vec![-1.0, 0.5]), "0.5"),
            (score, LabelAnswer::Scored(TokenScores::default()), "0 temperatures"),
            (embed, LabelAnswer::Embedded(vec![vec![1.0]]), "1 embeddings"),
            (embed, LabelAnswer::Embedded(vec![vec![1.0], vec![0.6, 0.8]]), "2 numbers"),
            (embed, LabelAnswer::Embedded(vec![vec![1.0], vec![2.0]]), "length 2"),
        ] {
            let error = question.check(&answer).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}

//! Conversion of a server's token lists and sampled texts to probabilities of answers.

use super::tokens;
use crate::pipeline::label::backend::{NoAnswer, Reply};

/// A space token before the answer is ignored if it has less than this share of the answers' probability.
const NEGLIGIBLE: f64 = 0.01;

/// The most likely next tokens with their probabilities, as listed by a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed(pub Vec<(String, f64)>);

impl Listed {
    /// Returns the probability of each answer, summed over all tokens that spell it with any leading space. An answer
    /// that is not listed has probability zero.
    ///
    /// # Errors
    /// An abstention if none of the answers is listed, or a log-probability cannot be read.
    pub fn weights(&self, answers: &[String]) -> Reply<Vec<f64>> {
        let weights: Vec<f64> = answers
            .iter()
            .map(|answer| self.0.iter().filter(|(token, _)| token.trim_start() == answer).map(|(_, p)| p).sum())
            .collect();
        if let Some(unreadable) = weights.iter().position(|weight| weight.is_nan()) {
            return Err(NoAnswer::Abstention(format!(
                "the log-probability of the answer {} cannot be read",
                answers[unreadable]
            )));
        }
        if self.0.first().is_some_and(|(token, _)| tokens::is_number(token)) {
            return Err(NoAnswer::Abstention(
                "the server sends token numbers instead of texts; start it without --return-tokens-as-token-ids".into(),
            ));
        }
        if weights.iter().all(|weight| *weight == 0.0) {
            let likeliest = self.0.first().map_or("nothing".to_owned(), |(token, _)| cut(token));
            return Err(NoAnswer::Abstention(format!(
                "none of the answers {} is among the judge's likeliest tokens; the likeliest is {likeliest:?}",
                answers.join(", ")
            )));
        }
        Ok(weights)
    }

    /// Returns a separate space token, which an answer may follow, with its probability, if that is large enough to
    /// affect the answers' total.
    pub fn space_before(&self, answers: &[String]) -> Option<(&str, f64)> {
        let (space, p) = self.0.iter().find(|(token, _)| !token.is_empty() && token.chars().all(|c| c == ' '))?;
        (*p > NEGLIGIBLE * self.mass(answers)).then_some((space.as_str(), *p))
    }

    /// Returns the total probability of all answers.
    pub fn mass(&self, answers: &[String]) -> f64 {
        let spelt = |token: &str| answers.iter().any(|answer| token.trim_start() == answer);
        self.0.iter().filter(|(token, _)| spelt(token)).map(|(_, p)| p).sum()
    }

    /// Returns an upper bound on the total probability of the unlisted answers, if the list ends after `most` tokens:
    /// each has at most the probability of the last listed token.
    pub fn unlisted(&self, answers: &[String], most: usize) -> f64 {
        let last = self.0.iter().map(|(_, p)| *p).fold(1.0, f64::min);
        let missing = answers.iter().filter(|answer| !self.has(answer)).count();
        if self.0.len() < most { 0.0 } else { missing as f64 * last }
    }

    /// Adds the tokens `after` that follow `space`, which has probability `p`, as tokens that include the space.
    pub fn add_after_space(&mut self, space: &str, p: f64, after: Self) {
        self.0.extend(after.0.into_iter().map(|(token, q)| (format!("{space}{token}"), p * q)));
    }

    /// Returns whether a token spells the complete `answer`.
    pub fn has(&self, answer: &str) -> bool {
        self.0.iter().any(|(token, _)| token.trim_start() == answer)
    }

    /// Returns the most likely token that spells `answer`, including its space; the answer itself if none does.
    pub fn spelling(&self, answer: &str) -> String {
        let spelt = self.0.iter().filter(|(token, _)| token.trim_start() == answer);
        spelt.max_by(|a, b| a.1.total_cmp(&b.1)).map_or_else(|| answer.to_owned(), |(token, _)| token.clone())
    }

    /// Returns the probability of the token that is exactly `text`.
    pub fn exactly(&self, text: &str) -> f64 {
        self.0.iter().filter(|(token, p)| token == text && !p.is_nan()).map(|(_, p)| p).sum()
    }
}

/// Shortens a token for display, because a server may send one of any length.
fn cut(token: &str) -> String {
    token.chars().take(60).collect()
}

/// Returns pairs of indices of answers of which the first is a prefix of the second.
pub fn split_prefixes(answers: &[String]) -> Vec<(usize, usize)> {
    let pairs = (0..answers.len()).flat_map(|i| (0..answers.len()).map(move |j| (i, j)));
    pairs
        .filter(|(i, j)| i != j && answers[*j].len() > answers[*i].len() && answers[*j].starts_with(&answers[*i]))
        .collect()
}

/// Returns the share of sampled `texts` that name each answer. A text counts if its beginning names an answer.
///
/// # Errors
/// An abstention if fewer than half of the texts name one.
pub fn votes(texts: &[String], answers: &[String]) -> Reply<Vec<f64>> {
    let named: Vec<usize> = texts.iter().filter_map(|text| named(text, answers)).collect();
    if named.len() * 2 < texts.len() || named.is_empty() {
        let unreadable = texts.iter().find(|text| self::named(text, answers).is_none());
        let such = unreadable.map_or(String::new(), |text| format!("; this one could not: {:?}", cut(text)));
        return Err(NoAnswer::Abstention(format!(
            "{} of {} sampled answers could be read{such}",
            named.len(),
            texts.len()
        )));
    }
    let share = |i: usize| named.iter().filter(|index| **index == i).count() as f64 / named.len() as f64;
    Ok((0..answers.len()).map(share).collect())
}

/// Labels that judges write before their answer, in lower case.
const LABELS: [&str; 9] =
    ["answer", "rating", "score", "response", "choice", "option", "summary", "preferred", "verdict"];

/// Returns the index of the answer that a text gives: its first word, or the one after a label such as `Rating:`, without
/// surrounding punctuation. A rating may be followed by its scale (`8/10`). Returns `None` for a text that begins with two
/// different answers (`1 or 2`) and for a negative number.
fn named(text: &str, answers: &[String]) -> Option<usize> {
    let marks = |c: char| !c.is_alphanumeric() && c != '-';
    let text = text.replace("\\boxed", " ");
    let mut words =
        text.split_whitespace().map(|word| word.trim_matches(marks)).filter(|word| !word.is_empty() && *word != "-");
    let place = |word: &str| {
        let word = answers.last().and_then(|last| word.strip_suffix(&format!("/{last}"))).unwrap_or(word);
        answers.iter().position(|answer| answer == word)
    };
    let is_label = |word: &str| LABELS.contains(&word.to_lowercase().as_str());
    let mut first = words.next()?;
    if is_label(first) {
        first = words.next().filter(|word| *word != "is").or_else(|| words.next())?;
    }
    let found = place(first)?;
    let joins = |word: &str| ["or", "and", "to", "vs"].contains(&word.to_lowercase().as_str());
    let second = words.next().filter(|word| !joins(word)).or_else(|| words.next());
    let other = second.and_then(place).is_some_and(|other| other != found);
    (!other).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn spellings_are_summed_and_unlisted_answers_have_probability_zero() {
        let listed = Listed(vec![(" 1".into(), 0.5), ("1".into(), 0.2), ("The".into(), 0.1), ("10".into(), 0.05)]);
        assert_eq!(listed.weights(&answers(&["1", "2", "10"])).unwrap(), [0.7, 0.0, 0.05]);
        assert!(listed.has("10") && !listed.has("2"));
        assert_eq!((listed.spelling("1").as_str(), listed.spelling("2").as_str()), (" 1", "2"));
        assert!(matches!(listed.weights(&answers(&["x"])), Err(NoAnswer::Abstention(why)) if why.contains("\" 1\"")));
    }

    #[test]
    fn answers_after_a_separate_space_token_are_added() {
        let both = answers(&["1", "2"]);
        let mut listed = Listed(vec![("A".into(), 0.5), (" ".into(), 0.25), ("1".into(), 0.125)]);
        assert_eq!(listed.space_before(&both), Some((" ", 0.25)));
        listed.add_after_space(" ", 0.25, Listed(vec![("2".into(), 0.5), ("1".into(), 0.25)]));
        assert_eq!(listed.weights(&both).unwrap(), [0.1875, 0.125]);
        assert_eq!(Listed(vec![(" ".into(), 0.2), ("1".into(), 0.3)]).space_before(&both), Some((" ", 0.2)));
        assert_eq!(Listed(vec![("1".into(), 0.9), (" ".into(), 0.005)]).space_before(&both), None);
    }

    #[test]
    fn unlisted_answers_have_at_most_the_probability_of_the_last_listed_token() {
        let three = answers(&["1", "2", "3"]);
        let listed = Listed(vec![("1".into(), 0.5), ("A".into(), 0.25), ("B".into(), 0.125)]);
        assert_eq!((listed.unlisted(&three, 3), listed.unlisted(&three, 4)), (0.25, 0.0));
        assert_eq!(listed.mass(&three), 0.5);
    }

    #[test]
    fn votes_are_read_strictly() {
        let texts = answers(&["2", " 2.", "\n**1**", "I think 2", "10", "(2) since"]);
        assert_eq!(votes(&texts, &answers(&["1", "2"])).unwrap(), [0.25, 0.75]);
        let one = |text: &str, of: &[&str]| votes(&answers(&[text]), &answers(of)).ok();
        for text in [
            "Answer: 1",
            "Response 1",
            "**Answer:** 1",
            "The",
            "\\boxed{1}",
            "Rating is 1",
            "- 1",
            "1. Text 2 is worse",
        ] {
            let expected = (text != "The").then(|| vec![1.0, 0.0]);
            assert_eq!(one(text, &["1", "2"]), expected, "{text}");
        }
        for text in ["1 or 2", "-1", "1 2", "2, 1", "Answer: 2 or 1", "8/10"] {
            assert_eq!(one(text, &["1", "2"]), None, "{text}");
        }
        let ratings: Vec<String> = (1..=10).map(|rating| rating.to_string()).collect();
        let rated =
            |text: &str| votes(&answers(&[text]), &ratings).ok().and_then(|votes| votes.iter().position(|p| *p > 0.0));
        for (text, expected) in
            [("8/10", Some(7)), ("Rating: 8/10.", Some(7)), ("-3", None), ("3 4", None), ("10", Some(9)), ("8/9", None)]
        {
            assert_eq!(rated(text), expected, "{text}");
        }
        let Err(NoAnswer::Abstention(why)) = votes(&answers(&["who knows"]), &ratings) else { panic!("it was read") };
        assert!(why.contains("0 of 1 sampled answers could be read; this one could not: \"who knows\""), "{why}");
        assert!(matches!(votes(&answers(&["x", "y", "1"]), &answers(&["1", "2"])), Err(NoAnswer::Abstention(_))));
        assert!(votes(&[], &answers(&["1"])).is_err());
    }

    #[test]
    fn answers_that_are_prefixes_of_others_are_found() {
        assert_eq!(split_prefixes(&answers(&["1", "2", "10"])), [(0, 2)]);
    }
}

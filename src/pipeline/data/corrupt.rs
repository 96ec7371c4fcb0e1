//! Preference pairs whose better answer is known by construction: a human reference against a corrupted one.
//!
//! The complete rule: a row with `prompt` and `reference` gives one pair; all choices are made by a hash of the seed
//! and the prompt.
//! - `swap`, for half of the rows: the worse answer is the reference of another row. Among eight random rows, the one
//!   is taken whose word count is nearest to the reference's, so that length carries no information.
//! - `shuffle`, for the other half: the worse answer is the reference with its words in another order.
//! - The better answer is first in half of the pairs.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::util::seed::{self, mix};

/// Number of references that a swap chooses from.
const DRAWN: usize = 8;

/// Kind of corruption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The answer belongs to another prompt.
    Swap,
    /// The words are in another order.
    Shuffle,
}

impl Kind {
    /// Returns the name used in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Swap => "swap",
            Self::Shuffle => "shuffle",
        }
    }
}

/// A corrupted answer and the position of the correct one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corrupted {
    /// Kind of corruption.
    pub kind: Kind,
    /// The corrupted answer.
    pub worse: String,
    /// True if the better answer is first.
    pub better_first: bool,
}

/// Corrupts the reference of row `i` of `rows` (prompt and reference of each). Returns `None` if that is impossible: no
/// other reference was found, or shuffling does not change the order of its words.
pub fn corrupt(rows: &[(String, String)], i: usize, seed: u64) -> Option<Corrupted> {
    let (prompt, reference) = &rows[i];
    let mut rng = ChaCha8Rng::seed_from_u64(mix(seed ^ seed::text(prompt)));
    let (swap, better_first) = (rng.random::<bool>(), rng.random::<bool>());
    let words: Vec<&str> = reference.split_whitespace().collect();
    let (kind, worse) = if swap {
        let near = |other: &str| other.split_whitespace().count().abs_diff(words.len());
        let drawn = (0..DRAWN).map(|_| &rows[rng.random_range(0..rows.len())]);
        let others = drawn.filter(|(other, text)| other != prompt && text != reference).map(|(_, text)| text);
        (Kind::Swap, others.min_by_key(|text| near(text))?.clone())
    } else {
        let mut shuffled = words.clone();
        // Several attempts, since repeated words can fall back into order.
        (0..8).find(|_| {
            shuffled.shuffle(&mut rng);
            shuffled != words
        })?;
        (Kind::Shuffle, shuffled.join(" "))
    };
    Some(Corrupted { kind, worse, better_first })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<(String, String)> {
        (0..400).map(|i| (format!("prompt {i}"), format!("the answer number {i} is {}", "so ".repeat(i % 7)))).collect()
    }

    #[test]
    fn half_of_the_rows_are_swapped_and_half_are_shuffled() {
        let rows = rows();
        let pairs: Vec<Corrupted> = (0..rows.len()).map(|i| corrupt(&rows, i, 1).unwrap()).collect();
        for (corrupted, (_, reference)) in pairs.iter().zip(&rows) {
            assert_ne!(&corrupted.worse, reference);
            let mut words =
                [corrupted.worse.split_whitespace().collect::<Vec<_>>(), reference.split_whitespace().collect()];
            words.iter_mut().for_each(|words| words.sort_unstable());
            assert_eq!(corrupted.kind == Kind::Shuffle, words[0] == words[1], "{corrupted:?} of {reference:?}");
        }
        // Halves, within five standard deviations.
        let bound = 5.0 * (0.25f64 * 400.0).sqrt();
        for count in [
            pairs.iter().filter(|corrupted| corrupted.kind == Kind::Swap).count(),
            pairs.iter().filter(|corrupted| corrupted.better_first).count(),
        ] {
            assert!((count as f64 - 200.0).abs() < bound, "{count}");
        }
        assert_eq!(corrupt(&rows, 7, 1), corrupt(&rows, 7, 1));
        assert!((0..400).any(|i| corrupt(&rows, i, 2) != Some(pairs[i].clone())));
    }

    #[test]
    fn rows_that_cannot_be_corrupted_are_left_out() {
        let alone = [("p".to_owned(), "same same".to_owned())];
        assert!((0..20).all(|seed| corrupt(&alone, 0, seed).is_none()));
    }
}

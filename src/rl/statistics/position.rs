//! Position bias and alignment of a labeler that judges pairs in both orders (Lee et al. 2023).

use serde::Serialize;

use super::interval::{Estimate, share};

/// One of a pair's two answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Answer A.
    A,
    /// Answer B.
    B,
}

/// A labeler's judgement of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Judged {
    /// The labeler answered in both orders.
    Both {
        /// Probability that the answer shown first is preferred, with A shown first.
        ab: f64,
        /// Probability that the answer shown first is preferred, with B shown first.
        ba: f64,
    },
    /// The labeler abstained in one order or both.
    Abstained,
    /// The labeler could not be asked in one order or both.
    Failed,
}

/// A judged pair of answers, with the human choice if known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The labeler's judgement.
    pub judged: Judged,
    /// The answer that a person chose, if known.
    pub human: Option<Choice>,
}

/// Position bias and alignment of a labeler on a set of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Positions {
    /// AI labeler alignment: share of pairs on which the preference averaged over both orders agrees with the person's
    /// choice. Pairs without a person's choice and exact ties are excluded.
    pub alignment: Estimate,
    /// Alignment in order AB only.
    pub alignment_ab: Estimate,
    /// Alignment in order BA only.
    pub alignment_ba: Estimate,
    /// Number of pairs whose preference averaged over both orders is an exact tie, which is neither correct nor wrong.
    pub ties: usize,
    /// Numbers of pairs by preferred position, indexed `[order AB][order BA]`; 0 is the position shown first, 1 the
    /// second. The diagonal holds the pairs whose preferred answer changes with the order.
    pub orders: [[usize; 2]; 2],
    /// Number of pairs with a probability of exactly ½ in one order; they are not in the table.
    pub even: usize,
    /// Share of the table's pairs on which the same position is preferred in both orders.
    pub same_position: Estimate,
    /// Share of these pairs on which that position is the first.
    pub first_of_same: Estimate,
    /// Number of pairs on which the labeler abstained.
    pub abstentions: usize,
    /// Number of pairs on which the labeler could not be asked, or gave a number that is not a probability.
    pub failures: usize,
}

/// Computes position bias and alignment from a labeler's judgements.
///
/// Averaged over both orders, A's probability is ½·[ab + (1 − ba)], so that A is preferred if ab > ba.
pub fn positions(pairs: &[Pair]) -> Positions {
    let (mut averaged, mut in_ab, mut in_ba) = (Vec::new(), Vec::new(), Vec::new());
    let (mut orders, mut even, mut ties, mut abstentions, mut failures) = ([[0; 2]; 2], 0, 0, 0, 0);
    for pair in pairs {
        let (ab, ba) = match pair.judged {
            Judged::Both { ab, ba } if [ab, ba].iter().all(|p| (0.0..=1.0).contains(p)) => (ab, ba),
            Judged::Both { .. } | Judged::Failed => {
                failures += 1;
                continue;
            }
            Judged::Abstained => {
                abstentions += 1;
                continue;
            }
        };
        if ab == 0.5 || ba == 0.5 {
            even += 1;
        } else {
            orders[usize::from(ab < 0.5)][usize::from(ba < 0.5)] += 1;
        }
        ties += usize::from(ab == ba);
        for (found, right) in [&mut averaged, &mut in_ab, &mut in_ba].into_iter().zip(pair.right()) {
            found.extend(right);
        }
    }
    let [[first, a], [b, second]] = orders;
    let same = first + second;
    Positions {
        alignment: right(&averaged),
        alignment_ab: right(&in_ab),
        alignment_ba: right(&in_ba),
        ties,
        orders,
        even,
        same_position: share(same, same + a + b),
        first_of_same: share(first, same),
        abstentions,
        failures,
    }
}

fn right(pairs: &[bool]) -> Estimate {
    share(pairs.iter().filter(|right| **right).count(), pairs.len())
}

/// Returns whether the person's choice has the larger of the two values, or `None` if they are equal.
fn agreement(for_a: f64, for_b: f64, human: Choice) -> Option<bool> {
    (for_a != for_b).then_some((for_a > for_b) == (human == Choice::A))
}

impl Pair {
    /// Returns whether the labeler prefers the person's choice: averaged over both orders, in order AB, and in order
    /// BA. `None` if the labeler's preference is a tie or missing, or the person's choice is unknown.
    pub fn right(&self) -> [Option<bool>; 3] {
        match (self.judged, self.human) {
            (Judged::Both { ab, ba }, Some(human)) if [ab, ba].iter().all(|p| (0.0..=1.0).contains(p)) => {
                [agreement(ab, ba, human), agreement(ab, 0.5, human), agreement(0.5, ba, human)]
            }
            _ => [None; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(ab: f64, ba: f64, human: impl Into<Option<Choice>>) -> Pair {
        Pair { judged: Judged::Both { ab, ba }, human: human.into() }
    }

    #[test]
    fn the_both_orders_table_matches_a_manual_count() {
        use Choice::{A, B};
        let refused = |judged| Pair { judged, human: Some(A) };
        //            averaged    AB    BA  preferred positions
        let pairs = [
            pair(0.9, 0.2, A),    // A  right  right  right  first, second
            pair(0.9, 0.2, B),    //    wrong  wrong  wrong  first, second
            pair(0.3, 0.9, B),    // B  right  right  right  second, first
            pair(0.8, 0.7, A),    // A  right  right  wrong  first, first
            pair(0.6, 0.9, A),    // B  wrong  right  wrong  first, first
            pair(0.1, 0.4, B),    // B  right  right  wrong  second, second
            pair(0.7, 0.7, B),    // tie  –    wrong  right  first, first
            pair(0.5, 0.9, B),    // B  right   –     right  even
            pair(0.9, 0.8, None), // no human choice   first, first
            refused(Judged::Abstained),
            refused(Judged::Abstained),
            refused(Judged::Failed),
            pair(f64::NAN, 0.5, A),
            pair(0.5, 1.5, A),
        ];
        let found = positions(&pairs);
        assert_eq!(found.orders, [[4, 2], [1, 1]]);
        assert_eq!((found.even, found.abstentions, found.failures), (1, 2, 3));
        assert_eq!((found.same_position.value, found.same_position.count), (Some(5.0 / 8.0), 8));
        assert_eq!((found.first_of_same.value, found.first_of_same.count), (Some(4.0 / 5.0), 5));
        assert_eq!(found.ties, 1);
        for (name, found, right, of) in [
            ("averaged", found.alignment, 5.0, 7),
            ("A first", found.alignment_ab, 5.0, 7),
            ("B first", found.alignment_ba, 4.0, 8),
        ] {
            assert_eq!((found.value, found.count), (Some(right / of as f64), of), "{name}");
        }
    }

    #[test]
    fn a_small_preference_is_not_lost_in_rounding() {
        // ½·[ab + (1 − ba)] is one half here in floating point.
        let found = positions(&[pair(1e-20, 0.0, Choice::A), pair(0.0, 1e-20, Choice::B), pair(0.1, 0.1, Choice::A)]);
        assert_eq!((found.alignment.value, found.alignment.count, found.ties), (Some(1.0), 2, 1));
    }

    #[test]
    fn without_judgements_shares_are_absent() {
        let found = positions(&[Pair { judged: Judged::Failed, human: Some(Choice::A) }]);
        assert_eq!((found.alignment.value, found.same_position.value, found.first_of_same.value), (None, None, None));
    }
}

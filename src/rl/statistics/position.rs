//! Position bias: what a labeler says of a pair in both orders (Lee et al. 2023).

use serde::Serialize;

use super::interval::{Estimate, share};

/// One of a pair's two answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The answer that is called A.
    A,
    /// The other.
    B,
}

/// What a labeler said of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Judged {
    /// It answered in both orders.
    Both {
        /// Probability that the answer shown first is preferred, A being first.
        ab: f64,
        /// Probability that the answer shown first is preferred, B being first.
        ba: f64,
    },
    /// It would not decide in one order or both.
    Abstained,
    /// It could not be asked in one order or both.
    Failed,
}

/// A pair of answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// What the labeler said.
    pub judged: Judged,
    /// What a person chose; absent where nobody was asked.
    pub human: Option<Choice>,
}

/// The both-orders table and what is read from it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Positions {
    /// AI labeler alignment: how often the preference averaged over both orders is the person's. Only pairs with a person's
    /// choice count, and of these no exact tie.
    pub alignment: Estimate,
    /// The same, had A been shown first only.
    pub alignment_ab: Estimate,
    /// The same, had B been shown first only.
    pub alignment_ba: Estimate,
    /// Pairs whose preference averaged over both orders is an exact tie. They are neither right nor wrong.
    pub ties: usize,
    /// Pairs by preferred position: first index in order AB, second in order BA; 0 is the position shown first, 1 the
    /// second. The diagonal holds what flips with the order.
    pub orders: [[usize; 2]; 2],
    /// Pairs that one order leaves exactly even; they are not in the table.
    pub even: usize,
    /// Share of the table in which the same position is preferred after the swap.
    pub same_position: Estimate,
    /// Share of those in which it is the first.
    pub first_of_same: Estimate,
    /// Pairs on which the labeler would not decide.
    pub abstentions: usize,
    /// Pairs on which it could not be asked, or answered with what is no probability.
    pub failures: usize,
}

/// Reads position bias and alignment off a labeler's answers.
///
/// Averaged over both orders, A's probability is ½·[ab + (1 − ba)], so that A is preferred where ab > ba.
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

/// Whether what speaks for A and what speaks for B prefer the person's choice; absent where they are even.
fn agreement(for_a: f64, for_b: f64, human: Choice) -> Option<bool> {
    (for_a != for_b).then_some((for_a > for_b) == (human == Choice::A))
}

impl Pair {
    /// Whether the labeler prefers the person's choice: by the average over both orders, in order AB alone, and in order BA
    /// alone. Absent where it is even, did not answer, or nobody chose.
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
    fn the_both_orders_table_is_what_a_hand_counts() {
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
            pair(0.9, 0.8, None), // nobody chose      first, first
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
    fn nothing_judged_is_no_number() {
        let found = positions(&[Pair { judged: Judged::Failed, human: Some(Choice::A) }]);
        assert_eq!((found.alignment.value, found.same_position.value, found.first_of_same.value), (None, None, None));
    }
}

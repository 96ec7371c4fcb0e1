//! Shares and means with 95 % confidence intervals that are valid near 0 and 1 and for few items.

use serde::Serialize;

/// The normal distribution's 97.5 % quantile.
pub(super) const Z: f64 = 1.959_963_984_540_054;

/// A share or mean in [0, 1] with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The share or mean. `None` without items.
    pub value: Option<f64>,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Number of items.
    pub count: usize,
}

/// Returns the share `successes / trials` with Wilson's score interval (Wilson 1927), which is [0, 1] without trials.
pub fn share(successes: usize, trials: usize) -> Estimate {
    if trials == 0 {
        return Estimate { value: None, low: 0.0, high: 1.0, count: 0 };
    }
    let value = successes as f64 / trials as f64;
    let (low, high) = wilson(value, trials as f64);
    Estimate { value: Some(value), low, high, count: trials }
}

/// Returns the mean of values in [0, 1], such as wins with ties as one half, with a confidence interval.
///
/// The interval is Wilson's for a share of the same size out of n·p(1−p)/s² items (Kish's effective sample size): the
/// number of wins and losses whose mean would vary as much as that of these values. Without ties, it is the interval of
/// [`share`]; with ties, it is narrower, because a tie is nearer to the mean than a win. Unlike a bootstrap, it needs
/// no random draws, and it is not degenerate if all values are 1. If all values are equal, their variance is unknown,
/// and n items are assumed.
pub fn mean(values: &[f64]) -> Estimate {
    let n = values.len() as f64;
    if values.is_empty() {
        return share(0, 0);
    }
    let value = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - value).powi(2)).sum::<f64>() / n;
    let size = if variance > 0.0 { n * value * (1.0 - value) / variance } else { n };
    let (low, high) = wilson(value, size);
    Estimate { value: Some(value), low, high, count: values.len() }
}

/// Returns Wilson's interval for a share `value` of `n` items.
fn wilson(value: f64, n: f64) -> (f64, f64) {
    let shrink = 1.0 + Z * Z / n;
    let centre = (value + Z * Z / (2.0 * n)) / shrink;
    let half = Z / shrink * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt();
    // At 0 and 1, where an end equals the value, rounding could move it past the value.
    ((centre - half).clamp(0.0, value), (centre + half).clamp(value, 1.0))
}

/// Difference of two accuracies on the same items.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    /// Accuracy of A minus that of B. `None` without items.
    pub value: Option<f64>,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end of the 95 % interval.
    pub high: f64,
    /// Two-sided p-value of the hypothesis of equal accuracies (McNemar's exact test).
    pub p: f64,
    /// Number of items on which only A was correct.
    pub only_a: usize,
    /// Number of items on which only B was correct.
    pub only_b: usize,
    /// Number of all items.
    pub count: usize,
}

/// Compares two accuracies. `right` states for each item whether A and whether B was correct.
///
/// The interval is that of Bonett & Price (2012): Wald's interval after adding one item to each side, which keeps its
/// coverage when A and B rarely disagree.
pub fn difference(right: &[(bool, bool)]) -> Difference {
    let n = right.len() as f64;
    let only_a = right.iter().filter(|(a, b)| *a && !b).count();
    let only_b = right.iter().filter(|(a, b)| *b && !a).count();
    let (a, b) = ((only_a as f64 + 1.0) / (n + 2.0), (only_b as f64 + 1.0) / (n + 2.0));
    let half = Z * ((a + b - (a - b).powi(2)) / (n + 2.0)).sqrt();
    Difference {
        value: (!right.is_empty()).then(|| (only_a as f64 - only_b as f64) / n),
        low: (a - b - half).max(-1.0),
        high: (a - b + half).min(1.0),
        p: mcnemar(only_a, only_b),
        only_a,
        only_b,
        count: right.len(),
    }
}

/// Returns the p-value of McNemar's exact test: twice the probability of at most as many successes as the smaller
/// count in a binomial distribution with p = ½ over all discordant pairs, and at most 1.
fn mcnemar(only_a: usize, only_b: usize) -> f64 {
    let (discordant, smaller) = ((only_a + only_b) as f64, only_a.min(only_b));
    // In logarithms, because 2^−n underflows from n = 1,075 on.
    let mut log_term = -discordant * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for i in 0..=smaller {
        tail += log_term.exp();
        log_term += ((discordant - i as f64) / (i as f64 + 1.0)).ln();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{near, numbers, reference};
    use super::*;

    #[test]
    fn shares_agree_with_the_reference() {
        for case in reference("wilson") {
            let [successes, trials] = ["successes", "trials"].map(|key| case[key].as_u64().unwrap() as usize);
            let ours = share(successes, trials);
            assert_eq!((ours.value, ours.count), (Some(successes as f64 / trials as f64), trials));
            near(&case, &[("low", ours.low), ("high", ours.high)], 1e-12);
        }
    }

    #[test]
    fn without_items_intervals_are_maximal() {
        let nothing = Estimate { value: None, low: 0.0, high: 1.0, count: 0 };
        assert_eq!((share(0, 0), mean(&[])), (nothing, nothing));
        let difference = difference(&[]);
        assert_eq!((difference.value, difference.p, difference.count), (None, 1.0, 0));
        assert!(difference.low <= -0.9 && difference.high >= 0.9);
    }

    #[test]
    fn means_agree_with_the_reference_and_nearly_with_a_bootstrap() {
        for case in reference("mean") {
            let ours = mean(&numbers(&case["values"]));
            near(&case, &[("value", ours.value.unwrap()), ("low", ours.low), ("high", ours.high)], 1e-12);
            let bootstrap = numbers(&case["bootstrap"]);
            assert!((ours.low - bootstrap[0]).abs() < 0.005 && (ours.high - bootstrap[1]).abs() < 0.005);
        }
    }

    #[test]
    fn a_mean_of_wins_and_losses_is_a_share() {
        for (wins, losses) in [(3, 17), (20, 0), (0, 4)] {
            let values = [vec![1.0; wins], vec![0.0; losses]].concat();
            let (ours, share) = (mean(&values), share(wins, wins + losses));
            assert!((ours.low - share.low).abs() < 1e-12 && (ours.high - share.high).abs() < 1e-12);
        }
        // If all values are ties, their variance is unknown.
        let ties = mean(&[0.5; 10]);
        let half = share(5, 10);
        assert_eq!((ties.value, ties.low, ties.high), (Some(0.5), half.low, half.high));
    }

    #[test]
    fn differences_agree_with_the_reference() {
        for case in reference("paired") {
            let counts = numbers(&case["counts"]);
            let kinds = [(true, true), (true, false), (false, true), (false, false)];
            let right: Vec<_> = kinds.iter().zip(&counts).flat_map(|(kind, n)| vec![*kind; *n as usize]).collect();
            let ours = difference(&right);
            near(&case, &[("low", ours.low), ("high", ours.high), ("p", ours.p)], 1e-10);
            let n: f64 = counts.iter().sum();
            assert!((ours.value.unwrap() - (counts[1] - counts[2]) / n).abs() < 1e-12);
            assert_eq!((ours.only_a as f64, ours.only_b as f64), (counts[1], counts[2]));
        }
        // 2^−n would underflow.
        assert!(mcnemar(1_000, 1_000) == 1.0 && mcnemar(900, 1_100) > 1e-6 && mcnemar(900, 1_100) < 1e-4);
    }
}

//! Length-controlled win rates (Lee et al. 2023, appendix), which correct for judges' preference for longer answers.

use anyhow::{Result, bail, ensure};
use serde::Serialize;

use super::interval::{Estimate, Z};

/// Maximum number of Newton steps; an existing fit converges within fewer.
const MAX_STEPS: usize = 100;

/// One comparison of a policy's answer with another answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Outcome for the policy's answer: 1 for a win, 0 for a loss, one half for a tie, or any probability of a win.
    pub win: f64,
    /// Length of the policy's answer, above zero, in any unit.
    pub length: f64,
    /// Length of the other answer, in the same unit.
    pub other: f64,
}

/// Result of [`length_controlled`]: a win rate at equal length.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LengthControlled {
    /// The win rate at a length ratio of 1.
    pub rate: Estimate,
    /// Increase of the log-odds of a win per unit of ln(length ratio). Positive if longer answers win more often.
    pub slope: f64,
}

/// Fits P(win) = σ(a + b·ln(length / other)) by maximum likelihood and returns the win rate at ratio 1, σ(a).
///
/// The paper regresses on the ratio. The logarithm is used here for symmetry: exchanging the two policies gives one
/// minus the rate. The interval is that of the delta method for a, transformed by σ, so that it is within [0, 1]. Ties
/// make it wider than necessary.
///
/// # Errors
/// If a win is not a probability, a length is not above zero, or no finite fit exists: all comparisons have the same
/// length ratio, or length separates wins from losses perfectly.
pub fn length_controlled(comparisons: &[Comparison]) -> Result<LengthControlled> {
    for (i, comparison) in comparisons.iter().enumerate() {
        ensure!(
            (0.0..=1.0).contains(&comparison.win),
            "comparison {i}: a win of {} is not a probability",
            comparison.win
        );
        let measured = [comparison.length, comparison.other].iter().all(|length| *length > 0.0 && length.is_finite());
        ensure!(
            measured,
            "comparison {i}: lengths of {} and {} have no ratio; remove empty answers",
            comparison.length,
            comparison.other
        );
    }
    let points: Vec<(f64, f64)> =
        comparisons.iter().map(|comparison| ((comparison.length / comparison.other).ln(), comparison.win)).collect();
    check_overlap(&points)?;
    let Fit { intercept, slope, variance } = fit(&points)?;
    let half = Z * variance.sqrt();
    let [value, low, high] = [intercept, intercept - half, intercept + half].map(logistic);
    Ok(LengthControlled { rate: Estimate { value: Some(value), low, high, count: points.len() }, slope })
}

/// Checks that a finite fit exists, which requires that wins and losses overlap in length ratio (Albert & Anderson
/// 1984). A partial win counts as both.
fn check_overlap(points: &[(f64, f64)]) -> Result<()> {
    let range = |kept: fn(f64) -> bool| {
        let kept = points.iter().filter(|(_, win)| kept(*win)).map(|(x, _)| *x);
        kept.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
    };
    let (all, wins, losses) = (range(|_| true), range(|win| win > 0.0), range(|win| win < 1.0));
    ensure!(wins.0 <= wins.1, "without a win, length cannot be controlled for");
    ensure!(losses.0 <= losses.1, "without a loss, length cannot be controlled for");
    ensure!(all.0 < all.1, "all comparisons have the same length ratio, so that length cannot be controlled for");
    ensure!(
        wins.0 < losses.1 && losses.0 < wins.1,
        "length alone separates wins from losses, so that no finite fit exists; more comparisons are needed"
    );
    Ok(())
}

struct Fit {
    intercept: f64,
    slope: f64,
    /// Variance of the intercept.
    variance: f64,
}

/// Maximises the log-likelihood by Newton's method, halving each step until the likelihood does not decrease.
fn fit(points: &[(f64, f64)]) -> Result<Fit> {
    let (mut a, mut b) = (0.0, 0.0);
    let mut reached = likelihood(points, a, b);
    for _ in 0..MAX_STEPS {
        // Gradient, and the information [[i, j], [j, k]].
        let (mut ga, mut gb, mut i, mut j, mut k) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, win) in points {
            let p = logistic(a + b * x);
            let weight = p * (1.0 - p);
            ga += win - p;
            gb += (win - p) * x;
            i += weight;
            j += weight * x;
            k += weight * x * x;
        }
        let determinant = i * k - j * j;
        let (da, db) = ((k * ga - j * gb) / determinant, (i * gb - j * ga) / determinant);
        ensure!(da.is_finite() && db.is_finite(), "the regression on length is singular; more comparisons are needed");
        if da.abs().max(db.abs()) < 1e-10 {
            return Ok(Fit { intercept: a, slope: b, variance: k / determinant });
        }
        let (mut step, mut next) = (1.0, likelihood(points, a + da, b + db));
        // Near the maximum, a step's gain is below rounding; the tolerance accepts it.
        while next < reached - 1e-12 * reached.abs() && step > 1e-6 {
            step /= 2.0;
            next = likelihood(points, a + step * da, b + step * db);
        }
        (a, b, reached) = (a + step * da, b + step * db, next);
    }
    bail!("the regression on length did not converge in {MAX_STEPS} steps; wins and losses barely overlap in length")
}

/// Returns the log-likelihood Σ win·ln σ(z) + (1 − win)·ln σ(−z), z = a + b·x.
fn likelihood(points: &[(f64, f64)], a: f64, b: f64) -> f64 {
    // ln σ(z) = −ln(1 + e^−z), in a form that does not overflow.
    let log_logistic = |z: f64| z.min(0.0) - (-z.abs()).exp().ln_1p();
    let term = |(x, win): &(f64, f64)| {
        let z = a + b * x;
        win * log_logistic(z) + (1.0 - win) * log_logistic(-z)
    };
    points.iter().map(term).sum()
}

fn logistic(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{near, numbers, reference};
    use super::*;

    fn pair(win: f64, length: f64, other: f64) -> Comparison {
        Comparison { win, length, other }
    }

    #[test]
    fn fits_agree_with_the_reference() {
        for case in reference("length_control") {
            let pairs: Vec<Vec<f64>> = case["pairs"].as_array().unwrap().iter().map(numbers).collect();
            let pairs: Vec<_> = pairs.iter().map(|p| pair(p[0], p[1], p[2])).collect();
            let ours = length_controlled(&pairs).unwrap();
            let rate = ours.rate;
            near(&case, &[("value", rate.value.unwrap()), ("low", rate.low), ("high", rate.high)], 1e-7);
            near(&case, &[("slope", ours.slope)], 1e-6);
            assert_eq!(rate.count, pairs.len());
            // Exchanging the policies gives one minus the rate.
            let swapped: Vec<_> = pairs.iter().map(|p| pair(1.0 - p.win, p.other, p.length)).collect();
            let swapped = length_controlled(&swapped).unwrap().rate;
            assert!((swapped.value.unwrap() + rate.value.unwrap() - 1.0).abs() < 1e-9);
            assert!((swapped.low + rate.high - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn comparisons_without_a_fit_are_refused_with_the_reason() {
        let refused = |pairs: &[Comparison], word: &str| {
            let error = length_controlled(pairs).unwrap_err().to_string();
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        };
        refused(&[], "without a win");
        refused(&[pair(1.0, 2.0, 1.0), pair(1.0, 3.0, 1.0)], "without a loss");
        refused(&[pair(0.0, 2.0, 1.0), pair(0.0, 3.0, 1.0)], "without a win");
        refused(&[pair(1.0, 2.0, 1.0), pair(0.0, 4.0, 2.0)], "the same length ratio");
        refused(&[pair(1.0, 2.0, 1.0), pair(0.0, 1.0, 2.0), pair(1.0, 3.0, 1.0)], "length alone separates");
        // A single common ratio is not an overlap either.
        refused(
            &[pair(1.0, 2.0, 1.0), pair(1.0, 1.0, 1.0), pair(0.0, 1.0, 1.0), pair(0.0, 1.0, 2.0)],
            "length alone separates",
        );
        refused(&[pair(1.5, 2.0, 1.0)], "comparison 0: a win of 1.5 is not a probability");
        refused(&[pair(-0.5, 2.0, 1.0)], "a win of -0.5 is not a probability");
        refused(&[pair(f64::NAN, 2.0, 1.0)], "is not a probability");
        refused(&[pair(1.0, 2.0, 1.0), pair(1.0, 0.0, 1.0)], "comparison 1: lengths of 0 and 1 have no ratio");
        // A tie counts as a win and a loss, so a single one makes an overlap.
        let tie = [pair(1.0, 2.0, 1.0), pair(0.0, 1.0, 2.0), pair(0.5, 3.0, 1.0)];
        assert!(length_controlled(&tie).is_ok());
    }
}

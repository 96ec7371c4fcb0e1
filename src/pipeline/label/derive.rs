//! Derives scores from preferences and preferences from scores, so that any labeler can serve any mode.

use crate::types::{Preference, UNCOMPARED, Verdict};

/// Returns P(first is better) = σ((s₁ − s₂)/τ) for each pair (Bradley and Terry 1952), where `temperature` is τ on the
/// labeler's own scale. A pair with an unscored completion gets no probability.
pub fn preferences(scores: &[Verdict], pairs: &[(usize, usize)], temperature: f64) -> Vec<Preference> {
    pairs
        .iter()
        .map(|(first, second)| {
            let verdict = match (&scores[*first], &scores[*second]) {
                (Verdict::Label(a), Verdict::Label(b)) => Verdict::Label(sigmoid((a - b) / temperature)),
                // The failure takes precedence, because asking again may succeed.
                (Verdict::Failure(why), _) | (_, Verdict::Failure(why)) => Verdict::Failure(why.clone()),
                (Verdict::Abstention(why), _) | (_, Verdict::Abstention(why)) => Verdict::Abstention(why.clone()),
            };
            Preference { first: *first, second: *second, verdict, orders: None }
        })
        .collect()
}

/// Returns each completion's mean probability, from 0 to 1, of being better than the others it was compared with. A
/// completion with an unlabeled pair gets no score, because a mean over its other pairs would not be comparable.
pub fn scores(completions: usize, preferences: &[Preference]) -> Vec<Verdict> {
    (0..completions)
        .map(|i| {
            let mine = preferences.iter().filter(|preference| preference.first == i || preference.second == i);
            let (mut sum, mut count, mut missing) = (0.0, 0u32, None);
            for preference in mine {
                match &preference.verdict {
                    Verdict::Label(p) => sum += if preference.first == i { *p } else { 1.0 - p },
                    Verdict::Failure(_) => missing = Some(preference.verdict.clone()),
                    Verdict::Abstention(_) => {
                        missing.get_or_insert_with(|| preference.verdict.clone());
                    }
                }
                count += 1;
            }
            match missing {
                Some(verdict) => verdict,
                None if count == 0 => Verdict::Abstention(UNCOMPARED.into()),
                None => Verdict::Label(sum / f64::from(count)),
            }
        })
        .collect()
}

/// Returns 1/(1 + e^−x), computed without overflow.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Abstention, Failure, Label};

    fn pair(first: usize, second: usize, verdict: Verdict) -> Preference {
        Preference { first, second, verdict, orders: None }
    }

    #[test]
    fn preferences_follow_bradley_and_terry() {
        // σ(ln 3) = 3/4; at twice the temperature σ(ln 3 / 2) = √3/(1 + √3).
        let scores = [Label(3f64.ln()), Label(0.0), Failure("gone".into()), Abstention("too long".into())];
        let derived = preferences(&scores, &[(0, 1), (1, 0), (0, 2), (3, 2), (1, 3)], 1.0);
        assert!((derived[0].probability().unwrap() - 0.75).abs() < 1e-12);
        assert!((derived[1].probability().unwrap() - 0.25).abs() < 1e-12);
        assert_eq!(derived[2].verdict, Failure("gone".into()));
        assert_eq!(derived[3].verdict, Failure("gone".into()));
        assert_eq!(derived[4].verdict, Abstention("too long".into()));
        let softer = preferences(&scores, &[(0, 1)], 2.0)[0].probability().unwrap();
        assert!((softer - 3f64.sqrt() / (1.0 + 3f64.sqrt())).abs() < 1e-12);
    }

    #[test]
    fn a_score_is_the_mean_probability_of_winning() {
        let pairs = [pair(0, 1, Label(0.9)), pair(0, 2, Label(0.5)), pair(1, 2, Label(0.2))];
        let derived: Vec<f64> = scores(3, &pairs).iter().filter_map(Verdict::label).collect();
        for (got, expected) in derived.iter().zip([0.7, 0.15, 0.65]) {
            assert!((got - expected).abs() < 1e-12, "{derived:?}");
        }
        let pairs = [pair(0, 1, Label(0.9)), pair(0, 2, Failure("gone".into()))];
        assert_eq!(
            scores(4, &pairs).iter().map(Verdict::kind).collect::<Vec<_>>(),
            ["failure", "label", "failure", "abstention"]
        );
    }
}

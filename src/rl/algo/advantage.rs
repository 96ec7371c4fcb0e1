//! Advantages from rewards and values.

/// Returns (Â, Â + V) of one completion by generalised advantage estimation (Schulman et al. 2016, eq. 11–16): δ_t =
/// r_t + γ·V_{t+1} − V_t, Â_t = δ_t + γλ·Â_{t+1}, with V and Â zero after the last token. `rewards` and `values` have
/// one entry per token.
pub fn gae(rewards: &[f64], values: &[f32], gamma: f64, lambda: f64) -> (Vec<f32>, Vec<f32>) {
    let (mut next_value, mut tail) = (0.0, 0.0);
    let mut advantages = vec![0f32; rewards.len()];
    for t in (0..rewards.len()).rev() {
        let value = f64::from(values[t]);
        tail = rewards[t] + gamma * next_value - value + gamma * lambda * tail;
        advantages[t] = tail as f32;
        next_value = value;
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

/// Returns leave-one-out advantages: R_i minus the mean of the other returns (Ahmadian et al. 2024). Zero for a group
/// of one.
pub fn leave_one_out(returns: &[f64]) -> Vec<f64> {
    let n = returns.len() as f64;
    let total: f64 = returns.iter().sum();
    returns.iter().map(|r| if n > 1.0 { r - (total - r) / (n - 1.0) } else { 0.0 }).collect()
}

/// Returns group-normalised advantages: (R_i − mean)/(std + 10⁻⁴) with the sample standard deviation (Shao et al. 2024,
/// §4.1.2). Without `scaled`, R_i − mean (Liu et al. 2025, Dr.GRPO). Zero if all returns are equal.
pub fn group_normalised(returns: &[f64], scaled: bool) -> Vec<f64> {
    let (mean, std) = moments(returns.iter().copied());
    let divisor = if scaled { std + 1e-4 } else { 1.0 };
    returns.iter().map(|r| if std > 0.0 { (r - mean) / divisor } else { 0.0 }).collect()
}

/// Shifts `values` to mean 0 and scales them to sample variance 1. A single value, or equal values, become 0.
pub fn whiten<'a>(values: impl Iterator<Item = &'a mut f32>) {
    let values: Vec<&mut f32> = values.collect();
    let (mean, std) = moments(values.iter().map(|value| f64::from(**value)));
    let inverse = 1.0 / (std * std + 1e-8).sqrt();
    for value in values {
        *value = ((f64::from(*value) - mean) * inverse) as f32;
    }
}

/// Returns the deviation below which values of the magnitude `largest` count as equal: the rounding of f32, in which
/// models compute. Small values may be differences of larger ones, such as a rating minus the middle of its scale, and have
/// at least the rounding of these in f64.
fn rounding(largest: f64) -> f64 {
    const OF_DIFFERENCES: f64 = 1e-12;
    (f64::from(f32::EPSILON) * largest.abs()).max(OF_DIFFERENCES)
}

/// Returns the mean and the sample standard deviation. The latter is zero for fewer than two values, and for values
/// that are equal up to the rounding of f32.
pub fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    if n == 0.0 {
        return (0.0, 0.0);
    }
    let mean = values.clone().sum::<f64>() / n;
    let squares: f64 = values.clone().map(|value| (value - mean).powi(2)).sum();
    let std = if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 };
    let equal = std <= rounding(values.fold(0.0, |largest, value| largest.max(value.abs())));
    (mean, if equal { 0.0 } else { std })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_differ_only_by_rounding_are_equal() {
        let equal = [5.5, 5.5 + 1e-15, 5.5 - 1e-15, 5.5];
        assert_eq!(moments(equal.into_iter()).1, 0.0);
        assert_eq!(group_normalised(&equal, true), [0.0; 4]);
        assert_eq!(group_normalised(&equal, false), [0.0; 4]);
        // Ratings of 5.5 minus the middle of their scale.
        assert_eq!(moments([0.0, 1.97e-16, 0.0, -2e-16].into_iter()).1, 0.0);
        assert_eq!(group_normalised(&[0.0, 1.97e-16], true), [0.0; 2]);
        // Small values, and small differences of large values, are preserved.
        for values in [[1e-9, -1e-9], [1e6, 1e6 + 1.0]] {
            let std = moments(values.into_iter()).1;
            assert!((std - (values[1] - values[0]).abs() / 2f64.sqrt()).abs() < 1e-3 * std, "{values:?}: {std}");
        }
    }
}

//! The loss of a soft preference label, for reward models and preference optimisation.

/// Returns the loss of a compared pair and its derivative. The first completion is better with probability `p`, and `x`
/// is the model's margin for it: L = −p·log σ(x) − (1−p)·log σ(−x), dL/dx = σ(x) − p.
///
/// With x = r₁ − r₂, this is the cross-entropy between the soft label and softmax(r₁, r₂) (Lee et al. 2023, §2.2). With
/// p = 1, it is the Bradley-Terry loss of human preferences.
pub fn soft_label(x: f64, p: f64) -> (f64, f64) {
    // −log σ(x) = log(1 + e^−x), in a form that does not overflow.
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let sigmoid = if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) };
    (p * softplus(-x) + (1.0 - p) * softplus(x), sigmoid - p)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_margins_do_not_overflow() {
        let (loss, derivative) = soft_label(0.0, 0.3);
        assert!((loss - 2f64.ln()).abs() < 1e-15 && (derivative - 0.2).abs() < 1e-15);
        assert_eq!(soft_label(1000.0, 1.0), (0.0, 0.0));
        assert_eq!(soft_label(-1000.0, 1.0), (1000.0, -1.0));
        assert_eq!(soft_label(1000.0, 0.0), (1000.0, 1.0));
    }
}

//! Correcting for tokens that older weights produced.

/// How a token's loss is weighted by how far the policy has moved since it was sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Correction {
    /// Not at all: right only when the data is on-policy.
    None,
    /// Truncated importance sampling: min(π_θ/μ, C), detached.
    Truncated {
        /// The bound C.
        limit: f32,
    },
}

impl Correction {
    /// Weight of a token with log-probability `policy` now and `behaviour` when it was sampled.
    pub fn weight(&self, policy: f32, behaviour: f32) -> f32 {
        match self {
            Self::None => 1.0,
            Self::Truncated { limit } => (policy - behaviour).exp().min(*limit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncates_above_only() {
        let correction = Correction::Truncated { limit: 2.0 };
        assert_eq!(correction.weight(-1.0, -1.0), 1.0);
        assert_eq!(correction.weight(0.0, -3.0), 2.0);
        assert!((correction.weight(-3.0, -1.0) - (-2f32).exp()).abs() < 1e-7);
        assert_eq!(Correction::None.weight(0.0, -3.0), 1.0);
    }
}

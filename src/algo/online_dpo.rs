//! Online direct preference optimisation (Guo et al. 2024, OAIF): both completions are the policy's own, labeled now.

use super::preference::soft_label;
use super::{Algorithm, GroupLoss, GroupView};

/// Δ_i = Σ_t log π(a_t)/π_ref(a_t) ; L = −p·log σ(β(Δ₁ − Δ₂)) − (1−p)·log σ(−β(Δ₁ − Δ₂)), a sum over the group's pairs
/// (Rafailov et al. 2023, eq. 7; the soft form is that of a label with P(first is better) = p).
#[derive(Debug, Clone)]
pub struct OnlineDpo {
    /// β, how firmly the policy is held to the reference.
    pub beta: f64,
    /// Learn from P itself, or from which of the two is preferred. A hard label of exactly ½ says nothing.
    pub soft: bool,
}

impl Algorithm for OnlineDpo {
    fn needs_preferences(&self) -> bool {
        true
    }

    fn loss(&self, group: &GroupView<'_>) -> GroupLoss {
        let gain: Vec<f64> = group
            .policy
            .iter()
            .zip(group.reference)
            .map(|(policy, reference)| policy.iter().zip(reference).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum())
            .collect();
        let mut slopes = vec![0.0; gain.len()];
        let mut out = GroupLoss::default();
        for (first, second, p) in group.preferences {
            if !self.soft && *p == 0.5 {
                continue;
            }
            let p = if self.soft { *p } else { f64::from(u8::from(*p > 0.5)) };
            let margin = self.beta * (gain[*first] - gain[*second]);
            let (loss, slope) = soft_label(margin, p);
            out.policy += loss;
            out.terms += 1;
            out.margins.push(if p > 0.5 { margin } else { -margin });
            slopes[*first] += self.beta * slope;
            slopes[*second] -= self.beta * slope;
        }
        out.d_policy =
            slopes.iter().zip(group.policy).map(|(slope, tokens)| vec![*slope as f32; tokens.len()]).collect();
        out
    }
}

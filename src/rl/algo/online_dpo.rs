//! Online direct preference optimisation (Guo et al. 2024, OAIF): both completions of a pair are sampled from the
//! policy and labeled during training.

use super::preference::soft_label;
use super::{Algorithm, GroupLoss, GroupView, Targets};

/// Online DPO. Δ_i = Σ_t log π(a_t)/π_ref(a_t); L = −p·log σ(β(Δ₁ − Δ₂)) − (1−p)·log σ(−β(Δ₁ − Δ₂)), summed over the
/// group's pairs (Rafailov et al. 2023, eq. 7, in the soft form for a label P(first is better) = p).
///
/// With [`DpoLoss::Ipo`], Δ_i is a mean over tokens and L = p·(Δ₁ − Δ₂ − 1/2β)² + (1−p)·(Δ₁ − Δ₂ + 1/2β)² (Azar et al.
/// 2023, eq. 17).
#[derive(Debug, Clone)]
pub struct OnlineDpo {
    /// β, the strength of the regularization towards the reference policy.
    pub beta: f64,
    /// True if P is the target. Otherwise the target is the preferred completion, and pairs with P = ½ are skipped.
    pub soft: bool,
    /// The loss of a pair.
    pub loss_kind: DpoLoss,
}

/// The loss of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DpoLoss {
    /// The logistic loss of DPO.
    Sigmoid,
    /// The squared loss of IPO.
    Ipo,
}

impl OnlineDpo {
    /// Returns the loss of a pair and its derivative with respect to `gap` = Δ₁ − Δ₂.
    fn pair(&self, gap: f64, p: f64) -> (f64, f64) {
        match self.loss_kind {
            DpoLoss::Sigmoid => {
                let (loss, derivative) = soft_label(self.beta * gap, p);
                (loss, self.beta * derivative)
            }
            DpoLoss::Ipo => {
                let target = 0.5 / self.beta;
                let loss = p * (gap - target).powi(2) + (1.0 - p) * (gap + target).powi(2);
                (loss, 2.0 * (gap - (2.0 * p - 1.0) * target))
            }
        }
    }
}

impl Algorithm for OnlineDpo {
    fn needs_preferences(&self) -> bool {
        true
    }

    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets> {
        vec![Targets::default(); batch.len()]
    }

    fn loss(&self, group: &GroupView<'_>, _: &Targets) -> GroupLoss {
        let share =
            |tokens: &[f32]| if self.loss_kind == DpoLoss::Ipo { 1.0 / tokens.len().max(1) as f64 } else { 1.0 };
        let gain: Vec<f64> = group
            .policy
            .iter()
            .zip(group.reference)
            .map(|(policy, reference)| {
                let sum: f64 = policy.iter().zip(reference).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum();
                sum * share(policy)
            })
            .collect();
        let mut derivatives = vec![0.0; gain.len()];
        let mut out = GroupLoss::default();
        for (first, second, p) in group.preferences {
            if !self.soft && *p == 0.5 {
                continue;
            }
            let p = if self.soft { *p } else { f64::from(u8::from(*p > 0.5)) };
            let gap = gain[*first] - gain[*second];
            let (loss, derivative) = self.pair(gap, p);
            out.policy += loss;
            out.terms += 1;
            out.margins.push(self.beta * if p > 0.5 { gap } else { -gap });
            derivatives[*first] += derivative;
            derivatives[*second] -= derivative;
        }
        out.d_policy = derivatives
            .iter()
            .zip(group.policy)
            .map(|(derivative, tokens)| vec![(derivative * share(tokens)) as f32; tokens.len()])
            .collect();
        out
    }
}

//! Algorithms against reference values from an independent implementation.

use candle_core::{Device, Tensor};
use preceptor::algo::rloo::{Rloo, leave_one_out};
use preceptor::algo::{Algorithm, Correction, GroupView, sequence_kl};
use std::collections::HashMap;

use crate::common::{fixture, max_abs_difference};

fn load(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture("advantages").join(name), &Device::Cpu).unwrap()
}

fn rows(values: &HashMap<String, Tensor>, name: &str) -> Vec<Vec<f32>> {
    let mask = values["completion_mask"].to_vec2::<i64>().unwrap();
    let all = values[name].to_vec2::<f32>().unwrap();
    all.iter()
        .zip(mask)
        .map(|(row, mask)| row.iter().zip(mask).filter(|(_, m)| *m == 1).map(|(v, _)| *v).collect())
        .collect()
}

/// Reward minus β times the sequence's KL, against the mean of the rest of the group of four.
#[test]
fn leave_one_out_advantages_agree_with_the_reference() {
    for (name, beta) in [("rloo_plain.safetensors", 0.0), ("rloo_kl.safetensors", 0.05)] {
        let values = load(name);
        let rewards = values["rewards0"].to_vec1::<f32>().unwrap();
        let (old, reference) = (rows(&values, "old_logps_tok"), rows(&values, "ref_logps_tok"));
        let returns: Vec<f64> =
            (0..rewards.len()).map(|i| f64::from(rewards[i]) - beta * sequence_kl(&old[i], &reference[i])).collect();
        let ours: Vec<f32> = returns.chunks(4).flat_map(leave_one_out).map(|a| a as f32).collect();
        let worst = max_abs_difference(&ours, &values["advantages"].to_vec1().unwrap());
        assert!(worst < 1e-5, "{name}: advantages differ by {worst}");
    }
}

/// On-policy, every form of RLOO has the gradient −A/N at each token.
#[test]
fn the_on_policy_slope_agrees_with_the_reference() {
    let values = load("rloo_on_policy.safetensors");
    let (policy, behaviour) = (rows(&values, "logps"), rows(&values, "old_logps_tok"));
    let advantages = values["advantages"].to_vec1::<f32>().unwrap();
    let expected = rows(&values, "grad_logps");
    let n = policy.len();
    // The advantages sum to zero, so they are the leave-one-out advantages of rewards A·(n−1)/n.
    let rewards: Vec<f64> = advantages.iter().map(|a| f64::from(*a) * (n - 1) as f64 / n as f64).collect();
    let algorithm = Rloo { kl_coef: 0.0, correction: Correction::Truncated { limit: 2.0 } };
    let loss = algorithm.loss(&GroupView {
        rewards: &rewards,
        behaviour: &behaviour,
        reference: &behaviour,
        policy: &policy,
        values: &[],
    });
    for (ours, theirs) in loss.d_policy.iter().zip(&expected) {
        let ours: Vec<f32> = ours.iter().map(|slope| slope / n as f32).collect();
        assert!(max_abs_difference(&ours, theirs) < 1e-5, "{ours:?} against {theirs:?}");
    }
}

/// The value form: with V = Z the policy has nothing to learn, and the value loss is zero with a zero slope.
#[test]
fn a_perfect_baseline_leaves_nothing() {
    use preceptor::algo::reinforce::Reinforce;
    let algorithm = Reinforce { kl_coef: 0.1, correction: Correction::None };
    let (behaviour, reference) = (vec![vec![-1.0f32, -2.0]], vec![vec![-1.5f32, -1.0]]);
    // Z_2 = 0.9·3 − 0.1·(−1) = 2.8 ; Z_1 = 2.8 − 0.1·0.5 = 2.75.
    let view = |values: &'static [Vec<f32>]| (values, vec![3.0]);
    let perfect: &'static [Vec<f32>] = Box::leak(Box::new([vec![2.75, 2.8]]));
    let (values, rewards) = view(perfect);
    let group =
        GroupView { rewards: &rewards, behaviour: &behaviour, reference: &reference, policy: &behaviour, values };
    let loss = algorithm.loss(&group);
    assert!(loss.value < 1e-10 && loss.d_policy[0].iter().all(|slope| slope.abs() < 1e-6), "{loss:?}");
    let off = [vec![1.75f32, 3.8]];
    let loss = algorithm.loss(&GroupView { values: &off, ..group });
    assert!((loss.value - 2.0).abs() < 1e-5);
    assert!(max_abs_difference(&loss.d_policy[0], &[-1.0, 1.0]) < 1e-5);
    assert!(max_abs_difference(&loss.d_value[0], &[-2.0, 2.0]) < 1e-5);
}

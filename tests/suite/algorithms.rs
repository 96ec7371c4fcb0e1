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
        preferences: &[],
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
    let group = GroupView {
        rewards: &rewards,
        behaviour: &behaviour,
        reference: &reference,
        preferences: &[],
        policy: &behaviour,
        values,
    };
    let loss = algorithm.loss(&group);
    assert!(loss.value < 1e-10 && loss.d_policy[0].iter().all(|slope| slope.abs() < 1e-6), "{loss:?}");
    let off = [vec![1.75f32, 3.8]];
    let loss = algorithm.loss(&GroupView { values: &off, ..group });
    assert!((loss.value - 2.0).abs() < 1e-5);
    assert!(max_abs_difference(&loss.d_policy[0], &[-1.0, 1.0]) < 1e-5);
    assert!(max_abs_difference(&loss.d_value[0], &[-2.0, 2.0]) < 1e-5);
}

/// Cross-entropy between a soft label and softmax(r₁, r₂), and its gradient, against PyTorch's autograd.
#[test]
fn the_soft_label_loss_agrees_with_pytorch() {
    use preceptor::algo::preference::soft_label;
    let text = std::fs::read_to_string(fixture("preference").join("soft_labels.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 24);
    for case in cases {
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        let rewards = [number(&case["rewards"][0]), number(&case["rewards"][1])];
        let (loss, slope) = soft_label(rewards[0] - rewards[1], number(&case["label"]));
        assert!((loss - number(&case["loss"])).abs() < 1e-5, "{case}: {loss}");
        for (ours, theirs) in [(slope, &case["gradient"][0]), (-slope, &case["gradient"][1])] {
            assert!((ours - number(theirs)).abs() < 1e-5, "{case}: {ours}");
        }
    }
}

/// Four pairs of a batch whose first half is chosen and whose second half is rejected.
#[test]
fn online_dpo_agrees_with_the_reference() {
    use preceptor::algo::online_dpo::OnlineDpo;
    let values =
        candle_core::safetensors::load(fixture("preference").join("dpo_sigmoid.safetensors"), &Device::Cpu).unwrap();
    let mask = values["completion_mask_full"].to_vec2::<i64>().unwrap();
    // Position t of a row scores token t + 1.
    let rows = |name: &str| -> Vec<Vec<f32>> {
        let all = values[name].to_vec2::<f32>().unwrap();
        let kept = |(row, mask): (&Vec<f32>, &Vec<i64>)| {
            row.iter().zip(&mask[1..]).filter(|(_, m)| **m == 1).map(|(v, _)| *v).collect()
        };
        all.iter().zip(&mask).map(kept).collect()
    };
    let (policy, reference, expected) = (rows("logps"), rows("ref_logps"), rows("grad_logps"));
    let preferences: Vec<(usize, usize, f64)> = (0..4).map(|i| (i, i + 4, 1.0)).collect();
    let group = GroupView {
        rewards: &[],
        behaviour: &policy,
        reference: &reference,
        preferences: &preferences,
        policy: &policy,
        values: &[],
    };
    for soft in [false, true] {
        let loss = OnlineDpo { beta: 0.1, soft }.loss(&group);
        assert_eq!(loss.terms, 4);
        assert!((loss.policy / 4.0 - 0.794_346_69).abs() < 1e-5, "{}", loss.policy / 4.0);
        assert!((loss.margins.iter().sum::<f64>() / 4.0 + 0.190_648_42).abs() < 1e-5);
        for (ours, theirs) in loss.d_policy.iter().zip(&expected) {
            let ours: Vec<f32> = ours.iter().map(|slope| slope / 4.0).collect();
            assert!(max_abs_difference(&ours, theirs) < 1e-5, "{ours:?} against {theirs:?}");
        }
    }
    // The label of ½ asks for indifference when it is soft, and for nothing when it is hard.
    let even = [(0, 4, 0.5)];
    let hard = OnlineDpo { beta: 0.1, soft: false }.loss(&GroupView { preferences: &even, ..group });
    assert_eq!((hard.terms, hard.d_policy.iter().flatten().all(|slope| *slope == 0.0)), (0, true));
}

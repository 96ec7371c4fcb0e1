//! Tests of algorithms against reference values from independent implementations.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use preceptor::rl::algo::advantage::{gae, group_normalised, leave_one_out, whiten};
use preceptor::rl::algo::correction::{Correction, Level};
use preceptor::rl::algo::grpo::Grpo;
use preceptor::rl::algo::kl::{Estimator, Kl, Place};
use preceptor::rl::algo::online_dpo::{DpoLoss, OnlineDpo};
use preceptor::rl::algo::ppo::clipped_value;
use preceptor::rl::algo::reinforce::Reinforce;
use preceptor::rl::algo::rloo::Rloo;
use preceptor::rl::algo::surrogate::{Average, Clip, Surrogate};
use preceptor::rl::algo::whiten::Whitened;
use preceptor::rl::algo::{Algorithm, GroupLoss, GroupView};
use serde_json::Value;

use crate::common::{fixture, max_abs_difference};

type Values = HashMap<String, Tensor>;

const NO_KL: Kl = Kl { coef: 0.0, estimator: Estimator::K1, place: Place::Reward };

const PLAIN: Surrogate =
    Surrogate { clip: None, correction: Correction::NONE, average: Average::SequenceSum, kl: NO_KL, entropy: 0.0 };

fn load(name: &str) -> Values {
    candle_core::safetensors::load(fixture(name), &Device::Cpu).unwrap()
}

fn list(values: &Values, name: &str) -> Vec<f32> {
    values[name].to_vec1().unwrap()
}

/// Returns the entries of each row that `completion_mask` keeps.
fn rows(values: &Values, name: &str) -> Vec<Vec<f32>> {
    let mask = values["completion_mask"].to_vec2::<i64>().unwrap();
    let all = values[name].to_vec2::<f32>().unwrap();
    all.iter()
        .zip(mask)
        .map(|(row, mask)| row.iter().zip(mask).filter(|(_, m)| *m == 1).map(|(v, _)| *v).collect())
        .collect()
}

/// Returns a group whose proximal policy equals the sampling policy.
fn view<'a>(behaviour: &'a [Vec<f32>], policy: &'a [Vec<f32>]) -> GroupView<'a> {
    GroupView {
        rewards: &[],
        behaviour,
        reference: behaviour,
        proximal: behaviour,
        policy,
        preferences: &[],
        values: &[],
    }
}

/// Returns one advantage for all tokens of each completion.
fn spread(advantages: &[f32], like: &[Vec<f32>]) -> Vec<Vec<f32>> {
    advantages.iter().zip(like).map(|(a, tokens)| vec![*a; tokens.len()]).collect()
}

/// Checks that `loss` divided by its terms, and its gradients, agree with the reference to 1e-5.
#[track_caller]
fn check(name: &str, loss: &GroupLoss, expected: f64, gradients: &[Vec<f32>]) {
    let terms = loss.terms as f64;
    let ours = (loss.policy + loss.kl) / terms;
    assert!((ours - expected).abs() < 1e-5, "{name}: {ours}, {expected} there");
    assert_eq!(loss.d_policy.len(), gradients.len());
    for (ours, theirs) in loss.d_policy.iter().zip(gradients) {
        let ours: Vec<f32> = ours.iter().map(|gradient| (f64::from(*gradient) / terms) as f32).collect();
        assert!(max_abs_difference(&ours, theirs) < 1e-5, "{name}: {ours:?} against {theirs:?}");
    }
}

#[test]
fn advantages_of_groups_agree_with_the_reference() {
    for (name, coef) in [("advantages/rloo_plain.safetensors", 0.0), ("advantages/rloo_kl.safetensors", 0.05)] {
        let values = load(name);
        let rewards: Vec<f64> = list(&values, "rewards0").into_iter().map(f64::from).collect();
        let (old, reference) = (rows(&values, "old_logps_tok"), rows(&values, "ref_logps_tok"));
        // The reference charges β·KL and uses the complete reward.
        let kl = Kl { coef, ..NO_KL };
        let returns: Vec<f64> =
            (0..rewards.len()).map(|i| kl.sequence_return(rewards[i] / (1.0 - coef), &old[i], &reference[i])).collect();
        let ours: Vec<f32> = returns.chunks(4).flat_map(leave_one_out).map(|a| a as f32).collect();
        let worst = max_abs_difference(&ours, &list(&values, "advantages"));
        assert!(worst < 1e-5, "{name}: advantages differ by {worst}");
    }
    let values = load("advantages/grpo_group.safetensors");
    let rewards: Vec<f64> = list(&values, "rewards0").into_iter().map(f64::from).collect();
    let ours: Vec<f32> = rewards.chunks(4).flat_map(|group| group_normalised(group, true)).map(|a| a as f32).collect();
    let worst = max_abs_difference(&ours, &list(&values, "advantages"));
    assert!(worst < 1e-5, "advantages differ by {worst}");
    assert_eq!(group_normalised(&[1.0, 4.0], false), [-1.5, 1.5]);
}

/// GRPO, Dr.GRPO and DAPO, with and without the KL in the loss.
#[test]
fn the_grpo_family_agrees_with_the_reference() {
    let even = Clip { low: 0.2, high: 0.2, level: Level::Token };
    let kl = Kl { coef: 0.04, estimator: Estimator::K3, place: Place::Loss };
    for (name, clip, average, kl, expected) in [
        ("grpo", even, Average::SequenceMean, NO_KL, 0.005_970_045_924_186_707),
        ("grpo_kl", even, Average::SequenceMean, kl, 0.010_585_725_307_464_6),
        ("dr_grpo", even, Average::Constant(12.0), NO_KL, -0.138_159_468_770_027_16),
        ("dapo", Clip { high: 0.28, ..even }, Average::TokenMean, NO_KL, -0.226_970_300_078_392_03),
        ("grpo_on_policy", even, Average::SequenceMean, NO_KL, -7.450_580_596_923_828e-9),
    ] {
        let values = load(&format!("losses/{name}.safetensors"));
        let policy = rows(&values, "logps");
        let old = if values.contains_key("old_logps") { rows(&values, "old_logps") } else { policy.clone() };
        let reference = if kl.coef > 0.0 { rows(&values, "ref_logps") } else { old.clone() };
        let group = GroupView { reference: &reference, ..view(&old, &policy) };
        let advantages = spread(&list(&values, "advantages"), &policy);
        let loss = Surrogate { clip: Some(clip), average, kl, ..PLAIN }.loss(&group, &advantages);
        check(name, &loss, expected, &rows(&values, "grad_logps"));
        let tokens = policy.iter().map(Vec::len).sum::<usize>() as f64;
        // The reference counts values outside the bounds on the side where the clip has an effect.
        let share = [("grpo", 0.360_655_725), ("dapo", 0.229_508_191)].iter().find(|(case, _)| *case == name);
        if let Some((_, share)) = share {
            assert!((loss.clipped as f64 / tokens - share).abs() < 1e-6, "{name}: {} clipped", loss.clipped);
        }
    }
}

/// RLOO with the clip on a completion's ratio.
#[test]
fn rloo_agrees_with_the_reference() {
    for (name, expected) in [("rloo", -0.028_394_207_358_360_29), ("rloo_on_policy", 2.235_174_179_077_148_4e-8)] {
        let values = load(&format!("losses/{name}.safetensors"));
        let (policy, old) = (rows(&values, "logps"), rows(&values, "old_logps_tok"));
        let clip = Some(Clip { low: 0.2, high: 0.2, level: Level::Sequence });
        let advantages = spread(&list(&values, "advantages"), &policy);
        let loss = Surrogate { clip, ..PLAIN }.loss(&view(&old, &policy), &advantages);
        check(name, &loss, expected, &rows(&values, "grad_logps"));
    }
    // On-policy, the form without a clip has the same gradients.
    let values = load("losses/rloo_on_policy.safetensors");
    let (policy, advantages) = (rows(&values, "logps"), list(&values, "advantages"));
    let n = policy.len();
    // The advantages sum to zero, so they are the leave-one-out advantages of rewards A·(n−1)/n.
    let rewards: Vec<f64> = advantages.iter().map(|a| f64::from(*a) * (n - 1) as f64 / n as f64).collect();
    let group = GroupView { rewards: &rewards, ..view(&policy, &policy) };
    let algorithm = Rloo { surrogate: Surrogate { correction: Correction::truncated(2.0), ..PLAIN } };
    let targets = algorithm.targets(&[group]).pop().unwrap();
    let loss = algorithm.loss(&group, &targets);
    for (ours, theirs) in loss.d_policy.iter().zip(rows(&values, "grad_logps")) {
        let ours: Vec<f32> = ours.iter().map(|gradient| gradient / n as f32).collect();
        assert!(max_abs_difference(&ours, &theirs) < 1e-5, "{ours:?} against {theirs:?}");
    }
}

/// The reference has one state more than tokens: its values, returns and rewards extend one past the end.
#[test]
fn ppo_agrees_with_the_reference() {
    let values = load("losses/ppo_k1.safetensors");
    let matrix = |name: &str| values[name].to_vec2::<f32>().unwrap();
    let last = values["last_index"].to_vec1::<i64>().unwrap();
    let columns = matrix("logps")[0].len();
    let ends: Vec<usize> = last.iter().map(|l| *l as usize + 1).collect();
    let cut = |name: &str, more: usize| -> Vec<Vec<f32>> {
        matrix(name).into_iter().zip(&ends).map(|(row, end)| row[..(end + more).min(columns)].to_vec()).collect()
    };
    let (behaviour, reference) = (cut("old_logps", 0), cut("ref_logps", 0));
    let (scores, rewards, old) = (list(&values, "scores"), cut("rewards", 1), cut("values", 1));
    let kl = Kl { coef: 0.05, ..NO_KL };
    let mut advantages = Vec::new();
    for i in 0..ends.len() {
        // Per-token KL penalties, plus the score at the last position.
        let mut ours: Vec<f64> = behaviour[i].iter().zip(&reference[i]).map(|(b, r)| -kl.in_reward(*b, *r)).collect();
        ours.resize(rewards[i].len(), 0.0);
        *ours.last_mut().unwrap() += f64::from(scores[i]);
        let charged: Vec<f32> = ours.iter().map(|r| *r as f32).collect();
        assert!(max_abs_difference(&charged, &rewards[i]) < 1e-5, "rewards of {i}");
        let (raw, returns) = gae(&ours, &old[i], 1.0, 0.95);
        assert!(max_abs_difference(&raw[..ends[i]], &cut("gae", 0)[i]) < 1e-5, "advantages of {i}");
        assert!(max_abs_difference(&returns, &cut("returns", 1)[i]) < 1e-5, "returns of {i}");
        advantages.push(raw[..ends[i]].to_vec());
    }
    whiten(advantages.iter_mut().flatten());
    for (ours, theirs) in advantages.iter().zip(cut("advantages", 0)) {
        assert!(max_abs_difference(ours, &theirs) < 1e-5, "{ours:?} against {theirs:?}");
    }
    let policy = cut("logps", 0);
    let clip = Some(Clip { low: 0.2, high: 0.2, level: Level::Token });
    let loss = Surrogate { clip, average: Average::TokenMean, ..PLAIN }.loss(&view(&behaviour, &policy), &advantages);
    check("ppo", &loss, f64::from(list(&values, "pg_loss")[0]), &cut("grad_logps", 0));
    let (now, returns, gradients) = (cut("vpred", 1), cut("returns", 1), cut("grad_vpred", 1));
    let count = now.iter().map(Vec::len).sum::<usize>() as f64;
    let mut total = 0.0;
    for i in 0..now.len() {
        for t in 0..now[i].len() {
            let (loss, gradient) = clipped_value(now[i][t], returns[i][t], old[i][t], 0.2);
            total += loss;
            assert!((0.1 * gradient / count - f64::from(gradients[i][t])).abs() < 1e-5, "value {i}, {t}");
        }
    }
    assert!((total / count - f64::from(list(&values, "vf_loss")[0])).abs() < 1e-5);
}

/// Every correction with every average, with and without the clip and the KL in the loss, against PyTorch.
#[test]
fn off_policy_corrections_agree_with_pytorch() {
    let text = std::fs::read_to_string(fixture("losses/corrected.json")).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    let rows = |value: &Value| -> Vec<Vec<f32>> {
        let row = |row: &Value| row.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        value.as_array().unwrap().iter().map(row).collect()
    };
    let [behaviour, kl_reference, proximal, policy, advantages] =
        ["behaviour", "reference", "proximal", "policy", "advantages"].map(|name| rows(&reference[name]));
    let group = GroupView { reference: &kl_reference, proximal: &proximal, ..view(&behaviour, &policy) };
    let bound = |value: &Value| value.as_f64().unwrap_or(f64::INFINITY);
    let cases = reference["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 60);
    for case in cases {
        let surrogate = Surrogate {
            clip: case["clip"].as_array().map(|clip| Clip {
                low: clip[0].as_f64().unwrap(),
                high: clip[1].as_f64().unwrap(),
                level: Level::Token,
            }),
            correction: Correction {
                level: match case["correction"].as_str().unwrap() {
                    "none" => Level::None,
                    "token" => Level::Token,
                    _ => Level::Sequence,
                },
                limit: bound(&case["limit"]),
                mask_beyond: bound(&case["mask"]),
            },
            average: match case["average"].as_str().unwrap() {
                "sequence-sum" => Average::SequenceSum,
                "sequence-mean" => Average::SequenceMean,
                "token-mean" => Average::TokenMean,
                _ => Average::Constant(reference["longest"].as_f64().unwrap()),
            },
            kl: Kl {
                coef: if case["kl"].is_null() { 0.0 } else { case["kl_coef"].as_f64().unwrap() },
                estimator: match case["kl"].as_str() {
                    Some("k2") => Estimator::K2,
                    Some("k3") => Estimator::K3,
                    _ => Estimator::K1,
                },
                place: Place::Loss,
            },
            entropy: 0.0,
        };
        let loss = surrogate.loss(&group, &advantages);
        check(&format!("{surrogate:?}"), &loss, case["loss"].as_f64().unwrap(), &rows(&case["gradient"]));
    }
}

/// The value loss: with V = Z the policy has no gradient, and the value loss and its gradient are zero.
#[test]
fn a_perfect_baseline_leaves_no_gradient() {
    let algorithm = Reinforce { surrogate: Surrogate { kl: Kl { coef: 0.1, ..NO_KL }, ..PLAIN } };
    let (behaviour, reference) = (vec![vec![-1.0f32, -2.0]], vec![vec![-1.5f32, -1.0]]);
    // Z_2 = 0.9·3 − 0.1·(−1) = 2.8 ; Z_1 = 2.8 − 0.1·0.5 = 2.75.
    let (perfect, off) = ([vec![2.75f32, 2.8]], [vec![1.75f32, 3.8]]);
    let group = GroupView { rewards: &[3.0], reference: &reference, values: &perfect, ..view(&behaviour, &behaviour) };
    let of = |group: GroupView<'_>| algorithm.loss(&group, &algorithm.targets(&[group])[0]);
    let loss = of(group);
    assert!(loss.value < 1e-10 && loss.d_policy[0].iter().all(|gradient| gradient.abs() < 1e-6), "{loss:?}");
    let loss = of(GroupView { values: &off, ..group });
    assert!((loss.value - 2.0).abs() < 1e-5);
    assert!(max_abs_difference(&loss.d_policy[0], &[-1.0, 1.0]) < 1e-5);
    assert!(max_abs_difference(&loss.d_value[0], &[-2.0, 2.0]) < 1e-5);
}

/// Rewards are whitened over the batch, not the group; whitened advantages have mean 0 and variance 1 over tokens.
#[test]
fn whitening_covers_the_batch() {
    let tokens = vec![vec![-1.0f32], vec![-1.0; 3]];
    let plain = view(&tokens, &tokens);
    let batch = [GroupView { rewards: &[1.0, 2.0], ..plain }, GroupView { rewards: &[3.0, 6.0], ..plain }];
    let made = |rewards, advantages| {
        let inner = Box::new(Grpo { scaled: false, surrogate: PLAIN });
        let algorithm = Whitened { inner, rewards, advantages };
        assert!(algorithm.needs_batch());
        algorithm.targets(&batch).into_iter().map(|targets| targets.advantages.concat()).collect::<Vec<_>>()
    };
    // The sample variance of 1, 2, 3, 6 is 14/3; the mean is removed within a group.
    let unit = (14f32 / 3.0).sqrt().recip();
    let expected =
        [[-0.5 * unit, 0.5 * unit, 0.5 * unit, 0.5 * unit], [-1.5 * unit, 1.5 * unit, 1.5 * unit, 1.5 * unit]];
    for (ours, expected) in made(true, false).iter().zip(&expected) {
        assert!(max_abs_difference(ours, expected) < 1e-6, "{ours:?}");
    }
    let all = made(false, true).concat();
    let mean = all.iter().sum::<f32>() / 8.0;
    let variance = all.iter().map(|a| (a - mean).powi(2)).sum::<f32>() / 7.0;
    assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5, "{all:?}");
}

/// Cross-entropy between a soft label and softmax(r₁, r₂), and its gradient, against PyTorch's autograd.
#[test]
fn the_soft_label_loss_agrees_with_pytorch() {
    use preceptor::rl::algo::preference::soft_label;
    let text = std::fs::read_to_string(fixture("preference").join("soft_labels.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 24);
    for case in cases {
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        let rewards = [number(&case["rewards"][0]), number(&case["rewards"][1])];
        let (loss, gradient) = soft_label(rewards[0] - rewards[1], number(&case["label"]));
        assert!((loss - number(&case["loss"])).abs() < 1e-5, "{case}: {loss}");
        for (ours, theirs) in [(gradient, &case["gradient"][0]), (-gradient, &case["gradient"][1])] {
            assert!((ours - number(theirs)).abs() < 1e-5, "{case}: {ours}");
        }
    }
}

/// Four pairs of a batch whose first half is chosen and whose second half is rejected.
#[test]
fn online_dpo_agrees_with_the_reference() {
    for (loss_kind, name, expected) in [
        (DpoLoss::Sigmoid, "losses/dpo_sigmoid.safetensors", 0.794_346_690_177_917_5),
        (DpoLoss::Ipo, "losses/dpo_ipo.safetensors", 27.790_147_781_372_07),
    ] {
        let values = load(name);
        let mask = values["completion_mask_full"].to_vec2::<i64>().unwrap();
        // Position t of a row scores token t + 1.
        let rows = |name: &str| -> Vec<Vec<f32>> {
            let all = values[name].to_vec2::<f32>().unwrap();
            let kept = |(row, mask): (&Vec<f32>, &Vec<i64>)| {
                row.iter().zip(&mask[1..]).filter(|(_, m)| **m == 1).map(|(v, _)| *v).collect()
            };
            all.iter().zip(&mask).map(kept).collect()
        };
        let (policy, reference, gradients) = (rows("logps"), rows("ref_logps"), rows("grad_logps"));
        let preferences: Vec<(usize, usize, f64)> = (0..4).map(|i| (i, i + 4, 1.0)).collect();
        let group = GroupView { reference: &reference, preferences: &preferences, ..view(&policy, &policy) };
        for soft in [false, true] {
            let algorithm = OnlineDpo { beta: 0.1, soft, loss_kind };
            let loss = algorithm.loss(&group, &algorithm.targets(&[group])[0]);
            assert_eq!(loss.terms, 4);
            if loss_kind == DpoLoss::Sigmoid {
                assert!((loss.margins.iter().sum::<f64>() / 4.0 + 0.190_648_42).abs() < 1e-5);
            }
            assert!((loss.policy / 4.0 / expected - 1.0).abs() < 1e-5, "{name}: {}", loss.policy / 4.0);
            for (ours, theirs) in loss.d_policy.iter().zip(&gradients) {
                let ours: Vec<f32> = ours.iter().map(|gradient| gradient / 4.0).collect();
                assert!(max_abs_difference(&ours, theirs) < 1e-5, "{name}: {ours:?} against {theirs:?}");
            }
        }
        // A soft label of ½ pulls towards indifference; a hard one has no effect.
        let even = [(0, 4, 0.5)];
        let loss = |soft| {
            let algorithm = OnlineDpo { beta: 0.1, soft, loss_kind };
            algorithm.loss(&GroupView { preferences: &even, ..group }, &Default::default())
        };
        assert_eq!((loss(false).terms, loss(true).terms), (0, 1));
        assert!(loss(false).d_policy.iter().flatten().all(|gradient| *gradient == 0.0));
        assert!(loss(true).d_policy[0].iter().any(|gradient| *gradient != 0.0));
    }
}

/// The reward's KL of a stale token is that of the proximal policy: 0.9·1 − 0.1·(ln π_prox − ln π_ref).
#[test]
fn the_kl_in_the_reward_is_that_of_the_proximal_policy() {
    let [behaviour, proximal, reference] = [-1.0, -2.0, -1.5].map(|logprob| vec![vec![logprob]]);
    let group =
        GroupView { rewards: &[1.0], reference: &reference, proximal: &proximal, ..view(&behaviour, &proximal) };
    let kl = Kl { coef: 0.1, estimator: Estimator::K1, place: Place::Reward };
    assert!((group.returns(&kl)[0] - 0.95).abs() < 1e-12);
    assert!((group.token_rewards(&kl)[0][0] - 0.95).abs() < 1e-12);
}

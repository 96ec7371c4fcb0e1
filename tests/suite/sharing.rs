//! Tests of shared prompts: a group's prompt computed once for all its completions, against a separate copy for each.

use candle_core::{Device, Tensor, Var};
use kernels::{Gradients, backward};
use preceptor::lm::model::config::Window;
use preceptor::lm::model::{Decoder, Lora, ModelConfig, Pack, Weights};
use preceptor::rl::algo::correction::{Correction, Level};
use preceptor::rl::algo::grpo::Grpo;
use preceptor::rl::algo::kl::{Estimator, Kl, Place};
use preceptor::rl::algo::online_dpo::{DpoLoss, OnlineDpo};
use preceptor::rl::algo::ppo::Ppo;
use preceptor::rl::algo::reinforce::Reinforce;
use preceptor::rl::algo::rloo::Rloo;
use preceptor::rl::algo::surrogate::{Average, Clip, Surrogate};
use preceptor::rl::algo::{Algorithm, GroupView};

use crate::common::max_abs_difference;

const PROMPT: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];

fn completions() -> Vec<Vec<u32>> {
    [1, 7, 4, 12].iter().enumerate().map(|(k, n)| (0..*n).map(|i| (k * 31 + i * 7 + 2) as u32 % 90).collect()).collect()
}

fn shape(window: Option<Window>) -> ModelConfig {
    ModelConfig { window, ..ModelConfig::tiny(90) }
}

fn algorithms() -> Vec<(&'static str, Box<dyn Algorithm>)> {
    let kl = Kl { coef: 0.1, estimator: Estimator::K1, place: Place::Reward };
    let plain = Surrogate {
        clip: None,
        correction: Correction { level: Level::Token, limit: 2.0, mask_beyond: f64::INFINITY },
        average: Average::SequenceSum,
        kl,
        entropy: 0.0,
    };
    let clip = Some(Clip { low: 0.2, high: 0.2, level: Level::Token });
    let in_loss = Kl { estimator: Estimator::K3, place: Place::Loss, ..kl };
    let grpo = Surrogate { clip, average: Average::SequenceMean, kl: in_loss, entropy: 0.01, ..plain };
    vec![
        ("reinforce", Box::new(Reinforce { surrogate: plain })),
        (
            "rloo",
            Box::new(Rloo {
                surrogate: Surrogate { clip: Some(Clip { low: 0.2, high: 0.2, level: Level::Sequence }), ..plain },
            }),
        ),
        ("grpo", Box::new(Grpo { scaled: true, surrogate: grpo })),
        (
            "dr-grpo",
            Box::new(Grpo { scaled: false, surrogate: Surrogate { average: Average::Constant(12.0), ..grpo } }),
        ),
        (
            "ppo",
            Box::new(Ppo {
                gamma: 0.99,
                lambda: 0.95,
                value_clip: 0.2,
                surrogate: Surrogate { clip, average: Average::TokenMean, ..plain },
            }),
        ),
        ("online-dpo", Box::new(OnlineDpo { beta: 0.1, soft: true, loss_kind: DpoLoss::Sigmoid })),
        ("ipo", Box::new(OnlineDpo { beta: 0.1, soft: false, loss_kind: DpoLoss::Ipo })),
    ]
}

/// Returns log-probabilities and entropies `[N]` of all completions, with a shared prompt or with one for each.
fn forward(model: &Decoder, shared: bool) -> (Tensor, Tensor) {
    let completions = completions();
    if shared {
        return model.logprobs(&Pack::new(&PROMPT, &completions), 0.9).unwrap();
    }
    // One continuous sequence, from which the completion's tokens are taken.
    let alone = |completion: &Vec<u32>| {
        let sequence = [&PROMPT[1..], completion].concat();
        let (logprobs, entropy) = model.logprobs(&Pack::new(&PROMPT[..1], &[sequence]), 0.9).unwrap();
        [logprobs, entropy].map(|of| of.narrow(0, PROMPT.len() - 1, completion.len()).unwrap())
    };
    let parts: Vec<[Tensor; 2]> = completions.iter().map(alone).collect();
    let join = |parts: Vec<&Tensor>| Tensor::cat(&parts, 0).unwrap();
    (join(parts.iter().map(|part| &part[0]).collect()), join(parts.iter().map(|part| &part[1]).collect()))
}

/// Returns the gradient of the algorithm's loss for each parameter.
fn gradients(algorithm: &dyn Algorithm, model: &Decoder, params: &[(String, Var)], shared: bool) -> Gradients {
    let pack = Pack::new(&PROMPT, &completions());
    let (logprobs, entropy) = forward(model, shared);
    let policy = pack.split(&logprobs.to_vec1().unwrap());
    let moved = |by: f32| -> Vec<Vec<f32>> {
        let row = |row: &Vec<f32>| row.iter().enumerate().map(|(i, p)| p + by * (i as f32 + 1.0).sin()).collect();
        policy.iter().map(row).collect()
    };
    let (behaviour, reference, proximal, values) = (moved(0.2), moved(-0.3), moved(0.15), moved(0.5));
    let view = GroupView {
        rewards: &[0.3, -1.0, 1.5, 0.2],
        behaviour: &behaviour,
        reference: &reference,
        proximal: &proximal,
        policy: &policy,
        preferences: &[(0, 1, 0.8), (2, 3, 0.35)],
        values: &values,
    };
    let loss = algorithm.loss(&view, &algorithm.targets(&[view])[0]);
    let weigh = |x: &Tensor, gradients: &[Vec<f32>]| {
        let gradients = Tensor::from_vec(gradients.concat(), x.dims(), &Device::Cpu).unwrap();
        (x * gradients).unwrap().sum_all().unwrap()
    };
    let mut sum = weigh(&logprobs, &loss.d_policy);
    if !loss.d_entropy.is_empty() {
        sum = (sum + weigh(&entropy, &loss.d_entropy)).unwrap();
    }
    let mut gradients = Gradients::new(params);
    assert_eq!(backward(&sum, &mut [&mut gradients]).unwrap(), params.len());
    gradients
}

#[test]
fn the_gradient_equals_that_of_unshared_prompts_for_every_algorithm() {
    for window in [None, Some(Window { size: 5, layers: vec![true, false] })] {
        let config = shape(window);
        let base = Decoder::new(&config, &Weights::scratch(&config, 0.2, 3, &Device::Cpu).unwrap()).unwrap();
        let lora = Lora { rank: 4, alpha: 8.0, targets: vec!["q_proj".into(), "down_proj".into()] };
        // Adapters start with B at zero, where A has no gradient; random weights simulate training.
        let (adapted, adapters) = base.adapted(&lora, 5).unwrap();
        for (i, (_, var)) in adapters.iter().enumerate() {
            let values = (0..var.elem_count()).map(|j| ((i * 13 + j * 7) % 11) as f32 / 50.0 - 0.1).collect();
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu).unwrap()).unwrap();
        }
        for (model, params) in [base.trainable(true).unwrap(), (adapted, adapters)] {
            for (name, algorithm) in algorithms() {
                let [shared, own] = [true, false].map(|shared| gradients(&*algorithm, &model, &params, shared));
                assert!(own.global_norm().unwrap() > 1e-3, "{name} has no gradient to compare");
                for (param, _) in &params {
                    let [shared, own] = [&shared, &own]
                        .map(|of| of.get(param).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
                    let size = own.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
                    let worst = max_abs_difference(&shared, &own);
                    assert!(worst < 2e-5 * size, "{name}: the gradients of {param} differ by {worst}, of {size}");
                }
            }
        }
    }
}

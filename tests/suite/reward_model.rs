//! Tests of the reward model against `transformers`, and of its training.

use candle_core::{DType, Device, Tensor};
use kernels::AdamWConfig;
use preceptor::lm::model::{Decoder, Weights};
use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::reward::{RewardModel, RewardTrainer, TrainerPlan};
use preceptor::types::{Completion, Group, Prompt};
use serde_json::Value;

use crate::common::fixture;

fn plan() -> TrainerPlan {
    TrainerPlan { lr: 1e-3, head_lr: 1e-2, batch_pairs: 2, max_grad_norm: 1.0, hard: false, holdout: 0.0, seed: 0 }
}

fn group(seq: u64, prompt: &[u32], answers: &[Vec<u32>]) -> Group {
    let prompt = Prompt::new(seq, format!("{prompt:?} of {seq}"), prompt);
    let completion = |ids: &Vec<u32>| Completion::unsampled(ids.clone(), "");
    Group { prompt, completions: answers.iter().map(completion).collect() }
}

fn llama() -> Decoder {
    let (config, weights) = Weights::from_directory(&fixture("llama"), &Device::Cpu).unwrap();
    Decoder::new(&config, &weights).unwrap()
}

#[test]
fn scores_loss_and_gradient_agree_with_transformers() {
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("reward/scores.json")).unwrap()).unwrap();
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let floats =
        |value: &Value| -> Vec<f64> { value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let head: Vec<f32> = floats(&reference["head"]).into_iter().map(|x| x as f32).collect();
    let head = Tensor::from_vec(head, (1, 64), &Device::Cpu).unwrap();
    let answers: Vec<Vec<u32>> = reference["answers"].as_array().unwrap().iter().map(ids).collect();
    let mut trainer = RewardTrainer::new(&llama(), Some(&head), plan(), AdamWConfig::default()).unwrap();
    let group = group(0, &ids(&reference["prompt"]), &answers);
    let (scores, step) = trainer.learn(&group, &[(0, 1, 0.7), (2, 0, 0.2)]).unwrap();
    for (ours, theirs) in scores.iter().zip(floats(&reference["scores"])) {
        assert!((ours - theirs).abs() < 1e-4, "{scores:?}");
    }
    let step = step.unwrap();
    // The loss is a mean over the two pairs here and a sum in the reference.
    let (loss, norm) = (reference["loss"].as_f64().unwrap() / 2.0, reference["gradient_norm"].as_f64().unwrap() / 2.0);
    assert!((step.loss - loss).abs() < 1e-4, "{step:?}, {loss} there");
    assert!((step.gradient_norm / norm - 1.0).abs() < 1e-3, "{step:?}, {norm} there");
    assert_eq!((trainer.version(), trainer.trained()), (1, 2));
}

#[test]
fn preferred_answers_come_to_score_higher_and_held_out_pairs_are_not_trained_on() {
    let mut trainer =
        RewardTrainer::new(&llama(), None, TrainerPlan { holdout: 0.3, ..plan() }, AdamWConfig::default()).unwrap();
    // Answers with token 7 are better than answers with token 9, in either position.
    let pair = |seq: u64| {
        let (good, bad) = (vec![20 + (seq % 5) as u32, 7], vec![20 + (seq % 5) as u32, 9]);
        let first_is_good = seq.is_multiple_of(2);
        let answers = if first_is_good { [good, bad] } else { [bad, good] };
        (group(seq, &[1, 30 + (seq % 11) as u32], &answers), f64::from(u8::from(first_is_good)))
    };
    let mut held_out = 0;
    for seq in 0..60 {
        let (group, p) = pair(seq);
        let before = (trainer.version(), trainer.trained());
        let scores = trainer.observe(&group, &[(0, 1, p)]).unwrap().scores;
        assert_eq!(scores.len(), 2);
        if trainer.holds_out(&group.prompt) {
            held_out += 1;
            assert_eq!((trainer.version(), trainer.trained()), before);
        }
        // A group that is issued again after a restart is scored but not learned from twice.
        let after = (trainer.version(), trainer.trained());
        trainer.observe(&group, &[(0, 1, p)]).unwrap();
        assert_eq!((trainer.version(), trainer.trained()), after);
    }
    assert!((8..30).contains(&held_out), "{held_out}");
    assert_eq!(trainer.accuracy().1, held_out);
    let (group, _) = pair(1001);
    let scores = trainer.score(&group).unwrap();
    assert!(scores[1] > scores[0] + 1.0, "{scores:?}");
}

#[test]
fn a_saved_reward_model_opens_with_the_same_scores() {
    let head = Tensor::randn(0f32, 1.0, (1, 64), &Device::Cpu).unwrap();
    let trainer = RewardTrainer::new(&llama(), Some(&head), plan(), AdamWConfig::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    trainer.model().save(dir.path(), &Tokenizer::bytes(), DType::F32).unwrap();
    let opened = RewardModel::open(dir.path(), &Device::Cpu).unwrap();
    let scores =
        |model: &RewardModel| model.scores(&[3, 4, 5], &[vec![6], vec![7, 8, 9]]).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(scores(&opened), scores(trainer.model()));
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["architectures"][0], config["id2label"].as_object().unwrap().len()),
        (&Value::from("LlamaForSequenceClassification"), 1)
    );
    // The score is read at the last token that is not padding, so the end token must not be the padding token.
    let eos = Tokenizer::bytes().eos_ids().to_vec();
    let pad = config["pad_token_id"].as_u64().unwrap() as u32;
    assert!(!eos.contains(&pad), "{pad}");
    // A language model is not a reward model, and the reverse.
    let error = RewardModel::open(&fixture("llama"), &Device::Cpu).err().unwrap();
    assert!(format!("{error:#}").contains("LlamaForCausalLM"), "{error:#}");
    assert!(Weights::from_directory(dir.path(), &Device::Cpu).is_err());
}

//! Labelers on a real, if random, model.

use std::sync::Arc;

use candle_core::Device;
use preceptor::label::backend::{Ask, Backend, Decoding, Usage};
use preceptor::label::local::{Judge, Local};
use preceptor::model::{Decoder, ModelConfig, Pack, Weights};
use preceptor::tokens::Tokenizer;

fn judge(chat: bool) -> Judge {
    let tokenizer = Tokenizer::bytes();
    let config = ModelConfig {
        hidden_size: 32,
        intermediate_size: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        vocab_size: tokenizer.vocab_size(),
        context: 512,
        eos: tokenizer.eos_ids().to_vec(),
        ..ModelConfig::llama()
    };
    let weights = Weights::scratch(&config, 0.3, 5, &Device::Cpu).unwrap();
    Judge { model: Arc::new(Decoder::new(&config, &weights).unwrap()), tokenizer, identity: 1, chat }
}

/// P(text | prompt), by a pass of its own.
fn probability(judge: &Judge, prompt: &str, text: &str) -> f64 {
    let ids = |text: &str| judge.tokenizer.encode(text).unwrap();
    let logprobs = judge.model.logprobs(&Pack::new(&ids(prompt), &[ids(text)]), 1.0).unwrap().0;
    logprobs.to_vec1::<f32>().unwrap().iter().map(|p| f64::from(*p)).sum::<f64>().exp()
}

#[test]
fn a_judge_s_weights_are_those_of_a_pass_per_question() {
    let prompts =
        ["Please rate: good\nSCORE:", "Please rate: awful and long\nSCORE:", "Please rate: good and so on\nSCORE:"];
    let answers = ["1", "2", "10"].map(str::to_owned).to_vec();
    let asks: Vec<Ask> =
        prompts.iter().map(|prompt| Ask { prompt: (*prompt).to_owned(), answers: answers.clone() }).collect();
    for chat in [false, true] {
        let judge = judge(chat);
        let local = Local::new(judge.clone());
        let mut usage = Usage::default();
        let cold = local.weigh(&asks, &mut usage);
        let without = usage.prompt_tokens;
        // With what the prompts begin with computed beforehand, fewer tokens are read and the answers are the same.
        local.warm(&["Please rate: a\nSCORE:".to_owned(), "Please rate: b\nSCORE:".to_owned()]).unwrap();
        let warm = local.weigh(&asks, &mut usage);
        assert!(usage.prompt_tokens - without < without, "{usage:?}");
        for (i, prompt) in prompts.iter().enumerate() {
            let full = if chat {
                let message = preceptor::tokens::chat::Message { role: "user".into(), content: (*prompt).into() };
                judge.tokenizer.render_chat(&[message], true).unwrap()
            } else {
                (*prompt).to_owned()
            };
            let p = |text: &str| {
                let spaced = if chat { 0.0 } else { probability(&judge, &full, &format!(" {text}")) };
                probability(&judge, &full, text) + spaced
            };
            let expected = [p("1") - p("10"), p("2"), p("10")];
            for replies in [&cold, &warm] {
                let weights = replies[i].as_ref().unwrap();
                for (weight, expected) in weights.iter().zip(expected) {
                    assert!((weight - expected).abs() < 1e-5 * expected.max(1e-3), "{weights:?} against {expected}");
                }
            }
        }
    }
}

#[test]
fn a_question_beyond_the_context_is_an_abstention_and_its_neighbours_are_answered() {
    let local = Local::new(judge(false));
    let ask = |prompt: String| Ask { prompt, answers: vec!["1".into(), "2".into()] };
    let asks = [ask("short:".into()), ask("long ".repeat(200)), ask("short too:".into())];
    let replies = local.weigh(&asks, &mut Usage::default());
    assert!(replies[0].is_ok() && replies[2].is_ok());
    assert!(replies[1].as_ref().unwrap_err().to_string().contains("context of 512"), "{:?}", replies[1]);
}

#[test]
fn what_a_judge_writes_depends_on_its_prompt_alone() {
    let local = Local::new(judge(false));
    let decoding = Decoding { max_tokens: 12, temperature: 1.0, top_k: Some(40), seed: 9 };
    let write = |prompts: &[&str]| -> Vec<String> {
        let prompts: Vec<String> = prompts.iter().map(|prompt| (*prompt).to_owned()).collect();
        let replies = local.write(&prompts, &decoding, &mut Usage::default());
        replies.into_iter().map(Result::unwrap).collect()
    };
    let together = write(&["one", "two", "one"]);
    assert_eq!(write(&["two"])[0], together[1]);
    assert_ne!(together[0], together[2], "equal prompts of one call are two draws");
    // Next to each other they share a prefill, and more than go side by side are written in lots: all the same.
    let neighbours = write(&["one", "one", "two"]);
    assert_eq!([&neighbours[0], &neighbours[1], &neighbours[2]], [&together[0], &together[2], &together[1]]);
    let many = write(&["two"; 40]);
    assert_eq!(many[0], together[1]);
}

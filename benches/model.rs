//! Tokens per second of a model: sampling at several batch sizes, scoring a group, the gradient of a group, and an
//! optimizer step. Weights are random; the time does not depend on them. Uses PRECEPTOR_BENCH_THREADS threads, by default
//! one.
//!
//!     cargo bench --bench model              # both sizes
//!     cargo bench --bench model -- tiny      # 4.0 M parameters
//!     cargo bench --bench model -- smollm2   # the shape of SmolLM2-135M

#[path = "common/shapes.rs"]
mod shapes;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::Device;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use kernels::{AdamW, AdamWConfig, Format, Gradients, backward};
use preceptor::lm::model::{Decoder, ModelConfig, Pack, Weights};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Fixed, Request, generate};
use preceptor::pipeline::learn::collective::{Collective, SharedWeights};
use preceptor::pipeline::learn::replicas::{Replicas, Sums};
use rayon::ThreadPool;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const GROUP: usize = 8;
const PROMPT: usize = 64;
const ANSWER: usize = 64;

fn benches(criterion: &mut Criterion) {
    preceptor::util::process::prepare();
    let threads = std::env::var("PRECEPTOR_BENCH_THREADS").map_or(1, |n| n.parse().expect("a number of threads"));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    for name in ["tiny", "smollm2"] {
        let config = shapes::shape(name).expect("a known shape");
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(10));
        size(&mut group, &config, &pool);
        group.finish();
    }
}

fn size(group: &mut BenchmarkGroup<'_, criterion::measurement::WallTime>, config: &ModelConfig, pool: &ThreadPool) {
    let weights = Weights::scratch(config, 0.02, 1, &Device::Cpu).expect("weights");
    let frozen = Arc::new(Decoder::new(config, &weights).expect("a model"));
    let word = |i: usize| (i * 61 % config.vocab_size) as u32;
    let prompt: Vec<u32> = (0..PROMPT).map(word).collect();
    let completions: Vec<Vec<u32>> =
        (0..GROUP).map(|k| (0..ANSWER).map(|i| word(PROMPT + i * GROUP + k)).collect()).collect();
    let pack = Pack::new(&prompt, &completions);

    let [half, eight] =
        [Format::Bf16, Format::Q8].map(|format| Arc::new(frozen.quantized(format).expect("fewer bits")));
    let models = [(&frozen, ""), (&half, " bf16"), (&eight, " q8_0")];
    for (width, (model, suffix)) in [1, 8, 32].into_iter().flat_map(|n| models.map(|model| (n, model))) {
        group.throughput(Throughput::Elements((width * ANSWER) as u64));
        group.bench_function(format!("sample {width}{suffix}"), |b| {
            let sampling = Sampling { temperature: 0.9, max_new_tokens: ANSWER, ..Sampling::default() };
            b.iter(|| {
                let requests: Vec<Request> = (0..width.div_ceil(GROUP))
                    .map(|_| Request::new(&prompt, (0..width.min(GROUP) as u64).collect()))
                    .collect();
                pool.install(|| generate(&mut Fixed(Arc::clone(model)), requests, &sampling).expect("completions"))
            });
        });
    }
    group.throughput(Throughput::Elements((GROUP * ANSWER) as u64));
    group.bench_function("score", |b| {
        b.iter(|| pool.install(|| frozen.logprobs(&pack, 1.0).expect("log-probabilities").0.to_vec1::<f32>()));
    });
    let (model, params) = frozen.trainable(true).expect("variables");
    let model = Arc::new(model);
    let mut gradients = Gradients::new(&params);
    let mut optimizer = AdamW::new(params.clone(), AdamWConfig::default()).expect("moments");
    group.bench_function("gradient", |b| {
        b.iter(|| {
            pool.install(|| {
                let (logprobs, _) = model.logprobs(&pack, 1.0).expect("log-probabilities");
                let loss = logprobs.sum_all().expect("a loss");
                backward(&loss, &mut [&mut gradients]).expect("a gradient")
            })
        });
    });
    // Two groups, on one replica and on two of one thread each.
    group.throughput(Throughput::Elements((2 * GROUP * ANSWER) as u64));
    for count in [1, 2] {
        let sums = |_| Arc::new(Mutex::new(vec![Gradients::new(&params)]));
        let sums: Vec<_> = (0..count).map(sums).collect();
        let mut replicas = Replicas::start(sums.clone(), 1, 2).expect("threads");
        let learner = rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("a pool");
        let mut step = || {
            for place in 0..2 {
                let (model, pack) = (Arc::clone(&model), pack.clone());
                let job = move |sums: &mut Sums| {
                    let (logprobs, _) = model.logprobs(&pack, 1.0)?;
                    Ok(backward(&logprobs.sum_all()?, &mut [&mut sums[0]])?)
                };
                replicas.submit(place % count, Box::new(job));
            }
            while let Some(result) = replicas.take() {
                result.expect("a gradient");
            }
            SharedWeights.reduce(&sums).expect("a sum");
        };
        group.bench_function(format!("gradients of two groups, {count} replicas"), |b| {
            b.iter(|| learner.install(&mut step));
        });
    }
    group.throughput(Throughput::Elements(weights.parameters() as u64));
    group.bench_function("optimizer", |b| {
        b.iter(|| {
            pool.install(|| {
                gradients.global_norm().expect("a norm");
                optimizer.step(&gradients, 1e-6, 1.0).expect("a step");
            })
        });
    });
}

criterion_group!(model, benches);
criterion_main!(model);

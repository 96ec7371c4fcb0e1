//! Throughput of a device with a model of random weights: tokens per second of sampling, scoring and training, and the
//! share of the device's peak performance.
//!
//! ```text
//! cargo bench --bench device -- --size tiny
//! cargo bench --bench device --features cuda -- --device cuda:0 --dtype bf16 --peak-tflops 989
//! ```
//!
//! Only necessary operations are counted: two per weight and token, and attention to the visible tokens; three times as
//! many for a training step. Discarded results, such as masked attention scores, are not counted.

#[path = "common/shapes.rs"]
mod shapes;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use candle_core::{DType, Device};
use clap::Parser;
use kernels::{AdamW, AdamWConfig, Gradients};
use preceptor::lm::model::{Decoder, DeviceReplicas, ModelConfig, Pack, Weights};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Fixed, Request, generate};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Number of completions per prompt.
const GROUP: usize = 8;
/// Length of a prompt in tokens.
const PROMPT: usize = 64;
/// Length of a completion in tokens.
const ANSWER: usize = 64;
/// Number of groups in a training step.
const GROUPS: usize = 4;

#[derive(Parser)]
struct Options {
    /// `cpu` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// `tiny` (4.0 M parameters) or `smollm2` (the shape of SmolLM2-135M).
    #[arg(long, default_value = "smollm2")]
    size: String,
    /// `f32` or `bf16`.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Peak performance of the device in this type, in 10¹² operations per second.
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Minimum seconds of each measurement.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Set by `cargo bench`; without it nothing is measured.
    #[arg(long)]
    bench: bool,
}

fn main() -> Result<()> {
    preceptor::util::process::prepare();
    let options = Options::parse();
    if !options.bench {
        return Ok(());
    }
    let device = preceptor::util::device::open(&options.device)?;
    let dtype = match options.dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        other => bail!("--dtype {other} is neither f32 nor bf16"),
    };
    let Some(config) = shapes::shape(&options.size) else {
        bail!("--size {} is neither tiny nor smollm2", options.size)
    };
    println!("{} on {}, {}\n", options.size, options.device, options.dtype);
    println!("| work | tokens/s | TFLOP/s | share of peak |\n|---|---|---|---|");
    Bench { config, device, dtype, options }.run()
}

/// Returns the number of attended (query, key) pairs of a sequence of `length` tokens.
fn attended(length: usize) -> usize {
    length * (length + 1) / 2
}

/// Returns the number of attended pairs whose query is in a completion after `prompt` tokens. The last token of a
/// completion is not fed to the model.
fn attended_after(prompt: usize) -> usize {
    (ANSWER - 1) * prompt + attended(ANSWER - 1)
}

struct Bench {
    config: ModelConfig,
    device: Device,
    dtype: DType,
    options: Options,
}

impl Bench {
    fn run(&self) -> Result<()> {
        let mut weights = Weights::scratch(&self.config, 0.02, 1, &self.device)?;
        for tensor in weights.0.values_mut() {
            *tensor = tensor.to_dtype(self.dtype)?;
        }
        let model = Arc::new(Decoder::new(&self.config, &weights)?);
        let word = |i: usize| (i * 61 % self.config.vocab_size) as u32;
        let prompt: Vec<u32> = (0..PROMPT).map(word).collect();
        // More rows than `generate` has slots are sampled in turn.
        for rows in [1, 8, 32, 128] {
            self.sampling(&model, &prompt, rows)?;
        }
        let completions: Vec<Vec<u32>> =
            (0..GROUP).map(|k| (0..ANSWER).map(|i| word(PROMPT + i * GROUP + k)).collect()).collect();
        let pack = Pack::new(&prompt, &completions);
        let scored = (GROUP * ANSWER) as f64;
        let pairs = attended(PROMPT) + GROUP * attended_after(PROMPT);
        let forward = self.operations(pack.len(), pack.targets.len(), pairs);
        self.measure("score", scored, forward, || {
            model.logprobs(&pack, 1.0)?.0.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            Ok(())
        })?;
        let (trained, params) = model.trainable(true)?;
        let mut gradients = Gradients::new(&params);
        let mut optimizer = AdamW::new(params, AdamWConfig::default())?;
        let mut train = || {
            gradients.zero()?;
            for _ in 0..GROUPS {
                let (logprobs, _) = trained.logprobs(&pack, 1.0)?;
                kernels::backward(&logprobs.sum_all()?, &mut [&mut gradients])?;
            }
            let norm = gradients.global_norm()?;
            Ok(optimizer.step(&gradients, 1e-6, 1.0 / norm)?)
        };
        let tokens = scored * GROUPS as f64;
        self.measure("train", tokens, forward * 3.0 * GROUPS as f64, &mut train)?;
        // As the actors of a run: on one stream, which they share, and on separate streams.
        self.concurrent("on one stream", &model, &prompt, tokens, &mut train)?;
        let own = preceptor::util::device::open(&self.options.device)?;
        if own.same_device(&self.device) {
            return Ok(());
        }
        self.concurrent("on separate streams", &DeviceReplicas::new(own).of(&model)?, &prompt, tokens, &mut train)
    }

    /// Measures training and concurrent sampling of 32 rows with `model`.
    fn concurrent(
        &self,
        how: &str,
        model: &Arc<Decoder>,
        prompt: &[u32],
        tokens: f64,
        train: &mut impl FnMut() -> Result<()>,
    ) -> Result<()> {
        const ROWS: usize = 32;
        let sampling = Sampling { temperature: 0.9, max_new_tokens: ANSWER, ..Sampling::default() };
        let stop = AtomicBool::new(false);
        let (trained, sampled) = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| {
                let (began, mut times) = (Instant::now(), 0.0);
                while !stop.load(Ordering::Relaxed) {
                    let requests = (0..ROWS / GROUP).map(|_| Request::new(prompt, (0..GROUP as u64).collect()));
                    generate(&mut Fixed(Arc::clone(model)), requests.collect(), &sampling)?;
                    times += (ROWS * ANSWER) as f64;
                }
                anyhow::Ok(times / began.elapsed().as_secs_f64())
            });
            let (began, mut times) = (Instant::now(), 0.0);
            let done = loop {
                let done = train().and_then(|()| Ok(self.device.synchronize()?));
                times += tokens;
                if done.is_err() || began.elapsed() >= Duration::from_secs_f64(self.options.seconds) {
                    break done;
                }
            };
            let rate = times / began.elapsed().as_secs_f64();
            stop.store(true, Ordering::Relaxed);
            let sampled = sampler.join().map_err(|_| anyhow!("the sampling thread panicked"))??;
            done.map(|()| (rate, sampled))
        })?;
        println!("| train during sampling, {how} | {trained:.0} | | |");
        println!("| sample, {ROWS} rows, during training, {how} | {sampled:.0} | | |");
        Ok(())
    }

    fn sampling(&self, model: &Arc<Decoder>, prompt: &[u32], rows: usize) -> Result<()> {
        let sampling = Sampling { temperature: 0.9, max_new_tokens: ANSWER, ..Sampling::default() };
        let groups = rows.div_ceil(GROUP);
        let fed = rows * (ANSWER - 1);
        let pairs = groups * attended(PROMPT) + rows * attended_after(PROMPT);
        let operations = self.operations(groups * PROMPT + fed, groups + fed, pairs);
        let measured = self.measure(&format!("sample, {rows} rows"), (rows * ANSWER) as f64, operations, || {
            let seeds = || (0..rows.min(GROUP) as u64).collect();
            let requests = (0..groups).map(|_| Request::new(prompt, seeds())).collect();
            generate(&mut Fixed(Arc::clone(model)), requests, &sampling)?;
            Ok(())
        });
        match measured {
            // Sampling is not supported in half precision on every device.
            Err(error) if self.dtype != DType::F32 => {
                let error = error.to_string();
                let cause = error.lines().next().unwrap_or_default();
                println!("| sample, {rows} rows | not supported in this type ({cause}) | | |");
                Ok(())
            }
            other => other,
        }
    }

    /// Returns the number of operations of a forward pass over `fed` tokens that applies the head to `predicted` of them
    /// and has `pairs` attended pairs.
    fn operations(&self, fed: usize, predicted: usize, pairs: usize) -> f64 {
        let config = &self.config;
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layer = 2 * config.hidden_size * (q + kv) + 3 * config.hidden_size * config.intermediate_size;
        let head = config.hidden_size * config.vocab_size;
        (2 * (config.layers * layer * fed + head * predicted) + 4 * config.layers * q * pairs) as f64
    }

    /// Runs `work` once as a warm-up, then repeatedly for `--seconds`, and prints the rates.
    fn measure(&self, what: &str, tokens: f64, operations: f64, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        work()?;
        self.device.synchronize()?;
        let (began, mut times) = (Instant::now(), 0.0);
        while began.elapsed() < Duration::from_secs_f64(self.options.seconds) {
            work()?;
            self.device.synchronize()?;
            times += 1.0;
        }
        let rate = times / began.elapsed().as_secs_f64();
        let tflops = operations * rate / 1e12;
        let share = self.options.peak_tflops.map_or("–".to_owned(), |peak| format!("{:.1} %", 100.0 * tflops / peak));
        println!("| {what} | {:.0} | {tflops:.3} | {share} |", tokens * rate);
        Ok(())
    }
}

//! Limits of the machine: the speed of matrix products and of memory, to which the other measurements are compared.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

/// Sizes `[m, k, n]` of the measured products `[m, k] · [n, k]ᵀ`: squares, and products of SmolLM2's learner.
const SHAPES: [[usize; 3]; 5] =
    [[1024, 1024, 1024], [2048, 2048, 2048], [1024, 576, 1536], [1024, 1536, 576], [512, 576, 49_152]];
/// Bytes that each thread reads or copies: much more than a cache holds.
const BYTES: usize = 512 << 20;
/// Number of timed repeats, of which the fastest counts.
const REPEATS: usize = 5;
/// Minimum seconds of a repeat.
const MIN_SECONDS: f64 = 0.2;

/// Measures products in GFLOP/s: one product on `threads` threads, and one product on each of them concurrently.
pub fn products(threads: usize) -> Result<Map<String, Value>> {
    let mut out = Map::new();
    for [m, k, n] in SHAPES {
        let operands = |_| {
            let tensor = |rows| Tensor::rand(-1f32, 1.0, (rows, k), &Device::Cpu);
            Ok((tensor(m)?, tensor(n)?))
        };
        let all: Vec<(Tensor, Tensor)> = (0..threads).map(operands).collect::<Result<_>>()?;
        let flops = 2.0 * (m * k * n) as f64;
        let multiply = |(x, w): &(Tensor, Tensor)| black_box(kernels::linear(x, w).expect("a product"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let one = fastest(|| drop(pool.install(|| multiply(&all[0]))));
        let each = if threads == 1 { one } else { concurrently(&all, |operands| drop(multiply(operands)))? };
        let rates = json!({ "split": flops / one / 1e9, "each": threads as f64 * flops / each / 1e9 });
        out.insert(format!("{m}x{k}x{n}"), rates);
    }
    Ok(out)
}

/// Measures memory in GB/s on `threads` threads: reading, and copying, whose reads and writes both count.
pub fn memory(threads: usize) -> Result<Map<String, Value>> {
    let buffers: Vec<Vec<u64>> = (0..threads).map(|i| vec![i as u64 + 1; BYTES / 8]).collect();
    let read = concurrently(&buffers, |buffer| {
        let mut sums = [0u64; 32];
        for chunk in buffer.as_chunks::<32>().0 {
            for (sum, value) in sums.iter_mut().zip(chunk) {
                *sum ^= value;
            }
        }
        black_box(sums);
    })?;
    let pairs: Vec<(Vec<u64>, std::sync::Mutex<Vec<u64>>)> =
        buffers.into_iter().map(|buffer| (buffer, vec![1; BYTES / 8].into())).collect();
    let copy = concurrently(&pairs, |(from, to)| {
        let mut to = to.lock().expect("no thread panics");
        to.copy_from_slice(from);
        black_box(&*to);
    })?;
    let bytes = (threads * BYTES) as f64;
    Ok([("read", json!(bytes / read / 1e9)), ("copy", json!(2.0 * bytes / copy / 1e9))]
        .map(|(name, rate)| (name.to_owned(), rate))
        .into_iter()
        .collect())
}

/// Returns the shortest time of one run of `work` on each element concurrently, each in its own thread.
fn concurrently<T: Sync>(elements: &[T], work: impl Fn(&T) + Sync) -> Result<f64> {
    let times = std::thread::scope(|scope| {
        let measure = |element| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            Ok(pool.install(|| fastest(|| work(element))))
        };
        let threads: Vec<_> = elements.iter().map(|element| scope.spawn(move || measure(element))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<Vec<f64>>>()
    })?;
    Ok(times.into_iter().fold(0.0, f64::max))
}

/// Returns the seconds of one run of `work`: those of the fastest repeat.
fn fastest(mut work: impl FnMut()) -> f64 {
    let mut time = |times: usize| {
        let began = Instant::now();
        (0..times).for_each(|_| work());
        began.elapsed().as_secs_f64()
    };
    time(1);
    let times = (MIN_SECONDS / time(1)).ceil() as usize;
    (0..REPEATS).map(|_| time(times) / times as f64).fold(f64::INFINITY, f64::min)
}

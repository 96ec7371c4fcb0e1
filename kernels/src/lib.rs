//! Differentiable tensor operations with fused forward and backward passes for `f32` on the CPU.
//!
//! On another device or dtype each operation falls back to a composite of candle operations, which keeps the gradient.
//! (Candle's own fused `rms_norm`, `softmax_last_dim` and `rope` return no gradient and no error, which is why these
//! exist.) Work is split by rows over the caller's rayon pool, and results do not depend on the number of threads. No
//! gradient is computed for an argument that is not part of a graph.

mod accumulate;
mod adamw;
mod attention;
mod checkpoint;
mod draw;
mod embed;
mod feed_forward;
mod frozen;
mod gated;
mod linear;
mod logprobs;
mod matmul;
mod matrix;
mod quantized;
mod rms_norm;
mod rope;
mod self_attention;
mod slab;
mod softmax;
mod tree_mask;
mod vector;

pub use accumulate::{Gradients, backward};
pub use adamw::{AdamW, AdamWConfig, clip_factor};
pub use attention::tree_attention;
pub use checkpoint::{Segment, checkpoint};
pub use draw::{draw_from_row, draw_from_rows};
pub use embed::embed;
pub use feed_forward::{FeedForward, feed_forward};
pub use frozen::Frozen;
pub use gated::{Activation, gated};
pub use linear::linear;
pub use logprobs::{linear_logprobs, linear_logprobs_at, row_logsumexp, softcap, token_logprobs};
pub use matmul::{LARGE_BATCH_ROWS, SMALL_BATCH_ROWS, has_tile_unit, set_parts, with_large_batch_kernels};
pub use matrix::{Adapter, Matrix};
pub use quantized::{Format, Quantized};
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use self_attention::{SelfAttention, self_attention};
pub use slab::{Continuation, Slab, attend_slabs};
pub use softmax::masked_softmax;
pub use tree_mask::TreeMask;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Number of elements below which splitting the work over threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 14;

/// Returns whether the fused path supports this tensor: contiguous or not, `f32` in host memory.
fn is_fused(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// Returns the dtype in which composites compute: `f64` for `f64`, `f32` for every other dtype.
fn composite_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Returns the elements of a CPU `f32` storage under `layout`. Fails unless the layout is contiguous.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a fused operation was given a tensor that is not contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Returns the elements of a storage as [`elements`] does. Fails unless the storage is on the CPU.
fn tensor_elements<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => elements(storage, layout),
        _ => bail!("a fused operation was given a tensor that is not on the cpu"),
    }
}

/// Converts the result of a composite into the return value of `cpu_fwd`.
fn on_cpu(out: &Tensor) -> Result<(CpuStorage, Shape)> {
    let out = out.contiguous()?;
    let (storage, layout) = out.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, out.shape().clone())),
        _ => bail!("an operation left the cpu"),
    }
}

/// Converts the result of a composite into the return value of `cuda_fwd`.
fn on_cuda(out: &Tensor) -> Result<(CudaStorage, Shape)> {
    let out = out.contiguous()?;
    let (storage, layout) = out.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, out.shape().clone())),
        _ => bail!("an operation left the cuda device"),
    }
}

/// Calls `f` with the elements of tensors that are [fused](is_fused) and contiguous.
fn with_elements<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let held = tensors.map(Tensor::storage_and_layout);
    let mut all = [&[][..]; N];
    for (elements, (storage, layout)) in all.iter_mut().zip(&held) {
        *elements = tensor_elements(storage, layout)?;
    }
    f(all)
}

/// Returns whether the fused path of a layer block supports its input `x` and its weights. All must be contiguous `f32`
/// tensors on the CPU. A block is a graph operation on `x` only, so trained weights receive a gradient only if `x` is
/// part of a graph.
fn is_block<'a>(x: &Tensor, mut weights: impl Iterator<Item = &'a Tensor>) -> bool {
    let fused = |tensor: &Tensor| is_fused(tensor) && tensor.is_contiguous();
    fused(x) && weights.all(|weight| fused(weight) && (x.track_op() || !weight.track_op()))
}

/// Adds `xᵀ · w`, the gradient of a captured weight, to its accumulator, if it has one.
fn accumulate_product(weight: &Tensor, x: &[f32], w: &[f32], rows: usize) -> Result<()> {
    accumulate::of_captured(weight)?.map_or(Ok(()), |sum| sum.inplace_op1(&linear::AddTransposedTimes { x, w, rows }))
}

/// Adds the gradient of a captured vector to its accumulator, if it has one.
fn accumulate_vector(weight: &Tensor, gradient: Vec<f32>) -> Result<()> {
    let Some(sum) = accumulate::of_captured(weight)? else { return Ok(()) };
    accumulate::add_in_place(&sum, &Tensor::from_vec(gradient, weight.shape(), weight.device())?)
}

/// Returns the mutable elements of a contiguous CPU `f32` storage under `layout`.
fn elements_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("an in-place operation was given a tensor that is not contiguous")
    };
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => bail!("an in-place operation was given a tensor that is not f32"),
    }
}

/// Returns the number of rows per task: all rows if the work is small or the pool has one thread, otherwise a quarter
/// of a thread's share, with a lower bound on the elements per task.
fn rows_per_task(rows: usize, width: usize) -> usize {
    let threads = rayon::current_num_threads();
    if threads == 1 || rows * width < PARALLEL_FROM {
        return rows.max(1);
    }
    let smallest = (PARALLEL_FROM / 4).div_ceil(width.max(1));
    rows.div_ceil(threads * 4).max(smallest).max(1)
}

/// Fills `out`, rows of `width`, by calling `fill(first_row, rows)` on disjoint runs of rows.
fn fill_rows<T: Send>(out: &mut [T], width: usize, fill: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() || width == 0 {
        return;
    }
    let run = rows_per_task(out.len() / width, width);
    if run * width >= out.len() {
        return fill(0, out);
    }
    out.par_chunks_mut(run * width).enumerate().for_each(|(task, rows)| fill(task * run, rows));
}

/// Returns `len` elements filled as by [`fill_rows`], without zeroing them first: zeroing would cost as much as the
/// norm of a layer.
///
/// # Safety
/// `fill` must write every element that it receives.
unsafe fn filled(len: usize, width: usize, fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    if width == 0 {
        return vec![0.0; len];
    }
    let mut out = Vec::with_capacity(len);
    fill_rows(&mut out.spare_capacity_mut()[..len], width, fill);
    // SAFETY: the capacity is at least `len`, and `fill` has written every element.
    unsafe { out.set_len(len) };
    out
}

/// Fills two outputs of the same shape as [`fill_rows`] does.
fn fill_rows2(a: &mut [f32], b: &mut [f32], width: usize, fill: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) {
    if a.is_empty() || width == 0 {
        return;
    }
    let run = rows_per_task(a.len() / width, width);
    if run * width >= a.len() {
        return fill(0, a, b);
    }
    a.par_chunks_mut(run * width)
        .zip(b.par_chunks_mut(run * width))
        .enumerate()
        .for_each(|(task, (a, b))| fill(task * run, a, b));
}

#[cfg(test)]
mod testing {
    //! Checks that compare a fused operation in `f32` with its composite in `f64`.
    use super::*;
    use candle_core::{Device, Var};

    /// Returns reproducible values in about [-2, 2].
    pub fn values(seed: u64, shape: &[usize]) -> Tensor {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let count = shape.iter().product();
        let data: Vec<f32> = (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0
            })
            .collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    }

    pub fn flat(tensor: &Tensor) -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
        assert_eq!(got.dims(), want.dims(), "{what}");
        let (got, want) = (flat(got), flat(want));
        let size = want.iter().fold(1e-3, |a: f64, b| a.max(b.abs()));
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() <= tolerance * (size * 0.1 + w.abs()), "{what}[{i}]: {g} against {w}");
        }
    }

    /// Runs `op` in `f32` and in `f64` on the same inputs and compares the output and every input's gradient under
    /// a loss that weighs each output differently.
    pub fn check(inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let run = |dtype: DType| {
            let vars: Vec<Var> =
                inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap()).collect();
            let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let out = op(&tensors).unwrap();
            let weights = values(99, out.dims()).to_dtype(dtype).unwrap();
            let grads = (&out * weights).unwrap().sum_all().unwrap().backward().unwrap();
            let grads: Vec<Tensor> = vars.iter().map(|v| grads.get(v).expect("the gradient was cut").clone()).collect();
            (out, grads)
        };
        let (out, grads) = run(DType::F32);
        let (want, want_grads) = run(DType::F64);
        assert_close("output", &out, &want, 1e-5);
        for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
            assert!(flat(w).iter().any(|v| v.abs() > 1e-6), "reference gradient {i} is zero");
            assert_close(&format!("gradient {i}"), g, w, 1e-5);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{flat, values};
    use super::*;
    use candle_core::Var;

    type Op = fn(&[Tensor]) -> Result<Tensor>;

    /// In bf16 the composites run: the gradient arrives and is close to that of `f32`.
    #[test]
    fn half_precision_keeps_the_gradient() {
        let ops: [(&str, &[&[usize]], Op); 8] = [
            ("rms_norm", &[&[5, 12], &[12]], |t| rms_norm(&t[0], &t[1], 1e-5)),
            ("gated", &[&[5, 12], &[5, 12]], |t| gated(&t[0], &t[1], Activation::Silu)),
            ("rope", &[&[5, 2, 12]], |t| {
                let angle = values(7, &[5, 6]);
                rope(&t[0], &angle.cos()?.to_dtype(t[0].dtype())?, &angle.sin()?.to_dtype(t[0].dtype())?)
            }),
            ("masked_softmax", &[&[5, 12]], |t| masked_softmax(&t[0], None, 0.5)),
            ("token_logprobs", &[&[5, 12]], |t| {
                let (logprob, entropy) = token_logprobs(&t[0], &[0, 3, 11, 5, 5], 0.7)?;
                logprob + entropy
            }),
            ("linear", &[&[5, 8], &[12, 8]], |t| linear(&t[0], &t[1])),
            ("linear_logprobs", &[&[5, 8], &[12, 8]], |t| {
                let (logprob, entropy) = linear_logprobs(&t[0], &t[1], None, &[0, 3, 11, 5, 5], 0.7)?;
                logprob + entropy
            }),
            ("linear_logprobs in two chunks", &[&[431, 8], &[20011, 8]], |t| {
                let (logprob, entropy) = linear_logprobs(&t[0], &t[1], Some(2.5), &[7; 431], 0.7)?;
                logprob + entropy
            }),
        ];
        for (name, shapes, op) in ops {
            let run = |dtype: DType| -> Vec<Tensor> {
                let inputs = shapes.iter().enumerate().map(|(i, shape)| values(i as u64 + 1, shape));
                let vars: Vec<Var> = inputs.map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap()).collect();
                let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
                let out = op(&tensors).unwrap().to_dtype(DType::F32).unwrap();
                let grads = (&out * values(9, out.dims())).unwrap().sum_all().unwrap().backward().unwrap();
                vars.iter().map(|v| grads.get(v).unwrap_or_else(|| panic!("{name} cut the gradient")).clone()).collect()
            };
            for (half, single) in run(DType::BF16).iter().zip(run(DType::F32)) {
                let (half, single) = (flat(half), flat(&single));
                let distance: f64 = half.iter().zip(&single).map(|(a, b)| (a - b).powi(2)).sum();
                let size: f64 = single.iter().map(|v| v * v).sum();
                assert!(distance < 1e-3 * size, "{name}: relative distance {}", (distance / size).sqrt());
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let x = Var::from_tensor(&values(1, &[301, 127])).unwrap();
                let weight = Var::from_tensor(&values(2, &[127])).unwrap();
                let y = rms_norm(&x, &weight, 1e-5).unwrap();
                let y = masked_softmax(&gated(&y, &x, Activation::Silu).unwrap(), None, 0.5).unwrap();
                let (logprob, entropy) = token_logprobs(&y, &[3; 301], 0.1).unwrap();
                let grads = (logprob + entropy).unwrap().sum_all().unwrap().backward().unwrap();
                [flat(grads.get(&x).unwrap()), flat(grads.get(&weight).unwrap())]
            })
        };
        assert_eq!(run(1), run(3));
    }

    /// The tests of a kernel pass without effect on a processor that cannot execute it; this test names those kernels.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn kernels_that_this_processor_cannot_execute_are_listed() {
        use std::io::Write;
        let present = [
            ("AVX2", std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")),
            ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
            ("AVX-512 VNNI", std::arch::is_x86_feature_detected!("avx512vnni")),
            ("AMX", has_tile_unit()),
        ];
        for (name, _) in present.iter().filter(|(_, present)| !present) {
            let line = format!("skipped: the processor has no {name}; the kernels for it were not tested\n");
            // Written to the stream itself: the test harness hides the output of `eprintln!` in a passing test.
            std::io::stderr().write_all(line.as_bytes()).unwrap();
        }
    }
}

//! Matrices in fewer bits than `f32`, for sampling, where a decode step of few rows is bound by memory bandwidth.

mod bf16;
mod q8;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::matmul::SMALL_BATCH_ROWS;
use super::{is_fused, tensor_elements};
use bf16::Bf16Weights;
use q8::Q8;

/// Number of cache lines that a kernel prefetches ahead while it reads a matrix once. On AMD Zen 4 a decode step with 64 takes
/// 0.8 of the time with a complete panel, which is larger than the first-level cache; 16 and 256 are slower.
const AHEAD: usize = 64;

/// Storage format of a quantized matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `bf16`. Inputs keep the precision of `f32` products.
    Bf16,
    /// GGML's Q8_0: blocks of 32 columns, each a scale and 32 signed 8-bit integers. Inputs are quantized to it as
    /// well.
    Q8,
}

/// A matrix `[out, in]` in a [`Format`], with each value rounded to the nearest one of the format.
#[derive(Debug)]
pub struct Quantized(Storage);

#[derive(Debug)]
enum Storage {
    Bf16Weights(Bf16Weights),
    Q8(Q8),
}

impl Quantized {
    /// Quantizes `weight` to `format`. Returns `None` if its width is not a multiple of 32, it is empty, or it is not
    /// `f32` in host memory.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn of(weight: &Tensor, format: Format) -> Result<Option<Self>> {
        let (rows, width) = weight.dims2()?;
        if !is_fused(weight) || !width.is_multiple_of(32) || rows * width == 0 {
            return Ok(None);
        }
        let weight = weight.detach().contiguous()?;
        let (storage, layout) = weight.storage_and_layout();
        let weight = tensor_elements(&storage, layout)?;
        Ok(Some(Self(match format {
            Format::Bf16 => Storage::Bf16Weights(Bf16Weights::of(weight, width)),
            Format::Q8 => Storage::Q8(Q8::of(weight, width)),
        })))
    }

    /// Computes `x · weightᵀ` for up to 64 rows `x` `[T, in]` that are not part of a graph. A row's result does not
    /// depend on the other rows. Fails when the widths differ, when `x` has more rows, or when a gradient would be
    /// lost.
    pub fn linear(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let (columns, own_width) = match &self.0 {
            Storage::Bf16Weights(weight) => (weight.rows, weight.width),
            Storage::Q8(weight) => (weight.rows, weight.width),
        };
        if width != own_width || rows > SMALL_BATCH_ROWS || x.track_op() || !is_fused(x) {
            bail!(
                "product with a quantized matrix: x has shape {:?}; it must have at most {SMALL_BATCH_ROWS} rows of {own_width} in f32 on the cpu, and no gradient",
                x.dims()
            )
        }
        let x = x.contiguous()?;
        let (storage, layout) = x.storage_and_layout();
        let rows_of_x = tensor_elements(&storage, layout)?;
        let mut out = Vec::with_capacity(rows * columns);
        let out_uninit = &mut out.spare_capacity_mut()[..rows * columns];
        match &self.0 {
            Storage::Bf16Weights(weight) => weight.multiply(out_uninit, rows_of_x),
            Storage::Q8(weight) => weight.multiply(out_uninit, rows_of_x),
        }
        // SAFETY: the capacity is at least that, and all elements were written.
        unsafe { out.set_len(rows * columns) };
        Tensor::from_vec(out, (rows, columns), x.device())
    }
}

/// Minimum number of multiply-adds of a task.
const TASK: usize = 1 << 20;

/// Calls `f` for each panel of a matrix, in tasks of several panels if the pool has several threads. `work` is the
/// number of multiply-adds per panel.
fn by_panels(panels: usize, work: usize, f: impl Fn(usize) + Sync) {
    let run = match rayon::current_num_threads() {
        1 => panels,
        threads => panels.div_ceil(threads * 2).max(TASK / work.max(1)).max(1),
    };
    if run >= panels {
        return (0..panels).for_each(f);
    }
    let some = |task: usize| (task * run..((task + 1) * run).min(panels)).for_each(&f);
    (0..panels.div_ceil(run)).into_par_iter().for_each(some);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{flat, values};
    use super::*;
    use candle_core::{Device, Var};

    const FORMATS: [Format; 2] = [Format::Bf16, Format::Q8];

    fn quantize(weight: &Tensor, format: Format) -> Quantized {
        Quantized::of(weight, format).unwrap().unwrap()
    }

    #[test]
    fn values_that_are_not_finite_propagate() {
        for (format, wrong) in FORMATS.into_iter().flat_map(|format| [(format, f32::NAN), (format, f32::INFINITY)]) {
            let mut x = vec![0.5; 64];
            x[40] = wrong;
            let x = Tensor::from_vec(x, (1, 64), &Device::Cpu).unwrap();
            let weight = values(2, &[20, 64]);
            for large_batch in [false, true] {
                let linear = |weight: &Tensor, x: &Tensor| {
                    let weight = quantize(weight, format);
                    flat(
                        &if large_batch {
                            super::super::with_large_batch_kernels(|| weight.linear(x))
                        } else {
                            weight.linear(x)
                        }
                        .unwrap(),
                    )
                };
                let out = linear(&weight, &x);
                assert!(out.iter().all(|out| !out.is_finite()), "{format:?} {large_batch}: {out:?}");
                let out = linear(&x, &values(1, &[2, 64]));
                assert!(out.iter().all(|out| !out.is_finite()), "{format:?} {large_batch}: {out:?}");
            }
        }
    }

    #[test]
    fn a_row_depends_neither_on_other_rows_nor_on_threads() {
        let (x, weight) = (values(1, &[40, 64]), values(2, &[700, 64]));
        for (format, large_batch) in FORMATS.into_iter().flat_map(|format| [(format, false), (format, true)]) {
            let weight = quantize(&weight, format);
            let linear = |x: &Tensor| {
                flat(
                    &if large_batch {
                        super::super::with_large_batch_kernels(|| weight.linear(x))
                    } else {
                        weight.linear(x)
                    }
                    .unwrap(),
                )
            };
            let all = linear(&x);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for row in 0..40 {
                    let one = pool.install(|| linear(&x.narrow(0, row, 1).unwrap()));
                    assert_eq!(one, all[row * 700..(row + 1) * 700], "{format:?}: row {row} on {threads} threads");
                }
            }
        }
    }

    #[test]
    fn unsupported_inputs_are_rejected() {
        for format in FORMATS {
            assert!(Quantized::of(&values(1, &[3, 33]), format).unwrap().is_none());
            let weight = quantize(&values(1, &[3, 32]), format);
            assert!(weight.linear(&values(2, &[65, 32])).is_err());
            assert!(weight.linear(&Var::from_tensor(&values(2, &[2, 32])).unwrap()).is_err());
        }
    }
}

//! Matrices in eight bits, for sampling with few rows, which is bound by reading the matrix.

use super::product::FEW_ROWS;
use super::{is_fused, tensor_elements};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Columns that share a scale.
const BLOCK: usize = 32;
/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 20;

/// A matrix `[out, in]` in GGML's Q8_0: blocks of 32 columns, each a scale and 32 whole numbers of eight bits. The scale is
/// kept in `f32`.
#[derive(Debug)]
pub struct Q8 {
    width: usize,
    values: Vec<i8>,
    /// `[out, in / 32]`.
    scales: Vec<f32>,
}

impl Q8 {
    /// The nearest of such matrices to `weight`; none where its width is no multiple of 32, or it is not `f32` in host
    /// memory.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn of(weight: &Tensor) -> Result<Option<Self>> {
        let width = weight.dim(1)?;
        if !is_fused(weight) || !width.is_multiple_of(BLOCK) {
            return Ok(None);
        }
        let weight = weight.detach().contiguous()?;
        let (storage, layout) = weight.storage_and_layout();
        let weight = tensor_elements(&storage, layout)?;
        let mut values = vec![0i8; weight.len()];
        let mut scales = vec![0f32; weight.len() / BLOCK];
        let blocks = values.par_chunks_mut(BLOCK).zip(weight.par_chunks(BLOCK)).zip(&mut scales);
        blocks.with_min_len(1024).for_each(|((values, weight), scale)| {
            let most = weight.iter().fold(0f32, |most, w| most.max(w.abs()));
            *scale = most / 127.0;
            let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
            for (value, w) in values.iter_mut().zip(weight) {
                *value = (w * inverse).round() as i8;
            }
        });
        Ok(Some(Self { width, values, scales }))
    }

    fn rows(&self) -> usize {
        self.values.len() / self.width
    }

    /// Row `row` and its scales.
    fn row(&self, row: usize) -> (&[i8], &[f32]) {
        let blocks = self.width / BLOCK;
        (&self.values[row * self.width..][..self.width], &self.scales[row * blocks..][..blocks])
    }
}

/// `x · weightᵀ` for up to 64 rows `x` `[T, in]`, which are no part of a graph. A row's result does not depend on the other
/// rows. Fails when the widths differ, when there are more rows, or when a gradient would be lost.
pub fn q8_linear(x: &Tensor, weight: &Q8) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    if width != weight.width || rows > FEW_ROWS || x.track_op() || !is_fused(x) {
        bail!(
            "q8_linear: x has shape {:?}; it must have at most {FEW_ROWS} rows of {} in f32 on the cpu, and no gradient",
            x.dims(),
            weight.width
        )
    }
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let (values, columns) = (tensor_elements(&storage, layout)?, weight.rows());
    // Made transposed, `[out, T]`, so that tasks write what is theirs alone.
    let mut out = vec![0f32; rows * columns];
    let run = match rayon::current_num_threads() {
        1 => columns,
        threads => columns.div_ceil(threads * 2).max(TASK / (rows * width).max(1)).max(1),
    };
    if rows > 0 {
        out.par_chunks_mut(run * rows).enumerate().for_each(|(task, out)| {
            multiply(out, values, weight, rows, task * run);
        });
    }
    drop(storage);
    Tensor::from_vec(out, (columns, rows), x.device())?.t()?.contiguous()
}

/// Rows of the matrix from `first` on, times all rows of `x`, into `out` `[…, T]`.
fn multiply(out: &mut [f32], x: &[f32], weight: &Q8, rows: usize, first: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            return unsafe { avx512::multiply(out, x, weight, rows, first) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: likewise.
            return unsafe { avx2::multiply(out, x, weight, rows, first) };
        }
    }
    plain(out, x, weight, rows, first);
}

fn plain(out: &mut [f32], x: &[f32], weight: &Q8, rows: usize, first: usize) {
    for (i, out) in out.chunks_exact_mut(rows).enumerate() {
        let (values, scales) = weight.row(first + i);
        for (out, x) in out.iter_mut().zip(x.chunks_exact(weight.width)) {
            let blocks = x.chunks_exact(BLOCK).zip(values.chunks_exact(BLOCK)).zip(scales);
            let block = |((x, values), scale): ((&[f32], &[i8]), &f32)| {
                scale * x.iter().zip(values).map(|(x, w)| x * f32::from(*w)).sum::<f32>()
            };
            *out = blocks.map(block).sum();
        }
    }
}

/// One instruction set's kernel: up to `$rows` rows of `x` with one of the matrix, which is widened once for all of them.
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $rows:literal, $zero:ident, $load:ident, $fma:ident, $mul:ident,
     $set:ident, $widen:expr, $sum:expr) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use super::{BLOCK, Q8};
            use std::arch::x86_64::*;

            #[target_feature(enable = $features)]
            pub(super) fn multiply(out: &mut [f32], x: &[f32], weight: &Q8, rows: usize, first: usize) {
                for (i, out) in out.chunks_exact_mut(rows).enumerate() {
                    let row = weight.row(first + i);
                    let width = weight.width;
                    for (out, x) in out.chunks_mut($rows).zip(x.chunks($rows * width)) {
                        match out.len() {
                            1 => tile::<1>(out, x, row, width),
                            2 => tile::<2>(out, x, row, width),
                            3 => tile::<3>(out, x, row, width),
                            4 => tile::<4>(out, x, row, width),
                            5 => tile::<5>(out, x, row, width),
                            6 => tile::<6>(out, x, row, width),
                            7 => tile::<7>(out, x, row, width),
                            _ => tile::<8>(out, x, row, width),
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn tile<const R: usize>(out: &mut [f32], x: &[f32], (values, scales): (&[i8], &[f32]), width: usize) {
                assert!(out.len() == R && x.len() == R * width && values.len() == width);
                let mut sums = [[$zero(); 2]; R];
                for (block, scale) in scales.iter().enumerate() {
                    let scale = $set(*scale);
                    for part in 0..BLOCK / $lanes {
                        let at = block * BLOCK + part * $lanes;
                        // SAFETY: `at` and the lanes after it lie within a row of `width` values.
                        let w = unsafe { $mul($widen(values.as_ptr().add(at)), scale) };
                        for r in 0..R {
                            // SAFETY: likewise, within row `r` of `x`.
                            let x = unsafe { $load(x.as_ptr().add(r * width + at)) };
                            sums[r][part % 2] = $fma(x, w, sums[r][part % 2]);
                        }
                    }
                }
                for r in 0..R {
                    out[r] = $sum(sums[r]);
                }
            }
        }
    };
}

kernel!(
    avx512,
    "avx512f",
    16,
    8,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    _mm512_mul_ps,
    _mm512_set1_ps,
    |at: *const i8| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))),
    |[a, b]: [__m512; 2]| _mm512_reduce_add_ps(_mm512_add_ps(a, b))
);
kernel!(
    avx2,
    "avx2,fma",
    8,
    4,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    _mm256_mul_ps,
    _mm256_set1_ps,
    |at: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))),
    |[a, b]: [__m256; 2]| {
        let whole = _mm256_add_ps(a, b);
        let half = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps::<1>(whole));
        let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
    }
);

#[cfg(test)]
mod tests {
    use super::super::testing::{flat, values};
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn the_product_is_that_of_the_nearest_matrix() {
        for (rows, width, columns) in [(1, 32, 5), (7, 96, 13), (64, 160, 40)] {
            let (x, weight) = (values(1, &[rows, width]), values(2, &[columns, width]));
            let quantised = Q8::of(&weight).unwrap().unwrap();
            let near: Vec<f32> = (0..columns)
                .flat_map(|row| {
                    let (values, scales) = quantised.row(row);
                    values.iter().enumerate().map(|(i, w)| f32::from(*w) * scales[i / BLOCK]).collect::<Vec<_>>()
                })
                .collect();
            for (i, (near, w)) in near.iter().zip(flat(&weight)).enumerate() {
                assert!((f64::from(*near) - w).abs() <= f64::from(quantised.scales[i / BLOCK]) * 0.501, "{near}, {w}");
            }
            let near = Tensor::from_vec(near, (columns, width), &Device::Cpu).unwrap();
            let want = flat(&x.matmul(&near.t().unwrap()).unwrap());
            let got = flat(&q8_linear(&x, &quantised).unwrap());
            let mut without = vec![0f32; rows * columns];
            plain(&mut without, &x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), &quantised, rows, 0);
            for (i, want) in want.iter().enumerate() {
                assert!((got[i] - want).abs() < 1e-3, "{i}: {} against {want}", got[i]);
                let without = without[i % columns * rows + i / columns];
                assert!((f64::from(without) - want).abs() < 1e-3, "{i}: {without} against {want}");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_company_or_on_threads() {
        let (x, weight) = (values(1, &[13, 64]), Q8::of(&values(2, &[700, 64])).unwrap().unwrap());
        let all = flat(&q8_linear(&x, &weight).unwrap());
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for row in 0..13 {
                let one = pool.install(|| flat(&q8_linear(&x.narrow(0, row, 1).unwrap(), &weight).unwrap()));
                assert_eq!(one, all[row * 700..(row + 1) * 700], "row {row} on {threads} threads");
            }
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        assert!(Q8::of(&values(1, &[3, 33])).unwrap().is_none());
        let weight = Q8::of(&values(1, &[3, 32])).unwrap().unwrap();
        assert!(q8_linear(&values(2, &[65, 32]), &weight).is_err());
        assert!(q8_linear(&Var::from_tensor(&values(2, &[2, 32])).unwrap(), &weight).is_err());
    }
}

//! Matrices in `bf16`, which halve the bytes to read. On a processor with a tile unit (AMX) they are stored in its
//! layout. Elsewhere they are widened to `f32` when they are loaded into registers, and the inputs stay in `f32`.

mod kernels;

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::super::matmul::{Line, OutputRows, multiply_packed};
use super::super::vector::vectorised;
use super::by_panels;

/// Number of matrix rows that are stored interleaved, in two halves.
const PANEL: usize = 32;
/// Number of rows of a half.
const HALF: usize = PANEL / 2;
/// Number of columns stored next to each other in a panel. Each half has half as many lines, of one pair of columns
/// each.
const STEP: usize = 32;
/// Distance in columns between the two values of a pair.
const APART: usize = STEP / 2;
/// Size of a pair in bytes.
const PAIR: usize = 4;

/// A matrix `[out, in]` in `bf16`.
#[derive(Debug)]
pub(super) struct Bf16Weights {
    pub(super) rows: usize,
    pub(super) width: usize,
    /// `[panels, in / 32, 2, 16]`: a line holds, for each row of a half, the values of two columns that are 16 apart.
    lines: Vec<Line>,
}

impl Bf16Weights {
    /// Rounds the given rows of `width` to `bf16`. At least one row is needed, and the width must be a multiple of 32.
    pub(super) fn of(weight: &[f32], width: usize) -> Self {
        let rows = weight.len() / width;
        let panel = width / STEP * 2 * APART;
        let mut lines = vec![Line([0; Line::BYTES]); rows.div_ceil(PANEL) * panel];
        lines.par_chunks_mut(panel).zip(weight.par_chunks(PANEL * width)).for_each(|(lines, rows)| {
            let mut pairs = vec![0u32; width / 2];
            for (lane, row) in rows.chunks_exact(width).enumerate() {
                round(&mut pairs, row);
                for (lines, pairs) in lines.chunks_exact_mut(2 * APART).zip(pairs.chunks_exact(APART)) {
                    for (line, pair) in lines[lane / HALF * APART..].iter_mut().zip(pairs) {
                        line.0.as_chunks_mut::<PAIR>().0[lane % HALF] = pair.to_le_bytes();
                    }
                }
            }
        });
        Self { rows, width, lines }
    }

    /// Computes `out = x · weightᵀ`. On the tile unit `x` is rounded to the parts that [`set_parts`](crate::set_parts)
    /// selects; elsewhere it is used in `f32`.
    pub(super) fn multiply(&self, out: &mut [MaybeUninit<f32>], x: &[f32]) {
        if !multiply_packed(out, x, &self.lines, [x.len() / self.width, self.width, self.rows]) {
            multiply(out, x, self, kernels::best());
        }
    }

    /// Returns the lines of a panel.
    fn panel(&self, panel: usize) -> &[Line] {
        let lines = self.width / STEP * 2 * APART;
        &self.lines[panel * lines..][..lines]
    }
}

vectorised! {
/// Writes pairs of columns of `row` that are 16 apart, rounded to the nearest `bf16`, the first column in the low half.
/// NaN stays NaN.
fn round<FMA>(pairs: &mut [u32], row: &[f32]) {
    let nearest = |x: f32| {
        let bits = x.to_bits();
        // Ties round to even.
        if x.is_nan() { bits | 0x40_0000 } else { bits + 0x7fff + (bits >> 16 & 1) }
    };
    for (pairs, step) in pairs.chunks_exact_mut(APART).zip(row.chunks_exact(STEP)) {
        let (first, second) = step.split_at(APART);
        for ((pair, first), second) in pairs.iter_mut().zip(first).zip(second) {
            *pair = nearest(*first) >> 16 | nearest(*second) & 0xffff_0000;
        }
    }
}
}

/// Multiplies all rows of `x` by the complete matrix, into `out` `[T, out]`.
fn multiply(out: &mut [MaybeUninit<f32>], x: &[f32], weight: &Bf16Weights, kernel: kernels::Kernel) {
    let rows = x.len() / weight.width;
    assert_eq!((x.len(), out.len()), (rows * weight.width, rows * weight.rows), "sizes of a product");
    let out = OutputRows { start: out.as_mut_ptr().cast(), stride: weight.rows };
    // SAFETY: `out` has room for all rows of all panels, and each call writes the columns of its panel alone.
    by_panels(weight.rows.div_ceil(PANEL), x.len() * PANEL, |panel| unsafe { kernel(out, x, weight, panel) });
}

#[cfg(test)]
mod tests {
    use super::super::super::matmul::as_uninit;
    use super::super::super::testing::{flat, values};
    use super::super::super::{has_tile_unit, with_large_batch_kernels};
    use super::*;
    use candle_core::{DType, Device, Tensor};

    fn rounded(value: f32) -> f32 {
        let tensor = Tensor::new(&[value], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        tensor.to_dtype(DType::F32).unwrap().to_vec1().unwrap()[0]
    }

    fn element(weight: &Bf16Weights, row: usize, column: usize) -> f64 {
        let (step, within) = (column / STEP, column % STEP);
        let line = step * 2 * APART + row % PANEL / HALF * APART + within % APART;
        let pair = u32::from_le_bytes(weight.panel(row / PANEL)[line].0.as_chunks::<PAIR>().0[row % HALF]);
        f64::from(f32::from_bits(if within < APART { pair << 16 } else { pair & 0xffff_0000 }))
    }

    /// Compares every kernel that the processor supports with sums in `f64` of the rounded values.
    #[test]
    fn the_product_is_that_of_the_rounded_values() {
        for (rows, width, columns) in
            [(1, 32, 5), (1, 96, 70), (2, 64, 33), (2, 96, 5), (7, 96, 16), (13, 64, 33), (33, 160, 40), (64, 32, 70)]
        {
            let [x, weight] = [values(1, &[rows, width]), values(2, &[columns, width])]
                .map(|t| flat(&t).iter().map(|value| *value as f32).collect::<Vec<_>>());
            let half = Bf16Weights::of(&weight, width);
            for (i, w) in weight.iter().enumerate() {
                let value = element(&half, i / width, i % width);
                assert_eq!(value, f64::from(rounded(*w)), "{i}: for {w}");
            }
            let run = |kernel| {
                let mut out = vec![f32::NAN; rows * columns];
                multiply(as_uninit(&mut out), &x, &half, kernel);
                out
            };
            let check = |out: &[f32]| {
                for (i, got) in out.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let product = |at| f64::from(x[row * width + at]) * element(&half, column, at);
                    let want: f64 = (0..width).map(product).sum();
                    let size: f64 = (0..width).map(|at| product(at).abs()).sum();
                    assert!((f64::from(*got) - want).abs() < 1e-6 * size, "{row}, {column}: {got} against {want}");
                }
            };
            let plain = run(kernels::plain);
            check(&plain);
            assert_eq!(run(kernels::best()), plain);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                assert_eq!(run(kernels::avx2::multiply), plain);
            }
            let mut out = vec![f32::NAN; rows * columns];
            with_large_batch_kernels(|| half.multiply(as_uninit(&mut out), &x));
            check(&out);
            assert!(width < 64 || (out != plain) == has_tile_unit(), "the tile unit sums in another order");
        }
    }

    #[test]
    fn values_round_to_the_nearest() {
        let mut row = vec![0f32; STEP];
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-40, -0.0, 1.003_906_2, 1.011_718_8];
        row[..special.len()].copy_from_slice(&special);
        // The low bits alone mark this value as a NaN.
        row[20] = f32::from_bits(0x7f80_0001);
        let half = Bf16Weights::of(&row, STEP);
        for (column, value) in row.iter().enumerate() {
            let (got, want) = (element(&half, 0, column) as f32, rounded(*value));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{value}: {got} for {want}");
        }
    }
}

//! Matrices in 8 bits. A decode step of few rows reads a quarter of the bytes; one of many rows needs a third of the
//! arithmetic, because it multiplies 8-bit integers.

mod kernels;

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::super::matmul::OutputRows;
use super::super::vector::vectorised;
use super::by_panels;

/// Number of columns that share a scale.
const BLOCK: usize = 32;
/// Number of matrix rows that are stored interleaved.
const PANEL: usize = 16;
/// Number of columns of a row that are stored next to each other in a panel.
const GROUP: usize = 4;

/// Four columns of each row of a panel. Values are stored with an offset of 128, because processors multiply unsigned
/// by signed 8-bit integers.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Lanes([u8; PANEL * GROUP]);

/// Stored value that represents zero in [`Lanes`].
const ZERO: u8 = 128;

/// A matrix `[out, in]` in GGML's Q8_0: blocks of 32 columns, each a scale and 32 signed 8-bit integers. The scales are
/// kept in `f32`. Panels of 16 rows are stored interleaved, so that a register holds the same columns of all of them.
#[derive(Debug)]
pub(super) struct Q8 {
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Values, `[panels, in / 4]`.
    values: Vec<Lanes>,
    /// Scales, `[panels, in / 32, 16]`.
    scales: Vec<[f32; PANEL]>,
}

impl Q8 {
    /// Quantizes the given rows of `width`, of which at least one is needed.
    pub(super) fn of(weight: &[f32], width: usize) -> Self {
        let rows = weight.len() / width;
        let (panels, groups, blocks) = (rows.div_ceil(PANEL), width / GROUP, width / BLOCK);
        let mut values = vec![Lanes([ZERO; PANEL * GROUP]); panels * groups];
        let mut scales = vec![[0.0; PANEL]; panels * blocks];
        let panels =
            weight.par_chunks(PANEL * width).zip(values.par_chunks_mut(groups)).zip(scales.par_chunks_mut(blocks));
        panels.for_each(|((rows, values), scales)| {
            let (mut near, mut scale) = (vec![0i8; width], vec![0.0; blocks]);
            for (lane, row) in rows.chunks_exact(width).enumerate() {
                quantize(&mut near, &mut scale, row);
                for (values, near) in values.iter_mut().zip(near.chunks_exact(GROUP)) {
                    for (value, near) in values.0[lane * GROUP..][..GROUP].iter_mut().zip(near) {
                        *value = near.wrapping_add_unsigned(ZERO) as u8;
                    }
                }
                scales.iter_mut().zip(&scale).for_each(|(lanes, scale)| lanes[lane] = *scale);
            }
        });
        Self { rows, width, values, scales }
    }

    /// Computes `out = x · weightᵀ`. The rows are quantized to 8 bits as well, 32 columns at a time, so that the
    /// products are of integers.
    pub(super) fn multiply(&self, out: &mut [MaybeUninit<f32>], x: &[f32]) {
        multiply(out, &Rows::of(x, self.width), self, kernels::best());
    }
}

vectorised! {
/// Quantizes `row` to the nearest 8-bit integers with a scale per block. The scale of a block with a value that is not
/// finite is not finite either, so that the result shows it.
fn quantize<FMA>(values: &mut [i8], scales: &mut [f32], row: &[f32]) {
    // The block size is computed so that the compiler cannot see it as a constant: given the constant, it processes
    // several blocks at once and gathers their values.
    let block = (row.len() / scales.len().max(1)).max(1);
    let blocks = values.chunks_exact_mut(block).zip(row.chunks_exact(block));
    for ((values, row), scale) in blocks.zip(scales) {
        // As integers the absolute values have the same order, infinity after the finite ones and NaN last.
        let most = f32::from_bits(row.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0));
        *scale = most / 127.0;
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        for (value, x) in values.iter_mut().zip(row) {
            // The addition leaves the nearest integer in the low bits of the significand.
            *value = (x * inverse + 12_582_912.0).to_bits() as i8;
        }
    }
}
}

/// Input rows, quantized in the same way and stored row by row.
struct Rows {
    width: usize,
    /// Values, `[T, in]`.
    values: Vec<i8>,
    /// Scales, `[T, in / 32]`.
    scales: Vec<f32>,
    /// `[T, in / 32]`: initial values of the blocks' integer sums, which compensate the offset [`ZERO`] of the matrix's
    /// values.
    starts: Vec<i32>,
}

impl Rows {
    fn of(x: &[f32], width: usize) -> Self {
        let (mut values, mut scales) = (vec![0i8; x.len()], vec![0.0; x.len() / BLOCK]);
        quantize(&mut values, &mut scales, x);
        let start = |block: &[i8; BLOCK]| -i32::from(ZERO) * block.iter().map(|value| i32::from(*value)).sum::<i32>();
        let starts = values.as_chunks::<BLOCK>().0.iter().map(start).collect();
        Self { width, values, scales, starts }
    }
}

/// Multiplies all rows of `x` by the complete matrix, into `out` `[T, out]`.
fn multiply(out: &mut [MaybeUninit<f32>], x: &Rows, weight: &Q8, kernel: kernels::Kernel) {
    let (rows, panels) = (out.len() / weight.rows, weight.rows.div_ceil(PANEL));
    let out = OutputRows { start: out.as_mut_ptr().cast(), stride: weight.rows };
    // SAFETY: `out` has room for all rows of all panels, and each call writes the columns of its panel alone.
    by_panels(panels, rows * weight.width * PANEL, |panel| unsafe { kernel(out, x, weight, panel) });
}

#[cfg(test)]
mod tests {
    use super::super::super::matmul::as_uninit;
    use super::super::super::testing::{flat, values};
    use super::*;

    /// Returns element `[row, column]` of the matrix, and its scale.
    fn element(weight: &Q8, row: usize, column: usize) -> (f64, f64) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let scale = f64::from(weight.scales[panel * (weight.width / BLOCK) + column / BLOCK][lane]);
        let value = weight.values[panel * (weight.width / GROUP) + column / GROUP].0[lane * GROUP + column % GROUP];
        ((f64::from(value) - f64::from(ZERO)) * scale, scale)
    }

    /// Compares every kernel that the processor supports with sums in `f64` of the quantized values, and checks that
    /// these are the nearest.
    #[test]
    fn the_product_is_that_of_the_nearest_integers() {
        for (rows, width, columns) in [(1, 32, 5), (7, 96, 16), (13, 64, 33), (64, 160, 40)] {
            let [x, weight] = [values(1, &[rows, width]), values(2, &[columns, width])].map(|t| flat(&t));
            let weight: Vec<f32> = weight.iter().map(|w| *w as f32).collect();
            let near = Q8::of(&weight, width);
            for (i, w) in weight.iter().enumerate() {
                let (value, scale) = element(&near, i / width, i % width);
                assert!((value - f64::from(*w)).abs() <= scale * 0.501, "{i}: {value} for {w}");
            }
            let x: Vec<f32> = x.iter().map(|x| *x as f32).collect();
            let x_near = Rows::of(&x, width);
            let value = |i: usize| f64::from(x_near.values[i]) * f64::from(x_near.scales[i / BLOCK]);
            for (i, x) in x.iter().enumerate() {
                let bound = f64::from(x_near.scales[i / BLOCK]) * 0.501;
                assert!((value(i) - f64::from(*x)).abs() <= bound, "{i}: {} for {x}", value(i));
            }
            let run = |kernel| {
                let mut out = vec![f32::NAN; rows * columns];
                multiply(as_uninit(&mut out), &x_near, &near, kernel);
                out
            };
            let plain = run(kernels::plain);
            for (i, got) in plain.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let want: f64 = (0..width).map(|at| value(row * width + at) * element(&near, column, at).0).sum();
                assert!((f64::from(*got) - want).abs() < 1e-5, "{row}, {column}: {got} against {want}");
            }
            assert_eq!(run(kernels::best()), plain);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                assert_eq!(run(kernels::avx2::multiply), plain);
            }
        }
    }
}

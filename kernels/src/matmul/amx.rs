//! Wide products on the tile unit that some processors have (Intel AMX), as exact as those of `f32` instructions.
//!
//! The unit multiplies `bf16` only, many times as fast as the vector instructions multiply `f32`. An `f32` value is
//! exactly the sum of three `bf16` values: its significand has 24 bits, theirs have eight each. Of the nine products of
//! parts the six largest are summed, in `f32`; the others are below 2⁻²³ of the product, of either sign (Henry, Tang
//! and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations").
//!
//! At reduced precision a value is two parts, 16 bits, of which three products are summed, or one part.
//!
//! Values that are not finite give results that are not finite: an infinity may become NaN, and a value within 2⁻⁹ of
//! the largest finite one may become an infinity.

mod kernel;
mod pack;
mod packed;
mod small;

use std::ops::Range;

use rayon::prelude::*;

use super::{Line, OutputRows};
use kernel::{Unit, multiply_block};
use pack::{PANEL, PackBuffer, PackedFormat, pack, step};

pub(super) use kernel::available;
pub(super) use pack::Operand;
pub(super) use packed::multiply as multiply_packed;
pub(super) use small::multiply as multiply_small_batch;

/// Inner width that is packed at a time.
const DEPTH: usize = 576;
/// Approximate number of bytes of the right operand that are packed at a time; they fit into an L2 cache of 2 MB.
const RIGHT: usize = 1300 << 10;
/// Number of rows of the left operand that are packed at a time.
const ROWS: usize = 64;

/// Returns whether a product of these sizes and parts is faster on the tile unit than with vector instructions. Packing
/// three parts takes a quarter of a nanosecond per element, independent of the product's size. The figures are of a
/// sixth-generation Xeon.
pub(super) fn is_faster([m, k, n]: [usize; 3], parts: usize) -> bool {
    let whole = |lanes: usize| lanes.next_multiple_of(PANEL) as f64;
    // Nanoseconds per step of the inner width.
    let vectors = (m * n) as f64 / 90.0;
    let (products, packing) = [(600.0, 9.0), (350.0, 6.0), (210.0, 4.0)][parts - 1];
    let tiles = whole(m) * whole(n) / products + (whole(m) + whole(n)) / packing;
    k >= PANEL && tiles < vectors
}

/// Computes `out [m, n] = left · right`, or `out += left · right` if `add`; `split` distributes the work over the
/// pool's threads.
///
/// An element's result depends on its row and its column only.
///
/// # Safety
/// The unit must be [available]; the memory within the sizes and strides of the operands and of `out`, with rows of
/// `stride`, must be allocated.
pub(super) unsafe fn multiply<const PARTS: usize>(
    (out, stride): (*mut f32, usize),
    k: usize,
    add: bool,
    [left, right]: [Operand; 2],
    split: bool,
) {
    let (m, n) = (left.lanes, right.lanes);
    let depth = share(k, DEPTH);
    let columns = share(n, RIGHT / bytes::<PARTS>(PANEL, depth) * PANEL);
    let out = OutputRows { start: out, stride };
    let mut packed = PackBuffer::right(bytes::<PARTS>(columns, depth));
    for first in (0..n).step_by(columns) {
        let columns = first..(first + columns).min(n);
        for from in (0..k).step_by(depth) {
            let inner = from..(from + depth).min(k);
            let packed = packed.lines(bytes::<PARTS>(columns.len(), inner.len()));
            // SAFETY: the operand's sizes are the caller's; a processor with the unit has AVX-512.
            unsafe { pack_panels::<PARTS>(packed, right, PackedFormat::Pairs, columns.clone(), &inner, split) };
            let packed = &*packed;
            let block = |at: usize| {
                let rows = at * ROWS..((at + 1) * ROWS).min(m);
                let size = bytes::<PARTS>(rows.len(), inner.len());
                let mut buffer = PackBuffer::left(size);
                let lines = buffer.lines(size);
                // SAFETY: the same as above.
                unsafe { pack_panels::<PARTS>(lines, left, PackedFormat::Rows, rows.clone(), &inner, false) };
                let (operands, add) = ([&*lines, packed], add || from > 0);
                // SAFETY: the unit and the sizes are the caller's.
                unsafe { rows_of::<PARTS>(out, rows, columns.clone(), operands, inner.len(), add) };
            };
            if split {
                (0..m.div_ceil(ROWS)).into_par_iter().for_each(block);
            } else {
                (0..m.div_ceil(ROWS)).for_each(block);
            }
        }
    }
}

/// Returns the size of the shares into which a length is split, as even as possible and none above `most`.
fn share(length: usize, most: usize) -> usize {
    length.div_ceil(length.div_ceil(most)).next_multiple_of(PANEL)
}

/// Returns the number of bytes of the panels of this many lanes and inner steps.
fn bytes<const PARTS: usize>(lanes: usize, inner: usize) -> usize {
    lanes.div_ceil(PANEL) * inner.div_ceil(PANEL) * step(PARTS)
}

/// Packs the panels of some lanes, one after another, for the `inner` steps.
///
/// # Safety
/// The same as for [`pack()`].
unsafe fn pack_panels<const PARTS: usize>(
    lines: &mut [Line],
    operand: Operand,
    format: PackedFormat,
    lanes: Range<usize>,
    inner: &Range<usize>,
    split: bool,
) {
    let lines = &mut lines[..bytes::<PARTS>(lanes.len(), inner.len()) / Line::BYTES];
    let panel = bytes::<PARTS>(PANEL, inner.len()) / Line::BYTES;
    let fill = |(at, lines): (usize, &mut [Line])| {
        // SAFETY: by the caller's contract; the panel has room for as many steps.
        unsafe { pack::<PARTS>(lines, operand, format, lanes.start + at * PANEL, inner.clone()) }
    };
    if split {
        lines.par_chunks_mut(panel).enumerate().for_each(fill);
    } else {
        lines.chunks_mut(panel).enumerate().for_each(fill);
    }
}

/// Computes some rows and columns of the result from operands of which `inner` steps are packed.
///
/// # Safety
/// The same as for [`multiply`].
unsafe fn rows_of<const PARTS: usize>(
    out: OutputRows,
    rows: Range<usize>,
    columns: Range<usize>,
    [left, right]: [&[Line]; 2],
    inner: usize,
    add: bool,
) {
    let panel = bytes::<PARTS>(PANEL, inner) / Line::BYTES;
    let mut unit = Unit::enter();
    for (right, column) in right.chunks(panel).zip(columns.clone().step_by(PANEL)) {
        for (left, row) in left.chunks(panel).zip(rows.clone().step_by(PANEL)) {
            let place = out.at(row, column);
            let sizes = [(rows.end - row).min(PANEL), (columns.end - column).min(PANEL)];
            // SAFETY: both panels have the same number of steps, and the output has the block's rows and columns.
            unsafe { multiply_block::<PARTS, PARTS>(&mut unit, left, right, (place, out.stride), sizes, add) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::as_uninit;
    use super::*;

    /// Returns reproducible values of either sign over eight powers of ten, with all bits of their significands in use.
    fn values(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut value = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let size = 10f32.powi((state % 9) as i32 - 4);
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
        };
        (0..count).map(|_| value()).collect()
    }

    /// Returns the operand of `lanes` lanes that are stored one after another, or interleaved if `across`.
    fn operand(values: &[f32], lanes: usize, across: bool) -> Operand {
        let depth = values.len() / lanes;
        let (lane, depth) = if across { (1, lanes as isize) } else { (depth as isize, 1) };
        Operand { start: values.as_ptr(), lanes, lane, depth }
    }

    fn run(m: usize, k: usize, n: usize, across: [bool; 2], sum: &[f32], split: bool) -> Vec<f32> {
        run_in::<3>([m, k, n], across, sum, split)
    }

    fn run_in<const PARTS: usize>([m, k, n]: [usize; 3], across: [bool; 2], sum: &[f32], split: bool) -> Vec<f32> {
        let (x, w) = (values(m * k, 1), values(n * k, 2));
        let mut out = if sum.is_empty() { vec![f32::NAN; m * n] } else { sum.to_vec() };
        let operands = [operand(&x, m, across[0]), operand(&w, n, across[1])];
        // SAFETY: the sizes are correct, and the caller has checked that the unit is available.
        unsafe { multiply::<PARTS>((out.as_mut_ptr(), n), k, !sum.is_empty(), operands, split) };
        out
    }

    /// Returns whether the unit is available, and prints a notice if not: products then never use the code under test.
    fn is_available() -> bool {
        let there = available();
        if !there {
            eprintln!("skipped: this processor has no usable tile unit (AMX)");
        }
        there
    }

    /// The error of a product of two values is a rounding plus the omitted products of small parts, which are less than
    /// another rounding. With truncation instead of rounding the omitted parts would be four times as large.
    #[test]
    fn the_error_of_a_product_is_at_most_two_roundings() {
        if !is_available() {
            return;
        }
        let (m, n) = (200, 300);
        let (x, w) = (values(m, 1), values(n, 2));
        for (at, got) in run(m, 1, n, [false, true], &[], false).iter().enumerate() {
            let want = f64::from(x[at / n]) * f64::from(w[at % n]);
            let error = ((f64::from(*got) - want) / want).abs();
            assert!(error < 2f64.powi(-24) + 2f64.powi(-23), "{got} against {want}, {error:e}");
        }
    }

    /// A part has eight bits, so the error of a value is at most 2⁻⁸ of it with one part, and 2⁻¹⁶ with two, of whose
    /// products one more is omitted.
    #[test]
    fn the_error_of_fewer_parts_is_that_of_their_missing_bits() {
        fn check<const PARTS: usize>(bound: f64) {
            for across in [[false, false], [false, true], [true, false], [true, true]] {
                for (m, k, n) in [(200, 1, 300), (65, 700, 401), (33, 31, 15)] {
                    let (x, w) = (values(m * k, 1), values(n * k, 2));
                    let of = |a: &[f32], lanes: usize, across: bool, lane: usize, at: usize| {
                        f64::from(if across { a[at * lanes + lane] } else { a[lane * k + at] })
                    };
                    let mut most = 0f64;
                    for (at, got) in run_in::<PARTS>([m, k, n], across, &[], false).iter().enumerate() {
                        let product = |l| of(&x, m, across[0], at / n, l) * of(&w, n, across[1], at % n, l);
                        let want = (0..k).map(product).sum::<f64>();
                        let size = (0..k).map(|l| product(l).abs()).sum::<f64>();
                        most = most.max((f64::from(*got) - want).abs() / size);
                    }
                    assert!(most < bound, "{PARTS} parts, {m}x{k}x{n} {across:?}: off by {most:e}");
                    assert!(k > 1 || most > bound / 4.0, "{PARTS} parts, yet off by no more than {most:e}");
                }
            }
            let (m, k, n) = (64, 130, 700);
            let (x, w) = (values(m * k, 1), values(n * k, 2));
            let mut few = vec![f32::NAN; m * n];
            multiply_small_batch::<PARTS>(as_uninit(&mut few), &x, &w, [m, k, n]);
            for (at, got) in few.iter().enumerate() {
                let product = |l| f64::from(x[at / n * k + l]) * f64::from(w[at % n * k + l]);
                let (want, size) = ((0..k).map(product).sum::<f64>(), (0..k).map(|l| product(l).abs()).sum::<f64>());
                assert!(
                    (f64::from(*got) - want).abs() < bound * size,
                    "{PARTS} parts, few at {at}: {got} against {want}"
                );
            }
        }
        if is_available() {
            check::<1>(2.0 * 2f64.powi(-8) + 2f64.powi(-16));
            check::<2>(3.0 * 2f64.powi(-16) + 2f64.powi(-23));
        }
    }

    /// The error of a sum is that of `f32` sums: up to 8e-7 for such values with `gemm`.
    #[test]
    fn every_shape_and_layout_is_as_exact_as_f32() {
        if !is_available() {
            return;
        }
        for (m, k, n) in [(1, 1, 1), (32, 32, 32), (33, 31, 15), (70, 33, 19), (65, 700, 401), (17, 64, 800)] {
            for across in [[false, false], [false, true], [true, false], [true, true]] {
                let (x, w) = (values(m * k, 1), values(n * k, 2));
                let of = |a: &[f32], lanes: usize, across: bool, lane: usize, at: usize| {
                    f64::from(if across { a[at * lanes + lane] } else { a[lane * k + at] })
                };
                for sum in [vec![], values(m * n, 3)] {
                    let out = run(m, k, n, across, &sum, false);
                    for (at, got) in out.iter().enumerate() {
                        let product = |l| of(&x, m, across[0], at / n, l) * of(&w, n, across[1], at % n, l);
                        let before = sum.get(at).map_or(0.0, |v| f64::from(*v));
                        let want = before + (0..k).map(product).sum::<f64>();
                        let size = before.abs() + (0..k).map(|l| product(l).abs()).sum::<f64>();
                        let error = (f64::from(*got) - want).abs() / size;
                        assert!(error < 1e-6, "{m}x{k}x{n} {across:?} at {at}: {got} against {want}, {error:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_element_depends_neither_on_other_rows_nor_on_threads() {
        if !is_available() {
            return;
        }
        let (m, k, n) = (150, 600, 500);
        let whole = run(m, k, n, [false, false], &[], false);
        let (x, w) = (values(m * k, 1), values(n * k, 2));
        let mut part = vec![0f32; 40 * 20];
        let operands = [operand(&x[70 * k..110 * k], 40, false), operand(&w[333 * k..353 * k], 20, false)];
        // SAFETY: the sizes are correct, and the unit is available.
        unsafe { multiply::<3>((part.as_mut_ptr(), 20), k, false, operands, false) };
        for (at, got) in part.iter().enumerate() {
            assert_eq!(*got, whole[(70 + at / 20) * n + 333 + at % 20], "at {at}");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| run(m, k, n, [false, false], &[], true)), whole);
    }

    #[test]
    fn results_of_few_rows_equal_those_of_a_larger_batch() {
        if !is_available() {
            return;
        }
        for (k, n) in [(33, 19), (64, 64), (200, 301), (130, 700)] {
            let (x, w) = (values(64 * k, 1), values(n * k, 2));
            let mut all = vec![f32::NAN; 64 * n];
            multiply_small_batch::<3>(as_uninit(&mut all), &x, &w, [64, k, n]);
            for (at, got) in all.iter().enumerate() {
                let product = |l| f64::from(x[at / n * k + l]) * f64::from(w[at % n * k + l]);
                let (want, size) = ((0..k).map(product).sum::<f64>(), (0..k).map(|l| product(l).abs()).sum::<f64>());
                assert!((f64::from(*got) - want).abs() < 1e-6 * size, "{k}x{n} at {at}: {got} against {want}");
            }
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for (first, rows) in [(0, 1), (5, 2), (9, 16), (2, 33), (30, 34)] {
                    let mut out = vec![f32::NAN; rows * n];
                    let x = &x[first * k..(first + rows) * k];
                    pool.install(|| multiply_small_batch::<3>(as_uninit(&mut out), x, &w, [rows, k, n]));
                    assert_eq!(out, all[first * n..(first + rows) * n], "{rows} rows of {k}x{n} on {threads} threads");
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_propagate() {
        if is_available() {
            check_not_finite::<1>();
            check_not_finite::<2>();
            check_not_finite::<3>();
        }
    }

    fn check_not_finite<const PARTS: usize>() {
        let (k, w) = (40, [1.0; 80]);
        for bits in [0x7fc0_0000, 0x7f80_0000, 0xff80_0000, 0x7f80_0001, 0x7fff_ffff, 0xffff_ffff] {
            let bad = f32::from_bits(bits);
            let mut x = values(3 * k, 1);
            x[k + 7] = bad;
            let mut out = [0f32; 6];
            let operands = [operand(&x, 3, false), operand(&w, 2, false)];
            // SAFETY: the sizes are correct, and the unit is available.
            unsafe { multiply::<PARTS>((out.as_mut_ptr(), 2), k, false, operands, false) };
            let finite = out.map(f32::is_finite);
            assert_eq!(finite, [true, true, false, false, true, true], "{bits:x} in {PARTS} parts: {out:?}");
        }
    }

    #[test]
    fn the_tile_unit_is_chosen_if_both_operands_are_wide() {
        for sizes in [[512, 256, 704], [128, 256, 256], [64, 64, 512], [1024, 576, 49_152]] {
            assert!((1..=3).all(|parts| is_faster(sizes, parts)), "{sizes:?}");
        }
        for sizes in [[65, 600, 1100], [70, 33, 19], [130, 64, 50], [512, 16, 512], [64, 64, 64]] {
            assert!(!is_faster(sizes, 3), "{sizes:?}");
        }
    }
}

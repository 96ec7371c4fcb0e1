//! Products of few rows with a matrix that is packed while it is read: the matrix's rows are the left operand, in
//! portions that stay in the first-level cache.
//!
//! Packing takes as long for one row as for 32, so this is faster than vector instructions from about 16 rows on. As
//! with these, a row's result depends on the row and the matrix only; the last bits differ.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{Unit, multiply_block};
use super::pack::{Operand, PANEL, PackBuffer, PackedFormat, pack, step, store_transposed};
use super::{Line, OutputRows};

/// Number of matrix rows in a portion.
const ROWS: usize = 2 * PANEL;
/// Inner width of a portion.
const DEPTH: usize = 2 * PANEL;
/// Minimum number of multiply-adds of a task.
const TASK: usize = 1 << 20;

/// Computes `out [m, n] = x [m, k] · w [n, k]ᵀ`.
///
/// # Panics
/// If the unit is not [available](super::available) or the sizes do not match.
pub fn multiply<const PARTS: usize>(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], [m, k, n]: [usize; 3]) {
    assert!(super::available(), "the tile unit is not available");
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    let lanes = |values: &[f32], lanes| Operand { start: values.as_ptr(), lanes, lane: k as isize, depth: 1 };
    let (x, w, out) = (lanes(x, m), lanes(w, n), OutputRows { start: out.as_mut_ptr().cast(), stride: n });
    let panel = k.div_ceil(PANEL) * step(PARTS);
    let mut buffer = PackBuffer::right(m.div_ceil(PANEL) * panel);
    let packed = buffer.lines(m.div_ceil(PANEL) * panel);
    for (at, lines) in packed.chunks_mut(panel / Line::BYTES).enumerate() {
        // SAFETY: the operand has the sizes that were checked; a processor with the unit has AVX-512.
        unsafe { pack::<PARTS>(lines, x, PackedFormat::Pairs, at * PANEL, 0..k) };
    }
    let packed = &*packed;
    // SAFETY: the operands have the sizes that were checked, and each call writes only its own columns.
    let columns = |from: usize, to: usize| unsafe { columns::<PARTS>(out, (packed, m), w, k, from..to) };
    let threads = rayon::current_num_threads();
    if threads == 1 || m * k * n < 2 * TASK {
        return columns(0, n);
    }
    let run = n.div_ceil(threads * 2).max(TASK / (m * k)).next_multiple_of(ROWS);
    (0..n.div_ceil(run)).into_par_iter().for_each(|task| columns(task * run, ((task + 1) * run).min(n)));
}

/// Computes some columns of the result for the packed rows of `x`.
///
/// # Safety
/// The matrix must have an inner width of `k`, and `out` must have room for `m` rows with one column per row of the
/// matrix; these columns must not be used by anything else.
unsafe fn columns<const PARTS: usize>(
    out: OutputRows,
    (x, m): (&[Line], usize),
    w: Operand,
    k: usize,
    range: Range<usize>,
) {
    let mut unit = Unit::enter();
    let mut buffer = PackBuffer::left(ROWS / PANEL * DEPTH / PANEL * step(PARTS));
    // Sums by panel of rows of `x`, then by panel of the matrix; each is stored by rows of the matrix.
    let mut sums = [[[[0f32; PANEL]; PANEL]; ROWS / PANEL]; 2];
    let panels = m.div_ceil(PANEL);
    for row in range.clone().step_by(ROWS) {
        for from in (0..k).step_by(DEPTH) {
            let inner = from..(from + DEPTH).min(k);
            let size = inner.len().div_ceil(PANEL) * step(PARTS);
            let portion = buffer.lines(ROWS / PANEL * size);
            for (at, lines) in portion.chunks_mut(size / Line::BYTES).enumerate() {
                // SAFETY: the operand's sizes are the caller's; the panel has room for as many steps.
                unsafe { pack::<PARTS>(lines, w, PackedFormat::Rows, row + at * PANEL, inner.clone()) };
            }
            fetch(w, if inner.end < k { row } else { row + ROWS }, inner.end % k);
            for (x, sums) in x.chunks(x.len() / panels).zip(&mut sums) {
                let x = &x[from / PANEL * step(PARTS) / Line::BYTES..][..size / Line::BYTES];
                for (portion, sums) in portion.chunks(size / Line::BYTES).zip(sums) {
                    let place = (sums.as_mut_ptr().cast(), PANEL);
                    // SAFETY: the sums have all rows and columns.
                    unsafe { multiply_block::<PARTS, PARTS>(&mut unit, portion, x, place, [PANEL, PANEL], from > 0) };
                }
            }
        }
        for (at, sums) in sums.iter().enumerate().take(panels) {
            for (half, sums) in sums.iter().enumerate() {
                let (first, column) = (at * PANEL, row + half * PANEL);
                let sizes = [(m - first).min(PANEL), range.end.saturating_sub(column).min(PANEL)];
                // SAFETY: `out` has these rows and columns, and only this call writes them.
                unsafe { store_transposed(sums, (out.at(first, column), out.stride), sizes) };
            }
        }
    }
}

/// Prefetches a portion of the matrix: the rows from `first` on and the inner steps from `from` on.
fn fetch(w: Operand, first: usize, from: usize) {
    for row in first..(first + ROWS).min(w.lanes) {
        let start = w.start.wrapping_offset(row as isize * w.lane).wrapping_add(from);
        for line in 0..DEPTH * size_of::<f32>() / Line::BYTES {
            // SAFETY: a prefetch may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(line * Line::BYTES / size_of::<f32>()).cast()) };
        }
    }
}

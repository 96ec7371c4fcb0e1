//! Products of few rows with a matrix that is stored packed, in one part.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::kernel::{Unit, multiply_block};
use super::pack::{Operand, PANEL, PackBuffer, PackedFormat, step};
use super::{Line, OutputRows, bytes, pack_panels};

/// Minimum number of multiply-adds of a task.
const TASK: usize = 1 << 20;

/// Computes `out [m, n] = x [m, k] · wᵀ`, with `x` in `PARTS` parts; `w` is a packed right operand of one part, `n`
/// lanes of `k` steps.
///
/// # Panics
/// If the unit is not [available](super::available) or the sizes do not match.
pub fn multiply<const PARTS: usize>(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[Line], [m, k, n]: [usize; 3]) {
    assert!(super::available(), "the tile unit is not available");
    assert_eq!((x.len(), out.len()), (m * k, m * n), "sizes of a product");
    assert_eq!(w.len() * Line::BYTES, bytes::<1>(n, k), "size of a packed matrix");
    let size = bytes::<PARTS>(m, k);
    let mut buffer = PackBuffer::left(size);
    let packed = buffer.lines(size);
    let x = Operand { start: x.as_ptr(), lanes: m, lane: k as isize, depth: 1 };
    // SAFETY: the operand has the sizes that were checked; a processor with the unit has AVX-512.
    unsafe { pack_panels::<PARTS>(packed, x, PackedFormat::Rows, 0..m, &(0..k), false) };
    let packed = &*packed;
    let out = OutputRows { start: out.as_mut_ptr().cast(), stride: n };
    let steps = k.div_ceil(PANEL);
    let some = |first: usize, panels: &[Line]| {
        let mut unit = Unit::enter();
        for (at, w) in panels.chunks(steps * step(1) / Line::BYTES).enumerate() {
            let column = (first + at) * PANEL;
            for (x, row) in packed.chunks(steps * step(PARTS) / Line::BYTES).zip((0..m).step_by(PANEL)) {
                let place = out.at(row, column);
                let sizes = [(m - row).min(PANEL), (n - column).min(PANEL)];
                // SAFETY: the output has the block's rows and columns, and only this call writes these columns.
                unsafe { multiply_block::<PARTS, 1>(&mut unit, x, w, (place, n), sizes, false) };
            }
        }
    };
    let threads = rayon::current_num_threads();
    if threads == 1 || m * k * n < 2 * TASK {
        return some(0, w);
    }
    let run = n.div_ceil(PANEL).div_ceil(threads * 2).max(TASK / (m * k * PANEL)).max(1);
    let lines = run * steps * step(1) / Line::BYTES;
    w.par_chunks(lines).enumerate().for_each(|(task, panels)| some(task * run, panels));
}

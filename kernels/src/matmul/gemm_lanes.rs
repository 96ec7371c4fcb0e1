//! Products of as many rows as a register has lanes with a matrix: each lane sums for one row, in the storage order of
//! the matrix, so that the matrix is not packed and no lanes are summed at the end.
//!
//! The kernel takes as long for one row as for a full register, so it is faster than [`gemv_small`](super::gemv_small)
//! from about 16 rows on. As there, a row's result depends on the row and the matrix only; the last bits differ.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::OutputRows;

/// Minimum number of multiply-adds of a task.
const TASK: usize = 1 << 20;

/// Computes `out = x · wᵀ` of sizes `[m, k, n]`. Returns false without writing on a processor without the instructions.
pub(super) fn multiply(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], [m, k, n]: [usize; 3]) -> bool {
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    let (columns, lanes): (Columns, usize) = if std::arch::is_x86_feature_detected!("avx512f") {
        (avx512::columns, 16)
    } else if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        (avx2::columns, 8)
    } else {
        return false;
    };
    let out = OutputRows { start: out.as_mut_ptr().cast(), stride: n };
    let threads = rayon::current_num_threads();
    for first in (0..m).step_by(MAX_REGISTERS * lanes) {
        let rows = (m - first).min(MAX_REGISTERS * lanes);
        let x = TransposedRows::of(&x[first * k..][..rows * k], rows, lanes, k);
        // SAFETY: the offset is within the output's `m` rows of `n`.
        let out = OutputRows { start: unsafe { out.start.add(first * n) }, ..out };
        // SAFETY: the processor has the instructions, the sizes were checked, and each call writes only its own
        // columns.
        let some = |from: usize, to: usize| unsafe { columns(out, &x, w, from, to) };
        if threads == 1 || rows * k * n < 2 * TASK {
            some(0, n);
        } else {
            let run = n.div_ceil(threads * 2).max(TASK / (rows * k)).next_multiple_of(12);
            (0..n.div_ceil(run)).into_par_iter().for_each(|task| some(task * run, ((task + 1) * run).min(n)));
        }
    }
    true
}

/// Largest number of registers that hold one element of all rows.
const MAX_REGISTERS: usize = 4;

type Columns = unsafe fn(OutputRows, &TransposedRows, &[f32], usize, usize);

/// Rows of the input, transposed so that an element of all rows is contiguous.
struct TransposedRows {
    rows: usize,
    /// Number of rows rounded up to a multiple of a register's lanes.
    lanes: usize,
    k: usize,
    /// Transposed rows, `[k, lanes]`.
    transposed: Vec<f32>,
}

impl TransposedRows {
    fn of(x: &[f32], rows: usize, lanes: usize, k: usize) -> Self {
        let lanes = rows.next_multiple_of(lanes);
        let mut transposed = vec![0.0; k * lanes];
        for (row, x) in x.chunks_exact(k).enumerate() {
            for (lanes, x) in transposed.chunks_exact_mut(lanes).zip(x) {
                lanes[row] = *x;
            }
        }
        Self { rows, lanes, k, transposed }
    }
}

/// Defines the kernel of one instruction set. By the number of registers of rows it uses tiles of `$columns` rows of
/// the matrix. All sums and operands of a step must fit into the registers: a sum that the compiler moves to the stack
/// takes half as long again, or twice as long where its place there crosses a cache line.
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $columns:expr, $zero:ident, $load:ident, $store:ident, $set:ident,
     $fma:ident) => {
        mod $name {
            use super::{MAX_REGISTERS, OutputRows, TransposedRows};
            use std::arch::x86_64::*;

            /// Number of matrix rows in a tile, by the number of registers of input rows.
            const COLUMNS: [usize; MAX_REGISTERS] = $columns;

            /// Computes columns `from..to` of `out = x · wᵀ`.
            ///
            /// # Safety
            /// The processor must have the instructions, and `out` and `w` must have the sizes of the product.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn columns(out: OutputRows, x: &TransposedRows, w: &[f32], from: usize, to: usize) {
                let registers = x.lanes / $lanes - 1;
                let mut column = from;
                while column < to {
                    let is_full = column + COLUMNS[registers] <= to;
                    let tile = TILES[registers][usize::from(is_full)];
                    // SAFETY: the tile lies within the sizes that the caller guarantees.
                    unsafe { tile(out, x, w, column) };
                    column += if is_full { COLUMNS[registers] } else { 1 };
                }
            }

            type Tile = unsafe fn(OutputRows, &TransposedRows, &[f32], usize);

            /// Tile functions by number of registers, then for one column or a full tile.
            const TILES: [[Tile; 2]; MAX_REGISTERS] = [
                [tile::<1, 1>, tile::<1, { COLUMNS[0] }>],
                [tile::<2, 1>, tile::<2, { COLUMNS[1] }>],
                [tile::<3, 1>, tile::<3, { COLUMNS[2] }>],
                [tile::<4, 1>, tile::<4, { COLUMNS[3] }>],
            ];

            /// Multiplies `V` registers of rows by `C` rows of the matrix from `column` on, and prefetches the next
            /// rows.
            #[target_feature(enable = $features)]
            unsafe fn tile<const V: usize, const C: usize>(
                out: OutputRows,
                x: &TransposedRows,
                w: &[f32],
                column: usize,
            ) {
                const LINE: usize = 16;
                let k = x.k;
                let w = w[column * k..(column + C) * k].as_ptr();
                let transposed = x.transposed[..k * V * $lanes].as_ptr();
                let mut sums = [[$zero(); V]; C];
                // SAFETY: all reads lie within the slices taken above; a prefetch may point anywhere.
                unsafe {
                    let mut step = |at: usize| {
                        let x = |v: usize| $load(transposed.add((at * V + v) * $lanes));
                        let w = |c: usize| $set(*w.add(c * k + at));
                        // The fewer operands stay in registers, and the others follow one by one, so that no sum is
                        // moved to the stack.
                        if V <= C {
                            let xs: [_; V] = std::array::from_fn(x);
                            for c in 0..C {
                                let w = w(c);
                                for v in 0..V {
                                    sums[c][v] = $fma(xs[v], w, sums[c][v]);
                                }
                            }
                        } else {
                            let ws: [_; C] = std::array::from_fn(w);
                            for v in 0..V {
                                let x = x(v);
                                for c in 0..C {
                                    sums[c][v] = $fma(x, ws[c], sums[c][v]);
                                }
                            }
                        }
                    };
                    for line in 0..k / LINE {
                        for c in 0..C {
                            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add((C + c) * k + line * LINE).cast());
                        }
                        for at in line * LINE..(line + 1) * LINE {
                            step(at);
                        }
                    }
                    for at in k / LINE * LINE..k {
                        step(at);
                    }
                }
                let mut lanes = [[0f32; MAX_REGISTERS * $lanes]; C];
                for c in 0..C {
                    for v in 0..V {
                        // SAFETY: `lanes` has room for this many registers.
                        unsafe { $store(lanes[c].as_mut_ptr().add(v * $lanes), sums[c][v]) };
                    }
                }
                for row in 0..x.rows {
                    for c in 0..C {
                        // SAFETY: by the caller's contract the output has room for these columns of each row.
                        unsafe { *out.at(row, column + c) = lanes[c][row] };
                    }
                }
            }
        }
    };
}

kernel!(
    avx512,
    "avx512f",
    16,
    [12, 12, 8, 6],
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps
);
kernel!(
    avx2,
    "avx2,fma",
    8,
    [6, 6, 3, 3],
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares both instruction sets, if the processor has them, with sums in `f64`, for every number of registers.
    #[test]
    fn every_kernel_is_correct_for_every_shape() {
        let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0;
        let kernels = [
            ("avx512", avx512::columns as Columns, 16, std::arch::is_x86_feature_detected!("avx512f")),
            (
                "avx2",
                avx2::columns as Columns,
                8,
                std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma"),
            ),
        ];
        for (m, k, n) in [(1, 16, 1), (3, 7, 13), (17, 40, 25), (32, 33, 11), (33, 64, 17), (64, 100, 7)] {
            let x: Vec<f32> = (0..m * k).map(value).collect();
            let w: Vec<f32> = (0..n * k).map(|i| value(i * 3 + 1)).collect();
            let check = |name: &str, out: &[f32], rows: usize| {
                for (i, got) in out[..rows * n].iter().enumerate() {
                    let (r, c) = (i / n, i % n);
                    let want: f64 = (0..k).map(|j| f64::from(x[r * k + j]) * f64::from(w[c * k + j])).sum();
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{name} {m}x{k}x{n} at {r},{c}: {got}, {want}");
                }
            };
            for (name, columns, lanes, _) in kernels.iter().filter(|kernel| kernel.3) {
                let rows = m.min(MAX_REGISTERS * lanes);
                let rows_of_x = TransposedRows::of(&x[..rows * k], rows, *lanes, k);
                let mut out = vec![f32::NAN; m * n];
                // SAFETY: the sizes are correct, and the features were detected.
                unsafe { columns(OutputRows { start: out.as_mut_ptr(), stride: n }, &rows_of_x, &w, 0, n) };
                check(name, &out, rows);
                assert!(out[rows * n..].iter().all(|out| out.is_nan()), "{name} wrote beyond its rows");
            }
            let mut out = vec![f32::NAN; m * n];
            if multiply(super::super::as_uninit(&mut out), &x, &w, [m, k, n]) {
                check("the best", &out, m);
            }
        }
    }
}

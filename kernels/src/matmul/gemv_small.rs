//! Kernel for small batches, bound by reading the matrix.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::OutputRows;

/// Minimum number of multiply-adds of a task.
const TASK: usize = 1 << 20;

/// Computes `out = x · wᵀ` of sizes `[m, k, n]`. Returns false without writing on a processor without the instructions.
pub(super) fn multiply(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], [m, k, n]: [usize; 3]) -> bool {
    let v4 = std::arch::is_x86_feature_detected!("avx512f");
    let v3 = std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma");
    if !(v3 || v4) {
        return false;
    }
    let out = OutputRows { start: out.as_mut_ptr().cast(), stride: n };
    let columns = |from: usize, to: usize| {
        // SAFETY: the processor has the instructions; `x`, `w` and `out` have the sizes given, and each call writes
        // only the columns `from..to`.
        unsafe {
            if v4 {
                avx512::columns(x, w, out, [m, k, n], from, to);
            } else {
                avx2::columns(x, w, out, [m, k, n], from, to);
            }
        }
    };
    let threads = rayon::current_num_threads();
    if threads == 1 || m * k * n < 2 * TASK {
        columns(0, n);
    } else {
        let run = n.div_ceil(threads * 2).max(TASK / (m * k)).next_multiple_of(12);
        (0..n.div_ceil(run)).into_par_iter().for_each(|task| columns(task * run, ((task + 1) * run).min(n)));
    }
    true
}

/// Number of elements from which a matrix is read as one stream by a single row, if a register has 16 lanes. From memory one
/// stream is read in 0.7 of the time of four; from a cache, where small matrices stay between two decode steps, it takes a
/// tenth longer, because each sum waits for the one before. Measured on AMD Zen 4 only.
const LARGE: usize = 1 << 18;

/// Cache lines to prefetch.
#[derive(Clone, Copy)]
struct Prefetch {
    start: *const f32,
    lines: usize,
}

/// Defines the kernel of one instruction set, whose tiles are up to four rows of `x` by one, `$narrow` or `$wide` rows of `w`;
/// each pair's sum is in a register.
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $narrow:literal, $wide:literal, $zero:ident, $load:ident, $fma:ident) => {
        mod $name {
            use super::sum_of_four::$name as sum_of_four;
            use super::{LARGE, OutputRows, Prefetch};
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch, $fma, $load, $zero};

            /// Computes columns `from..to` of `out = x · wᵀ`.
            ///
            /// # Safety
            /// The processor must have the instructions, and the slices must have the sizes `[m, k, n]`.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn columns(
                x: &[f32],
                w: &[f32],
                out: OutputRows,
                [m, k, n]: [usize; 3],
                from: usize,
                to: usize,
            ) {
                let blocks = m.div_ceil(4);
                // With one block of rows memory is the bottleneck, and few streams of it are read fastest.
                let (width, kind) = match blocks {
                    1 if m == 1 && $lanes == 16 && k * n >= LARGE => (1, 0),
                    1 => ($narrow, 1),
                    _ => ($wide, 2),
                };
                let mut column = from;
                while column < to {
                    let (width, kind) = if column + width <= to { (width, kind) } else { (1, 0) };
                    let next = column + width;
                    let w_tile = w[column * k..].as_ptr();
                    for block in 0..blocks {
                        let row = block * 4;
                        // Each block prefetches its share of the next rows of `w`, in memory order.
                        let lines = if next + width <= n { (width * k).div_ceil(16) } else { 0 };
                        let first = lines * block / blocks;
                        let prefetch = Prefetch {
                            start: w_tile.wrapping_add(width * k + first * 16),
                            lines: lines * (block + 1) / blocks - first,
                        };
                        let tile = TILES[(m - row).min(4) - 1][kind];
                        // SAFETY: the tile lies within the sizes that the caller guarantees.
                        unsafe {
                            tile(
                                x[row * k..].as_ptr(),
                                w_tile,
                                k,
                                out.start.add(row * out.stride + column),
                                out.stride,
                                prefetch,
                            )
                        };
                    }
                    column = next;
                }
            }

            type Tile = unsafe fn(*const f32, *const f32, usize, *mut f32, usize, Prefetch);

            /// Tile functions by number of rows of `x`, then by kind.
            const TILES: [[Tile; 3]; 4] = [
                [tile::<1, 1>, tile::<1, $narrow>, tile::<1, $wide>],
                [tile::<2, 1>, tile::<2, $narrow>, tile::<2, $wide>],
                [tile::<3, 1>, tile::<3, $narrow>, tile::<3, $wide>],
                [tile::<4, 1>, tile::<4, $narrow>, tile::<4, $wide>],
            ];

            /// Multiplies `R` rows of `x` by `C` rows of `w`, and prefetches the next rows.
            #[target_feature(enable = $features)]
            unsafe fn tile<const R: usize, const C: usize>(
                x: *const f32,
                w: *const f32,
                k: usize,
                out: *mut f32,
                n: usize,
                prefetch: Prefetch,
            ) {
                let whole = k / $lanes * $lanes;
                let lines = prefetch.lines.div_ceil((k / $lanes).max(1));
                let mut fetch = prefetch.start;
                // SAFETY: all offsets lie within `R` rows of `x`, `C` of `w`, and `R × C` elements of `out`; a prefetch
                // may point anywhere.
                unsafe {
                    let mut sums = [[$zero(); C]; R];
                    let mut at = 0;
                    while at < whole {
                        for _ in 0..lines {
                            _mm_prefetch::<_MM_HINT_T0>(fetch.cast());
                            fetch = fetch.wrapping_add(16);
                        }
                        let mut xs = [$zero(); R];
                        for r in 0..R {
                            xs[r] = $load(x.add(r * k + at));
                        }
                        for c in 0..C {
                            let w = $load(w.add(c * k + at));
                            for r in 0..R {
                                sums[r][c] = $fma(xs[r], w, sums[r][c]);
                            }
                        }
                        at += $lanes;
                    }
                    let of = |i: usize| if i < R * C { sums[i / C][i % C] } else { $zero() };
                    for first in (0..R * C).step_by(4) {
                        let four = sum_of_four([of(first), of(first + 1), of(first + 2), of(first + 3)]);
                        for (i, sum) in (first..R * C).zip(four) {
                            let (r, c) = (i / C, i % C);
                            let mut sum = sum;
                            for rest in whole..k {
                                sum += *x.add(r * k + rest) * *w.add(c * k + rest);
                            }
                            *out.add(r * n + c) = sum;
                        }
                    }
                }
            }
        }
    };
}

kernel!(avx512, "avx512f", 16, 4, 6, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_fmadd_ps);
kernel!(avx2, "avx2,fma", 8, 2, 3, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_fmadd_ps);

mod sum_of_four {
    //! Sums of the lanes of four registers.
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) fn avx2([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        four(_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves)))
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn avx512([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (ab, cd) = (pair(a, b), pair(c, d));
        let lanes = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xEE>(ab, cd));
        let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(lanes)));
        let half = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper);
        four(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)))
    }

    #[target_feature(enable = "sse")]
    #[inline]
    fn four(sums: __m128) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: `out` has room for four floats.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Columns = unsafe fn(&[f32], &[f32], OutputRows, [usize; 3], usize, usize);

    /// Compares both instruction sets, if the processor has them, with sums in `f64`.
    #[test]
    fn every_kernel_is_correct_for_every_shape() {
        let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0;
        for (m, k, n) in [(1, 16, 1), (1, 7, 9), (2, 40, 13), (3, 33, 6), (5, 64, 25), (8, 100, 7), (13, 129, 31)] {
            let x: Vec<f32> = (0..m * k).map(value).collect();
            let w: Vec<f32> = (0..n * k).map(|i| value(i * 3 + 1)).collect();
            let check = |name: &str, out: Vec<f32>| {
                for (i, got) in out.iter().enumerate() {
                    let (r, c) = (i / n, i % n);
                    let want: f64 = (0..k).map(|j| f64::from(x[r * k + j]) * f64::from(w[c * k + j])).sum();
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{name} {m}x{k}x{n} at {r},{c}: {got}, {want}");
                }
            };
            let run = |columns: Columns| {
                let mut out = vec![f32::NAN; m * n];
                // SAFETY: the sizes are correct, and the features were detected.
                unsafe { columns(&x, &w, OutputRows { start: out.as_mut_ptr(), stride: n }, [m, k, n], 0, n) };
                out
            };
            if std::arch::is_x86_feature_detected!("avx512f") {
                check("avx512", run(avx512::columns));
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                check("avx2", run(avx2::columns));
            }
        }
    }
}

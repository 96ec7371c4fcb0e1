//! Matrix products on slices of `f32`, row-major: candle's `gemm` for wide ones, a kernel of our own for few rows.
//!
//! Decoding multiplies few rows with large matrices, which is bound by reading the matrix. The kernel reads each of its
//! rows once, for all rows of the input together, and fetches the next ones while it computes. It sums in an order that
//! depends on nothing but the inner width: a row's result is the same to the last bit whatever rows it is computed
//! beside, and on however many threads.

use gemm::Parallelism;

use super::vector::dot;

/// Rows of input up to which the kernel for few rows is used.
pub const FEW_ROWS: usize = 64;

/// Multiply-adds from which a wide product is split over threads.
const PARALLEL_FROM: usize = 1 << 21;

/// `x [m, k] · w [n, k]ᵀ`, `[m, n]`.
pub(super) fn transposed_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    if m <= FEW_ROWS {
        let mut out = vec![0.0; m * n];
        times_transposed(&mut out, x, w, k);
        return out;
    }
    wide_transposed_product(x, w, k)
}

/// The same, whatever the number of rows: better where the inner width is small.
pub(super) fn wide_transposed_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len()), (m * k, n * k), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: the strides cover the slices and the room, whose sizes were checked.
    unsafe { made([m, k, n], |out| product(out, [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_))) }
}

/// `x [m, k] · w [k, n]`, `[m, n]`.
pub(super) fn plain_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len()), (m * k, n * k), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: as above.
    unsafe { made([m, k, n], |out| product(out, [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), n_, 1))) }
}

/// What `fill` writes into room for `[m, n]`: to fill it with zeros before would cost as much as many a layer's norm.
///
/// # Safety
/// `fill` must write all of it.
unsafe fn made([m, k, n]: [usize; 3], fill: impl FnOnce(*mut f32)) -> Vec<f32> {
    if k == 0 {
        return vec![0.0; m * n];
    }
    let mut out = Vec::with_capacity(m * n);
    fill(out.as_mut_ptr());
    // SAFETY: there is room for as many, and all are written.
    unsafe { out.set_len(m * n) };
    out
}

/// `out [m, n] = x [m, k] · w [n, k]ᵀ`.
pub(super) fn times_transposed(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    if m > FEW_ROWS {
        let (k_, n_) = (k as isize, n as isize);
        // SAFETY: the strides cover the slices, whose sizes were checked.
        return unsafe { product(out.as_mut_ptr(), [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_)) };
    }
    #[cfg(target_arch = "x86_64")]
    if few::multiply(out, x, w, [m, k, n]) {
        return;
    }
    plain_times_transposed(out, x, w, k);
}

/// `sum [m, n] += x [m, k] · w [n, k]ᵀ`.
pub(super) fn add_times_transposed(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    if m <= FEW_ROWS {
        let product = transposed_product(x, w, k);
        return sum.iter_mut().zip(product).for_each(|(sum, part)| *sum += part);
    }
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: as above.
    unsafe { product(sum.as_mut_ptr(), [m, k, n], n_, true, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_)) }
}

/// `sum [m, n] += x [m, k] · w [k, n]`.
pub(super) fn add_times(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: as above.
    unsafe { product(sum.as_mut_ptr(), [m, k, n], n_, true, (x.as_ptr(), k_, 1), (w.as_ptr(), n_, 1)) }
}

/// The same for few rows on a processor that the kernel is not for: slower, and as independent of a row's company.
fn plain_times_transposed(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let n = w.len() / k;
    for (column, w) in w.chunks_exact(k).enumerate() {
        for (row, x) in x.chunks_exact(k).enumerate() {
            out[row * n + column] = dot(x, w);
        }
    }
}

/// `out [m, n] = x [m, k] · w [k, n]`.
pub(super) fn times(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: as above.
    unsafe { product(out.as_mut_ptr(), [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), n_, 1)) }
}

/// `sum [m, n] += x [k, m]ᵀ · w [k, n]`.
pub(super) fn add_transposed_times(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    let (m_, n_) = (m as isize, n as isize);
    // SAFETY: as above.
    unsafe { product(sum.as_mut_ptr(), [m, k, n], n_, true, (x.as_ptr(), 1, m_), (w.as_ptr(), n_, 1)) }
}

/// A row-major product of operands given as (start, stride of rows, stride of columns).
///
/// # Safety
/// All that the sizes and strides reach must be there.
unsafe fn product(
    out: *mut f32,
    [m, k, n]: [usize; 3],
    stride: isize,
    add: bool,
    x: (*const f32, isize, isize),
    w: (*const f32, isize, isize),
) {
    let threads = rayon::current_num_threads();
    let parallelism =
        if threads > 1 && m * k * n >= PARALLEL_FROM { Parallelism::Rayon(threads) } else { Parallelism::None };
    let alpha = if add { 1.0 } else { 0.0 };
    // SAFETY: the caller's.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride,
            add,
            x.0,
            x.2,
            x.1,
            w.0,
            w.2,
            w.1,
            alpha,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(target_arch = "x86_64")]
mod few {
    //! The kernel for few rows.

    use rayon::prelude::*;

    /// Multiply-adds that are worth a task of their own.
    const TASK: usize = 1 << 20;

    /// Where results go; tasks write disjoint columns.
    #[derive(Clone, Copy)]
    struct Out(*mut f32);
    // SAFETY: the pointer is only used for writing columns that no other task writes.
    unsafe impl Send for Out {}
    // SAFETY: likewise.
    unsafe impl Sync for Out {}

    impl Out {
        fn start(self) -> *mut f32 {
            self.0
        }
    }

    /// `out = x · wᵀ` of sizes `[m, k, n]`; false, and nothing done, on a processor without the instructions.
    pub(super) fn multiply(out: &mut [f32], x: &[f32], w: &[f32], [m, k, n]: [usize; 3]) -> bool {
        let v4 = std::arch::is_x86_feature_detected!("avx512f");
        let v3 = std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma");
        if !(v3 || v4) {
            return false;
        }
        let out = Out(out.as_mut_ptr());
        let columns = |from: usize, to: usize| {
            // SAFETY: the processor has the instructions; `x`, `w` and `out` have the sizes given, and each call writes
            // the columns `from..to` alone.
            unsafe {
                if v4 {
                    avx512::columns(x, w, out.start(), [m, k, n], from, to);
                } else {
                    avx2::columns(x, w, out.start(), [m, k, n], from, to);
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

    /// Lines of memory that will be read next.
    #[derive(Clone, Copy)]
    struct Ahead {
        start: *const f32,
        lines: usize,
    }

    /// One instruction set's kernel: a tile of up to four rows of `x` and `$narrow`
    /// or `$wide` rows of `w`, each pair's sum in a register.
    macro_rules! kernel {
        ($name:ident, $features:literal, $lanes:literal, $narrow:literal, $wide:literal, $zero:ident, $load:ident, $fma:ident) => {
            mod $name {
                use super::Ahead;
                use super::sum_of_four::$name as sum_of_four;
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch, $fma, $load, $zero};

                /// Columns `from..to` of `out = x · wᵀ`.
                ///
                /// # Safety
                /// The processor must have the instructions, and the slices the sizes `[m, k, n]`.
                #[target_feature(enable = $features)]
                pub(super) unsafe fn columns(
                    x: &[f32],
                    w: &[f32],
                    out: *mut f32,
                    [m, k, n]: [usize; 3],
                    from: usize,
                    to: usize,
                ) {
                    let blocks = m.div_ceil(4);
                    // With one block of rows memory is the bound, and few streams of it are read fastest.
                    let (width, kind) = if blocks == 1 { ($narrow, 1) } else { ($wide, 2) };
                    let mut column = from;
                    while column < to {
                        let (width, kind) = if column + width <= to { (width, kind) } else { (1, 0) };
                        let next = column + width;
                        let w_tile = w[column * k..].as_ptr();
                        for block in 0..blocks {
                            let row = block * 4;
                            // Each block fetches its share of the rows of `w` that come next, as they lie in memory.
                            let lines = if next + width <= n { (width * k).div_ceil(16) } else { 0 };
                            let first = lines * block / blocks;
                            let ahead = Ahead {
                                start: w_tile.wrapping_add(width * k + first * 16),
                                lines: lines * (block + 1) / blocks - first,
                            };
                            let tile = TILES[(m - row).min(4) - 1][kind];
                            // SAFETY: the tile lies within the sizes that the caller answers for.
                            unsafe { tile(x[row * k..].as_ptr(), w_tile, k, out.add(row * n + column), n, ahead) };
                        }
                        column = next;
                    }
                }

                type Tile = unsafe fn(*const f32, *const f32, usize, *mut f32, usize, Ahead);

                /// By rows of `x`, then by kind.
                const TILES: [[Tile; 3]; 4] = [
                    [tile::<1, 1>, tile::<1, $narrow>, tile::<1, $wide>],
                    [tile::<2, 1>, tile::<2, $narrow>, tile::<2, $wide>],
                    [tile::<3, 1>, tile::<3, $narrow>, tile::<3, $wide>],
                    [tile::<4, 1>, tile::<4, $narrow>, tile::<4, $wide>],
                ];

                /// `R` rows of `x` with `C` of `w`; fetches what comes next meanwhile.
                #[target_feature(enable = $features)]
                unsafe fn tile<const R: usize, const C: usize>(
                    x: *const f32,
                    w: *const f32,
                    k: usize,
                    out: *mut f32,
                    n: usize,
                    ahead: Ahead,
                ) {
                    let whole = k / $lanes * $lanes;
                    let lines = ahead.lines.div_ceil((k / $lanes).max(1));
                    let mut fetch = ahead.start;
                    // SAFETY: all offsets lie within `R` rows of `x`, `C` of `w`, and `R × C` places of `out`; a
                    // prefetch may point anywhere.
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
        //! The sums of the lanes of four registers.
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
            // SAFETY: four floats have room for four floats.
            unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
            out
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        type Columns = unsafe fn(&[f32], &[f32], *mut f32, [usize; 3], usize, usize);

        /// Both instruction sets, where the processor has them, against sums in `f64`.
        #[test]
        fn every_kernel_is_right_for_every_shape() {
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
                    // SAFETY: the sizes are right, and the features were asked for.
                    unsafe { columns(&x, &w, out.as_mut_ptr(), [m, k, n], 0, n) };
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 29 + seed * 17 + 5) % 83) as f32 / 41.0 - 1.0).collect()
    }

    #[test]
    fn products_are_right_for_few_rows_and_for_many() {
        for (m, k, n) in [(1, 5, 3), (7, 48, 20), (70, 33, 19), (130, 64, 50)] {
            let (x, w) = (values(m * k, 1), values(n * k, 2));
            let want =
                |i: usize, j: usize| -> f64 { (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l])).sum() };
            let check = |name: &str, out: &[f32]| {
                for (at, got) in out.iter().enumerate() {
                    let want = want(at / n, at % n);
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{name} {m}x{k}x{n} at {at}: {got} against {want}");
                }
            };
            let transposed = |a: &[f32], rows: usize| -> Vec<f32> {
                let width = a.len() / rows;
                (0..a.len()).map(|i| a[i % rows * width + i / rows]).collect()
            };
            let mut out = vec![f32::NAN; m * n];
            times_transposed(&mut out, &x, &w, k);
            check("x·wᵀ", &out);
            out.fill(f32::NAN);
            plain_times_transposed(&mut out, &x, &w, k);
            check("x·wᵀ without the kernel", &out);
            out.fill(f32::NAN);
            times(&mut out, &x, &transposed(&w, n), k);
            check("x·w", &out);
            out.fill(0.0);
            add_transposed_times(&mut out, &transposed(&x, m), &transposed(&w, n), k);
            check("xᵀ·w", &out);
            add_transposed_times(&mut out, &transposed(&x, m), &transposed(&w, n), k);
            check("twice", &out.iter().map(|sum| sum / 2.0).collect::<Vec<_>>());
            check("new x·wᵀ", &transposed_product(&x, &w, k));
            check("new x·w", &plain_product(&x, &transposed(&w, n), k));
            out.fill(0.0);
            add_times_transposed(&mut out, &x, &w, k);
            add_times(&mut out, &x, &transposed(&w, n), k);
            check("x·wᵀ and x·w", &out.iter().map(|sum| sum / 2.0).collect::<Vec<_>>());
        }
    }

    /// What lets sequences be generated beside any others.
    #[test]
    fn a_row_does_not_depend_on_its_company_or_on_threads() {
        let (k, n) = (200, 301);
        let (x, w) = (values(FEW_ROWS * k, 3), values(n * k, 4));
        let mut together = vec![0.0; FEW_ROWS * n];
        times_transposed(&mut together, &x, &w, k);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (first, rows) in [(0, 1), (5, 2), (9, 7), (30, 34)] {
                let mut out = vec![0.0; rows * n];
                pool.install(|| times_transposed(&mut out, &x[first * k..(first + rows) * k], &w, k));
                assert_eq!(out, together[first * n..(first + rows) * n], "{rows} rows on {threads} threads");
            }
        }
    }
}

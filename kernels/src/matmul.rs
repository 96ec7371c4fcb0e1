//! Row-major matrix products on slices of `f32`: the processor's tile unit or the `gemm` crate for wide ones, kernels
//! of this crate for few rows.
//!
//! Decoding multiplies few rows by large matrices, which is bound by reading the matrix. The kernel for few rows reads
//! each row of the matrix once, for all rows of the input together, and prefetches the next ones while it computes. Its
//! order of summation depends on the inner width only: a row's result is the same to the last bit for any number of
//! other rows and threads.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod gemm_lanes;
#[cfg(target_arch = "x86_64")]
mod gemv_small;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use gemm::Parallelism;

use super::vector::dot;

/// Largest number of input rows for which the small-batch kernels are used.
pub const SMALL_BATCH_ROWS: usize = 64;

/// Batch size above which an engine should use the large-batch decode kernels (one SIMD lane per row, or AMX tiles).
/// Either takes as long for one row as for this many.
pub const LARGE_BATCH_ROWS: usize = 16;

/// Number of `bf16` parts into which the tile unit's operands are split.
static PARTS: AtomicUsize = AtomicUsize::new(3);

/// Sets the process-wide number of `bf16` parts into which products on the processor's tile unit split an `f32` value.
/// Three (the default) represent it exactly; two keep 16 bits of its significand; one keeps eight. Sums are in `f32`.
///
/// # Panics
/// If `parts` is not 1, 2 or 3.
pub fn set_parts(parts: usize) {
    assert!((1..=3).contains(&parts), "a value of f32 has from one to three parts of bf16");
    PARTS.store(parts, Relaxed);
}

/// Returns whether this processor has a tile unit (Intel AMX) that the process may use.
pub fn has_tile_unit() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

thread_local! {
    static LARGE_BATCH: Cell<bool> = const { Cell::new(false) };
}

/// Calls `f` with the large-batch kernels enabled for products of few rows that this thread starts.
///
/// For callers whose batches usually have more than [`LARGE_BATCH_ROWS`] rows. The results differ in the last bits from
/// those of the small-batch kernel, so such a caller must use it for every batch size; then a row's result does not
/// depend on the batch size.
pub fn with_large_batch_kernels<R>(f: impl FnOnce() -> R) -> R {
    struct RestoreKernels(bool);
    impl Drop for RestoreKernels {
        fn drop(&mut self) {
            LARGE_BATCH.set(self.0);
        }
    }
    let _restore = RestoreKernels(LARGE_BATCH.replace(true));
    f()
}

/// Output of a product, with rows of `stride` elements. Tasks write disjoint elements.
#[derive(Clone, Copy)]
pub(super) struct OutputRows {
    pub(super) start: *mut f32,
    pub(super) stride: usize,
}

impl OutputRows {
    /// Returns the address of an element, without a bounds check.
    pub(super) fn at(self, row: usize, column: usize) -> *mut f32 {
        self.start.wrapping_add(row * self.stride + column)
    }
}

// SAFETY: the pointer is used only for elements that no other task reads or writes.
unsafe impl Send for OutputRows {}
// SAFETY: the same as above.
unsafe impl Sync for OutputRows {}

/// A cache line, aligned to its size.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; Line::BYTES]);

impl Line {
    pub(super) const BYTES: usize = 64;
}

/// Number of multiply-adds from which a wide product is split over threads.
const PARALLEL_FROM: usize = 1 << 21;

/// Returns `x [m, k] · w [n, k]ᵀ` as `[m, n]`.
pub(super) fn transposed_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    if m <= SMALL_BATCH_ROWS {
        // SAFETY: the product writes all elements.
        return unsafe {
            allocate_product([m, k, n], |out| small_batch_times_transposed(uninit_slice(out, m * n), x, w, k))
        };
    }
    wide_transposed_product(x, w, k)
}

/// Returns `x [m, k] · w [n, k]ᵀ` by the kernels for wide products, for any number of rows: faster if the inner
/// width is small.
pub(super) fn wide_transposed_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len()), (m * k, n * k), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: the strides cover the slices and the output, whose sizes were checked.
    unsafe {
        allocate_product([m, k, n], |out| product(out, [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_)))
    }
}

/// Returns `x [m, k] · w [k, n]` as `[m, n]`.
pub(super) fn plain_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len()), (m * k, n * k), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: the same as above.
    unsafe {
        allocate_product([m, k, n], |out| product(out, [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), n_, 1)))
    }
}

/// Allocates `[m, n]` and lets `fill` write it, without zeroing it first: that would cost as much as the norm of a
/// layer.
///
/// # Safety
/// `fill` must write all elements.
unsafe fn allocate_product([m, k, n]: [usize; 3], fill: impl FnOnce(*mut f32)) -> Vec<f32> {
    if k == 0 {
        return vec![0.0; m * n];
    }
    let mut out = Vec::with_capacity(m * n);
    fill(out.as_mut_ptr());
    // SAFETY: the capacity is sufficient, and all elements are written.
    unsafe { out.set_len(m * n) };
    out
}

/// Returns `count` possibly uninitialised elements from `start` on.
///
/// # Safety
/// They must be allocated, and not used by anything else while the slice exists.
unsafe fn uninit_slice<'a>(start: *mut f32, count: usize) -> &'a mut [MaybeUninit<f32>] {
    // SAFETY: by the caller's contract; every bit pattern is valid.
    unsafe { std::slice::from_raw_parts_mut(start.cast(), count) }
}

/// Views values as possibly uninitialised elements, for functions that write only initialised values.
pub(super) fn as_uninit(out: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: they are allocated and borrowed; the products of this module write only initialised values.
    unsafe { uninit_slice(out.as_mut_ptr(), out.len()) }
}

/// Computes `out [m, n] = x [m, k] · w [n, k]ᵀ`.
pub(super) fn times_transposed(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    if m > SMALL_BATCH_ROWS {
        let (k_, n_) = (k as isize, n as isize);
        // SAFETY: the strides cover the slices, whose sizes were checked.
        return unsafe { product(out.as_mut_ptr(), [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_)) };
    }
    small_batch_times_transposed(as_uninit(out), x, w, k);
}

/// Computes [`times_transposed`] for up to [`SMALL_BATCH_ROWS`] rows, and writes every element of `out`.
fn small_batch_times_transposed(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    #[cfg(target_arch = "x86_64")]
    if LARGE_BATCH.get() && m * k * n > 0 {
        if amx::available() {
            return match PARTS.load(Relaxed) {
                1 => amx::multiply_small_batch::<1>(out, x, w, [m, k, n]),
                2 => amx::multiply_small_batch::<2>(out, x, w, [m, k, n]),
                _ => amx::multiply_small_batch::<3>(out, x, w, [m, k, n]),
            };
        }
        if gemm_lanes::multiply(out, x, w, [m, k, n]) {
            return;
        }
    }
    #[cfg(target_arch = "x86_64")]
    if gemv_small::multiply(out, x, w, [m, k, n]) {
        return;
    }
    plain_times_transposed(out, x, w, k);
}

/// Computes `out [m, n] = x [m, k] · w [n, k]ᵀ` for few rows and a `bf16` matrix in the layout of the tile unit: panels
/// of 32 rows, steps of 32 columns, two halves of the rows, pairs of columns 16 apart. Returns false without writing if
/// this thread has not enabled the [large-batch kernels](with_large_batch_kernels) or the processor has no such unit.
pub(super) fn multiply_packed(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[Line], sizes: [usize; 3]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if LARGE_BATCH.get() && amx::available() {
        match PARTS.load(Relaxed) {
            1 => amx::multiply_packed::<1>(out, x, w, sizes),
            2 => amx::multiply_packed::<2>(out, x, w, sizes),
            _ => amx::multiply_packed::<3>(out, x, w, sizes),
        }
        return true;
    }
    let _ = (out, x, w, sizes);
    false
}

/// Computes `sum [m, n] += x [m, k] · w [n, k]ᵀ`.
pub(super) fn add_times_transposed(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    if m <= SMALL_BATCH_ROWS {
        let product = transposed_product(x, w, k);
        return sum.iter_mut().zip(product).for_each(|(sum, part)| *sum += part);
    }
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: the same as above.
    unsafe { product(sum.as_mut_ptr(), [m, k, n], n_, true, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_)) }
}

/// Computes `sum [m, n] += x [m, k] · w [k, n]`.
pub(super) fn add_times(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: the same as above.
    unsafe { product(sum.as_mut_ptr(), [m, k, n], n_, true, (x.as_ptr(), k_, 1), (w.as_ptr(), n_, 1)) }
}

/// Portable fallback of the small-batch kernel; like it, each row's result is independent of the batch size.
fn plain_times_transposed(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], k: usize) {
    let n = w.len() / k;
    for (column, w) in w.chunks_exact(k).enumerate() {
        for (row, x) in x.chunks_exact(k).enumerate() {
            out[row * n + column].write(dot(x, w));
        }
    }
}

/// Computes `out [m, n] = x [m, k] · w [k, n]`.
pub(super) fn times(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    let (k_, n_) = (k as isize, n as isize);
    // SAFETY: the same as above.
    unsafe { product(out.as_mut_ptr(), [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), n_, 1)) }
}

/// Computes `sum [m, n] += x [k, m]ᵀ · w [k, n]`.
pub(super) fn add_transposed_times(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    let (m_, n_) = (m as isize, n as isize);
    // SAFETY: the same as above.
    unsafe { product(sum.as_mut_ptr(), [m, k, n], n_, true, (x.as_ptr(), 1, m_), (w.as_ptr(), n_, 1)) }
}

/// Computes a row-major product of operands given as (start, stride of rows, stride of columns), one stride of each
/// being 1.
///
/// # Safety
/// All memory within the sizes and strides must be allocated, and `out` must not be used by anything else.
unsafe fn product(
    out: *mut f32,
    [m, k, n]: [usize; 3],
    stride: isize,
    add: bool,
    x: (*const f32, isize, isize),
    w: (*const f32, isize, isize),
) {
    let threads = rayon::current_num_threads();
    let split = threads > 1 && m * k * n >= PARALLEL_FROM;
    #[cfg(target_arch = "x86_64")]
    if amx::is_faster([m, k, n], PARTS.load(Relaxed)) && amx::available() {
        let left = amx::Operand { start: x.0, lanes: m, lane: x.1, depth: x.2 };
        let right = amx::Operand { start: w.0, lanes: n, lane: w.2, depth: w.1 };
        let out = (out, stride as usize);
        // SAFETY: by the caller's contract, and the unit is available.
        return unsafe {
            match PARTS.load(Relaxed) {
                1 => amx::multiply::<1>(out, k, add, [left, right], split),
                2 => amx::multiply::<2>(out, k, add, [left, right], split),
                _ => amx::multiply::<3>(out, k, add, [left, right], split),
            }
        };
    }
    let parallelism = if split { Parallelism::Rayon(threads) } else { Parallelism::None };
    let alpha = if add { 1.0 } else { 0.0 };
    // SAFETY: by the caller's contract.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 29 + seed * 17 + 5) % 83) as f32 / 41.0 - 1.0).collect()
    }

    #[test]
    fn products_are_correct_for_few_rows_and_for_many() {
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
            plain_times_transposed(as_uninit(&mut out), &x, &w, k);
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

    /// Sequences can therefore be generated in any batch.
    #[test]
    fn a_row_depends_neither_on_other_rows_nor_on_threads() {
        check_row_independence();
        with_large_batch_kernels(check_row_independence);
        assert!(!LARGE_BATCH.get());
    }

    fn check_row_independence() {
        // The second matrix is so large that a single row reads it as one stream.
        [(200, 301), (520, 509)].into_iter().for_each(check_row_independence_of);
    }

    fn check_row_independence_of((k, n): (usize, usize)) {
        let (x, w) = (values(SMALL_BATCH_ROWS * k, 3), values(n * k, 4));
        let mut together = vec![0.0; SMALL_BATCH_ROWS * n];
        times_transposed(&mut together, &x, &w, k);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (first, rows) in [(0, 1), (5, 2), (9, 7), (30, 34)] {
                let mut out = vec![0.0; rows * n];
                let mut times = || times_transposed(&mut out, &x[first * k..(first + rows) * k], &w, k);
                // In the pool another thread starts the product.
                if LARGE_BATCH.get() {
                    pool.install(|| with_large_batch_kernels(times))
                } else {
                    pool.install(&mut times)
                }
                assert_eq!(out, together[first * n..(first + rows) * n], "{rows} rows on {threads} threads");
            }
        }
    }
}

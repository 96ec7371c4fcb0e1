//! Matrix products on slices of `f32`, row-major: the processor's tile unit or candle's `gemm` for wide ones, kernels
//! of our own for few rows.
//!
//! Decoding multiplies few rows with large matrices, which is bound by reading the matrix. The kernel for few reads each of its
//! rows once, for all rows of the input together, and fetches the next ones while it computes. It sums in an order that
//! depends on nothing but the inner width: a row's result is the same to the last bit whatever rows it is computed
//! beside, and on however many threads.

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

/// Rows of input up to which the kernel for few rows is used.
pub const SMALL_BATCH_ROWS: usize = 64;

/// Rows of input above which, were they always as many, they go by the kernels for crowds: with a lane for each row, or in
/// the tile unit. (Either takes as long for one row as for these.)
pub const LARGE_BATCH_ROWS: usize = 16;

/// Parts of `bf16` that a value of `f32` is taken as in the tile unit.
static PARTS: AtomicUsize = AtomicUsize::new(3);

/// Has the process take a value of `f32` as that many parts of `bf16` in products for which it uses the processor's tile
/// unit: three, as at first, which is exact; two, 16 bits of its significand; or one, eight bits. Sums are of `f32`.
///
/// # Panics
/// With any other number.
pub fn set_parts(parts: usize) {
    assert!((1..=3).contains(&parts), "a value of f32 has from one to three parts of bf16");
    PARTS.store(parts, Relaxed);
}

/// Whether this processor has a tile unit (Intel AMX) that the process may use.
pub fn has_tile_unit() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

thread_local! {
    static CROWDED: Cell<bool> = const { Cell::new(false) };
}

/// Calls `f`; the products with few rows that this thread begins meanwhile go by the kernels for crowds.
///
/// For a caller that usually has more than [`LARGE_BATCH_ROWS`] of them. The last bits of a result are not those that it has elsewhere,
/// so such a caller has to do it however many there are at the time: then a row's result does not depend on its company.
pub fn is_large_batch<R>(f: impl FnOnce() -> R) -> R {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            CROWDED.set(self.0);
        }
    }
    let _before = Before(CROWDED.replace(true));
    f()
}

/// Where the results of a product go, rows of `stride`; tasks write disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) start: *mut f32,
    pub(super) stride: usize,
}

impl Places {
    /// The place of row `row` and column `column`; wherever that is.
    pub(super) fn at(self, row: usize, column: usize) -> *mut f32 {
        self.start.wrapping_add(row * self.stride + column)
    }
}

// SAFETY: the pointer is only used for places that no other task reads or writes.
unsafe impl Send for Places {}
// SAFETY: likewise.
unsafe impl Sync for Places {}

/// A line of memory, aligned as processors like it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; Line::BYTES]);

impl Line {
    pub(super) const BYTES: usize = 64;
}

/// Multiply-adds from which a wide product is split over threads.
const PARALLEL_FROM: usize = 1 << 21;

/// `x [m, k] · w [n, k]ᵀ`, `[m, n]`.
pub(super) fn transposed_product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    if m <= SMALL_BATCH_ROWS {
        // SAFETY: all of it is written.
        return unsafe { made([m, k, n], |out| few_times_transposed(room(out, m * n), x, w, k)) };
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

/// `count` places from `start` on, which may hold anything.
///
/// # Safety
/// They must be there, and nobody else may use them meanwhile.
unsafe fn room<'a>(start: *mut f32, count: usize) -> &'a mut [MaybeUninit<f32>] {
    // SAFETY: the caller's; no bits are wrong.
    unsafe { std::slice::from_raw_parts_mut(start.cast(), count) }
}

/// Values as places that may hold anything, for one who writes values alone.
pub(super) fn as_room(out: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: they are there and borrowed; the products of this module write nothing but values.
    unsafe { room(out.as_mut_ptr(), out.len()) }
}

/// `out [m, n] = x [m, k] · w [n, k]ᵀ`.
pub(super) fn times_transposed(out: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    if m > SMALL_BATCH_ROWS {
        let (k_, n_) = (k as isize, n as isize);
        // SAFETY: the strides cover the slices, whose sizes were checked.
        return unsafe { product(out.as_mut_ptr(), [m, k, n], n_, false, (x.as_ptr(), k_, 1), (w.as_ptr(), 1, k_)) };
    }
    few_times_transposed(as_room(out), x, w, k);
}

/// The same for up to [`SMALL_BATCH_ROWS`], all of which it writes.
fn few_times_transposed(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), out.len()), (m * k, n * k, m * n), "sizes of a product");
    #[cfg(target_arch = "x86_64")]
    if CROWDED.get() && m * k * n > 0 {
        if amx::available() {
            return match PARTS.load(Relaxed) {
                1 => amx::multiply_few::<1>(out, x, w, [m, k, n]),
                2 => amx::multiply_few::<2>(out, x, w, [m, k, n]),
                _ => amx::multiply_few::<3>(out, x, w, [m, k, n]),
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

/// `out [m, n] = x [m, k] · w [n, k]ᵀ` for few rows and a matrix in `bf16` that lies as the tile unit takes it: panels of 32
/// rows, steps of 32 columns, two halves of the rows, pairs of columns 16 apart. False, and nothing done, where this thread's
/// products do not go by the [crowds'](is_large_batch) kernels or there is no such unit.
pub(super) fn multiply_packed(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[Line], sizes: [usize; 3]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if CROWDED.get() && amx::available() {
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

/// `sum [m, n] += x [m, k] · w [n, k]ᵀ`.
pub(super) fn add_times_transposed(sum: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    assert_eq!((x.len(), w.len(), sum.len()), (m * k, n * k, m * n), "sizes of a product");
    if m <= SMALL_BATCH_ROWS {
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
fn plain_times_transposed(out: &mut [MaybeUninit<f32>], x: &[f32], w: &[f32], k: usize) {
    let n = w.len() / k;
    for (column, w) in w.chunks_exact(k).enumerate() {
        for (row, x) in x.chunks_exact(k).enumerate() {
            out[row * n + column].write(dot(x, w));
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

/// A row-major product of operands given as (start, stride of rows, stride of columns), one stride of each being 1.
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
    let split = threads > 1 && m * k * n >= PARALLEL_FROM;
    #[cfg(target_arch = "x86_64")]
    if amx::pays([m, k, n], PARTS.load(Relaxed)) && amx::available() {
        let left = amx::Operand { start: x.0, lanes: m, lane: x.1, depth: x.2 };
        let right = amx::Operand { start: w.0, lanes: n, lane: w.2, depth: w.1 };
        let out = (out, stride as usize);
        // SAFETY: the caller's; the unit is there.
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
            plain_times_transposed(as_room(&mut out), &x, &w, k);
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
        check_company();
        is_large_batch(check_company);
        assert!(!CROWDED.get());
    }

    fn check_company() {
        let (k, n) = (200, 301);
        let (x, w) = (values(SMALL_BATCH_ROWS * k, 3), values(n * k, 4));
        let mut together = vec![0.0; SMALL_BATCH_ROWS * n];
        times_transposed(&mut together, &x, &w, k);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (first, rows) in [(0, 1), (5, 2), (9, 7), (30, 34)] {
                let mut out = vec![0.0; rows * n];
                let mut times = || times_transposed(&mut out, &x[first * k..(first + rows) * k], &w, k);
                // Within the pool another thread begins the product.
                if CROWDED.get() {
                    pool.install(|| is_large_batch(times))
                } else {
                    pool.install(&mut times)
                }
                assert_eq!(out, together[first * n..(first + rows) * n], "{rows} rows on {threads} threads");
            }
        }
    }
}

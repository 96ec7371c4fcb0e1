//! Kernels that multiply rows of `f32` by a panel of the matrix, one per instruction set. All sum in the same order, so
//! their results are identical to the last bit.

use super::super::super::matmul::OutputRows;
use super::super::AHEAD;
use super::{APART, Bf16Weights, HALF, PAIR, PANEL, STEP};

/// Function that multiplies all rows of `x` by one panel of the matrix.
///
/// # Safety
/// The processor must support the kernel's instructions, and the output must have room for the panel's columns of all
/// rows.
pub(super) type Kernel = unsafe fn(OutputRows, &[f32], &Bf16Weights, usize);

/// Returns the fastest kernel that the processor supports.
pub(super) fn best() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return avx512::multiply;
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return avx2::multiply;
        }
    }
    plain
}

/// Multiplies without special instructions.
///
/// # Safety
/// The same as for [`Kernel`].
pub(super) unsafe fn plain(out: OutputRows, x: &[f32], weight: &Bf16Weights, panel: usize) {
    let columns = (weight.rows - panel * PANEL).min(PANEL);
    for (row, x) in x.chunks_exact(weight.width).enumerate() {
        let mut sums = [0f32; PANEL];
        for (x, lines) in x.chunks_exact(STEP).zip(weight.panel(panel).chunks_exact(2 * APART)) {
            for (at, line) in lines.iter().enumerate() {
                let (half, at) = (at / APART, at % APART);
                for (sum, pair) in sums[half * HALF..].iter_mut().zip(line.0.as_chunks::<PAIR>().0) {
                    let pair = u32::from_le_bytes(*pair);
                    *sum = x[at].mul_add(f32::from_bits(pair << 16), *sum);
                    *sum = x[at + APART].mul_add(f32::from_bits(pair & 0xffff_0000), *sum);
                }
            }
        }
        for (column, sum) in sums[..columns].iter().enumerate() {
            // SAFETY: by the caller's contract.
            unsafe { out.at(row, panel * PANEL + column).write(*sum) };
        }
    }
}

/// Defines the kernel of one instruction set. A tile is two registers of `$lanes` rows of the matrix by up to `$most` rows of
/// `x`, for which the matrix is loaded once; for one or two rows of `x`, which leave the time to memory, it is the complete
/// panel. Each tile prefetches its share of the next panel, or, if there is only one tile of rows, the lines [`AHEAD`].
///
/// A tile of the complete panel reads the lines in the order of their addresses: two streams a kilobyte apart, or one with
/// gaps of a kilobyte, take twice the time on AMD Zen 4.
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $most:literal, [$($rows:literal),*], $zero:ident,
     $set:ident, $fma:ident, $store:ident, $load:ident, $shift:ident, $and:ident, $all:ident, $float:ident) => {
        #[cfg(target_arch = "x86_64")]
        pub(super) mod $name {
            use super::{AHEAD, APART, HALF, Bf16Weights, PAIR, PANEL, OutputRows, STEP};
            use std::arch::x86_64::*;

            /// Number of registers for the rows of a half.
            const EACH: usize = HALF / $lanes;
            /// Number of registers for the rows of a panel.
            const ALL: usize = PANEL / $lanes;

            /// # Safety
            /// The same as for [`Kernel`](super::Kernel).
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn multiply(out: OutputRows, x: &[f32], weight: &Bf16Weights, panel: usize) {
                let rows = x.len() / weight.width;
                match rows {
                    1 => return tile::<1, ALL>(out, x, weight, (0, panel, 0), (0, 1)),
                    2 => return tile::<2, ALL>(out, x, weight, (0, panel, 0), (0, 1)),
                    _ => {}
                }
                for lane in (0..(weight.rows - panel * PANEL).min(PANEL)).step_by(2 * $lanes) {
                    for row in (0..rows).step_by($most) {
                        let part = (row / $most, rows.div_ceil($most));
                        match (rows - row).min($most) {
                            $($rows => tile::<$rows, 2>(out, x, weight, (row, panel, lane), part),)*
                            _ => unreachable!("a tile has up to {} rows", $most),
                        }
                    }
                }
            }

            /// Multiplies `R` rows of `x` by `S` registers of rows of the matrix.
            #[target_feature(enable = $features)]
            fn tile<const R: usize, const S: usize>(
                out: OutputRows,
                x: &[f32],
                weight: &Bf16Weights,
                (row, panel, lane): (usize, usize, usize),
                (part, parts): (usize, usize),
            ) {
                let width = weight.width;
                let x = x[row * width..(row + R) * width].as_ptr();
                let lines = weight.panel(panel);
                let next = lines.as_ptr().wrapping_add(if parts == 1 { AHEAD } else { lines.len() });
                let mut sums = [[$zero(); S]; R];
                for step in 0..width / STEP {
                    for half in 0..S / EACH {
                        let start = (2 * step + lane / HALF + half) * APART;
                        for at in 0..APART {
                            if at % parts == part {
                                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(start + at).cast());
                            }
                            // SAFETY: a panel has all lines of a step, and `x` has all columns of `R` rows, by the slice
                            // above.
                            unsafe {
                                let line = lines.get_unchecked(start + at).0.as_ptr();
                                let pairs: [_; EACH] =
                                    std::array::from_fn(|i| $load(line.add(i * $lanes * PAIR).cast()));
                                let first = pairs.map(|pairs| $float($shift::<16>(pairs)));
                                let second = pairs.map(|pairs| $float($and(pairs, $all(0xffff_0000_u32.cast_signed()))));
                                for r in 0..R {
                                    let x = x.add(r * width + step * STEP + at);
                                    let x = [$set(*x), $set(*x.add(APART))];
                                    for i in 0..EACH {
                                        let sum = &mut sums[r][half * EACH + i];
                                        *sum = $fma(x[1], second[i], $fma(x[0], first[i], *sum));
                                    }
                                }
                            }
                        }
                    }
                }
                let first = panel * PANEL + lane;
                let columns = (weight.rows - first).min(S * $lanes);
                for (r, sums) in sums.iter().enumerate() {
                    let mut lanes = [0f32; PANEL];
                    for (register, sum) in sums.iter().enumerate() {
                        // SAFETY: `lanes` has room for the registers of a panel.
                        unsafe { $store(lanes.as_mut_ptr().add(register * $lanes), *sum) };
                    }
                    // SAFETY: by the caller's contract the output has room for the panel's columns of each row.
                    unsafe { out.at(row + r, first).copy_from_nonoverlapping(lanes.as_ptr(), columns) };
                }
            }
        }
    };
}

kernel!(
    avx512,
    "avx512f",
    16,
    12,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_storeu_ps,
    _mm512_loadu_si512,
    _mm512_slli_epi32,
    _mm512_and_si512,
    _mm512_set1_epi32,
    _mm512_castsi512_ps
);
kernel!(
    avx2,
    "avx2,fma",
    8,
    4,
    [1, 2, 3, 4],
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_storeu_ps,
    _mm256_loadu_si256,
    _mm256_slli_epi32,
    _mm256_and_si256,
    _mm256_set1_epi32,
    _mm256_castsi256_ps
);

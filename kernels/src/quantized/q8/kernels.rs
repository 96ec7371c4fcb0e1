//! Kernels that multiply rows of 8-bit integers by a panel of the matrix, one per instruction set. All sum in the same
//! order, so their results are identical to the last bit.

use super::super::super::matmul::OutputRows;
use super::super::AHEAD;
use super::{BLOCK, GROUP, PANEL, Q8, Rows};

/// Function that multiplies all rows of `x` by one panel of the matrix.
///
/// # Safety
/// The processor must support the kernel's instructions, and the output must have room for the panel's columns of all
/// rows.
pub(super) type Kernel = unsafe fn(OutputRows, &Rows, &Q8, usize);

/// Returns the fastest kernel that the processor supports.
pub(super) fn best() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512vnni") && std::arch::is_x86_feature_detected!("avx512f") {
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
pub(super) unsafe fn plain(out: OutputRows, x: &Rows, weight: &Q8, panel: usize) {
    let (blocks, groups) = (x.width / BLOCK, x.width / GROUP);
    for row in 0..x.values.len() / x.width {
        let mut sums = [0f32; PANEL];
        for block in 0..blocks {
            let mut sum_i32 = [x.starts[row * blocks + block]; PANEL];
            for group in block * (BLOCK / GROUP)..(block + 1) * (BLOCK / GROUP) {
                let x = &x.values[row * x.width + group * GROUP..][..GROUP];
                let lanes = weight.values[panel * groups + group].0.as_chunks::<GROUP>().0;
                for (sum_i32, w) in sum_i32.iter_mut().zip(lanes) {
                    *sum_i32 += (0..GROUP).map(|i| i32::from(w[i]) * i32::from(x[i])).sum::<i32>();
                }
            }
            let (scale, scales) = (x.scales[row * blocks + block], &weight.scales[panel * blocks + block]);
            for lane in 0..PANEL {
                sums[lane] = (sum_i32[lane] as f32).mul_add(scales[lane] * scale, sums[lane]);
            }
        }
        let columns = panel * PANEL..((panel + 1) * PANEL).min(weight.rows);
        for (column, sum) in columns.zip(sums) {
            // SAFETY: by the caller's contract.
            unsafe { out.at(row, column).write(sum) };
        }
    }
}

/// Defines the kernel of one instruction set, whose registers hold `$lanes` rows of the matrix. It processes up to
/// `$most` rows of `x` at a time, for which the matrix is loaded once. Each such tile prefetches its share of the next
/// panel. One tile of one or two rows, which leaves the time to memory, prefetches the lines [`AHEAD`].
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $most:literal, [$($rows:literal),*], $float:ident, $integers:ident,
     $set:ident, $mul:ident, $fma:ident, $load_float:ident, $store:ident, $widen:ident, $four:ident,
     $load:expr, $start:expr, $dot:expr) => {
        #[cfg(target_arch = "x86_64")]
        pub(super) mod $name {
            use super::{AHEAD, BLOCK, GROUP, PANEL, OutputRows, Q8, Rows};
            use std::arch::x86_64::*;

            /// Number of registers per panel.
            const PARTS: usize = PANEL / $lanes;

            /// # Safety
            /// The same as for [`Kernel`](super::Kernel).
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn multiply(out: OutputRows, x: &Rows, weight: &Q8, panel: usize) {
                let rows = x.values.len() / x.width;
                let tiles = rows.div_ceil($most);
                for tile in 0..tiles {
                    let row = tile * $most;
                    match (rows - row).min($most) {
                        $($rows => self::tile::<$rows>(out, x, weight, (row, panel), (tile, tiles)),)*
                        _ => unreachable!("a tile has up to {} rows", $most),
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn tile<const R: usize>(
                out: OutputRows,
                x: &Rows,
                weight: &Q8,
                (row, panel): (usize, usize),
                (part, parts): (usize, usize),
            ) {
                const GROUPS: usize = BLOCK / GROUP;
                let (width, blocks) = (x.width, x.width / BLOCK);
                let values = &weight.values[panel * blocks * GROUPS..][..blocks * GROUPS];
                let scales = &weight.scales[panel * blocks..][..blocks];
                assert!(x.values.len() >= (row + R) * width);
                assert!(x.scales.len() >= (row + R) * blocks && x.starts.len() >= (row + R) * blocks);
                let rows = x.values[row * width..].as_ptr();
                let row_scales = x.scales[row * blocks..].as_ptr();
                let starts = x.starts[row * blocks..].as_ptr();
                let mut sums = [[$set(0.0); PARTS]; R];
                let next = values.as_ptr().wrapping_add(if parts == 1 && R <= 2 { AHEAD } else { values.len() });
                for block in 0..blocks {
                    for group in (part..GROUPS).step_by(parts) {
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(block * GROUPS + group).cast());
                    }
                    // SAFETY: all reads lie within the slices, whose lengths are asserted above.
                    unsafe {
                        let mut sum_i32 = [[$four(0); PARTS]; R];
                        for r in 0..R {
                            sum_i32[r] = [$start(*starts.add(r * blocks + block)); PARTS];
                        }
                        for group in 0..GROUPS {
                            let w: *const u8 = values.get_unchecked(block * GROUPS + group).0.as_ptr();
                            let w: [$integers; PARTS] = std::array::from_fn(|part| $load(w.add(part * $lanes * GROUP)));
                            for r in 0..R {
                                let x = rows.add(r * width + block * BLOCK + group * GROUP).cast::<i32>();
                                let x = $four(x.read_unaligned());
                                for part in 0..PARTS {
                                    sum_i32[r][part] = $dot(sum_i32[r][part], w[part], x);
                                }
                            }
                        }
                        for part in 0..PARTS {
                            let w = $load_float(scales.get_unchecked(block).as_ptr().add(part * $lanes));
                            for r in 0..R {
                                let scale = $mul(w, $set(*row_scales.add(r * blocks + block)));
                                sums[r][part] = $fma($widen(sum_i32[r][part]), scale, sums[r][part]);
                            }
                        }
                    }
                }
                let columns = (weight.rows - panel * PANEL).min(PANEL);
                for (r, sums) in sums.iter().enumerate() {
                    let mut lanes = [0f32; PANEL];
                    for (part, sum) in sums.iter().enumerate() {
                        // SAFETY: `lanes` has room for all registers of a panel.
                        unsafe { $store(lanes.as_mut_ptr().add(part * $lanes), *sum) };
                    }
                    // SAFETY: by the caller's contract the output has room for the panel's columns of each row.
                    unsafe { out.at(row + r, panel * PANEL).copy_from_nonoverlapping(lanes.as_ptr(), columns) };
                }
            }
        }
    };
}

kernel!(
    avx512,
    "avx512f,avx512vnni",
    16,
    12,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    __m512,
    __m512i,
    _mm512_set1_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_cvtepi32_ps,
    _mm512_set1_epi32,
    |at: *const u8| _mm512_loadu_si512(at.cast()),
    |start: i32| _mm512_set1_epi32(start),
    |sum: __m512i, w: __m512i, x: __m512i| _mm512_dpbusd_epi32(sum, w, x)
);
// AVX2's instruction for such products saturates at 16 bits, which the sum of two products of an unsigned 8-bit number
// may exceed. Therefore the matrix's values are signed again, the sign of `x` moves to them, and the sum starts at
// zero.
kernel!(
    avx2,
    "avx2,fma",
    8,
    2,
    [1, 2],
    __m256,
    __m256i,
    _mm256_set1_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_cvtepi32_ps,
    _mm256_set1_epi32,
    |at: *const u8| _mm256_xor_si256(_mm256_loadu_si256(at.cast()), _mm256_set1_epi8(super::super::ZERO as i8)),
    |_: i32| _mm256_setzero_si256(),
    |sum: __m256i, w: __m256i, x: __m256i| {
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
);

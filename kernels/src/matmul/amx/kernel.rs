//! Detection of the tile unit, and products of packed panels on it.

use std::arch::asm;
use std::sync::OnceLock;

use super::Line;
use super::pack::{PANEL, TILE, TILE_BYTES, step};

/// Returns whether the processor has the unit and the operating system lets this process use it. The answer is computed
/// once.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_avx512() && has_unit() && is_permitted())
}

/// Returns whether the processor has the vector instructions that pack operands.
fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512bf16")
}

/// Returns whether the processor has tiles and their products of `bf16` (Intel's manual, CPUID leaf 7).
fn has_unit() -> bool {
    let wanted = 1 << 22 | 1 << 24;
    std::arch::x86_64::__cpuid(0).eax >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & wanted == wanted
}

/// Requests permission to use the tiles, which Linux grants per process. Other systems are not supported.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` and `XFEATURE_XTILEDATA`, from the kernel's `x86/xstate.rst`.
    const REQUEST: (libc::c_int, libc::c_ulong) = (0x1023, 18);
    // SAFETY: the call takes two numbers and accesses no memory of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST.0, REQUEST.1) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Guard that configures a thread's tiles, eight of 16 lines of 64 bytes, until it is dropped.
pub(super) struct Unit {
    /// Destination of dummy tile stores, which is never read; see [`square`].
    dummy: [Line; TILE],
}

impl Unit {
    /// Configures the tiles of this thread.
    ///
    /// # Panics
    /// If the unit is not [available].
    pub(super) fn enter() -> Self {
        assert!(available(), "the tile unit is not available");
        let mut palette = Line([0; Line::BYTES]);
        palette.0[0] = 1;
        for tile in 0..8 {
            palette.0[16 + 2 * tile] = Line::BYTES as u8;
            palette.0[48 + tile] = TILE as u8;
        }
        // SAFETY: the unit is available, and the palette is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) palette.0.as_ptr(), options(nostack, readonly)) };
        Self { dummy: [Line([0; Line::BYTES]); TILE] }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: the unit is available, as `enter` has checked.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Computes the first `[rows, columns]` of the product of two packed panels, of `PARTS` and of `RIGHT` parts, and
/// stores it at `out`, with rows of `stride`, or adds it to the values there if `add`.
///
/// # Safety
/// `out` must have those rows and columns.
pub(super) unsafe fn multiply_block<const PARTS: usize, const RIGHT: usize>(
    unit: &mut Unit,
    left: &[Line],
    right: &[Line],
    (out, stride): (*mut f32, usize),
    [rows, columns]: [usize; 2],
    add: bool,
) {
    let steps = left.len() * Line::BYTES / step(PARTS);
    let right_steps = right.len() * Line::BYTES / step(RIGHT);
    assert!(steps > 0 && steps == right_steps, "two panels with the same number of steps");
    let operands = [left.as_ptr().cast(), right.as_ptr().cast()];
    if (rows, columns) == (PANEL, PANEL) {
        // SAFETY: the panels have the same number of steps; `out` has all rows and columns.
        return unsafe { square::<PARTS, RIGHT>(unit, operands, steps, (out, stride), add) };
    }
    let mut full = [[0f32; PANEL]; PANEL];
    for (row, full) in full.iter_mut().enumerate().take(if add { rows } else { 0 }) {
        // SAFETY: `out` has these columns of the row.
        unsafe { out.add(row * stride).copy_to_nonoverlapping(full.as_mut_ptr(), columns) };
    }
    // SAFETY: the panels have the same number of steps, and `full` has all rows and columns.
    unsafe { square::<PARTS, RIGHT>(unit, operands, steps, (full.as_mut_ptr().cast(), PANEL), add) };
    for (row, full) in full.iter().enumerate().take(rows) {
        // SAFETY: `out` has these columns of the row.
        unsafe { out.add(row * stride).copy_from_nonoverlapping(full.as_ptr(), columns) };
    }
}

/// Assembles a loop over steps of the inner width that loads or zeroes the sums before and stores them after.
macro_rules! sums {
    ([$parts:literal, $right_parts:literal]: [$unit:ident, $left:ident, $right:ident, $steps:ident, $out:ident, $stride:ident, $add:ident], $($line:expr),*) => {
        asm!(
            "test {add}, {add}",
            "jz 2f",
            "tileloadd tmm0, [{out} + {stride}*1]",
            "tileloadd tmm1, [{out} + {stride}*1 + 64]",
            "tileloadd tmm2, [{lower} + {stride}*1]",
            "tileloadd tmm3, [{lower} + {stride}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            $($line,)*
            "add {left}, {left_step}",
            "add {right}, {right_step}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{out} + {stride}*1], tmm0",
            "tilestored [{out} + {stride}*1 + 64], tmm1",
            "tilestored [{lower} + {stride}*1], tmm2",
            "tilestored [{lower} + {stride}*1 + 64], tmm3",
            add = in(reg) usize::from($add),
            out = in(reg) $out,
            lower = in(reg) $out.wrapping_add(TILE * $stride),
            stride = in(reg) $stride * size_of::<f32>(),
            left = inout(reg) $left => _,
            right = inout(reg) $right => _,
            steps = inout(reg) $steps => _,
            dummy = in(reg) $unit.dummy.as_mut_ptr(),
            line = in(reg) Line::BYTES,
            tile = const TILE_BYTES,
            left_step = const step($parts),
            right_step = const step($right_parts),
            options(nostack),
        )
    };
}

/// Prefetches a quarter of the right operand's lines four steps ahead, for operands of one part. The processor does not
/// detect the sequential reads of tiles by itself: without this, a matrix that is read only once takes a quarter to a
/// third longer.
macro_rules! prefetch {
    ($quarter:literal) => {
        concat!(
            ".irp at, 0, 1, 2, 3, 4, 5, 6, 7\n",
            "prefetcht0 [{right} + 4*{right_step} + 512*",
            $quarter,
            " + 64*\\at]\n",
            ".endr"
        )
    };
}

/// Computes 32 rows and columns of a product, in four tiles of sums.
///
/// Parts are multiplied in an order in which each step reloads only one operand: (1, 3), (1, 2), (2, 2), (2, 1), (1,
/// 1), (3, 1); with two parts (1, 2), (1, 1), (2, 1). If the right operand has one part, the smallest part of the left
/// one is first.
///
/// After about 0.6 µs without a tile store, the next store takes about 0.25 µs, as long as two steps. Each step
/// therefore issues a dummy store, which cuts a sum of eight steps from 1.4 to 1.1 µs. (Loads and products slow down in
/// the same way, but never pause for that long within a sum. With one part a step is so short that a sum is stored in
/// time.)
///
/// # Safety
/// The operands must be panels of `steps` steps, at least one, and `out` must have 32 rows and columns.
unsafe fn square<const PARTS: usize, const RIGHT: usize>(
    unit: &mut Unit,
    [left, right]: [*const u8; 2],
    steps: usize,
    (out, stride): (*mut f32, usize),
    add: bool,
) {
    // SAFETY: all reads and writes are within the caller's memory; tiles are configured while a `Unit` exists, and only
    // this block uses them.
    unsafe {
        match (PARTS, RIGHT) {
            (1, 1) => sums!([1, 1]: [unit, left, right, steps, out, stride, add],
                    "tileloadd tmm4, [{left} + {line}*1]",
                    "tileloadd tmm6, [{right} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    prefetch!(0),
                    "tileloadd tmm7, [{right} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    prefetch!(1),
                    "tileloadd tmm5, [{left} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    prefetch!(2),
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    prefetch!(3),
                    "# {dummy}"
            ),
            (2, 2) => sums!([2, 2]: [unit, left, right, steps, out, stride, add],
                    "tileloadd tmm4, [{left} + {line}*1]",
                    "tileloadd tmm6, [{right} + {line}*1 + 2*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {line}*1 + 3*{tile}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm6, [{right} + {line}*1]",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm7, [{right} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{left} + {line}*1 + 2*{tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + 3*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tilestored [{dummy} + {line}*1], tmm7"
            ),
            (3, 3) => sums!([3, 3]: [unit, left, right, steps, out, stride, add],
                    "tileloadd tmm4, [{left} + {line}*1]",
                    "tileloadd tmm6, [{right} + {line}*1 + 4*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {line}*1 + 5*{tile}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm6, [{right} + {line}*1 + 2*{tile}]",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm7, [{right} + {line}*1 + 3*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{left} + {line}*1 + 2*{tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + 3*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm6, [{right} + {line}*1]",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm7, [{right} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{left} + {line}*1]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{left} + {line}*1 + 4*{tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + 5*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tilestored [{dummy} + {line}*1], tmm7"
            ),
            (2, 1) => sums!([2, 1]: [unit, left, right, steps, out, stride, add],
                    "tileloadd tmm4, [{left} + {line}*1 + 2*{tile}]",
                    "tileloadd tmm6, [{right} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    prefetch!(0),
                    "tileloadd tmm5, [{left} + {line}*1 + 3*{tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    prefetch!(1),
                    "tileloadd tmm4, [{left} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    prefetch!(2),
                    "tileloadd tmm5, [{left} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    prefetch!(3),
                    "tilestored [{dummy} + {line}*1], tmm7"
            ),
            (3, 1) => sums!([3, 1]: [unit, left, right, steps, out, stride, add],
                    "tileloadd tmm4, [{left} + {line}*1 + 4*{tile}]",
                    "tileloadd tmm6, [{right} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + 5*{tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    prefetch!(0),
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm4, [{left} + {line}*1 + 2*{tile}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    prefetch!(1),
                    "tileloadd tmm5, [{left} + {line}*1 + 3*{tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm4, [{left} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    prefetch!(2),
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{left} + {line}*1 + {tile}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    prefetch!(3),
                    "tilestored [{dummy} + {line}*1], tmm7"
            ),
            _ => unreachable!("one to three parts, and the same number or one in the right operand"),
        }
    }
}

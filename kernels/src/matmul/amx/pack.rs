//! Packing of operands: split into parts and reordered as the unit reads them.
//!
//! A tile is 16 lines of 64 bytes. In the left operand a line holds one lane and 32 steps of the inner width; in the
//! right one it holds a pair of such steps of 16 lanes. In both, two `bf16` values of one lane are adjacent. The unit
//! works for any choice of pairs that is the same in both operands; here the steps of a pair are sixteen apart, so that
//! a single shift combines them, whether lanes are contiguous in memory or strided.

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use super::Line;

/// Number of lanes, and of lines, of a tile.
pub(super) const TILE: usize = 16;
/// Number of lanes of a panel, which is two tiles; also the number of inner steps of a tile.
pub(super) const PANEL: usize = 2 * TILE;
/// Size of a tile in bytes.
pub(super) const TILE_BYTES: usize = TILE * Line::BYTES;

/// Returns the size in bytes of a panel for 32 inner steps: two tiles per part.
pub(super) const fn step(parts: usize) -> usize {
    parts * 2 * TILE_BYTES
}

/// Unpacked operand: lanes (rows of the left operand, columns of the right one) of an inner width.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    /// Address of the first lane.
    pub start: *const f32,
    /// Number of lanes.
    pub lanes: usize,
    /// Distance in elements between a lane and the next.
    pub lane: isize,
    /// Distance in elements between an inner step and the next; this or `lane` is 1.
    pub depth: isize,
}
// SAFETY: the operand is only read.
unsafe impl Send for Operand {}
// SAFETY: the same as above.
unsafe impl Sync for Operand {}

/// Layout of an operand in tiles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum PackedFormat {
    /// A line is a lane: the left operand.
    Rows,
    /// A line is a pair of steps of 16 lanes: the right operand.
    Pairs,
}

thread_local! {
    static LEFT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Buffer for a packed operand, which the thread reuses.
pub(super) struct PackBuffer {
    lines: Vec<Line>,
    home: &'static std::thread::LocalKey<Cell<Vec<Line>>>,
}

impl PackBuffer {
    /// Takes the buffer for `bytes` of a left operand.
    pub(super) fn left(bytes: usize) -> Self {
        Self::of(&LEFT, bytes)
    }

    /// Takes the buffer for `bytes` of a right operand.
    pub(super) fn right(bytes: usize) -> Self {
        Self::of(&RIGHT, bytes)
    }

    fn of(home: &'static std::thread::LocalKey<Cell<Vec<Line>>>, bytes: usize) -> Self {
        let mut lines = home.take();
        if lines.len() < bytes / Line::BYTES {
            lines = vec![Line([0; Line::BYTES]); bytes / Line::BYTES];
        }
        Self { lines, home }
    }

    /// Returns the first `bytes` of the buffer.
    pub(super) fn lines(&mut self, bytes: usize) -> &mut [Line] {
        &mut self.lines[..bytes / Line::BYTES]
    }
}

impl Drop for PackBuffer {
    fn drop(&mut self) {
        self.home.set(std::mem::take(&mut self.lines));
    }
}

/// Packs the `PARTS` parts of 32 lanes from `first` on and of the `inner` steps into `dest`, with zeros beyond the
/// operand.
///
/// # Safety
/// The processor must have AVX-512 with `bf16`, and the operand's lanes and steps must be allocated.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack<const PARTS: usize>(
    dest: &mut [Line],
    operand: Operand,
    format: PackedFormat,
    first: usize,
    inner: Range<usize>,
) {
    let contiguous = operand.depth == 1;
    let stride = if contiguous { operand.lane } else { operand.depth };
    for (panel, from) in dest.chunks_exact_mut(step(PARTS) / Line::BYTES).zip(inner.clone().step_by(PANEL)) {
        let depth = (inner.end - from).min(PANEL);
        for half in 0..2 {
            let lane = first + half * TILE;
            let lanes = operand.lanes.saturating_sub(lane).min(TILE);
            let start = operand.start.wrapping_offset(lane as isize * operand.lane + from as isize * operand.depth);
            let tile = Source { start, stride, lanes, depth };
            let dest = &mut panel[half * TILE..];
            // SAFETY: the source's lanes and steps are allocated.
            unsafe {
                match (contiguous, format, lanes == TILE && depth == PANEL) {
                    (true, PackedFormat::Rows, true) => pack_lines::<true, true, PARTS>(dest, tile),
                    (true, PackedFormat::Rows, false) => pack_lines::<true, false, PARTS>(dest, tile),
                    (false, PackedFormat::Pairs, true) => pack_lines::<false, true, PARTS>(dest, tile),
                    (false, PackedFormat::Pairs, false) => pack_lines::<false, false, PARTS>(dest, tile),
                    (true, PackedFormat::Pairs, true) => pack_transposed::<true, true, PARTS>(dest, tile),
                    (true, PackedFormat::Pairs, false) => pack_transposed::<true, false, PARTS>(dest, tile),
                    (false, PackedFormat::Rows, true) => pack_transposed::<false, true, PARTS>(dest, tile),
                    (false, PackedFormat::Rows, false) => pack_transposed::<false, false, PARTS>(dest, tile),
                }
            }
        }
    }
}

/// Up to 16 lanes and 32 inner steps of an operand. Only the first `lanes` and the first `depth` steps are allocated.
#[derive(Clone, Copy)]
struct Source {
    start: *const f32,
    stride: isize,
    lanes: usize,
    depth: usize,
}

impl Source {
    /// Loads a line. If lanes are contiguous in memory (`CONTIGUOUS`): steps 0 to 15 of lane `at`, and steps 16 to 31.
    /// Otherwise step `at` of all lanes, and step `at + 16`. The loads are not masked if the source is `FULL`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn line<const CONTIGUOUS: bool, const FULL: bool>(self, at: usize) -> [__m512; 2] {
        let first = self.start.wrapping_offset(at as isize * self.stride);
        let second = match CONTIGUOUS {
            true => first.wrapping_add(TILE),
            false => first.wrapping_offset(TILE as isize * self.stride),
        };
        if FULL {
            // SAFETY: by the caller's contract all lanes and steps are allocated.
            return unsafe { [_mm512_loadu_ps(first), _mm512_loadu_ps(second)] };
        }
        let up_to = |count: usize| ((1u32 << count.min(TILE)) - 1) as u16;
        let masks = match CONTIGUOUS {
            true if at < self.lanes => [up_to(self.depth), up_to(self.depth.saturating_sub(TILE))],
            true => [0, 0],
            false => [at, at + TILE].map(|step| if step < self.depth { up_to(self.lanes) } else { 0 }),
        };
        // SAFETY: masked elements are not read, and the others are allocated.
        unsafe { [_mm512_maskz_loadu_ps(masks[0], first), _mm512_maskz_loadu_ps(masks[1], second)] }
    }
}

/// Combines the upper halves of two lines into pairs, which are the values truncated to `bf16`.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves([first, second]: [__m512i; 2]) -> __m512i {
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    // first | (second & upper)
    _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(first), second, upper)
}

/// Returns a line's next part, and the exact remainder of the line. The remainder after the third part is zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn part_of(line: [__m512; 2]) -> (__m512i, [__m512; 2]) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    // Rounded to nearest: with truncation, the omitted parts would all have the sign of the value.
    let nearest = |value| _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
    let near = [nearest(line[0]), nearest(line[1])];
    let rest = |value, near| _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_and_si512(near, upper)));
    (halves(near), [rest(line[0], near[0]), rest(line[1], near[1])])
}

/// Returns a line's last part. The third of three has eight bits left and is exact; with fewer parts it is the
/// remainder rounded to nearest. NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn last_of<const PARTS: usize>(line: [__m512; 2]) -> __m512i {
    if PARTS == 3 {
        return halves([_mm512_castps_si512(line[0]), _mm512_castps_si512(line[1])]);
    }
    // SAFETY: both types have 512 bits.
    let side_by_side: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(line[1], line[0])) };
    let order: [u16; 2 * TILE] = std::array::from_fn(|at| (at / 2 + at % 2 * TILE) as u16);
    // SAFETY: `order` has 512 bits.
    _mm512_permutexvar_epi16(unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }, side_by_side)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(dest: &mut [Line], part: usize, at: usize, line: __m512i) {
    let dest = &mut dest[part * 2 * TILE + at];
    // SAFETY: a line has the size and the alignment of a register.
    unsafe { _mm512_store_si512(dest.0.as_mut_ptr().cast(), line) }
}

/// Packs a tile's parts if a line of the tile is a line of the source.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_lines<const CONTIGUOUS: bool, const FULL: bool, const PARTS: usize>(dest: &mut [Line], source: Source) {
    assert!(dest.len() >= (2 * PARTS - 1) * TILE);
    for at in 0..TILE {
        // SAFETY: by the caller's contract.
        let mut line = unsafe { source.line::<CONTIGUOUS, FULL>(at) };
        for number in 0..PARTS - 1 {
            let (part, rest) = part_of(line);
            store(dest, number, at, part);
            line = rest;
        }
        store(dest, PARTS - 1, at, last_of::<PARTS>(line));
    }
}

/// Packs a tile's parts if a line of the tile is a column of the source.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_transposed<const CONTIGUOUS: bool, const FULL: bool, const PARTS: usize>(
    dest: &mut [Line],
    source: Source,
) {
    assert!(dest.len() >= (2 * PARTS - 1) * TILE);
    let mut rests = [[_mm512_setzero_ps(); 2]; TILE];
    for part in 0..PARTS {
        let mut tile = [_mm512_setzero_si512(); TILE];
        for at in 0..TILE {
            let line = match part {
                // SAFETY: by the caller's contract.
                0 => unsafe { source.line::<CONTIGUOUS, FULL>(at) },
                _ => rests[at],
            };
            (tile[at], rests[at]) = if part + 1 < PARTS { part_of(line) } else { (last_of::<PARTS>(line), line) };
        }
        for (at, line) in transposed(tile).into_iter().enumerate() {
            store(dest, part, at, line);
        }
    }
}

/// Writes the first `[rows, columns]` of `sums`, which are stored by columns, to `out`, with rows of `stride`.
///
/// # Safety
/// The processor must have AVX-512, and `out` must have those rows and columns.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_transposed(
    sums: &[[f32; PANEL]; PANEL],
    (out, stride): (*mut f32, usize),
    [rows, columns]: [usize; 2],
) {
    for column in (0..columns).step_by(TILE) {
        let mask = ((1u32 << (columns - column).min(TILE)) - 1) as u16;
        for row in (0..rows).step_by(TILE) {
            let tile = std::array::from_fn(|at| {
                let sums = &sums[column + at][row..row + TILE];
                // SAFETY: the slice has sixteen values.
                unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) }
            });
            for (at, line) in transposed(tile).into_iter().enumerate().take(rows - row) {
                // SAFETY: `out` has this row, and masked elements are not written.
                unsafe { _mm512_mask_storeu_epi32(out.add((row + at) * stride + column).cast(), mask, line) };
            }
        }
    }
}

/// Transposes sixteen rows of sixteen 32-bit values.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; TILE]) -> [__m512i; TILE] {
    let mut a = rows;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    let mut b = a;
    for i in 0..4 {
        for j in 0..2 {
            b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + j + 2]);
            b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + j + 2]);
        }
    }
    // Now a register has four rows of one column in each quarter.
    for i in 0..4 {
        a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[4 + i]);
        a[4 + i] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[4 + i]);
        a[8 + i] = _mm512_shuffle_i32x4::<0x88>(b[8 + i], b[12 + i]);
        a[12 + i] = _mm512_shuffle_i32x4::<0xdd>(b[8 + i], b[12 + i]);
    }
    for i in 0..4 {
        b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[8 + i]);
        b[4 + i] = _mm512_shuffle_i32x4::<0x88>(a[4 + i], a[12 + i]);
        b[8 + i] = _mm512_shuffle_i32x4::<0xdd>(a[i], a[8 + i]);
        b[12 + i] = _mm512_shuffle_i32x4::<0xdd>(a[4 + i], a[12 + i]);
    }
    b
}

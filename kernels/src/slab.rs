//! Keys and values of sequences, laid out for attention of one new token of each sequence at a time.

use std::iter::repeat_n;

use super::softmax::softmax_in_place;
use super::vector::{LANES, exp, fused, vectorised};

/// Number of value columns that are summed in registers.
const WIDE: usize = 64;
/// Number of queries whose scores are in registers.
const SCORED: usize = 4;
/// Number of tokens whose values stay in the first-level cache while all queries read them.
const TILE: usize = 32;

/// Keys and values of consecutive tokens in one layer.
///
/// Those of a key head are contiguous. Keys are stored in blocks of sixteen tokens, component by component with the sixteen
/// tokens' values adjacent, so that sixteen scores are computed at once without a sum over lanes. Values are stored token by
/// token.
#[derive(Debug, Clone)]
pub struct Slab {
    width: usize,
    len: usize,
    /// Keys of each head, `[⌈len/16⌉, hd, 16]`, zero beyond `len`.
    keys: Vec<Vec<f32>>,
    /// Values of each head, `[len, hd]`.
    values: Vec<Vec<f32>>,
}

impl Slab {
    /// Creates an empty slab with capacity for `tokens` tokens.
    pub fn new(kv_heads: usize, width: usize, tokens: usize) -> Self {
        let heads = |tokens: usize| (0..kv_heads).map(|_| Vec::with_capacity(tokens * width)).collect();
        Self { width, len: 0, keys: heads(tokens.next_multiple_of(LANES)), values: heads(tokens) }
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the slab holds no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Removes all tokens and keeps the allocation.
    pub fn clear(&mut self) {
        self.len = 0;
        self.keys.iter_mut().chain(&mut self.values).for_each(Vec::clear);
    }

    /// Appends tokens: keys and values `[n, KV, hd]`.
    ///
    /// # Panics
    /// If a length is not a multiple of `KV · hd`, or the two lengths differ.
    pub fn push(&mut self, keys: &[f32], values: &[f32]) {
        let row = self.keys.len() * self.width;
        assert!(keys.len() == values.len() && keys.len().is_multiple_of(row), "complete tokens of keys and of values");
        for (keys, values) in keys.chunks_exact(row).zip(values.chunks_exact(row)) {
            let lane = self.len % LANES;
            for (head, key) in self.keys.iter_mut().zip(keys.chunks_exact(self.width)) {
                if lane == 0 {
                    head.resize(head.len() + self.width * LANES, 0.0);
                }
                let block = head.len() - self.width * LANES;
                for (place, key) in head[block + lane..].iter_mut().step_by(LANES).zip(key) {
                    *place = *key;
                }
            }
            for (head, value) in self.values.iter_mut().zip(values.chunks_exact(self.width)) {
                head.extend_from_slice(value);
            }
            self.len += 1;
        }
    }
}

/// A sequence of a decode step: the queries `[H, hd]` of its new token, and the tokens after its prompt.
#[derive(Debug, Clone, Copy)]
pub struct Continuation<'a> {
    /// Queries of the new token.
    pub queries: &'a [f32],
    /// Keys and values of the tokens after the prompt, the new one included.
    pub own: &'a Slab,
}

/// Computes softmax(q·Kᵀ/√hd)·V of sequences that continue `prompt`, for the query heads that read the key head `head`, with
/// scores capped if `cap` is set, without the first `hidden` tokens of each sequence. Returns `[sequences, H/KV, hd]`.
///
/// Each key and value of the prompt is read once for all sequences. The result of a sequence does not depend on the others.
///
/// # Panics
/// If the sizes do not match.
pub fn attend_slabs(
    prompt: &Slab,
    sequences: &[Continuation<'_>],
    head: usize,
    hidden: usize,
    cap: Option<f64>,
) -> Vec<f32> {
    let (width, kv_heads) = (prompt.width, prompt.keys.len());
    let Some(first) = sequences.first() else { return Vec::new() };
    let repeats = first.queries.len() / width / kv_heads;
    let sizes = |one: &Continuation<'_>| {
        one.queries.len() == repeats * width * kv_heads && (one.own.width, one.own.keys.len()) == (width, kv_heads)
    };
    assert!(repeats > 0 && head < kv_heads && sequences.iter().all(sizes), "sizes of queries");
    let queries: Vec<&[f32]> = sequences
        .iter()
        .flat_map(|one| one.queries[head * repeats * width..][..repeats * width].chunks_exact(width))
        .collect();
    let (from, own_from) = (hidden.min(prompt.len), hidden.saturating_sub(prompt.len));
    let (shared, cap) = (prompt.len - from, cap.map(|cap| cap as f32));
    let mut scores: Vec<Vec<f32>> = sequences
        .iter()
        .flat_map(|one| repeat_n(shared + one.own.len, repeats))
        .map(|tokens| Vec::with_capacity(tokens + LANES))
        .collect();
    score(&mut scores, &queries, prompt, head, from, cap);
    for ((scores, queries), one) in scores.chunks_exact_mut(repeats).zip(queries.chunks_exact(repeats)).zip(sequences) {
        score(scores, queries, one.own, head, own_from, cap);
    }
    for scores in &mut scores {
        softmax_in_place(scores);
    }
    let mut out = vec![0.0; queries.len() * width];
    mix(&mut out, &scores, 0, prompt, head, from);
    for ((out, scores), one) in out.chunks_exact_mut(repeats * width).zip(scores.chunks_exact(repeats)).zip(sequences) {
        mix(out, scores, shared, one.own, head, own_from);
    }
    out
}

vectorised! {
/// Appends to the list of each query its scores against a slab's tokens from `from` on.
fn score<FMA>(scores: &mut [Vec<f32>], queries: &[&[f32]], slab: &Slab, head: usize, from: usize, cap: Option<f32>) {
    let scale = 1.0 / (slab.width as f32).sqrt();
    for start in (from / LANES * LANES..slab.len).step_by(LANES) {
        let keys = &slab.keys[head][start * slab.width..];
        prefetch(&keys[slab.width * LANES..], slab.width * LANES);
        let keys = keys[..slab.width * LANES].as_chunks::<LANES>().0;
        let seen = from.saturating_sub(start)..(slab.len - start).min(LANES);
        for (scores, queries) in scores.chunks_mut(SCORED).zip(queries.chunks(SCORED)) {
            let mut sums = [[0.0; LANES]; SCORED];
            match *queries {
                [a] => sums[..1].copy_from_slice(&products::<FMA, 1>([a], keys)),
                [a, b] => sums[..2].copy_from_slice(&products::<FMA, 2>([a, b], keys)),
                [a, b, c] => sums[..3].copy_from_slice(&products::<FMA, 3>([a, b, c], keys)),
                [a, b, c, d] => sums = products::<FMA, 4>([a, b, c, d], keys),
                _ => unreachable!("chunks of at most {SCORED} queries"),
            }
            for (scores, sums) in scores.iter_mut().zip(&mut sums) {
                for sum in &mut *sums {
                    *sum *= scale;
                }
                if let Some(cap) = cap {
                    for sum in &mut *sums {
                        *sum = cap * (1.0 - 2.0 / (exp::<FMA>(2.0 * *sum / cap) + 1.0));
                    }
                }
                scores.extend_from_slice(&sums[seen.clone()]);
            }
        }
    }
}
}

/// Returns the products of queries with a block of keys.
#[inline(always)]
fn products<const FMA: bool, const Q: usize>(queries: [&[f32]; Q], keys: &[[f32; LANES]]) -> [[f32; LANES]; Q] {
    let queries = queries.map(|query| &query[..keys.len()]);
    let mut sums = [[0.0; LANES]; Q];
    for (i, keys) in keys.iter().enumerate() {
        for q in 0..Q {
            for lane in 0..LANES {
                sums[q][lane] = fused::<FMA>(queries[q][i], keys[lane], sums[q][lane]);
            }
        }
    }
    sums
}

/// Computes `out += Σ weight · value` of each query `[queries, hd]` over a slab's tokens from `from` on. The weights of
/// these tokens begin at `first` in each list.
fn mix(out: &mut [f32], weights: &[Vec<f32>], first: usize, slab: &Slab, head: usize, from: usize) {
    let width = slab.width;
    for start in (from..slab.len).step_by(TILE) {
        let (values, next) = slab.values[head][start * width..].split_at((slab.len - start).min(TILE) * width);
        prefetch(next, TILE * width);
        for (out, weights) in out.chunks_exact_mut(width).zip(weights) {
            mix_tile(out, &weights[first + start - from..], values);
        }
    }
}

vectorised! {
/// Computes `out += Σ weight · value`; values are `[tokens, hd]`.
fn mix_tile<FMA>(out: &mut [f32], weights: &[f32], values: &[f32]) {
    let width = out.len();
    let (wide, rest) = out.as_chunks_mut::<WIDE>();
    let done = wide.len() * WIDE;
    for (c, out) in wide.iter_mut().enumerate() {
        for (weight, row) in weights.iter().zip(values.chunks_exact(width)) {
            let (value, _) = row[c * WIDE..].as_chunks::<WIDE>();
            for i in 0..WIDE {
                out[i] = fused::<FMA>(*weight, value[0][i], out[i]);
            }
        }
    }
    for (weight, row) in weights.iter().zip(values.chunks_exact(width)) {
        for (out, value) in rest.iter_mut().zip(&row[done..]) {
            *out = fused::<FMA>(*weight, *value, *out);
        }
    }
}
}

/// Makes the processor read the first `count` of the given numbers into its cache.
#[inline(always)]
fn prefetch(numbers: &[f32], count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in numbers[..count.min(numbers.len())].chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch may point anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (numbers, count);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 31 + seed * 7 + 3) % 97) as f32 / 30.0 - 1.6).collect()
    }

    #[test]
    fn attention_over_slabs_matches_the_definition() {
        for (heads, kv_heads, width) in [(4, 2, 6), (3, 1, 64), (2, 2, 80)] {
            for (first, second, hidden, cap) in
                [(5, 0, 0, None), (37, 18, 0, Some(2.0)), (20, 3, 7, None), (4, 30, 9, None)]
            {
                let row = kv_heads * width;
                let (keys, vals) = (values((first + second) * row, 1), values((first + second) * row, 2));
                let mut slabs = [Slab::new(kv_heads, width, 8), Slab::new(kv_heads, width, 1)];
                slabs[0].push(&keys[..first * row], &vals[..first * row]);
                for token in first..first + second {
                    slabs[1].push(&keys[token * row..][..row], &vals[token * row..][..row]);
                }
                let repeats = heads / kv_heads;
                for head in 0..heads {
                    let queries = values(heads * width, 3);
                    let sequence = Continuation { queries: &queries, own: &slabs[1] };
                    let out = attend_slabs(&slabs[0], &[sequence], head / repeats, hidden, cap);
                    let out = &out[head % repeats * width..][..width];
                    let offset = head / repeats * width;
                    let at = |of: &[f32], token: usize, i: usize| f64::from(of[token * row + offset + i]);
                    let score = |token: usize| {
                        let dot: f64 =
                            (0..width).map(|i| f64::from(queries[head * width + i]) * at(&keys, token, i)).sum();
                        let score = dot / (width as f64).sqrt();
                        cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                    };
                    let seen = hidden..first + second;
                    let total: f64 = seen.clone().map(score).sum();
                    for (i, got) in out.iter().enumerate() {
                        let want: f64 = seen.clone().map(|token| score(token) / total * at(&vals, token, i)).sum();
                        assert!((f64::from(*got) - want).abs() < 1e-5, "head {head}, {i}: {got} against {want}");
                    }
                }
            }
        }
    }

    /// The sequences that share a prompt give the same numbers as each of them alone, to the last bit.
    #[test]
    fn a_sequence_does_not_depend_on_those_with_the_same_prompt() {
        let (kv_heads, width, repeats, prompt) = (2, 72, 3, 150);
        let row = kv_heads * width;
        let slab = |tokens: usize, seed: usize| {
            let mut slab = Slab::new(kv_heads, width, tokens);
            slab.push(&values(tokens * row, seed), &values(tokens * row, seed + 1));
            slab
        };
        let shared = slab(prompt, 1);
        let own: Vec<Slab> = (0..5).map(|i| slab(1 + 7 * i, 10 + i)).collect();
        let queries: Vec<Vec<f32>> = (0..5).map(|i| values(repeats * row, 20 + i)).collect();
        let all: Vec<Continuation<'_>> =
            queries.iter().zip(&own).map(|(queries, own)| Continuation { queries, own }).collect();
        for (head, hidden) in [(0, 0), (1, 40), (1, prompt)] {
            let together = attend_slabs(&shared, &all, head, hidden, None);
            for (one, together) in all.iter().zip(together.chunks_exact(repeats * width)) {
                assert_eq!(attend_slabs(&shared, &[*one], head, hidden, None), together);
            }
        }
    }

    #[test]
    fn a_cleared_slab_holds_only_later_tokens() {
        let [mut used, mut fresh] = [Slab::new(1, 4, 0), Slab::new(1, 4, 0)];
        used.push(&values(20 * 4, 1), &values(20 * 4, 2));
        used.clear();
        for slab in [&mut used, &mut fresh] {
            slab.push(&values(3 * 4, 5), &values(3 * 4, 6));
        }
        assert_eq!((used.len(), used.keys, used.values), (fresh.len(), fresh.keys, fresh.values));
    }
}

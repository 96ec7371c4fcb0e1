//! Keys and values of a sequence, laid out for attention of one new token at a time.

use super::softmax::softmax_in_place;
use super::vector::{LANES, exp, fused, vectorised};

/// Number of value columns that are summed in registers.
const WIDE: usize = 64;

/// Keys and values of consecutive tokens in one layer.
///
/// Keys are stored in blocks of sixteen tokens, component by component with the sixteen tokens' values adjacent, so
/// that sixteen scores are computed at once without a sum over lanes. Values are stored token by token.
#[derive(Debug, Clone)]
pub struct Slab {
    kv_heads: usize,
    width: usize,
    len: usize,
    /// Keys, `[⌈len/16⌉, KV, hd, 16]`, zero beyond `len`.
    keys: Vec<f32>,
    /// Values, `[len, KV, hd]`.
    values: Vec<f32>,
}

impl Slab {
    /// Creates an empty slab with capacity for `tokens` tokens.
    pub fn new(kv_heads: usize, width: usize, tokens: usize) -> Self {
        let row = kv_heads * width;
        let keys = Vec::with_capacity(tokens.next_multiple_of(LANES) * row);
        Self { kv_heads, width, len: 0, keys, values: Vec::with_capacity(tokens * row) }
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
        self.keys.clear();
        self.values.clear();
    }

    /// Appends tokens: keys and values `[n, KV, hd]`.
    ///
    /// # Panics
    /// If a length is not a multiple of `KV · hd`, or the two lengths differ.
    pub fn push(&mut self, keys: &[f32], values: &[f32]) {
        let row = self.kv_heads * self.width;
        assert!(keys.len() == values.len() && keys.len().is_multiple_of(row), "complete tokens of keys and of values");
        self.values.extend_from_slice(values);
        for key in keys.chunks_exact(row) {
            let lane = self.len % LANES;
            if lane == 0 {
                self.keys.resize(self.keys.len() + row * LANES, 0.0);
            }
            let start = self.len / LANES * row * LANES;
            for (i, key) in key.iter().enumerate() {
                self.keys[start + i * LANES + lane] = *key;
            }
            self.len += 1;
        }
    }
}

/// Computes softmax(q·Kᵀ/√hd)·V for one token's queries `[H, hd]`, with scores capped if `cap` is set, over the tokens
/// of both slabs without the first `hidden` ones. Writes `[H, hd]` to `out`; `scores` is a scratch buffer.
///
/// # Panics
/// If the sizes do not match.
pub fn attend_slabs(
    out: &mut [f32],
    queries: &[f32],
    slabs: [&Slab; 2],
    hidden: usize,
    cap: Option<f64>,
    scores: &mut Vec<f32>,
) {
    let (width, kv_heads) = (slabs[0].width, slabs[0].kv_heads);
    assert!(out.len() == queries.len() && queries.len().is_multiple_of(kv_heads * width), "sizes of queries");
    let from = [hidden.min(slabs[0].len), hidden.saturating_sub(slabs[0].len)];
    let scale = 1.0 / (width as f32).sqrt();
    let repeats = queries.len() / width / kv_heads;
    for (i, (out, query)) in out.chunks_exact_mut(width).zip(queries.chunks_exact(width)).enumerate() {
        let head = i / repeats;
        scores.clear();
        for (slab, from) in slabs.iter().zip(from) {
            if from < slab.len {
                score(scores, query, slab, head, from, scale, cap.map(|cap| cap as f32));
            }
        }
        softmax_in_place(scores);
        let (first, second) = scores.split_at(slabs[0].len - from[0]);
        out.fill(0.0);
        for ((slab, from), weights) in slabs.iter().zip(from).zip([first, second]) {
            let values = &slab.values[from * kv_heads * width..];
            mix(out, weights, values, head * width, kv_heads * width);
        }
    }
}

vectorised! {
/// Appends one head's scores against a slab's tokens from `from` on.
fn score<FMA>(
    scores: &mut Vec<f32>,
    query: &[f32],
    slab: &Slab,
    head: usize,
    from: usize,
    scale: f32,
    cap: Option<f32>,
) {
    let block = slab.width * LANES;
    for start in (from / LANES * LANES..slab.len).step_by(LANES) {
        let keys = &slab.keys[(start / LANES * slab.kv_heads + head) * block..][..block];
        let mut sums = [0.0f32; LANES];
        for (q, keys) in query.iter().zip(keys.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                sums[i] = fused::<FMA>(*q, keys[i], sums[i]);
            }
        }
        for sum in &mut sums {
            *sum *= scale;
        }
        if let Some(cap) = cap {
            for sum in &mut sums {
                *sum = cap * (1.0 - 2.0 / (exp::<FMA>(2.0 * *sum / cap) + 1.0));
            }
        }
        scores.extend_from_slice(&sums[from.saturating_sub(start)..(slab.len - start).min(LANES)]);
    }
}
}

vectorised! {
/// Computes `out += Σ weight · value`; each value is the `out.len()` columns from `offset` in a row of `stride`.
fn mix<FMA>(out: &mut [f32], weights: &[f32], values: &[f32], offset: usize, stride: usize) {
    let (wide, rest) = out.as_chunks_mut::<WIDE>();
    let done = wide.len() * WIDE;
    for (c, out) in wide.iter_mut().enumerate() {
        for (weight, row) in weights.iter().zip(values.chunks_exact(stride)) {
            let (value, _) = row[offset + c * WIDE..].as_chunks::<WIDE>();
            for i in 0..WIDE {
                out[i] = fused::<FMA>(*weight, value[0][i], out[i]);
            }
        }
    }
    for (weight, row) in weights.iter().zip(values.chunks_exact(stride)) {
        for (out, value) in rest.iter_mut().zip(&row[offset + done..]) {
            *out = fused::<FMA>(*weight, *value, *out);
        }
    }
}
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
                let queries = values(heads * width, 3);
                let mut out = vec![f32::NAN; heads * width];
                attend_slabs(&mut out, &queries, [&slabs[0], &slabs[1]], hidden, cap, &mut Vec::new());
                for head in 0..heads {
                    let offset = head / (heads / kv_heads) * width;
                    let at = |of: &[f32], token: usize, i: usize| f64::from(of[token * row + offset + i]);
                    let score = |token: usize| {
                        let dot: f64 =
                            (0..width).map(|i| f64::from(queries[head * width + i]) * at(&keys, token, i)).sum();
                        let score = dot / (width as f64).sqrt();
                        cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                    };
                    let seen = hidden..first + second;
                    let total: f64 = seen.clone().map(score).sum();
                    for i in 0..width {
                        let want: f64 = seen.clone().map(|token| score(token) / total * at(&vals, token, i)).sum();
                        let got = f64::from(out[head * width + i]);
                        assert!((got - want).abs() < 1e-5, "head {head}, {i}: {got} against {want}");
                    }
                }
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

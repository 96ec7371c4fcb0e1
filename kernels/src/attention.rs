//! Attention within a tree of tokens that never stores the complete score matrix.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::matmul::{add_transposed_times, times, wide_transposed_product};
use super::softmax::softmax_in_place;
use super::tree_mask::{Run, TreeMask};
use super::vector::{exp, inline_dot, vectorised};
use super::{elements, is_fused, masked_softmax, softcap, tensor_elements};

/// Number of rows whose scores exist at a time.
const BLOCK: usize = 64;

/// Computes softmax(scale · q·Kᵀ, within `mask` and `window`)·V. Scores are capped (see [`softcap`]) before they are
/// masked.
///
/// Queries are `[T, H, hd]`, keys and values `[S, KV, hd]`, with `S` the number of cached tokens of the mask plus `T`;
/// head `h` reads key head `h / (H/KV)`. A token attends to at most `window` tokens, itself included. Returns `[T,
/// H·hd]`. Gradients flow to all three.
///
/// For the backward the fused path keeps one number per row and head. It recomputes the attention weights a block of
/// rows at a time (Dao et al. 2022, §3.1), and only at positions that the mask allows. Fails when the shapes do not
/// match.
pub fn tree_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Arc<TreeMask>,
    scale: f64,
    window: Option<usize>,
    cap: Option<f64>,
) -> Result<Tensor> {
    let (t, heads, width) = q.dims3()?;
    let (s, kv_heads, _) = k.dims3()?;
    if t != mask.rows() || s != mask.cached() + t || k.dims() != [s, kv_heads, width] || v.dims() != k.dims() {
        bail!(
            "tree_attention: q has shape {:?}, k {:?}, v {:?}; the mask is for {} rows after {} cached ones",
            q.dims(),
            k.dims(),
            v.dims(),
            mask.rows(),
            mask.cached()
        )
    }
    if kv_heads == 0 || heads % kv_heads != 0 {
        bail!("tree_attention: {heads} query heads cannot share {kv_heads} key heads evenly")
    }
    let repeats = heads / kv_heads;
    if is_fused(q) && is_fused(k) && is_fused(v) {
        let tree = Tree::new(mask, [heads, kv_heads, width], scale, window, cap);
        let op = TreeAttention { tree, logsumexp: OnceLock::new() };
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op);
    }
    // The query heads that share one key head are stacked as rows: one product per key head.
    let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, repeats * t, width))?;
    let k = k.permute((1, 2, 0))?.contiguous()?; // [KV, hd, S]
    let v = v.transpose(0, 1)?.contiguous()?; // [KV, S, hd]
    let scores = q.matmul(&k)?.reshape((heads, t, s))?;
    let mask = mask.dense(window, q.device())?;
    let weights = match cap {
        None => masked_softmax(&scores, Some(&mask), scale)?,
        Some(_) => masked_softmax(&softcap(&(scores * scale)?, cap)?, Some(&mask), 1.0)?,
    };
    let mixed = weights.reshape((kv_heads, repeats * t, s))?.matmul(&v)?;
    mixed.reshape((heads, t, width))?.transpose(0, 1)?.contiguous()?.reshape((t, heads * width))
}

struct TreeAttention {
    tree: Tree,
    /// Log-sum-exp of each row and head, kept by the forward for the backward.
    logsumexp: OnceLock<Vec<f32>>,
}

/// Attention within a tree mask, on slices.
pub(super) struct Tree {
    mask: Arc<TreeMask>,
    /// Number of query heads per key head.
    repeats: usize,
    kv_heads: usize,
    width: usize,
    scale: f32,
    window: usize,
    cap: Option<f32>,
}

/// Consecutive rows of a run, and the positions that they attend to.
struct Block {
    /// Rows in the flat batch of tokens.
    rows: Range<usize>,
    /// Positions from the first one visible to the first row to the last one visible to the last row.
    positions: Range<usize>,
    /// Position of the first row.
    first: usize,
}

impl Tree {
    /// Creates the attention for `[query heads, key heads, width of a head]`.
    pub(super) fn new(
        mask: &Arc<TreeMask>,
        [heads, kv_heads, width]: [usize; 3],
        scale: f64,
        window: Option<usize>,
        cap: Option<f64>,
    ) -> Self {
        Self {
            mask: Arc::clone(mask),
            repeats: heads / kv_heads,
            kv_heads,
            width,
            scale: scale as f32,
            window: window.unwrap_or(usize::MAX),
            cap: cap.map(|cap| cap as f32),
        }
    }

    /// Computes the attention of rows with queries `[T, H, hd]` over keys and values `[S, KV, hd]`. Returns the outputs
    /// `[T, H·hd]`, and `[KV, T, repeats]`, ln Σ e^score of each row and head, which the backward needs.
    pub(super) fn forward(&self, inputs: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let (rows, span) = (self.mask.rows(), self.repeats * self.width);
        let tasks: Vec<(&Run, usize)> =
            self.mask.runs().iter().flat_map(|run| (0..self.kv_heads).map(move |head| (run, head))).collect();
        let parts = each(&tasks, |(run, head)| self.attend(inputs, run, *head));
        let mut out = vec![0.0; rows * self.kv_heads * span];
        let mut logsumexp = vec![0.0; self.kv_heads * rows * self.repeats];
        for ((run, head), (part, sums)) in tasks.iter().zip(parts) {
            scatter(&mut out, &part, *head, self.kv_heads, run.rows.start, span);
            logsumexp[(head * rows + run.rows.start) * self.repeats..][..sums.len()].copy_from_slice(&sums);
        }
        (out, logsumexp)
    }

    /// Returns the gradients of queries, keys and values, given these three, the output and its gradient.
    pub(super) fn backward(&self, inputs: [&[f32]; 5], logsumexp: &[f32]) -> [Vec<f32>; 3] {
        let heads: Vec<usize> = (0..self.kv_heads).collect();
        let parts = each(&heads, |head| self.pull_back(inputs, logsumexp, *head));
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|i| vec![0.0; inputs[i].len()]);
        for (head, [q, k, v]) in parts.into_iter().enumerate() {
            scatter(&mut dq, &q, head, self.kv_heads, 0, self.repeats * self.width);
            scatter(&mut dk, &k, head, self.kv_heads, 0, self.width);
            scatter(&mut dv, &v, head, self.kv_heads, 0, self.width);
        }
        [dq, dk, dv]
    }

    fn blocks(&self, run: &Run) -> impl Iterator<Item = Block> {
        let (run, window) = (run.clone(), self.window);
        run.rows.clone().step_by(BLOCK).map(move |start| {
            let rows = start..(start + BLOCK).min(run.rows.end);
            let first = run.first + start - run.rows.start;
            Block { positions: (first + 1).saturating_sub(window)..first + rows.len(), first, rows }
        })
    }

    /// Returns the positions, relative to the block's, that are visible to row `j` of the block (rows times repeats).
    fn span(&self, block: &Block, j: usize) -> Range<usize> {
        let end = block.first + j / self.repeats + 1;
        end.saturating_sub(self.window) - block.positions.start..end - block.positions.start
    }

    /// Gathers one key head's rows of keys or values `[S, KV, hd]`, ordered by position.
    fn gather(&self, from: &[f32], columns: &[usize], head: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(columns.len() * self.width);
        for column in columns {
            out.extend_from_slice(&from[(column * self.kv_heads + head) * self.width..][..self.width]);
        }
        out
    }

    /// Gathers one key head's part of queries, or of a tensor of their shape `[T, H, hd]`, for some rows: `[rows ·
    /// repeats, hd]`.
    fn queries(&self, from: &[f32], rows: &Range<usize>, head: usize) -> Vec<f32> {
        let span = self.repeats * self.width;
        let mut out = Vec::with_capacity(rows.len() * span);
        for row in rows.clone() {
            out.extend_from_slice(&from[(row * self.kv_heads + head) * span..][..span]);
        }
        out
    }

    /// Computes a block's scores against keys ordered by position, scaled and capped: `[rows · repeats, positions]`.
    fn scores(&self, block: &Block, queries: &[f32], keys: &[f32]) -> Vec<f32> {
        let mut scores = wide_transposed_product(queries, self.at(keys, block), self.width);
        scale_and_cap(&mut scores, self.scale, self.cap);
        scores
    }

    fn at<'a>(&self, by_position: &'a [f32], block: &Block) -> &'a [f32] {
        &by_position[block.positions.start * self.width..block.positions.end * self.width]
    }

    /// Returns the attention output of a run's rows for one key head, `[rows · repeats, hd]`, and ln Σ e^score of each.
    fn attend(&self, [q, k, v]: [&[f32]; 3], run: &Run, head: usize) -> (Vec<f32>, Vec<f32>) {
        let columns: Vec<usize> = run.columns(self.mask.cached()).collect();
        let (keys, values) = (self.gather(k, &columns, head), self.gather(v, &columns, head));
        let (mut out, mut sums) = (Vec::new(), Vec::new());
        for block in self.blocks(run) {
            let mut weights = self.scores(&block, &self.queries(q, &block.rows, head), &keys);
            for (j, row) in weights.chunks_exact_mut(block.positions.len()).enumerate() {
                let span = self.span(&block, j);
                row[..span.start].fill(0.0);
                row[span.end..].fill(0.0);
                sums.push(softmax_in_place(&mut row[span]));
            }
            let start = out.len();
            out.resize(start + block.rows.len() * self.repeats * self.width, 0.0);
            times(&mut out[start..], &weights, self.at(&values, &block), block.positions.len());
        }
        (out, sums)
    }

    /// Returns one key head's gradients: `[T · repeats, hd]` for its queries, `[S, hd]` for its keys and for its
    /// values.
    fn pull_back(&self, [q, k, v, out, grad]: [&[f32]; 5], sums: &[f32], head: usize) -> [Vec<f32>; 3] {
        let (rows, width) = (self.mask.rows(), self.width);
        let mut dq = vec![0.0; rows * self.repeats * width];
        let mut dk = vec![0.0; (self.mask.cached() + rows) * width];
        let mut dv = dk.clone();
        for run in self.mask.runs() {
            let columns: Vec<usize> = run.columns(self.mask.cached()).collect();
            let (keys, values) = (self.gather(k, &columns, head), self.gather(v, &columns, head));
            let (mut dkeys, mut dvalues) = (vec![0.0; keys.len()], vec![0.0; values.len()]);
            for block in self.blocks(run) {
                let [queries, out, grad] = [q, out, grad].map(|from| self.queries(from, &block.rows, head));
                let sums = &sums[(head * rows + block.rows.start) * self.repeats..];
                let block_width = block.positions.len();
                let mut weights = self.scores(&block, &queries, &keys);
                let mut dscores = wide_transposed_product(&grad, self.at(&values, &block), width);
                let pairs = weights.chunks_exact_mut(block_width).zip(dscores.chunks_exact_mut(block_width));
                for (j, (weights, dscores)) in pairs.enumerate() {
                    let span = self.span(&block, j);
                    for hidden in [0..span.start, span.end..block_width] {
                        weights[hidden.clone()].fill(0.0);
                        dscores[hidden].fill(0.0);
                    }
                    let (out, grad) = (&out[j * width..][..width], &grad[j * width..][..width]);
                    let (weights, dscores) = (&mut weights[span.clone()], &mut dscores[span]);
                    backward_row(weights, dscores, sums[j], out, grad, self.scale, self.cap);
                }
                let at = block.positions.start * width..block.positions.end * width;
                let rows = block.rows.start * self.repeats * width..block.rows.end * self.repeats * width;
                times(&mut dq[rows], &dscores, &keys[at.clone()], block_width);
                add_transposed_times(&mut dkeys[at.clone()], &dscores, &queries, queries.len() / width);
                add_transposed_times(&mut dvalues[at], &weights, &grad, grad.len() / width);
            }
            for (sum, part) in [(&mut dk, &dkeys), (&mut dv, &dvalues)] {
                for (column, part) in columns.iter().zip(part.chunks_exact(width)) {
                    sum[column * width..][..width].iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            }
        }
        [dq, dk, dv]
    }
}

/// Copies one head's rows, `span` wide, into `[rows, heads, span]`, from row `first` on.
fn scatter(out: &mut [f32], part: &[f32], head: usize, heads: usize, first: usize, span: usize) {
    for (i, part) in part.chunks_exact(span).enumerate() {
        out[((first + i) * heads + head) * span..][..span].copy_from_slice(part);
    }
}

/// Applies `map` to each task, on the pool's threads if it has several.
fn each<T: Sync, R: Send>(tasks: &[T], map: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    if rayon::current_num_threads() == 1 {
        tasks.iter().map(map).collect()
    } else {
        tasks.par_iter().map(map).collect()
    }
}

impl CustomOp3 for TreeAttention {
    fn name(&self) -> &'static str {
        "tree-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (out, logsumexp) = self.tree.forward([elements(s1, l1)?, elements(s2, l2)?, elements(s3, l3)?]);
        let shape = Shape::from((self.tree.mask.rows(), out.len() / self.tree.mask.rows().max(1)));
        // A forward runs once; if it ran again it would compute the same values.
        let _ = self.logsumexp.set(logsumexp);
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let ((qs, ql), (ks, kl), (vs, vl)) = (q.storage_and_layout(), k.storage_and_layout(), v.storage_and_layout());
        let ((os, ol), (gs, gl)) = (out.storage_and_layout(), grad.storage_and_layout());
        let inputs = [
            tensor_elements(&qs, ql)?,
            tensor_elements(&ks, kl)?,
            tensor_elements(&vs, vl)?,
            tensor_elements(&os, ol)?,
            tensor_elements(&gs, gl)?,
        ];
        let sums = self.logsumexp.get().map_or(&[][..], Vec::as_slice);
        let [dq, dk, dv] = self.tree.backward(inputs, sums);
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

vectorised! {
fn scale_and_cap<FMA>(scores: &mut [f32], scale: f32, cap: Option<f32>) {
    match cap {
        None => scores.iter_mut().for_each(|score| *score *= scale),
        Some(cap) => {
            for score in scores {
                // tanh(x) = 1 − 2/(e^2x + 1)
                *score = cap * (1.0 - 2.0 / (exp::<FMA>(2.0 * *score * scale / cap) + 1.0));
            }
        }
    }
}
}

vectorised! {
/// Replaces scores by weights w = e^(score − sum), and d = grad·vᵀ by the gradient of the unscaled scores, scale · w ·
/// (d − grad·out), times 1 − (score/cap)² if scores are capped.
fn backward_row<FMA>(
    weights: &mut [f32],
    dscores: &mut [f32],
    sum: f32,
    out: &[f32],
    grad: &[f32],
    scale: f32,
    cap: Option<f32>,
) {
    let mean = inline_dot::<FMA>(out, grad);
    match cap {
        None => {
            for (w, d) in weights.iter_mut().zip(dscores.iter_mut()) {
                *w = exp::<FMA>(*w - sum);
                *d = scale * *w * (*d - mean);
            }
        }
        Some(cap) => {
            for (w, d) in weights.iter_mut().zip(dscores.iter_mut()) {
                let tanh = *w / cap;
                *w = exp::<FMA>(*w - sum);
                *d = scale * *w * (*d - mean) * (1.0 - tanh * tanh);
            }
        }
    }
}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, check, values};
    use super::*;

    /// Builds a chain of `long` tokens, two consecutive chains that branch from its middle, and one more from its
    /// start.
    fn tree(cached: usize, long: usize, branch: usize) -> Arc<TreeMask> {
        let mut parents: Vec<Option<usize>> = (0..long).map(|i| i.checked_sub(1)).collect();
        for start in [Some(long / 2), Some(long + branch / 2), None] {
            let first = parents.len();
            parents.extend((0..branch).map(|i| if i == 0 { start } else { Some(first + i - 1) }));
        }
        Arc::new(TreeMask::new(cached, parents))
    }

    #[test]
    fn matches_the_composite() {
        for (cached, long, branch) in [(0, 1, 1), (3, 5, 4), (0, 131, 7)] {
            let mask = tree(cached, long, branch);
            let (t, s) = (mask.rows(), mask.rows() + cached);
            for (heads, kv_heads, width) in [(4, 2, 6), (3, 3, 16)] {
                for (window, cap) in [(None, None), (Some(3), None), (None, Some(1.5)), (Some(40), Some(4.0))] {
                    let shapes = [[t, heads, width], [s, kv_heads, width], [s, kv_heads, width]];
                    let inputs: Vec<Tensor> = (1..).zip(&shapes).map(|(seed, shape)| values(seed, shape)).collect();
                    check(&inputs, |t| tree_attention(&t[0], &t[1], &t[2], &mask, 0.6, window, cap));
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let mask = tree(2, 90, 70);
        let (t, s) = (mask.rows(), mask.rows() + 2);
        let [q, k, v] = [values(1, &[t, 4, 8]), values(2, &[s, 2, 8]), values(3, &[s, 2, 8])];
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let vars = [&q, &k, &v].map(|t| candle_core::Var::from_tensor(t).unwrap());
                let out = tree_attention(&vars[0], &vars[1], &vars[2], &mask, 0.3, None, None).unwrap();
                let store = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                vars.map(|var| store.get(&var).unwrap().clone())
            })
        };
        for (one, three) in run(1).iter().zip(run(3)) {
            assert_close("gradient", one, &three, 0.0);
        }
    }

    #[test]
    fn nan_propagates() {
        let mask = Arc::new(TreeMask::new(0, [None, Some(0)]));
        let nan = (values(1, &[2, 1, 4]) * f64::NAN).unwrap();
        let [k, v] = [values(2, &[2, 1, 4]), values(3, &[2, 1, 4])];
        let out = tree_attention(&nan, &k, &v, &mask, 1.0, None, None).unwrap();
        assert!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| x.is_nan()));
    }

    #[test]
    fn mismatched_shapes_are_rejected() {
        let mask = Arc::new(TreeMask::new(1, [None, Some(0)]));
        let [q, kv] = [values(1, &[2, 2, 4]), values(2, &[2, 1, 4])];
        let error = tree_attention(&q, &kv, &kv, &mask, 1.0, None, None).unwrap_err().to_string();
        assert!(error.contains("2 rows after 1 cached"), "{error}");
    }
}

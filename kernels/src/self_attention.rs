//! Attention half of a transformer layer as one operation.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::attention::{Tree, tree_attention};
use super::matrix::Matrix;
use super::rms_norm::{self, normed, rms_norm};
use super::rope::{rope, rotated};
use super::tree_mask::TreeMask;
use super::{accumulate_vector, elements, is_block, tensor_elements, with_elements};

/// Weights and settings of a layer's attention half: norm, query, key and value projections, rotary positions,
/// attention within a tree, output projection.
#[derive(Debug, Clone)]
pub struct SelfAttention {
    /// Weights of the RMS norm, `[D]`.
    pub norm: Tensor,
    /// Constant added to the mean square in the norms.
    pub eps: f64,
    /// Query projection, `[H·hd, D]`.
    pub q: Matrix,
    /// Key projection, `[KV·hd, D]`.
    pub k: Matrix,
    /// Value projection, `[KV·hd, D]`.
    pub v: Matrix,
    /// Output projection, `[D, H·hd]`.
    pub o: Matrix,
    /// Weights `[hd]` of the norms over each head of the queries and of the keys, applied before the rotation.
    pub head_norms: Option<[Tensor; 2]>,
    /// Cosines of the tokens' rotary angles, `[T, hd/2]`.
    pub cos: Tensor,
    /// Sines of the tokens' rotary angles, `[T, hd/2]`.
    pub sin: Tensor,
    /// Width of a head, `hd`.
    pub head_dim: usize,
    /// Attention mask, without cached tokens.
    pub mask: Arc<TreeMask>,
    /// Number of tokens that a token attends to, itself included; `None` for all that the mask allows.
    pub window: Option<usize>,
    /// Soft cap of the scores, if any.
    pub cap: Option<f64>,
}

/// Computes `x + attention(h)·oᵀ` with `h = rms_norm(x)`, for rows `x` `[T, D]`. Scores are divided by √hd.
///
/// Gradients flow as in [`feed_forward`](super::feed_forward()). For the backward it keeps the rotated queries and keys
/// (if heads have norms, the projections before these), the values, the attention output, and a number per row and
/// head. Fails when the shapes do not match.
pub fn self_attention(x: &Tensor, block: &SelfAttention) -> Result<Tensor> {
    let SelfAttention { norm, eps, q, k, v, o, head_norms, cos, sin, head_dim: hd, mask, window, cap } = block;
    let (t, d) = x.dims2()?;
    let (heads, kv_heads) = (q.weight.dim(0)? / hd, k.weight.dim(0)? / hd);
    let matrices = [q, k, v, o].into_iter().flat_map(Matrix::tensors);
    if !is_block(x, [norm, cos, sin].into_iter().chain(matrices).chain(head_norms.iter().flatten())) {
        let h = rms_norm(x, norm, *eps)?;
        let of = |matrix: &Matrix, heads: usize| matrix.apply(&h)?.reshape((t, heads, *hd));
        let (mut queries, mut keys) = (of(q, heads)?, of(k, kv_heads)?);
        if let Some([q, k]) = head_norms {
            (queries, keys) = (rms_norm(&queries, q, *eps)?, rms_norm(&keys, k, *eps)?);
        }
        let (queries, keys) = (rope(&queries, cos, sin)?, rope(&keys, cos, sin)?);
        let scale = 1.0 / (*hd as f64).sqrt();
        let read = tree_attention(&queries, &keys, &of(v, kv_heads)?, mask, scale, *window, *cap)?;
        return x + o.apply(&read)?;
    }
    let (q_width, kv_width) = (heads * hd, kv_heads * hd);
    let fits = norm.dims() == [d]
        && q.has_shape(q_width, d)
        && k.has_shape(kv_width, d)
        && v.has_shape(kv_width, d)
        && o.has_shape(d, q_width)
        && head_norms.iter().flatten().all(|norm| norm.dims() == [*hd])
        && cos.dims() == [t, hd / 2]
        && sin.dims() == [t, hd / 2]
        && (mask.cached(), mask.rows()) == (0, t)
        && kv_heads > 0
        && heads.is_multiple_of(kv_heads);
    if !fits {
        candle_core::bail!(
            "self_attention: x has shape {:?}, norm {:?}, q {}, k {}, v {}, o {}, norms of heads {:?}, angles {:?}, heads are {hd} wide and the mask is for {} rows after {} cached ones; these shapes do not match",
            x.dims(),
            norm.dims(),
            q.shapes(),
            k.shapes(),
            v.shapes(),
            o.shapes(),
            head_norms.iter().flatten().map(Tensor::dims).collect::<Vec<_>>(),
            cos.dims(),
            mask.rows(),
            mask.cached()
        )
    }
    if x.track_op() {
        return x.apply_op1(Op { block: block.clone(), saved: OnceLock::new() });
    }
    let (xs, xl) = x.storage_and_layout();
    Tensor::from_vec(block.forward(tensor_elements(&xs, xl)?)?.0, x.shape(), x.device())
}

/// Intermediate results that the forward keeps for the backward.
struct Saved {
    /// Queries (and below, keys) after the rotation. If heads have norms, those before the norms; the backward
    /// recomputes the rest.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    read: Vec<f32>,
    logsumexp: Vec<f32>,
}

impl SelfAttention {
    fn tree(&self) -> Result<Tree> {
        let hd = self.head_dim;
        let heads = [self.q.weight.dim(0)? / hd, self.k.weight.dim(0)? / hd, hd];
        Ok(Tree::new(&self.mask, heads, 1.0 / (hd as f64).sqrt(), self.window, self.cap))
    }

    /// Rotates heads by their tokens' angles, or back by the same angles if `direction` is −1.
    fn rotated_heads(&self, x: &[f32], direction: f32) -> Result<Vec<f32>> {
        with_elements([&self.cos, &self.sin], |[cos, sin]| {
            let heads = x.len() / (cos.len() * 2).max(1);
            Ok(rotated(x, cos, sin, [heads, self.head_dim / 2], direction))
        })
    }

    /// Normalises and rotates heads.
    fn normed_rotated_heads(&self, x: &[f32], norm: &Tensor) -> Result<Vec<f32>> {
        self.rotated_heads(&with_elements([norm], |[norm]| Ok(normed(x, norm, self.eps as f32)))?, 1.0)
    }

    fn forward(&self, x: &[f32]) -> Result<(Vec<f32>, Saved)> {
        let h = with_elements([&self.norm], |[norm]| Ok(normed(x, norm, self.eps as f32)))?;
        let (q, k, v) = (self.q.forward(&h)?, self.k.forward(&h)?, self.v.forward(&h)?);
        let (q, k, read, logsumexp) = match &self.head_norms {
            None => {
                let (q, k) = (self.rotated_heads(&q, 1.0)?, self.rotated_heads(&k, 1.0)?);
                let (read, logsumexp) = self.tree()?.forward([&q, &k, &v]);
                (q, k, read, logsumexp)
            }
            Some([q_norm, k_norm]) => {
                let (read, logsumexp) = self.tree()?.forward([
                    &self.normed_rotated_heads(&q, q_norm)?,
                    &self.normed_rotated_heads(&k, k_norm)?,
                    &v,
                ]);
                (q, k, read, logsumexp)
            }
        };
        let mut out = x.to_vec();
        self.o.add_forward(&mut out, &read)?;
        Ok((out, Saved { q, k, v, read, logsumexp }))
    }

    /// Returns the gradient of `x`, and adds those of the weights to their accumulators.
    fn backward(&self, x: &[f32], saved: &Saved, grad: &[f32]) -> Result<Vec<f32>> {
        let Saved { q, k, v, read, logsumexp } = saved;
        let eps = self.eps as f32;
        let dread = self.o.pull_back(grad, read, None)?;
        let tree = self.tree()?;
        let (dq, dk, dv) = match &self.head_norms {
            None => {
                let [dq, dk, dv] = tree.backward([q, k, v, read, &dread], logsumexp);
                (self.rotated_heads(&dq, -1.0)?, self.rotated_heads(&dk, -1.0)?, dv)
            }
            Some([q_norm, k_norm]) => {
                let (rotated_q, rotated_k) =
                    (self.normed_rotated_heads(q, q_norm)?, self.normed_rotated_heads(k, k_norm)?);
                let [dq, dk, dv] = tree.backward([&rotated_q, &rotated_k, v, read, &dread], logsumexp);
                let before = |d: &[f32], raw: &[f32], norm: &Tensor| {
                    let d = self.rotated_heads(d, -1.0)?;
                    let (d, dnorm) = with_elements([norm], |[norm]| Ok(rms_norm::pull_back([raw, norm, &d], eps)))?;
                    accumulate_vector(norm, dnorm)?;
                    Ok::<_, candle_core::Error>(d)
                };
                (before(&dq, q, q_norm)?, before(&dk, k, k_norm)?, dv)
            }
        };
        with_elements([&self.norm], |[norm]| {
            let h = normed(x, norm, eps);
            let dh = self.q.pull_back(&dq, &h, None)?;
            let dh = self.k.pull_back(&dk, &h, Some(dh))?;
            let dh = self.v.pull_back(&dv, &h, Some(dh))?;
            let (mut dx, dnorm) = rms_norm::pull_back([x, norm, &dh], eps);
            accumulate_vector(&self.norm, dnorm)?;
            dx.iter_mut().zip(grad).for_each(|(dx, grad)| *dx += grad);
            Ok(dx)
        })
    }
}

struct Op {
    block: SelfAttention,
    saved: OnceLock<Saved>,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, saved) = self.block.forward(elements(storage, layout)?)?;
        // A forward runs once; if it ran again it would compute the same values.
        let _ = self.saved.set(saved);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let Some(saved) = self.saved.get() else { candle_core::bail!("self_attention: a backward without a forward") };
        let dx = with_elements([x, &grad], |[x, grad]| self.block.backward(x, saved, grad))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::super::testing::{assert_close, flat, values};
    use super::super::{Adapter, Gradients, backward};
    use super::*;

    /// The last ones are biases, adapters and norms of heads.
    const NAMES: [&str; 13] =
        ["x", "norm", "q", "k", "v", "o", "q bias", "v bias", "k A", "k B", "o A", "o B", "q norm"];
    const HD: usize = 6;

    fn params(rows: usize, dtype: DType) -> Vec<(String, Var)> {
        let (d, q, kv) = (16, 4 * HD, 2 * HD);
        let shapes: [&[usize]; 13] = [
            &[rows, d],
            &[d],
            &[q, d],
            &[kv, d],
            &[kv, d],
            &[d, q],
            &[q],
            &[kv],
            &[3, d],
            &[kv, 3],
            &[3, q],
            &[d, 3],
            &[HD],
        ];
        // Scores of a size at which the softmax still distinguishes its columns.
        let value = |i: usize| (values(i as u64 + 1, shapes[i]) * 0.4).unwrap().to_dtype(dtype).unwrap();
        let var = |i: usize| Var::from_tensor(&value(i)).unwrap();
        NAMES.iter().enumerate().map(|(i, name)| ((*name).to_owned(), var(i))).collect()
    }

    /// Builds the mask of a prompt of five tokens with two continuations, the second of which is long.
    fn mask(rows: usize) -> Arc<TreeMask> {
        let parent = |row: usize| match row {
            0 => None,
            8 => Some(4),
            _ => Some(row - 1),
        };
        Arc::new(TreeMask::new(0, (0..rows).map(parent)))
    }

    /// Builds a block without, or with all, optional parts; queries and keys share one head norm.
    fn block(params: &[Tensor], bare: bool, window: Option<usize>, cap: Option<f64>) -> SelfAttention {
        let [x, norm, q, k, v, o, q_bias, v_bias, k_a, k_b, o_a, o_b, head_norm] = params.to_vec().try_into().unwrap();
        let angle = values(7, &[x.dim(0).unwrap(), HD / 2]).to_dtype(x.dtype()).unwrap();
        let (cos, sin, mask) = (angle.cos().unwrap(), angle.sin().unwrap(), mask(x.dim(0).unwrap()));
        let [mut q, mut k, mut v, mut o] = [q, k, v, o].map(Matrix::from);
        if !bare {
            (q.bias, v.bias) = (Some(q_bias), Some(v_bias));
            k.adapter = Some(Adapter { a: k_a, b: k_b, scale: 2.0 });
            o.adapter = Some(Adapter { a: o_a, b: o_b, scale: 0.5 });
        }
        let head_norms = (!bare).then(|| [head_norm.clone(), head_norm]);
        SelfAttention { norm, eps: 0.1, q, k, v, o, head_norms, cos, sin, head_dim: HD, mask, window, cap }
    }

    fn tensors(params: &[(String, Var)]) -> Vec<Tensor> {
        params.iter().map(|(_, var)| var.as_tensor().clone()).collect()
    }

    /// Compares few rows and many with the composite in `f64`.
    #[test]
    fn matches_the_composite() {
        let cases = [(11, None, None), (90, Some(4), Some(3.0)), (131, None, None)];
        for ((rows, window, cap), bare) in cases.into_iter().flat_map(|case| [(case, true), (case, false)]) {
            let names = if bare { &NAMES[..6] } else { &NAMES };
            let run = |dtype| {
                let params = params(rows, dtype);
                let out = self_attention(&params[0].1, &block(&tensors(&params), bare, window, cap)).unwrap();
                let mut sums = Gradients::new(&params);
                let loss = (&out * values(9, out.dims()).to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap();
                assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), names.len());
                (out.detach(), sums)
            };
            let ((out, sums), (want, want_sums)) = (run(DType::F32), run(DType::F64));
            assert_close("output", &out, &want, 1e-5);
            for name in names {
                assert_close(name, sums.get(name).unwrap(), want_sums.get(name).unwrap(), 5e-5);
            }
        }
    }

    #[test]
    fn the_result_without_a_gradient_is_the_same() {
        let params = params(90, DType::F32);
        let (x, trained) = (&params[0].1, block(&tensors(&params), false, None, None));
        let detached: Vec<Tensor> = tensors(&params).iter().map(Tensor::detach).collect();
        let frozen = block(&detached, false, None, None);
        let plain = self_attention(&x.detach(), &frozen).unwrap();
        assert!(!plain.track_op());
        assert_eq!(flat(&plain), flat(&self_attention(x, &trained).unwrap()));
    }

    #[test]
    fn mismatched_shapes_are_rejected() {
        let params = params(11, DType::F32);
        let wrong = SelfAttention { mask: mask(12), ..block(&tensors(&params), true, None, None) };
        assert!(self_attention(&params[0].1, &wrong).unwrap_err().to_string().contains("the mask is for 12 rows"));
    }
}

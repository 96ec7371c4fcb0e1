//! The attention half of a layer as one operation.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::attention::{Tree, tree_attention};
use super::linear::linear;
use super::product::{add_times, add_times_transposed, plain_product, transposed_product};
use super::rms_norm::{self, normed, rms_norm};
use super::rope::{rope, rotated};
use super::tree_mask::TreeMask;
use super::{accumulate_product, accumulate_vector, elements, is_block, tensor_elements, with_elements};

/// Norm, queries, keys and values with rotary positions, attention within a tree, and a matrix after it.
#[derive(Debug, Clone)]
pub struct SelfAttention {
    /// `[D]`.
    pub norm: Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// `[H·hd, D]`.
    pub q: Tensor,
    /// `[KV·hd, D]`.
    pub k: Tensor,
    /// `[KV·hd, D]`.
    pub v: Tensor,
    /// `[D, H·hd]`.
    pub o: Tensor,
    /// `[T, hd/2]`, of the tokens' angles.
    pub cos: Tensor,
    /// `[T, hd/2]`.
    pub sin: Tensor,
    /// `hd`.
    pub head_dim: usize,
    /// Who sees whom; it has cached no tokens.
    pub mask: Arc<TreeMask>,
    /// Tokens that a token sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Bound of the scores.
    pub cap: Option<f64>,
}

/// `x + attention(h)·oᵀ` with `h = rms_norm(x)`, for rows `x` `[T, D]`; scores are divided by √hd.
///
/// Gradients as of [`feed_forward`](super::feed_forward). For the backward it keeps rotated queries and keys, values, what
/// was read, and a number for each row and head. Fails when the shapes do not fit.
pub fn self_attention(x: &Tensor, block: &SelfAttention) -> Result<Tensor> {
    let SelfAttention { norm, eps, q, k, v, o, cos, sin, head_dim: hd, mask, window, cap } = block;
    let (t, d) = x.dims2()?;
    let (heads, kv_heads) = (q.dim(0)? / hd, k.dim(0)? / hd);
    if !is_block(x, &[norm, q, k, v, o, cos, sin]) {
        let h = rms_norm(x, norm, *eps)?;
        let of = |weight: &Tensor, heads: usize| linear(&h, weight)?.reshape((t, heads, *hd));
        let (queries, keys) = (rope(&of(q, heads)?, cos, sin)?, rope(&of(k, kv_heads)?, cos, sin)?);
        let scale = 1.0 / (*hd as f64).sqrt();
        let read = tree_attention(&queries, &keys, &of(v, kv_heads)?, mask, scale, *window, *cap)?;
        return x + linear(&read, o)?;
    }
    let (wide, narrow) = (heads * hd, kv_heads * hd);
    let fits = norm.dims() == [d]
        && q.dims() == [wide, d]
        && k.dims() == [narrow, d]
        && v.dims() == [narrow, d]
        && o.dims() == [d, wide]
        && cos.dims() == [t, hd / 2]
        && sin.dims() == [t, hd / 2]
        && (mask.cached(), mask.rows()) == (0, t)
        && kv_heads > 0
        && heads.is_multiple_of(kv_heads);
    if !fits {
        candle_core::bail!(
            "self_attention: x has shape {:?}, norm {:?}, q {:?}, k {:?}, v {:?}, o {:?}, angles {:?}, heads are {hd} wide and the mask is for {} rows after {} cached ones; they do not fit",
            x.dims(),
            norm.dims(),
            q.dims(),
            k.dims(),
            v.dims(),
            o.dims(),
            cos.dims(),
            mask.rows(),
            mask.cached()
        )
    }
    if x.track_op() {
        return x.apply_op1(Op { block: block.clone(), kept: OnceLock::new() });
    }
    let (xs, xl) = x.storage_and_layout();
    Tensor::from_vec(block.forward(tensor_elements(&xs, xl)?)?.0, x.shape(), x.device())
}

/// What the forward leaves for the backward.
struct Kept {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    read: Vec<f32>,
    logsumexp: Vec<f32>,
}

impl SelfAttention {
    fn tree(&self) -> Result<Tree> {
        let hd = self.head_dim;
        let heads = [self.q.dim(0)? / hd, self.k.dim(0)? / hd, hd];
        Ok(Tree::new(&self.mask, heads, 1.0 / (hd as f64).sqrt(), self.window, self.cap))
    }

    /// Heads, turned by their tokens' angles, forward or (`direction` −1) back.
    fn turned(&self, x: &[f32], direction: f32) -> Result<Vec<f32>> {
        with_elements([&self.cos, &self.sin], |[cos, sin]| {
            let heads = x.len() / (cos.len() * 2).max(1);
            Ok(rotated(x, cos, sin, [heads, self.head_dim / 2], direction))
        })
    }

    fn forward(&self, x: &[f32]) -> Result<(Vec<f32>, Kept)> {
        let weights = [&self.norm, &self.q, &self.k, &self.v, &self.o];
        let d = self.norm.elem_count();
        with_elements(weights, |[norm, q, k, v, o]| {
            let h = normed(x, norm, self.eps as f32);
            let [q, k, v] = [q, k, v].map(|weight| transposed_product(&h, weight, d));
            let (q, k) = (self.turned(&q, 1.0)?, self.turned(&k, 1.0)?);
            let (read, logsumexp) = self.tree()?.forward([&q, &k, &v]);
            let mut out = x.to_vec();
            add_times_transposed(&mut out, &read, o, o.len() / d);
            Ok((out, Kept { q, k, v, read, logsumexp }))
        })
    }

    /// The gradient of `x`; those of the weights go to their accumulators.
    fn backward(&self, x: &[f32], kept: &Kept, grad: &[f32]) -> Result<Vec<f32>> {
        let Kept { q, k, v, read, logsumexp } = kept;
        let (d, eps) = (self.norm.elem_count(), self.eps as f32);
        let rows = x.len() / d;
        accumulate_product(&self.o, grad, read, rows)?;
        let dread = with_elements([&self.o], |[o]| Ok(plain_product(grad, o, d)))?;
        let [dq, dk, dv] = self.tree()?.backward([q, k, v, read, &dread], logsumexp);
        let (dq, dk) = (self.turned(&dq, -1.0)?, self.turned(&dk, -1.0)?);
        with_elements([&self.norm, &self.q, &self.k, &self.v], |[norm, wq, wk, wv]| {
            let h = normed(x, norm, eps);
            for (weight, slope) in [(&self.q, &dq), (&self.k, &dk), (&self.v, &dv)] {
                accumulate_product(weight, slope, &h, rows)?;
            }
            let mut dh = plain_product(&dq, wq, wq.len() / d);
            add_times(&mut dh, &dk, wk, wk.len() / d);
            add_times(&mut dh, &dv, wv, wv.len() / d);
            let (mut dx, dnorm) = rms_norm::pull_back([x, norm, &dh], eps);
            accumulate_vector(&self.norm, dnorm)?;
            dx.iter_mut().zip(grad).for_each(|(dx, grad)| *dx += grad);
            Ok(dx)
        })
    }
}

struct Op {
    block: SelfAttention,
    kept: OnceLock<Kept>,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, kept) = self.block.forward(elements(storage, layout)?)?;
        // A forward runs once; were it to run again it would find the same.
        let _ = self.kept.set(kept);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let Some(kept) = self.kept.get() else { candle_core::bail!("self_attention: a backward without a forward") };
        let dx = with_elements([x, &grad], |[x, grad]| self.block.backward(x, kept, grad))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::super::testing::{assert_close, flat, values};
    use super::super::{Gradients, backward};
    use super::*;

    const NAMES: [&str; 6] = ["x", "norm", "q", "k", "v", "o"];
    const HD: usize = 6;

    fn params(rows: usize, dtype: DType) -> Vec<(String, Var)> {
        let d = 16;
        let shapes: [&[usize]; 6] = [&[rows, d], &[d], &[4 * HD, d], &[2 * HD, d], &[2 * HD, d], &[d, 4 * HD]];
        // Scores of a size at which a softmax still tells its columns apart.
        let value = |i: usize| (values(i as u64 + 1, shapes[i]) * 0.4).unwrap().to_dtype(dtype).unwrap();
        let var = |i: usize| Var::from_tensor(&value(i)).unwrap();
        NAMES.iter().enumerate().map(|(i, name)| ((*name).to_owned(), var(i))).collect()
    }

    /// A prompt of five with two continuations, the second of which is long.
    fn mask(rows: usize) -> Arc<TreeMask> {
        let parent = |row: usize| match row {
            0 => None,
            8 => Some(4),
            _ => Some(row - 1),
        };
        Arc::new(TreeMask::new(0, (0..rows).map(parent)))
    }

    fn block(params: &[(String, Var)], window: Option<usize>, cap: Option<f64>) -> SelfAttention {
        let [x, norm, q, k, v, o] = [0, 1, 2, 3, 4, 5].map(|i| params[i].1.as_tensor().clone());
        let angle = values(7, &[x.dim(0).unwrap(), HD / 2]).to_dtype(x.dtype()).unwrap();
        let (cos, sin, mask) = (angle.cos().unwrap(), angle.sin().unwrap(), mask(x.dim(0).unwrap()));
        SelfAttention { norm, eps: 0.1, q, k, v, o, cos, sin, head_dim: HD, mask, window, cap }
    }

    /// Few rows and many, against the composite in `f64`.
    #[test]
    fn matches_the_composite() {
        for (rows, window, cap) in [(11, None, None), (90, Some(4), Some(3.0)), (131, None, None)] {
            let run = |dtype| {
                let params = params(rows, dtype);
                let out = self_attention(&params[0].1, &block(&params, window, cap)).unwrap();
                let mut sums = Gradients::new(&params).unwrap();
                let loss = (&out * values(9, out.dims()).to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap();
                assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), NAMES.len());
                (out.detach(), sums)
            };
            let ((out, sums), (want, want_sums)) = (run(DType::F32), run(DType::F64));
            assert_close("output", &out, &want, 1e-5);
            for name in NAMES {
                assert_close(name, sums.get(name).unwrap(), want_sums.get(name).unwrap(), 5e-5);
            }
        }
    }

    #[test]
    fn without_a_gradient_it_is_the_same() {
        let params = params(90, DType::F32);
        let (x, trained) = (&params[0].1, block(&params, None, None));
        let [norm, q, k, v, o] = [&trained.norm, &trained.q, &trained.k, &trained.v, &trained.o].map(Tensor::detach);
        let frozen = SelfAttention { norm, q, k, v, o, ..trained.clone() };
        let plain = self_attention(&x.detach(), &frozen).unwrap();
        assert!(!plain.track_op());
        assert_eq!(flat(&plain), flat(&self_attention(x, &trained).unwrap()));
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let params = params(11, DType::F32);
        let wrong = SelfAttention { mask: mask(12), ..block(&params, None, None) };
        assert!(self_attention(&params[0].1, &wrong).unwrap_err().to_string().contains("the mask is for 12 rows"));
    }
}

//! The feed-forward half of a layer as one operation.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::gated::{Activation, gated, let_through, pull_back};
use super::linear::linear;
use super::product::{add_times, add_times_transposed, plain_product, transposed_product};
use super::rms_norm::{self, normed, rms_norm};
use super::{accumulate_product, accumulate_vector, elements, is_block, tensor_elements, with_elements};

/// Norm, gate and two matrices on the way up, one on the way down (Shazeer 2020).
#[derive(Debug, Clone)]
pub struct FeedForward {
    /// `[D]`.
    pub norm: Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// `[F, D]`.
    pub gate: Tensor,
    /// `[F, D]`.
    pub up: Tensor,
    /// `[D, F]`.
    pub down: Tensor,
    /// Of the gate.
    pub activation: Activation,
}

/// `x + (activation(h·gateᵀ) ⊙ h·upᵀ)·downᵀ` with `h = rms_norm(x)`, for rows `x` `[T, D]`.
///
/// Gradients flow to `x`, and to the weights by [`backward`](super::backward) alone: the fused path adds them to their
/// accumulators and never tells candle, whose store would zero and add a copy of each tensor within. For the backward it
/// keeps what stands before the gate and nothing else. Fails when the shapes do not fit.
pub fn feed_forward(x: &Tensor, block: &FeedForward) -> Result<Tensor> {
    let FeedForward { norm, eps, gate, up, down, activation } = block;
    if !is_block(x, &[norm, gate, up, down]) || x.dims2().is_err() {
        let h = rms_norm(x, norm, *eps)?;
        return x + linear(&gated(&linear(&h, gate)?, &linear(&h, up)?, *activation)?, down)?;
    }
    let (d, f) = (x.dim(1)?, gate.dim(0)?);
    if norm.dims() != [d] || gate.dims() != [f, d] || up.dims() != [f, d] || down.dims() != [d, f] {
        candle_core::bail!(
            "feed_forward: x has shape {:?}, norm {:?}, gate {:?}, up {:?} and down {:?}, they do not fit",
            x.dims(),
            norm.dims(),
            gate.dims(),
            up.dims(),
            down.dims()
        )
    }
    if x.track_op() {
        return x.apply_op1(Op { block: block.clone(), kept: OnceLock::new() });
    }
    let (xs, xl) = x.storage_and_layout();
    Tensor::from_vec(block.forward(tensor_elements(&xs, xl)?)?.0, x.shape(), x.device())
}

impl FeedForward {
    /// The result, and what stands before the gate: `h·gateᵀ` and `h·upᵀ`.
    fn forward(&self, x: &[f32]) -> Result<(Vec<f32>, [Vec<f32>; 2])> {
        with_elements([&self.norm, &self.gate, &self.up, &self.down], |[norm, gate, up, down]| {
            let h = normed(x, norm, self.eps as f32);
            let before = [gate, up].map(|weight| transposed_product(&h, weight, norm.len()));
            let mut out = x.to_vec();
            let through = let_through(&before[0], &before[1], self.activation);
            add_times_transposed(&mut out, &through, down, down.len() / norm.len());
            Ok((out, before))
        })
    }

    /// The gradient of `x`; those of the weights go to their accumulators.
    fn backward(&self, x: &[f32], [g, u]: [&[f32]; 2], grad: &[f32]) -> Result<Vec<f32>> {
        with_elements([&self.norm, &self.gate, &self.up, &self.down], |[norm, gate, up, down]| {
            let (d, eps) = (norm.len(), self.eps as f32);
            let (rows, f) = (x.len() / d, gate.len() / d);
            let mut through = let_through(g, u, self.activation);
            accumulate_product(&self.down, grad, &through, rows)?;
            let mut dup = plain_product(grad, down, d);
            // In the place of what was let through, which is not needed any more.
            pull_back(&mut through, &mut dup, g, u, self.activation);
            let dgate = through;
            let h = normed(x, norm, eps);
            accumulate_product(&self.gate, &dgate, &h, rows)?;
            accumulate_product(&self.up, &dup, &h, rows)?;
            let mut dh = plain_product(&dgate, gate, f);
            add_times(&mut dh, &dup, up, f);
            let (mut dx, dnorm) = rms_norm::pull_back([x, norm, &dh], eps);
            accumulate_vector(&self.norm, dnorm)?;
            dx.iter_mut().zip(grad).for_each(|(dx, grad)| *dx += grad);
            Ok(dx)
        })
    }
}

struct Op {
    block: FeedForward,
    /// What stood before the gate.
    kept: OnceLock<[Vec<f32>; 2]>,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "feed-forward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, before) = self.block.forward(elements(storage, layout)?)?;
        // A forward runs once; were it to run again it would find the same.
        let _ = self.kept.set(before);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let Some([gate, up]) = self.kept.get() else {
            candle_core::bail!("feed_forward: a backward without a forward")
        };
        let dx = with_elements([x, &grad], |[x, grad]| self.block.backward(x, [gate, up], grad))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::super::testing::{assert_close, flat, values};
    use super::super::{Gradients, backward};
    use super::*;

    const NAMES: [&str; 5] = ["x", "norm", "gate", "up", "down"];

    fn params(rows: usize, d: usize, f: usize, dtype: DType) -> Vec<(String, Var)> {
        let shapes: [&[usize]; 5] = [&[rows, d], &[d], &[f, d], &[f, d], &[d, f]];
        let var = |i: usize| Var::from_tensor(&values(i as u64 + 1, shapes[i]).to_dtype(dtype).unwrap()).unwrap();
        NAMES.iter().enumerate().map(|(i, name)| ((*name).to_owned(), var(i))).collect()
    }

    fn block(params: &[(String, Var)], activation: Activation) -> FeedForward {
        let [_, norm, gate, up, down] = [0, 1, 2, 3, 4].map(|i| params[i].1.as_tensor().clone());
        FeedForward { norm, eps: 0.1, gate, up, down, activation }
    }

    /// Few rows and many, against the composite in `f64`.
    #[test]
    fn matches_the_composite() {
        for (rows, activation) in [(3, Activation::Silu), (70, Activation::GeluTanh), (131, Activation::Silu)] {
            let run = |dtype| {
                let params = params(rows, 12, 20, dtype);
                let out = feed_forward(&params[0].1, &block(&params, activation)).unwrap();
                let mut sums = Gradients::new(&params).unwrap();
                let loss = (&out * values(9, out.dims()).to_dtype(dtype).unwrap()).unwrap().sum_all().unwrap();
                assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), NAMES.len());
                (out.detach(), sums)
            };
            let ((out, sums), (want, want_sums)) = (run(DType::F32), run(DType::F64));
            assert_close("output", &out, &want, 1e-5);
            for name in NAMES {
                assert_close(name, sums.get(name).unwrap(), want_sums.get(name).unwrap(), 2e-5);
            }
        }
    }

    #[test]
    fn without_a_gradient_it_is_the_same() {
        let params = params(70, 12, 20, DType::F32);
        let (x, trained) = (&params[0].1, block(&params, Activation::Silu));
        let [norm, gate, up, down] = [&trained.norm, &trained.gate, &trained.up, &trained.down].map(Tensor::detach);
        let frozen = FeedForward { norm, gate, up, down, ..trained.clone() };
        let plain = feed_forward(&x.detach(), &frozen).unwrap();
        assert!(!plain.track_op());
        assert_eq!(flat(&plain), flat(&feed_forward(x, &trained).unwrap()));
        // Frozen weights let the gradient through and get none.
        let mut sums = Gradients::new(&params).unwrap();
        let loss = feed_forward(x, &frozen).unwrap().sum_all().unwrap();
        assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), 1);
        // Where nothing would lead back to the weights, the composite does.
        let loss = feed_forward(&x.detach(), &trained).unwrap().sum_all().unwrap();
        assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), 4);
    }

    #[test]
    fn a_backward_pass_that_would_lose_gradients_fails() {
        let params = params(3, 12, 20, DType::F32);
        let loss = feed_forward(&params[0].1, &block(&params, Activation::Silu)).unwrap().sum_all().unwrap();
        assert!(loss.backward().unwrap_err().to_string().contains("ops::backward"));
    }
}

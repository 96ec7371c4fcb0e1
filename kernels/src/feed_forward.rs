//! Feed-forward half of a transformer layer as one operation.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::gated::{Activation, gated, gated_product, pull_back};
use super::matrix::Matrix;
use super::rms_norm::{self, normed, rms_norm};
use super::{accumulate_vector, elements, is_block, tensor_elements, with_elements};

/// Weights and settings of a layer's gated feed-forward half (Shazeer 2020): norm, gate and up projections, activation,
/// down projection.
#[derive(Debug, Clone)]
pub struct FeedForward {
    /// Weights of the RMS norm, `[D]`.
    pub norm: Tensor,
    /// Constant added to the mean square in the norm.
    pub eps: f64,
    /// Gate projection, `[F, D]`.
    pub gate: Matrix,
    /// Up projection, `[F, D]`.
    pub up: Matrix,
    /// Down projection, `[D, F]`.
    pub down: Matrix,
    /// Activation of the gate.
    pub activation: Activation,
}

/// Computes `x + (activation(h·gateᵀ) ⊙ h·upᵀ)·downᵀ` with `h = rms_norm(x)`, for rows `x` `[T, D]`.
///
/// Gradients flow to `x`; those of the weights are computed only by [`backward`](super::backward). The fused path adds
/// them to their accumulators and does not register its tensors with candle, whose gradient store would zero and
/// accumulate a copy of each. For the backward it keeps the two inputs of the gating and nothing else. Fails when the
/// shapes do not match.
pub fn feed_forward(x: &Tensor, block: &FeedForward) -> Result<Tensor> {
    let FeedForward { norm, eps, gate, up, down, activation } = block;
    let matrices = [gate, up, down];
    if !is_block(x, [norm].into_iter().chain(matrices.into_iter().flat_map(Matrix::tensors))) || x.dims2().is_err() {
        let h = rms_norm(x, norm, *eps)?;
        return x + down.apply(&gated(&gate.apply(&h)?, &up.apply(&h)?, *activation)?)?;
    }
    let (d, f) = (x.dim(1)?, gate.weight.dim(0)?);
    if norm.dims() != [d] || !gate.has_shape(f, d) || !up.has_shape(f, d) || !down.has_shape(d, f) {
        candle_core::bail!(
            "feed_forward: x has shape {:?}, norm {:?}, gate {}, up {} and down {}; these shapes do not match",
            x.dims(),
            norm.dims(),
            gate.shapes(),
            up.shapes(),
            down.shapes()
        )
    }
    if x.track_op() {
        return x.apply_op1(Op { block: block.clone(), kept: OnceLock::new() });
    }
    let (xs, xl) = x.storage_and_layout();
    Tensor::from_vec(block.forward(tensor_elements(&xs, xl)?)?.0, x.shape(), x.device())
}

impl FeedForward {
    /// Returns the result, and the two inputs of the gating: `h·gateᵀ` and `h·upᵀ`.
    fn forward(&self, x: &[f32]) -> Result<(Vec<f32>, [Vec<f32>; 2])> {
        let h = with_elements([&self.norm], |[norm]| Ok(normed(x, norm, self.eps as f32)))?;
        let before = [self.gate.forward(&h)?, self.up.forward(&h)?];
        let mut out = x.to_vec();
        self.down.add_forward(&mut out, &gated_product(&before[0], &before[1], self.activation))?;
        Ok((out, before))
    }

    /// Returns the gradient of `x`, and adds those of the weights to their accumulators.
    fn backward(&self, x: &[f32], [g, u]: [&[f32]; 2], grad: &[f32]) -> Result<Vec<f32>> {
        let mut product = gated_product(g, u, self.activation);
        let mut dup = self.down.pull_back(grad, &product, None)?;
        // `product` is not needed any more, so its gradient overwrites it.
        pull_back(&mut product, &mut dup, g, u, self.activation);
        let dgate = product;
        with_elements([&self.norm], |[norm]| {
            let eps = self.eps as f32;
            let h = normed(x, norm, eps);
            let dh = self.gate.pull_back(&dgate, &h, None)?;
            let dh = self.up.pull_back(&dup, &h, Some(dh))?;
            let (mut dx, dnorm) = rms_norm::pull_back([x, norm, &dh], eps);
            accumulate_vector(&self.norm, dnorm)?;
            dx.iter_mut().zip(grad).for_each(|(dx, grad)| *dx += grad);
            Ok(dx)
        })
    }
}

struct Op {
    block: FeedForward,
    /// Inputs of the gating, kept by the forward.
    kept: OnceLock<[Vec<f32>; 2]>,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "feed-forward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, before) = self.block.forward(elements(storage, layout)?)?;
        // A forward runs once; if it ran again it would compute the same values.
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
    use super::super::{Adapter, Gradients, backward};
    use super::*;

    /// The last ones are biases and adapters.
    const NAMES: [&str; 8] = ["x", "norm", "gate", "up", "down", "gate bias", "down A", "down B"];

    fn params(rows: usize, d: usize, f: usize, dtype: DType) -> Vec<(String, Var)> {
        let shapes: [&[usize]; 8] = [&[rows, d], &[d], &[f, d], &[f, d], &[d, f], &[f], &[3, f], &[d, 3]];
        let var = |i: usize| Var::from_tensor(&values(i as u64 + 1, shapes[i]).to_dtype(dtype).unwrap()).unwrap();
        NAMES.iter().enumerate().map(|(i, name)| ((*name).to_owned(), var(i))).collect()
    }

    fn block(params: &[Tensor], activation: Activation) -> FeedForward {
        let [_, norm, gate, up, down, bias, a, b] = params.to_vec().try_into().unwrap();
        let adapter = Adapter { a, b, scale: 0.5 };
        let gate = Matrix { bias: Some(bias), ..gate.into() };
        FeedForward {
            norm,
            eps: 0.1,
            gate,
            up: up.into(),
            down: Matrix { adapter: Some(adapter), ..down.into() },
            activation,
        }
    }

    fn tensors(params: &[(String, Var)]) -> Vec<Tensor> {
        params.iter().map(|(_, var)| var.as_tensor().clone()).collect()
    }

    /// Compares few rows and many with the composite in `f64`.
    #[test]
    fn matches_the_composite() {
        for (rows, activation) in [(3, Activation::Silu), (70, Activation::GeluTanh), (131, Activation::Silu)] {
            let run = |dtype| {
                let params = params(rows, 12, 20, dtype);
                let out = feed_forward(&params[0].1, &block(&tensors(&params), activation)).unwrap();
                let mut sums = Gradients::new(&params);
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
    fn the_result_without_a_gradient_is_the_same() {
        let params = params(70, 12, 20, DType::F32);
        let (x, trained) = (&params[0].1, block(&tensors(&params), Activation::Silu));
        let detached: Vec<Tensor> = tensors(&params).iter().map(Tensor::detach).collect();
        let frozen = block(&detached, Activation::Silu);
        let plain = feed_forward(&x.detach(), &frozen).unwrap();
        assert!(!plain.track_op());
        assert_eq!(flat(&plain), flat(&feed_forward(x, &trained).unwrap()));
        // Frozen weights pass the gradient on and receive none.
        let mut sums = Gradients::new(&params);
        let loss = feed_forward(x, &frozen).unwrap().sum_all().unwrap();
        assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), 1);
        // If no path of the graph leads back to the weights, the composite runs.
        let loss = feed_forward(&x.detach(), &trained).unwrap().sum_all().unwrap();
        assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), NAMES.len() - 1);
    }

    /// The other weights are frozen, as when adapters are trained.
    #[test]
    fn a_single_trained_weight_gets_the_same_gradient() {
        let params = params(70, 12, 20, DType::F32);
        let run = |tensors: &[Tensor]| {
            let mut sums = Gradients::new(&params);
            let loss = feed_forward(&params[0].1, &block(tensors, Activation::Silu)).unwrap().sqr().unwrap();
            let reached = backward(&loss.sum_all().unwrap(), &mut [&mut sums]).unwrap();
            (reached, ["x", "down A", "down B"].map(|name| flat(sums.get(name).unwrap())))
        };
        let all = tensors(&params);
        let some: Vec<Tensor> =
            all.iter().enumerate().map(|(i, t)| if i < 6 { t.detach() } else { t.clone() }).collect();
        let ((reached, got), (_, want)) = (run(&some), run(&all));
        assert_eq!((reached, got), (3, want));
    }

    #[test]
    fn a_backward_pass_that_would_lose_gradients_fails() {
        let params = params(3, 12, 20, DType::F32);
        let loss = feed_forward(&params[0].1, &block(&tensors(&params), Activation::Silu)).unwrap().sum_all().unwrap();
        assert!(loss.backward().unwrap_err().to_string().contains("preceptor_kernels::backward"));
    }
}

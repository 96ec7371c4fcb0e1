//! Gated activations of feed-forward layers (Shazeer 2020).

use std::mem::MaybeUninit;

use super::vector::{exp, vectorised};
use super::{elements, fill_rows2, filled, is_fused, tensor_elements};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

/// Activation of a gate: `g · σ(s(g))`, with σ the logistic function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// SwiGLU: `s(g) = g`.
    Silu,
    /// GeGLU with the tanh approximation of GELU (Hendrycks & Gimpel 2016): `s(g) = 2·√(2/π)·(g + 0.044715·g³)`.
    GeluTanh,
}

impl Activation {
    /// Returns `[a, b]` of `s(g) = g·(a + b·g²)`.
    fn coefficients(self) -> [f32; 2] {
        const ROOT: f32 = 1.595_769; // 2·√(2/π)
        match self {
            Self::Silu => [1.0, 0.0],
            Self::GeluTanh => [ROOT, ROOT * 0.044_715],
        }
    }
}

/// Computes `activation(gate) · up` element by element.
///
/// Both inputs and the result have the same shape. Gradients flow to both. Fails when the shapes differ.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("gated: gate has shape {:?} and up {:?}, they must be the same", gate.dims(), up.dims())
    }
    if is_fused(gate) && is_fused(up) {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(activation));
    }
    match activation {
        Activation::Silu => gate.silu()? * up,
        Activation::GeluTanh => gate.gelu()? * up,
    }
}

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (elements(s1, l1)?, elements(s2, l2)?);
        let out = gated_product(gate, up, self.0);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (gs, gl) = gate.storage_and_layout();
        let (us, ul) = up.storage_and_layout();
        let (ds, dl) = grad.storage_and_layout();
        let (gv, uv, dv) = (tensor_elements(&gs, gl)?, tensor_elements(&us, ul)?, tensor_elements(&ds, dl)?);
        let mut dgate = vec![0.0; gv.len()];
        let mut dup = dv.to_vec();
        pull_back(&mut dgate, &mut dup, gv, uv, self.0);
        let dgate = gate.track_op().then(|| Tensor::from_vec(dgate, gate.shape(), gate.device())).transpose()?;
        let dup = up.track_op().then(|| Tensor::from_vec(dup, up.shape(), up.device())).transpose()?;
        Ok((dgate, dup))
    }
}

/// Computes `activation(gate) · up`.
pub(super) fn gated_product(gate: &[f32], up: &[f32], activation: Activation) -> Vec<f32> {
    let multiply = |first: usize, out: &mut [MaybeUninit<f32>]| {
        forward(out, &gate[first..][..out.len()], &up[first..][..out.len()], activation.coefficients());
    };
    // SAFETY: each element is written; a shorter `up` panics.
    unsafe { filled(gate.len(), 1, multiply) }
}

/// Replaces `dgate` and `dup` by the gradients of gate and up; `dup` initially holds that of the result.
pub(super) fn pull_back(dgate: &mut [f32], dup: &mut [f32], gate: &[f32], up: &[f32], activation: Activation) {
    fill_rows2(dgate, dup, 1, |first, dgate, dup| {
        let n = dgate.len();
        backward(dgate, dup, &gate[first..][..n], &up[first..][..n], activation.coefficients());
    });
}

vectorised! {
fn forward<FMA>(out: &mut [MaybeUninit<f32>], gate: &[f32], up: &[f32], coefficients: [f32; 2]) {
    let [a, b] = coefficients;
    for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
        out.write(g / (1.0 + exp::<FMA>(-g * (a + b * g * g))) * u);
    }
}
}

vectorised! {
/// With σ = σ(s(g)): dg = d·u·σ·(1 + g·s'(g)·(1 − σ)), du = d·g·σ. `dup` initially holds d.
fn backward<FMA>(dgate: &mut [f32], dup: &mut [f32], gate: &[f32], up: &[f32], coefficients: [f32; 2]) {
    let [a, b] = coefficients;
    for (((dgate, dup), g), u) in dgate.iter_mut().zip(dup.iter_mut()).zip(gate).zip(up) {
        let d = *dup;
        let sigma = 1.0 / (1.0 + exp::<FMA>(-g * (a + b * g * g)));
        *dgate = d * u * sigma * (1.0 + g * (a + 3.0 * b * g * g) * (1.0 - sigma));
        *dup = d * g * sigma;
    }
}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, flat, values};
    use super::*;

    const BOTH: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    #[test]
    fn matches_the_composite() {
        for (shape, activation) in
            [&[1][..], &[3, 7], &[151, 193]].into_iter().flat_map(|shape| BOTH.map(|a| (shape, a)))
        {
            check(&[(values(1, shape) * 3.0).unwrap(), values(2, shape)], |t| gated(&t[0], &t[1], activation));
        }
    }

    #[test]
    fn accepts_transposed_inputs() {
        check(&[values(1, &[5, 9]), values(2, &[5, 9])], |t| gated(&t[0].t()?, &t[1].t()?, Activation::Silu));
    }

    #[test]
    fn is_finite_for_extreme_gates() {
        let gate = Tensor::new(&[-1e4f32, -90.0, 90.0], &candle_core::Device::Cpu).unwrap();
        for activation in BOTH {
            let out = flat(&gated(&gate, &gate.ones_like().unwrap(), activation).unwrap());
            assert!(out[0].abs() < 1e-30 && out[1].abs() < 1e-30 && out[2] == 90.0, "{out:?}");
        }
    }
}

//! Root-mean-square normalisation (Zhang & Sennrich 2019).

use super::vector::{dot, vectorised};
use super::{composite_dtype, elements, filled, is_fused, rows_per_task, tensor_elements};
use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Number of rows whose weight gradients are summed together. It is fixed, so that the sum does not depend on the
/// thread count.
const BLOCK: usize = 64;

/// Computes `x / sqrt(mean(x²) + eps) · weight` over the last dimension.
///
/// `x` is `[.., D]`, `weight` is `[D]`; the result has the shape of `x`. Gradients flow to both. Fails when the last
/// dimension differs from the weight's.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if weight.dims() != [width] {
        bail!("rms_norm: weight has shape {:?}, expected [{width}] for an input {:?}", weight.dims(), x.dims())
    }
    if is_fused(x) && is_fused(weight) {
        return x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps: eps as f32, width });
    }
    let dtype = composite_dtype(x.dtype());
    let wide = x.to_dtype(dtype)?;
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    wide.broadcast_div(&scale)?.broadcast_mul(&weight.to_dtype(dtype)?)?.to_dtype(x.dtype())
}

struct RmsNorm {
    eps: f32,
    width: usize,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = normed(elements(s1, l1)?, elements(s2, l2)?, self.eps);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (xs, xl) = x.storage_and_layout();
        let (ws, wl) = weight.storage_and_layout();
        let (gs, gl) = grad.storage_and_layout();
        let inputs = [tensor_elements(&xs, xl)?, tensor_elements(&ws, wl)?, tensor_elements(&gs, gl)?];
        let (dx, dw) = pull_back(inputs, self.eps);
        let dx = x.track_op().then(|| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let dw = weight.track_op().then(|| Tensor::from_vec(dw, self.width, x.device())).transpose()?;
        Ok((dx, dw))
    }
}

fn inverse(row: &[f32], eps: f32) -> f32 {
    1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt()
}

/// Computes the RMS norm of rows `x`, times `weight`.
pub(super) fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    assert!(x.is_empty() || width > 0 && x.len().is_multiple_of(width), "complete rows");
    let scale = |first: usize, rows: &mut [MaybeUninit<f32>]| {
        let x = &x[first * width..][..rows.len()];
        for (out, x) in rows.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            scale_row(out, x, weight, inverse(x, eps));
        }
    };
    // SAFETY: the length is a multiple of the width, and each element of a row is written.
    unsafe { filled(x.len(), width, scale) }
}

/// Returns the gradients of rows `x` and of the weight, given that of the result.
pub(super) fn pull_back([x, weight, grad]: [&[f32]; 3], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let mut dx = vec![0.0; x.len()];
    let rows = x.len() / width.max(1);
    let mut partial = vec![0.0; rows.div_ceil(BLOCK) * width];
    let work = |block: usize, dx: &mut [f32], dw: &mut [f32]| {
        let at = block * BLOCK * width;
        let (x, g) = (&x[at..][..dx.len()], &grad[at..][..dx.len()]);
        for ((dx, x), g) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(g.chunks_exact(width)) {
            backward_row(dx, dw, x, g, weight, inverse(x, eps));
        }
    };
    if rows_per_task(rows, width) >= rows {
        for (block, (dx, dw)) in dx.chunks_mut(BLOCK * width).zip(partial.chunks_mut(width)).enumerate() {
            work(block, dx, dw);
        }
    } else {
        dx.par_chunks_mut(BLOCK * width)
            .zip(partial.par_chunks_mut(width))
            .enumerate()
            .for_each(|(block, (dx, dw))| work(block, dx, dw));
    }
    let mut dw = vec![0.0f32; width];
    for block in partial.chunks_exact(width) {
        dw.iter_mut().zip(block).for_each(|(a, b)| *a += b);
    }
    (dx, dw)
}

vectorised! {
fn scale_row<FMA>(out: &mut [MaybeUninit<f32>], x: &[f32], weight: &[f32], inverse: f32) {
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        out.write(x * inverse * w);
    }
}
}

vectorised! {
/// Computes dx = inverse·(g·w − x̂·mean(g·w·x̂)) and dw += g·x̂, with x̂ = x·inverse.
fn backward_row<FMA>(dx: &mut [f32], dw: &mut [f32], x: &[f32], grad: &[f32], weight: &[f32], inverse: f32) {
    for ((((dx, dw), x), g), w) in dx.iter_mut().zip(dw.iter_mut()).zip(x).zip(grad).zip(weight) {
        *dw += g * x * inverse;
        *dx = g * w;
    }
    let mean = super::vector::inline_dot::<FMA>(dx, x) * inverse * inverse / x.len() as f32;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = inverse * (*dx - x * mean);
    }
}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, values};
    use super::*;

    #[test]
    fn matches_the_composite() {
        for shape in [&[1, 1][..], &[3, 7], &[2, 3, 37], &[131, 193]] {
            let weight = values(2, &shape[shape.len() - 1..]);
            check(&[(values(1, shape) + 0.3).unwrap(), weight], |t| rms_norm(&t[0], &t[1], 0.1));
        }
    }

    #[test]
    fn accepts_a_transposed_input() {
        check(&[values(1, &[5, 9]), values(2, &[5])], |t| rms_norm(&t[0].t()?, &t[1], 1e-5));
    }

    #[test]
    fn rejects_a_weight_of_another_width() {
        let error = rms_norm(&values(1, &[2, 4]), &values(1, &[3]), 1e-5).unwrap_err();
        assert!(error.to_string().contains("expected [4]"), "{error}");
    }
}

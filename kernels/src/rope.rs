//! Rotary position embedding (Su et al. 2021), in the variant that pairs the first half of a head with the second.

use std::mem::MaybeUninit;

use super::vector::vectorised;
use super::{elements, filled, is_fused, tensor_elements};
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

/// Rotates each pair `(x[i], x[i + hd/2])` by the angle of its token's position.
///
/// `x` is `[T, H, hd]`; `cos` and `sin` are `[T, hd/2]`, one row per token, and receive no gradient. The gradient of
/// `x` is the inverse rotation. Fails when the shapes do not match or `hd` is odd.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, width) = x.dims3()?;
    if width % 2 != 0 || cos.dims() != [tokens, width / 2] || sin.dims() != cos.dims() {
        bail!(
            "rope: cos has shape {:?} and sin {:?}, expected [{tokens}, {width}/2] for an input {:?}",
            cos.dims(),
            sin.dims(),
            x.dims()
        )
    }
    if is_fused(x) && is_fused(cos) && is_fused(sin) {
        let (cos, sin) = (cos.detach().contiguous()?, sin.detach().contiguous()?);
        return x.contiguous()?.apply_op1(Rope { cos, sin, heads, half: width / 2, direction: 1.0 });
    }
    let cos = cos.detach().to_dtype(x.dtype())?.unsqueeze(1)?;
    let sin = sin.detach().to_dtype(x.dtype())?.unsqueeze(1)?;
    let a = x.narrow(D::Minus1, 0, width / 2)?;
    let b = x.narrow(D::Minus1, width / 2, width / 2)?;
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
    heads: usize,
    half: usize,
    /// 1 for the rotation, −1 for its inverse.
    direction: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(storage, layout)?;
        let (cs, cl) = self.cos.storage_and_layout();
        let (ss, sl) = self.sin.storage_and_layout();
        let (cos, sin) = (tensor_elements(&cs, cl)?, tensor_elements(&ss, sl)?);
        let out = rotated(x, cos, sin, [self.heads, self.half], self.direction);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let inverse = Rope { cos, sin, heads: self.heads, half: self.half, direction: -self.direction };
        grad.contiguous()?.apply_op1_no_bwd(&inverse).map(Some)
    }
}

/// Rotates each pair of heads `[T, H, 2·half]` by its token's angle, or by the opposite angle if `direction` is −1.
pub(super) fn rotated(x: &[f32], cos: &[f32], sin: &[f32], [heads, half]: [usize; 2], direction: f32) -> Vec<f32> {
    let token = heads * half * 2;
    assert!(x.is_empty() || token > 0 && x.len().is_multiple_of(token), "complete tokens");
    let turn = |first: usize, rows: &mut [MaybeUninit<f32>]| {
        let x = &x[first * token..][..rows.len()];
        for (t, (out, x)) in rows.chunks_exact_mut(token).zip(x.chunks_exact(token)).enumerate() {
            let at = (first + t) * half;
            rotate(out, x, &cos[at..][..half], &sin[at..][..half], direction);
        }
    };
    // SAFETY: the length is a multiple of a token's, and both halves of each head are written.
    unsafe { filled(x.len(), token, turn) }
}

vectorised! {
/// Rotates one token's heads.
fn rotate<FMA>(out: &mut [MaybeUninit<f32>], x: &[f32], cos: &[f32], sin: &[f32], direction: f32) {
    let half = cos.len();
    for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
        let (first, second) = out.split_at_mut(half);
        let (a, b) = x.split_at(half);
        for (((((first, second), a), b), c), s) in
            first.iter_mut().zip(second.iter_mut()).zip(a).zip(b).zip(cos).zip(sin)
        {
            let s = s * direction;
            first.write(a * c - b * s);
            second.write(b * c + a * s);
        }
    }
}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, check, values};
    use super::*;

    #[test]
    fn matches_the_composite() {
        for (tokens, heads, width) in [(1, 1, 2), (5, 3, 14), (67, 5, 64)] {
            let angle = values(3, &[tokens, width / 2]);
            let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
            check(&[values(1, &[tokens, heads, width])], |t| {
                rope(&t[0], &cos.to_dtype(t[0].dtype())?, &sin.to_dtype(t[0].dtype())?)
            });
            check(&[values(1, &[heads, tokens, width])], |t| {
                rope(&t[0].transpose(0, 1)?, &cos.to_dtype(t[0].dtype())?, &sin.to_dtype(t[0].dtype())?)
            });
        }
    }

    #[test]
    fn a_quarter_turn_swaps_the_halves() {
        let x = Tensor::new(&[[[1f32, 2.0, 3.0, 4.0]]], &candle_core::Device::Cpu).unwrap();
        let one = Tensor::ones((1, 2), x.dtype(), x.device()).unwrap();
        let turned = rope(&x, &one.zeros_like().unwrap(), &one).unwrap();
        let want = Tensor::new(&[[[-3f32, -4.0, 1.0, 2.0]]], x.device()).unwrap();
        assert_close("turned", &turned, &want, 1e-7);
    }
}

//! Softmax of attention scores with an additive mask.

use super::vector::{LANES, exp, inline_dot, inline_max, total, vectorised};
use super::{composite_dtype, elements, fill_rows, is_fused, tensor_elements};
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

/// Computes `softmax(scale · scores + mask)` over the last dimension.
///
/// `scores` is `[.., T, S]`; `mask` is `[T, S]`, 0 for visible columns and −∞ for hidden ones, and receives no
/// gradient. A row without a visible column is all zeros. Masked columns at both ends of a row are skipped and only
/// zeroed.
pub fn masked_softmax(scores: &Tensor, mask: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let (rows, width) = (scores.dim(D::Minus2)?, scores.dim(D::Minus1)?);
    if let Some(mask) = mask
        && mask.dims() != [rows, width]
    {
        bail!("masked_softmax: mask has shape {:?}, expected [{rows}, {width}]", mask.dims())
    }
    if is_fused(scores) && mask.is_none_or(is_fused) {
        let mask = mask.map(|m| m.detach().contiguous()).transpose()?;
        let spans = match &mask {
            None => vec![(0, width)],
            Some(mask) => {
                let (storage, layout) = mask.storage_and_layout();
                tensor_elements(&storage, layout)?.chunks_exact(width.max(1)).map(span).collect()
            }
        };
        return scores.contiguous()?.apply_op1(MaskedSoftmax { mask, spans, width, scale: scale as f32 });
    }
    let dtype = composite_dtype(scores.dtype());
    let mut x = (scores.to_dtype(dtype)? * scale)?;
    if let Some(mask) = mask {
        x = x.broadcast_add(&mask.detach().to_dtype(dtype)?)?;
    }
    // A row without a finite score has the maximum −∞; a finite stand-in keeps NaN out.
    let max = x.detach().max_keepdim(D::Minus1)?.maximum(-1e30)?;
    let powers = x.broadcast_sub(&max)?.exp()?;
    let sum = powers.sum_keepdim(D::Minus1)?.maximum(1e-30)?;
    powers.broadcast_div(&sum)?.to_dtype(scores.dtype())
}

/// Returns the first visible column, and one past the last.
fn span(mask: &[f32]) -> (usize, usize) {
    let is_visible = |m: &f32| *m != f32::NEG_INFINITY;
    match (mask.iter().position(is_visible), mask.iter().rposition(is_visible)) {
        (Some(first), Some(last)) => (first, last + 1),
        _ => (0, 0),
    }
}

struct MaskedSoftmax {
    mask: Option<Tensor>,
    /// Visible columns of each mask row, as from [`span`]; one entry if there is no mask.
    spans: Vec<(usize, usize)>,
    width: usize,
    scale: f32,
}

impl CustomOp1 for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scores = elements(storage, layout)?;
        let guard = self.mask.as_ref().map(Tensor::storage_and_layout);
        let mask = guard.as_ref().map(|(storage, layout)| tensor_elements(storage, layout)).transpose()?;
        let width = self.width;
        let mut out = vec![0.0; scores.len()];
        fill_rows(&mut out, width, |first, rows| {
            let scores = &scores[first * width..][..rows.len()];
            for (r, (out, scores)) in rows.chunks_exact_mut(width).zip(scores.chunks_exact(width)).enumerate() {
                let at = (first + r) % self.spans.len();
                let (from, to) = self.spans[at];
                let mask = mask.map_or(&[][..], |m| &m[at * width + from..at * width + to]);
                softmax(&mut out[from..to], &scores[from..to], mask, self.scale);
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (ps, pl) = out.storage_and_layout();
        let (gs, gl) = grad.storage_and_layout();
        let (p, g) = (tensor_elements(&ps, pl)?, tensor_elements(&gs, gl)?);
        let width = self.width;
        let mut dscores = vec![0.0; p.len()];
        fill_rows(&mut dscores, width, |first, rows| {
            for (r, d) in rows.chunks_exact_mut(width).enumerate() {
                let (from, to) = self.spans[(first + r) % self.spans.len()];
                let at = (first + r) * width;
                backward(&mut d[from..to], &p[at + from..at + to], &g[at + from..at + to], self.scale);
            }
        });
        Tensor::from_vec(dscores, out.shape(), out.device()).map(Some)
    }
}

vectorised! {
/// Computes `softmax(scale · scores + mask)` of one row. An empty `mask` adds nothing.
fn softmax<FMA>(out: &mut [f32], scores: &[f32], mask: &[f32], scale: f32) {
    if mask.is_empty() {
        for (out, s) in out.iter_mut().zip(scores) {
            *out = s * scale;
        }
    } else {
        for ((out, s), m) in out.iter_mut().zip(scores).zip(mask) {
            *out = s * scale + m;
        }
    }
    softmax_in_place(out);
}
}

vectorised! {
/// Replaces scores by their softmax, or by zeros if all are −∞. Returns ln Σ e^score.
pub(super) fn softmax_in_place<FMA>(scores: &mut [f32]) -> f32 {
    let max = inline_max(scores);
    // A maximum of −∞ would give NaN below. A NaN among the scores propagates.
    let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp::<FMA>(chunk[i] - max);
            lanes[i] += chunk[i];
        }
    }
    let mut sum = total(lanes);
    for value in rest {
        *value = exp::<FMA>(*value - max);
        sum += *value;
    }
    let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    for value in scores {
        *value *= inverse;
    }
    max + sum.ln()
}
}

vectorised! {
/// Computes d = scale · p · (g − Σ p·g).
fn backward<FMA>(d: &mut [f32], p: &[f32], g: &[f32], scale: f32) {
    let mean = inline_dot::<FMA>(p, g);
    for ((d, p), g) in d.iter_mut().zip(p).zip(g) {
        *d = scale * p * (g - mean);
    }
}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, flat, values};
    use super::*;
    use candle_core::Device;

    /// Builds a causal mask with `offset` extra visible columns; if `blind`, nothing is visible to the last row.
    fn mask(rows: usize, width: usize, offset: usize, blind: bool) -> Tensor {
        let at = |t: usize, s: usize| {
            let hidden = s > t + offset || (s == 2 && t != 2) || (blind && t + 1 == rows);
            if hidden { f32::NEG_INFINITY } else { 0.0 }
        };
        let data: Vec<f32> = (0..rows * width).map(|i| at(i / width, i % width)).collect();
        Tensor::from_vec(data, (rows, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn matches_the_composite() {
        for shape in [&[3, 5][..], &[2, 3, 7, 19], &[4, 61, 83]] {
            let (rows, width) = (shape[shape.len() - 2], shape[shape.len() - 1]);
            check(&[values(1, shape)], |t| masked_softmax(&t[0], None, 0.7));
            for blind in [false, true] {
                let mask = mask(rows, width, width - rows, blind);
                check(&[values(1, shape)], |t| masked_softmax(&t[0], Some(&mask.to_dtype(t[0].dtype())?), 0.7));
            }
        }
    }

    #[test]
    fn a_fully_masked_row_is_zero_and_others_sum_to_one() {
        let out = masked_softmax(&values(1, &[4, 6]), Some(&mask(4, 6, 2, true)), 1.0).unwrap();
        let sums = flat(&out.sum(1).unwrap());
        assert!(sums[..3].iter().all(|s| (s - 1.0).abs() < 1e-6) && sums[3] == 0.0, "{sums:?}");
    }

    #[test]
    fn nan_propagates() {
        let scores = Tensor::new(&[[1f32, f32::NAN, 2.0]], &Device::Cpu).unwrap();
        assert!(flat(&masked_softmax(&scores, None, 1.0).unwrap()).iter().all(|p| p.is_nan()));
    }
}

//! Log-probabilities and entropies composed of candle operations, for any dtype and device.

use candle_core::{CpuStorage, CudaStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, Var};

use super::{CHUNK_ELEMENTS, softcap};
use crate::{composite_dtype, linear, on_cpu, on_cuda};

/// Returns the log-probability and entropy, each `[N]`, of each row of `logits` `[N, V]`.
pub(super) fn token_logprobs(logits: &Tensor, targets: &[u32], temperature: f64) -> Result<(Tensor, Tensor)> {
    let x = (logits.to_dtype(composite_dtype(logits.dtype()))? * (1.0 / temperature))?;
    // The bound keeps 0·−∞ out of the entropy; e^−1e4 is 0 in every dtype.
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.maximum(-1e4)?;
    let all = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    let entropy = (all.exp()? * &all)?.sum(D::Minus1)?.neg()?;
    Ok((all.gather(&index, D::Minus1)?.squeeze(D::Minus1)?, entropy))
}

/// Returns [`token_logprobs`] of `softcap(hidden · headᵀ, cap)`. The logits are computed a few rows at a time and
/// computed again in the backward.
pub(super) fn linear_logprobs(
    hidden: &Tensor,
    head: &Tensor,
    cap: Option<f64>,
    targets: &[u32],
    temperature: f64,
) -> Result<(Tensor, Tensor)> {
    // At most four chunks if the vocabulary is large, because the backward of each chunk allocates a gradient of the
    // head.
    let chunk = (CHUNK_ELEMENTS / head.dim(0)?.max(1)).clamp(16, 1024).max(targets.len().div_ceil(4));
    let rows = Rows { cap, targets: targets.to_vec(), temperature };
    if targets.len() <= chunk {
        return rows.of(hidden, head, 0);
    }
    let op = Chunks { hidden: hidden.detach(), head: head.detach(), rows, chunk };
    let stats = hidden.apply_op2(head, op)?;
    Ok((stats.get(0)?, stats.get(1)?))
}

/// Calls `each` with the logits and targets of one chunk of rows after another. Gradients do not flow.
pub(super) fn each_chunk(
    hidden: &Tensor,
    head: &Tensor,
    cap: Option<f64>,
    targets: &[u32],
    mut each: impl FnMut(&Tensor, &[u32]) -> Result<()>,
) -> Result<()> {
    let chunk = (CHUNK_ELEMENTS / head.dim(0)?.max(1)).clamp(16, 1024);
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let hidden = hidden.narrow(0, i * chunk, targets.len())?;
        each(&softcap(&hidden.matmul(&head.t()?)?, cap)?, targets)?;
    }
    Ok(())
}

struct Rows {
    cap: Option<f64>,
    targets: Vec<u32>,
    temperature: f64,
}

impl Rows {
    /// Returns the log-probabilities and entropies of the rows of `hidden`; its first row is row `first` of the
    /// targets.
    fn of(&self, hidden: &Tensor, head: &Tensor, first: usize) -> Result<(Tensor, Tensor)> {
        let logits = softcap(&linear(hidden, head)?, self.cap)?;
        token_logprobs(&logits, &self.targets[first..first + hidden.dim(0)?], self.temperature)
    }
}

/// Operation over all chunks that keeps its inputs and no intermediate results.
struct Chunks {
    hidden: Tensor,
    head: Tensor,
    rows: Rows,
    chunk: usize,
}

impl Chunks {
    /// Returns the first row and the row count of each chunk.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let (rows, chunk) = (self.rows.targets.len(), self.chunk);
        (0..rows).step_by(chunk).map(move |first| (first, chunk.min(rows - first)))
    }

    /// Returns `[2, N]`: log-probabilities and entropies.
    fn forward(&self) -> Result<Tensor> {
        let part = |(first, count)| {
            let (logprob, entropy) = self.rows.of(&self.hidden.narrow(0, first, count)?, &self.head, first)?;
            Tensor::stack(&[logprob, entropy], 0)
        };
        Tensor::cat(&self.parts().map(part).collect::<Result<Vec<_>>>()?, 1)?.contiguous()
    }
}

impl CustomOp2 for Chunks {
    fn name(&self) -> &'static str {
        "linear-logprobs-by-chunks"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(&self.forward()?)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        on_cuda(&self.forward()?)
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let learns = head.track_op();
        let variable = if learns { Var::from_tensor(&self.head)?.into_inner() } else { self.head.clone() };
        let (mut dhidden, mut dhead) = (Vec::new(), None::<Tensor>);
        for (first, count) in self.parts() {
            let x = Var::from_tensor(&self.hidden.narrow(0, first, count)?)?;
            let (logprob, entropy) = self.rows.of(&x, &variable, first)?;
            let stats = Tensor::stack(&[logprob, entropy], 0)?;
            let mut store = (stats * grad.narrow(1, first, count)?)?.sum_all()?.backward()?;
            dhidden.extend(store.remove(&x));
            if let Some(part) = store.remove(&variable).filter(|_| learns) {
                // The sum over chunks is in the dtype of the composites, whatever dtype the head has.
                let part = part.detach().to_dtype(composite_dtype(part.dtype()))?;
                dhead = Some(match dhead {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
        }
        let dhidden = if hidden.track_op() { Some(Tensor::cat(&dhidden, 0)?.detach()) } else { None };
        let dtype: DType = head.dtype();
        Ok((dhidden, dhead.map(|sum| sum.to_dtype(dtype)).transpose()?))
    }
}

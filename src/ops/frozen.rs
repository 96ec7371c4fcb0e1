//! Products with matrices that are not trained.

use super::{elements, is_fused};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// `x · weightᵀ` for rows `x` `[T, in]` and a `weight` `[out, in]` that is no part of a graph.
///
/// The gradient flows to `x` alone. Candle's own product makes one of the weight's shape as well, whether or not anybody
/// asks for it, and keeps it to the end of the backward pass.
pub fn frozen_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !x.track_op() {
        return x.matmul(&weight.t()?);
    }
    if is_fused(x) && is_fused(weight) {
        return x.contiguous()?.apply_op1(FrozenLinear { x: x.detach().contiguous()?, weight: weight.detach() });
    }
    x.matmul(&weight.detach().t()?)
}

struct FrozenLinear {
    x: Tensor,
    weight: Tensor,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = self.x.matmul(&self.weight.t()?)?;
        let (storage, layout) = out.storage_and_layout();
        let values = match &*storage {
            candle_core::Storage::Cpu(storage) => elements(storage, layout)?.to_vec(),
            _ => candle_core::bail!("a fused operation was given a tensor that is not on the cpu"),
        };
        Ok((CpuStorage::F32(values), out.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.matmul(&self.weight).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, check, values};
    use super::*;
    use candle_core::Var;

    #[test]
    fn matches_the_composite() {
        for (rows, width, out) in [(1, 3, 2), (7, 12, 31)] {
            let weight = values(2, &[out, width]);
            check(&[values(1, &[rows, width])], |t| frozen_linear(&t[0], &weight.to_dtype(t[0].dtype())?));
        }
    }

    #[test]
    fn what_is_frozen_gets_no_gradient() {
        let (x, weight) =
            (Var::from_tensor(&values(1, &[3, 4])).unwrap(), Var::from_tensor(&values(2, &[5, 4])).unwrap());
        let store = frozen_linear(&x, &weight).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(store.get(&weight).is_none());
        let plain = x.matmul(&weight.t().unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
        assert_close("gradient", store.get(&x).unwrap(), plain.get(&x).unwrap(), 1e-6);
    }
}

//! Linear layers: products of rows with a matrix.

use super::matmul::{add_transposed_times, plain_product, transposed_product};
use super::{accumulate, elements, elements_mut, is_fused, on_cpu, on_cuda, tensor_elements};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, InplaceOp1, Layout, Result, Shape, Tensor, bail};

/// Computes `x · weightᵀ` for rows `x` `[T, in]` and a `weight` `[out, in]`.
///
/// Gradients are computed for inputs that are part of a graph. That of the weight is added to its accumulator in place
/// while [`backward`](super::backward) runs, without a temporary tensor. With up to 64 rows, a row's result does not
/// depend on the other rows. Fails when the widths differ.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((_, width), (_, weight_width)) = (x.dims2()?, weight.dims2()?);
    if width != weight_width {
        bail!("linear: x has shape {:?} and the weight {:?}, the widths differ", x.dims(), weight.dims())
    }
    if is_fused(x) && is_fused(weight) {
        return x.contiguous()?.apply_op2(&weight.contiguous()?, Linear);
    }
    // Candle's own product computes a gradient of the weight's shape even if the weight is not trained.
    if x.track_op() && !weight.track_op() {
        return x.contiguous()?.apply_op1(FrozenLinear { x: x.detach(), weight: weight.detach() });
    }
    x.matmul(&weight.t()?)
}

/// Product with a matrix that is not trained, by candle operations.
struct FrozenLinear {
    x: Tensor,
    weight: Tensor,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "linear-frozen"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(&self.x.matmul(&self.weight.t()?)?)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        on_cuda(&self.x.matmul(&self.weight.t()?)?)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.detach().matmul(&self.weight).map(Some)
    }
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (elements(s1, l1)?, elements(s2, l2)?);
        let (rows, width) = l1.shape().dims2()?;
        let out_width = l2.shape().dims2()?.0;
        let out = if x.is_empty() || weight.is_empty() {
            vec![0.0; rows * out_width]
        } else {
            transposed_product(x, weight, width)
        };
        Ok((CpuStorage::F32(out), Shape::from((rows, out_width))))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (gs, gl) = grad.storage_and_layout();
        let g = tensor_elements(&gs, gl)?;
        let ((rows, width), out_width) = (x.dims2()?, weight.dim(0)?);
        let mut dx = None;
        if x.track_op() {
            let (ws, wl) = weight.storage_and_layout();
            let out = plain_product(g, tensor_elements(&ws, wl)?, out_width);
            dx = Some(Tensor::from_vec(out, (rows, width), x.device())?);
        }
        if !weight.track_op() {
            return Ok((dx, None));
        }
        let (xs, xl) = x.storage_and_layout();
        let dweight = accumulate::of_or_zeros(weight)?;
        dweight.sum().inplace_op1(&AddTransposedTimes { x: g, w: tensor_elements(&xs, xl)?, rows })?;
        Ok((dx, dweight.into_gradient()))
    }
}

/// In-place operation `sum += xᵀ · w` for `rows` rows of each.
pub(super) struct AddTransposedTimes<'a> {
    pub(super) x: &'a [f32],
    pub(super) w: &'a [f32],
    pub(super) rows: usize,
}

impl InplaceOp1 for AddTransposedTimes<'_> {
    fn name(&self) -> &'static str {
        "add-transposed-times"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        add_transposed_times(elements_mut(storage, layout)?, self.x, self.w, self.rows);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, check, values};
    use super::super::{Gradients, backward};
    use super::*;
    use candle_core::{DType, Var};

    #[test]
    fn matches_the_composite() {
        for (rows, width, out) in [(1, 3, 2), (7, 12, 31), (80, 24, 40)] {
            check(&[values(1, &[rows, width]), values(2, &[out, width])], |t| linear(&t[0], &t[1]));
        }
    }

    #[test]
    fn accepts_transposed_inputs() {
        check(&[values(1, &[5, 9]), values(2, &[5, 7])], |t| linear(&t[0].t()?, &t[1].t()?));
    }

    #[test]
    fn frozen_tensors_get_no_gradient() {
        let (x, weight) =
            (Var::from_tensor(&values(1, &[3, 4])).unwrap(), Var::from_tensor(&values(2, &[5, 4])).unwrap());
        let store = linear(&x, &weight.detach()).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(store.get(&weight).is_none());
        // Candle's operations would compute a gradient for it; this composite does not.
        let [wide_x, wide] = [&x, &weight].map(|t| Var::from_tensor(&t.to_dtype(DType::F64).unwrap()).unwrap());
        let frozen = wide.detach();
        let store_wide = linear(&wide_x, &frozen).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(store_wide.get(&frozen).is_none() && store_wide.get(&wide).is_none());
        assert_eq!(store_wide.get_ids().count(), 1, "of x alone");
        assert_close("gradient", store.get(&x).unwrap(), store_wide.get(&wide_x).unwrap(), 1e-6);
        let plain = x.matmul(&weight.t().unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
        assert_close("gradient", store.get(&x).unwrap(), plain.get(&x).unwrap(), 1e-6);
    }

    /// The weight is used twice in one graph, and in two graphs.
    #[test]
    fn gradients_added_in_place_equal_those_of_a_gradient_store() {
        let (x, weight) =
            (Var::from_tensor(&values(1, &[3, 5])).unwrap(), Var::from_tensor(&values(2, &[5, 5])).unwrap());
        let params = vec![("x".to_string(), x.clone()), ("weight".to_string(), weight.clone())];
        let loss = || linear(&linear(&x, &weight).unwrap(), &weight).unwrap().sqr().unwrap().sum_all().unwrap();
        let mut sums = Gradients::new(&params);
        assert_eq!(backward(&loss(), &mut [&mut sums]).unwrap(), 2);
        backward(&loss(), &mut [&mut sums]).unwrap();
        let store = loss().backward().unwrap();
        for (name, var) in &params {
            assert_close(name, sums.get(name).unwrap(), &(store.get(var).unwrap() * 2.0).unwrap(), 1e-5);
        }
    }
}

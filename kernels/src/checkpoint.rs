//! Activation checkpointing: activations are recomputed instead of kept (Chen et al. 2016).

use std::sync::Arc;

use super::{accumulate, on_cpu, on_cuda};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};

/// Part of a model that maps one tensor to one tensor.
pub type Segment = Arc<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// Computes `segment(x)` and keeps only `x` for the backward, which runs the segment again.
///
/// The gradients of the variables in the segment are computed only by [`backward`](super::backward), for the parameters
/// of its accumulators; a plain candle backward pass fails.
pub fn checkpoint(x: &Tensor, segment: &Segment) -> Result<Tensor> {
    x.apply_op1(Checkpoint { x: x.detach(), segment: Arc::clone(segment) })
}

struct Checkpoint {
    x: Tensor,
    segment: Segment,
}

impl CustomOp1 for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        // `x` is a variable, as in the backward, so that both take the same code path.
        let x = Var::from_tensor(&self.x)?;
        on_cpu(&(self.segment)(&x)?)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        // `x` is a variable, as in the backward, so that both take the same code path.
        let x = Var::from_tensor(&self.x)?;
        on_cuda(&(self.segment)(&x)?)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let x = Var::from_tensor(&self.x)?;
        let mut store = ((self.segment)(&x)? * grad)?.sum_all()?.backward()?;
        let dx = store.remove(&x);
        accumulate::absorb(&mut store)?;
        Ok(dx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, values};
    use super::super::{Gradients, backward, linear, rms_norm};
    use super::*;

    fn params() -> Vec<(String, Var)> {
        let var = |seed, shape: &[usize]| Var::from_tensor(&values(seed, shape)).unwrap();
        vec![("x".into(), var(1, &[5, 8])), ("norm".into(), var(2, &[8])), ("weight".into(), var(3, &[8, 8]))]
    }

    fn segment(params: &[(String, Var)]) -> Segment {
        let (norm, weight) = (params[1].1.clone(), params[2].1.clone());
        Arc::new(move |x| linear(&rms_norm(x, &norm, 1e-5)?, &weight))
    }

    #[test]
    fn gradients_equal_those_with_kept_activations() {
        let params = params();
        let segment = segment(&params);
        let run = |through: &dyn Fn(&Tensor) -> Tensor| {
            let mut sums = Gradients::new(&params);
            let out = through(&through(&params[0].1));
            let loss = (&out * values(9, out.dims())).unwrap().sum_all().unwrap();
            assert_eq!(backward(&loss, &mut [&mut sums]).unwrap(), 3);
            (out.detach(), sums)
        };
        let (out, sums) = run(&|x| checkpoint(x, &segment).unwrap());
        let (want, want_sums) = run(&|x| segment(x).unwrap());
        assert_close("output", &out, &want, 0.0);
        for (name, _) in &params {
            assert_close(name, sums.get(name).unwrap(), want_sums.get(name).unwrap(), 1e-6);
        }
    }

    #[test]
    fn a_backward_pass_that_would_lose_gradients_fails() {
        let params = params();
        let loss = checkpoint(&params[0].1, &segment(&params)).unwrap().sum_all().unwrap();
        assert!(loss.backward().unwrap_err().to_string().contains("preceptor_kernels::backward"));
    }
}

//! Gradient accumulation over micro-batches in buffers that are allocated once.

use super::{PARALLEL_FROM, elements, elements_mut, is_fused, tensor_elements};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, TensorId, Var, bail};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

/// Number of elements whose squares are summed together. It is fixed, so that the norm does not depend on the thread
/// count.
const BLOCK: usize = 1 << 14;

/// Gradient accumulators, one per parameter, in `f32` on the parameter's device. Their memory is allocated by the first
/// backward pass.
pub struct Gradients {
    buffers: Vec<Buffer>,
    index: HashMap<String, usize>,
}

struct Buffer {
    param: Var,
    /// The sum; unset while it is zero and nothing has asked for it.
    sum: OnceLock<Tensor>,
}

impl Gradients {
    /// Creates zero accumulators for these named parameters.
    pub fn new(params: &[(String, Var)]) -> Self {
        let buffer = |(_, param): &(String, Var)| Buffer { param: param.clone(), sum: OnceLock::new() };
        let index = params.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
        Self { buffers: params.iter().map(buffer).collect(), index }
    }

    /// Sets every accumulator to zero, in place.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn zero(&mut self) -> Result<()> {
        self.buffers.iter().filter_map(|buffer| buffer.sum.get()).try_for_each(Tensor::zero_set)
    }

    /// Makes these the accumulators of other variables for the same parameters. The sums stay as they are.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape; the error names it. Nothing has changed then.
    pub fn follow(&mut self, params: &[(String, Var)]) -> Result<()> {
        if params.len() != self.buffers.len() {
            bail!("cannot use the gradients of {} parameters for {}", self.buffers.len(), params.len());
        }
        for (name, param) in params {
            let own = &self.buffer(name)?.param;
            if own.dims() != param.dims() {
                bail!("the gradient of {name} has shape {:?}, not {:?}", own.dims(), param.dims());
            }
        }
        for (name, param) in params {
            let i = self.index[name];
            self.buffers[i].param = param.clone();
        }
        Ok(())
    }

    /// Adds the accumulators of `other`, which were created for copies of the same parameters, perhaps on another device.
    ///
    /// # Errors
    /// If `other` has other parameters, or parameters of another shape.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        if self.index.len() != other.index.len() {
            bail!("cannot add the gradients of {} parameters to those of {}", other.index.len(), self.index.len());
        }
        for (name, &i) in &self.index {
            let (buffer, addend) = (&mut self.buffers[i], other.buffer(name)?);
            if addend.param.dims() != buffer.param.dims() {
                bail!("the gradient of {name} has shape {:?}, not {:?}", addend.param.dims(), buffer.param.dims());
            }
            if let Some(addend) = addend.sum.get() {
                buffer.add(&addend.to_device(buffer.param.device())?)?;
            }
        }
        Ok(())
    }

    /// Returns the Euclidean norm over all accumulators, summed in `f64`. It is not finite if any element is not.
    pub fn global_norm(&self) -> Result<f64> {
        let mut squares = 0.0;
        for sum in self.buffers.iter().filter_map(|buffer| buffer.sum.get()) {
            squares += if is_fused(sum) {
                let (storage, layout) = sum.storage_and_layout();
                sum_of_squares(tensor_elements(&storage, layout)?)
            } else {
                sum.sqr()?.sum_all()?.to_scalar::<f32>()? as f64
            };
        }
        Ok(squares.sqrt())
    }

    /// Returns a copy of every accumulator, with the parameter's name.
    pub fn copies(&self) -> Result<Vec<(String, Tensor)>> {
        let copy = |(name, &i): (&String, &usize)| Ok((name.clone(), self.buffers[i].sum()?.copy()?));
        self.index.iter().map(copy).collect()
    }

    /// Sets the accumulators to copies taken earlier.
    ///
    /// # Errors
    /// If a parameter has no copy, or one of another shape; the error names the parameter.
    pub fn restore(&mut self, copies: &HashMap<String, Tensor>) -> Result<()> {
        for (name, &i) in &self.index {
            let Buffer { param, sum } = &mut self.buffers[i];
            match copies.get(name) {
                Some(copy) if copy.dims() == param.dims() => *sum = copy.to_device(param.device())?.copy()?.into(),
                Some(copy) => bail!("the gradient of {name} has shape {:?}, not {:?}", copy.dims(), param.dims()),
                None => bail!("no saved gradient for {name}"),
            }
        }
        Ok(())
    }

    /// Returns the accumulator of a parameter. The tensor shares its storage: the next backward pass or `zero` changes
    /// its values.
    ///
    /// # Errors
    /// If there is no such parameter, or memory for the accumulator is not available.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.buffer(name)?.sum()
    }

    /// Returns the shape of a parameter's accumulator; `None` if there is no such parameter.
    pub(super) fn dims(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|&i| self.buffers[i].param.dims())
    }

    /// Returns the accumulator of a parameter, which is zero afterwards and has no memory.
    ///
    /// # Errors
    /// The same as for [`Self::get`].
    pub(super) fn take(&mut self, name: &str) -> Result<Tensor> {
        let sum = self.get(name)?.clone();
        let i = self.index[name];
        self.buffers[i].sum.take();
        Ok(sum)
    }

    fn buffer(&self, name: &str) -> Result<&Buffer> {
        match self.index.get(name) {
            Some(&i) => Ok(&self.buffers[i]),
            None => bail!("there is no gradient of {name}"),
        }
    }
}

/// Runs the backward pass of `loss` and adds each parameter's gradient to its accumulator. The accumulator of a
/// parameter without a gradient is unchanged. Operations that support it add to the accumulators in place, so that the
/// gradient of a large matrix is never a separate tensor. Returns the number of parameters that had a gradient.
///
/// # Errors
/// Tensor errors; the accumulators then hold part of the pass.
pub fn backward(loss: &Tensor, accumulators: &mut [&mut Gradients]) -> Result<usize> {
    let mut sinks = Sinks::default();
    for buffer in accumulators.iter().flat_map(|gradients| &gradients.buffers) {
        let sum = buffer.sum()?;
        if is_fused(sum) {
            sinks.sums.insert(buffer.param.id(), sum.clone());
        }
        sinks.params.push(buffer.param.clone());
    }
    let open = Open::with(sinks);
    let mut store = loss.backward()?;
    let Sinks { mut reached, mut absorbed, .. } = open.close();
    for buffer in accumulators.iter_mut().flat_map(|gradients| &mut gradients.buffers) {
        let id = buffer.param.id();
        for grad in store.remove(&buffer.param).into_iter().chain(absorbed.remove(&id).into_iter().flatten()) {
            reached.insert(id);
            buffer.add(&grad)?;
        }
    }
    Ok(reached.len())
}

impl Buffer {
    /// Returns the sum, which this allocates if nothing did before.
    fn sum(&self) -> Result<&Tensor> {
        if let Some(sum) = self.sum.get() {
            return Ok(sum);
        }
        let zeros = Tensor::zeros(self.param.shape(), DType::F32, self.param.device())?;
        Ok(self.sum.get_or_init(|| zeros))
    }

    fn add(&mut self, grad: &Tensor) -> Result<()> {
        let sum = self.sum()?;
        if is_fused(sum) && is_fused(grad) {
            return add_in_place(sum, &grad.contiguous()?);
        }
        self.sum = (sum + grad.detach().to_dtype(DType::F32)?)?.into();
        Ok(())
    }
}

thread_local! {
    /// Accumulators of the backward pass that this thread runs, by parameter.
    static SINKS: RefCell<Option<Sinks>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Sinks {
    /// Accumulators that operations can add to in place.
    sums: HashMap<TensorId, Tensor>,
    /// Parameters whose accumulators have received a gradient.
    reached: HashSet<TensorId>,
    /// All parameters of the pass.
    params: Vec<Var>,
    /// Gradients found by nested passes, which are not registered in candle's gradient store.
    absorbed: HashMap<TensorId, Vec<Tensor>>,
}

/// Guard under which operations can reach the accumulators. They are closed when it is dropped, also on an error or a
/// panic.
struct Open;

impl Open {
    fn with(sinks: Sinks) -> Self {
        SINKS.set(Some(sinks));
        Self
    }

    fn close(self) -> Sinks {
        SINKS.take().unwrap_or_default()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        SINKS.set(None);
    }
}

/// Moves the parameters' gradients out of the store of a pass that is nested in [`backward`].
pub(super) fn absorb(store: &mut GradStore) -> Result<()> {
    SINKS.with_borrow_mut(|sinks| {
        let Some(Sinks { sums, reached, params, absorbed }) = sinks else {
            bail!("activation checkpointing needs preceptor_kernels::backward; a plain candle backward pass loses gradients")
        };
        for param in params.iter() {
            let (Some(grad), id) = (store.remove(param), param.id()) else { continue };
            match sums.get(&id).filter(|_| is_fused(&grad)) {
                Some(sum) => {
                    reached.insert(id);
                    add_in_place(sum, &grad.contiguous()?)?;
                }
                None => absorbed.entry(id).or_default().push(grad.detach()),
            }
        }
        Ok(())
    })
}

/// Tensor to which an operation adds a parameter's gradient in place.
pub(super) enum Sum {
    /// Accumulator of the parameter. Candle receives no gradient.
    Shared(Tensor),
    /// Tensor of the parameter's shape, initially zeros.
    Own(Tensor),
}

impl Sum {
    /// Returns the tensor to add to.
    pub(super) fn sum(&self) -> &Tensor {
        let (Self::Shared(sum) | Self::Own(sum)) = self;
        sum
    }

    /// Returns the gradient that candle must receive, if any.
    pub(super) fn into_gradient(self) -> Option<Tensor> {
        match self {
            Self::Shared(_) => None,
            Self::Own(sum) => Some(sum),
        }
    }
}

/// Returns the accumulator of a parameter while [`backward`] runs on this thread; otherwise, and for a tensor that is
/// not a parameter, zeros.
pub(super) fn of_or_zeros(param: &Tensor) -> Result<Sum> {
    let shared = SINKS.with_borrow_mut(|sinks| {
        let sinks = sinks.as_mut()?;
        let sum = sinks.sums.get(&param.id())?.clone();
        sinks.reached.insert(param.id());
        Some(sum)
    });
    shared.map_or_else(|| param.zeros_like().map(Sum::Own), |sum| Ok(Sum::Shared(sum)))
}

/// Returns the accumulator of a parameter that an operation captures without having it as an input. `None` if the
/// parameter is not trained or the pass does not collect its gradient.
///
/// # Errors
/// If candle runs the backward pass alone, because it cannot receive such a gradient.
pub(super) fn of_captured(param: &Tensor) -> Result<Option<Tensor>> {
    if !param.track_op() {
        return Ok(None);
    }
    SINKS.with_borrow_mut(|sinks| {
        let Some(sinks) = sinks else {
            bail!("a fused block needs preceptor_kernels::backward to train its weights; a plain candle backward pass loses gradients")
        };
        let sum = sinks.sums.get(&param.id()).cloned();
        if sum.is_some() {
            sinks.reached.insert(param.id());
        }
        Ok(sum)
    })
}

/// Computes `sum += addend` for contiguous CPU `f32` tensors that do not share storage.
pub(super) fn add_in_place(sum: &Tensor, addend: &Tensor) -> Result<()> {
    sum.inplace_op2(addend, &Add)
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add-in-place"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (sum, addend) = (elements_mut(s1, l1)?, elements(s2, l2)?);
        let add = |(a, b): (&mut [f32], &[f32])| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        if sum.len() < PARALLEL_FROM || rayon::current_num_threads() == 1 {
            add((sum, addend));
        } else {
            sum.par_chunks_mut(BLOCK).zip(addend.par_chunks(BLOCK)).for_each(add);
        }
        Ok(())
    }
}

/// Sums squares block by block; the order of the sum does not depend on the thread count.
fn sum_of_squares(values: &[f32]) -> f64 {
    let block = |values: &[f32]| {
        let mut lanes = [0.0f64; 8];
        let (chunks, rest) = values.as_chunks::<8>();
        for chunk in chunks {
            for i in 0..8 {
                lanes[i] += chunk[i] as f64 * chunk[i] as f64;
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|&v| v as f64 * v as f64).sum::<f64>()
    };
    if values.len() < PARALLEL_FROM || rayon::current_num_threads() == 1 {
        return values.chunks(BLOCK).map(block).sum();
    }
    values.par_chunks(BLOCK).map(block).collect::<Vec<f64>>().iter().sum()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, values};
    use super::*;

    #[test]
    fn sums_of_two_accumulators_are_added() {
        let params = params();
        let (mut sum, mut other) = (Gradients::new(&params), Gradients::new(&params));
        for (gradients, scale) in [(&mut sum, 1.0), (&mut other, 2.0)] {
            let loss = params.iter().map(|(_, var)| (var.sum_all().unwrap() * scale).unwrap());
            let loss = loss.reduce(|a, b| (a + b).unwrap()).unwrap();
            backward(&loss, &mut [gradients]).unwrap();
        }
        sum.add(&other).unwrap();
        for (name, var) in &params {
            let all = sum.get(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(all, vec![3.0; var.elem_count()], "{name}");
        }
        assert!(sum.add(&Gradients::new(&params[..2])).is_err());
    }

    fn params() -> Vec<(String, Var)> {
        let var = |seed, shape: &[usize]| Var::from_tensor(&values(seed, shape)).unwrap();
        vec![("a".into(), var(1, &[131, 193])), ("b".into(), var(2, &[5])), ("c".into(), var(3, &[2]))]
    }

    fn loss(params: &[(String, Var)]) -> Tensor {
        let a = params[0].1.sqr().unwrap().sum_all().unwrap();
        (a + (params[1].1.as_tensor() * 3.0).unwrap().sum_all().unwrap()).unwrap()
    }

    #[test]
    fn gradients_sum_over_micro_batches_and_can_be_zeroed() {
        let params = params();
        let mut grads = Gradients::new(&params);
        for _ in 0..2 {
            for _ in 0..3 {
                assert_eq!(backward(&loss(&params), &mut [&mut grads]).unwrap(), 2);
            }
            assert_close("a", grads.get("a").unwrap(), &(params[0].1.as_tensor() * 6.0).unwrap(), 1e-6);
            assert_close("b", grads.get("b").unwrap(), &Tensor::full(9f32, 5, params[1].1.device()).unwrap(), 1e-6);
            assert_close("c", grads.get("c").unwrap(), &params[2].1.zeros_like().unwrap(), 0.0);
            assert!(grads.get("d").is_err());
            grads.zero().unwrap();
            assert_eq!(grads.global_norm().unwrap(), 0.0);
        }
    }

    #[test]
    fn the_norm_does_not_depend_on_the_pool_and_propagates_nan() {
        let params = params();
        let mut grads = Gradients::new(&params);
        backward(&loss(&params), &mut [&mut grads]).unwrap();
        let norm = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| grads.global_norm().unwrap())
        };
        let want = super::super::testing::flat(&params[0].1).iter().map(|v| 4.0 * v * v).sum::<f64>() + 45.0;
        assert!((norm(1) - want.sqrt()).abs() < 1e-6 * want.sqrt());
        assert_eq!(norm(1), norm(3));
        assert!(grads.global_norm().unwrap().is_finite());
        let nan = (params[1].1.as_tensor() * f64::NAN).unwrap().sum_all().unwrap();
        backward(&nan, &mut [&mut grads]).unwrap();
        assert!(!grads.global_norm().unwrap().is_finite());
    }
}

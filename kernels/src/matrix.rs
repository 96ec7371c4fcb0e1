//! A matrix of a layer with its optional bias and low-rank adapter.

use candle_core::{Result, Tensor};

use super::linear::linear;
use super::matmul::{add_times, add_times_transposed, plain_product, transposed_product};
use super::{accumulate_product, accumulate_vector, with_elements};

/// Linear map `W·x + b + s·B·A·x`; the bias and the adapter are optional.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Weight W, `[out, in]`.
    pub weight: Tensor,
    /// Bias b, `[out]`, if any.
    pub bias: Option<Tensor>,
    /// Low-rank adapter (A, B and s), if any.
    pub adapter: Option<Adapter>,
}

/// Low-rank adapter (Hu et al. 2021) of a matrix `[out, in]`, which adds `s·B·A·x`.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Matrix A, `[r, in]`.
    pub a: Tensor,
    /// Matrix B, `[out, r]`.
    pub b: Tensor,
    /// Scale s of the product.
    pub scale: f64,
}

impl From<Tensor> for Matrix {
    fn from(weight: Tensor) -> Self {
        Self { weight, bias: None, adapter: None }
    }
}

impl Matrix {
    /// Returns the result `[T, out]` for rows `x` `[T, in]`, composed of separate operations. Gradients flow to all
    /// tensors. Fails when the shapes do not match.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.add_bias_and_adapter(linear(x, &self.weight)?, x)
    }

    /// Adds the adapter's part and the bias to `product`, which must be `x · Wᵀ`.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn add_bias_and_adapter(&self, mut product: Tensor, x: &Tensor) -> Result<Tensor> {
        if let Some(Adapter { a, b, scale }) = &self.adapter {
            product = (product + (linear(&linear(x, a)?, b)? * *scale)?)?;
        }
        self.bias.as_ref().map_or(Ok(product.clone()), |bias| product.broadcast_add(bias))
    }

    /// Iterates over the weight, the bias and the adapter's matrices.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let adapter = self.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]);
        [&self.weight].into_iter().chain(&self.bias).chain(adapter)
    }

    /// Returns whether all shapes match a map from rows of `width` to rows of `out`.
    pub(super) fn has_shape(&self, out: usize, width: usize) -> bool {
        self.weight.dims() == [out, width]
            && self.bias.as_ref().is_none_or(|bias| bias.dims() == [out])
            && self.adapter.as_ref().is_none_or(|Adapter { a, b, .. }| {
                let rank = a.dims()[0];
                a.dims() == [rank, width] && b.dims() == [out, rank]
            })
    }

    /// Formats the shapes of all tensors for an error message.
    pub(super) fn shapes(&self) -> String {
        let shapes: Vec<String> = self.tensors().map(|tensor| format!("{:?}", tensor.dims())).collect();
        shapes.join(" with ")
    }

    /// Returns the result for rows `x`.
    pub(super) fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let width = self.weight.dim(1)?;
        let mut out = with_elements([&self.weight], |[weight]| Ok(transposed_product(x, weight, width)))?;
        self.add_bias_and_adapter_rows(&mut out, x)?;
        Ok(out)
    }

    /// Adds the result for rows `x` to `out`.
    pub(super) fn add_forward(&self, out: &mut [f32], x: &[f32]) -> Result<()> {
        let width = self.weight.dim(1)?;
        with_elements([&self.weight], |[weight]| {
            add_times_transposed(out, x, weight, width);
            Ok(())
        })?;
        self.add_bias_and_adapter_rows(out, x)
    }

    fn add_bias_and_adapter_rows(&self, out: &mut [f32], x: &[f32]) -> Result<()> {
        if let Some(bias) = &self.bias {
            with_elements([bias], |[bias]| {
                for row in out.chunks_exact_mut(bias.len()) {
                    row.iter_mut().zip(bias).for_each(|(out, b)| *out += b);
                }
                Ok(())
            })?;
        }
        if let Some(Adapter { b, .. }) = &self.adapter {
            let adapter_inner = self.adapter_inner(x)?;
            let rank = b.dim(1)?;
            with_elements([b], |[b]| {
                add_times_transposed(out, &adapter_inner, b, rank);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Returns `s·A·x` `[T, r]`, or an empty vector without an adapter.
    fn adapter_inner(&self, x: &[f32]) -> Result<Vec<f32>> {
        let Some(Adapter { a, scale, .. }) = &self.adapter else { return Ok(Vec::new()) };
        let width = a.dim(1)?;
        let mut adapter_inner = with_elements([a], |[a]| Ok(transposed_product(x, a, width)))?;
        adapter_inner.iter_mut().for_each(|value| *value *= *scale as f32);
        Ok(adapter_inner)
    }

    /// Returns the gradient of rows `x`, given that of the result; adds it to `dx` if that is given. Adds the gradients
    /// of the weight, bias and adapter to their accumulators.
    pub(super) fn pull_back(&self, grad: &[f32], x: &[f32], dx: Option<Vec<f32>>) -> Result<Vec<f32>> {
        let (out, width) = self.weight.dims2()?;
        let rows = x.len() / width;
        accumulate_product(&self.weight, grad, x, rows)?;
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.track_op()) {
            let mut dbias = vec![0.0; out];
            for row in grad.chunks_exact(out) {
                dbias.iter_mut().zip(row).for_each(|(sum, grad)| *sum += grad);
            }
            accumulate_vector(bias, dbias)?;
        }
        let mut dx = with_elements([&self.weight], |[weight]| {
            let Some(mut dx) = dx else { return Ok(plain_product(grad, weight, out)) };
            add_times(&mut dx, grad, weight, out);
            Ok(dx)
        })?;
        if let Some(Adapter { a, b, scale }) = &self.adapter {
            accumulate_product(b, grad, &self.adapter_inner(x)?, rows)?;
            let mut dadapter_inner = with_elements([b], |[b]| Ok(plain_product(grad, b, out)))?;
            dadapter_inner.iter_mut().for_each(|value| *value *= *scale as f32);
            accumulate_product(a, &dadapter_inner, x, rows)?;
            let rank = a.dim(0)?;
            with_elements([a], |[a]| {
                add_times(&mut dx, &dadapter_inner, a, rank);
                Ok(())
            })?;
        }
        Ok(dx)
    }
}

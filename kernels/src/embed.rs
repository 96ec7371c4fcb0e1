//! Embedding lookup: rows of a table by index.

use super::{accumulate, composite_dtype, elements, elements_mut, is_fused, on_cpu, on_cuda, tensor_elements};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, InplaceOp1, Layout, Result, Shape, Tensor, bail};

/// Returns the rows `ids` of `table` `[V, D]` as `[T, D]`.
///
/// The gradient flows to the table and touches these rows only; while [`backward`](super::backward) runs, it is added
/// to the accumulator in place. Fails when an index is not below `V`.
pub fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let count = table.dim(0)?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
        bail!("embed: token {id} is outside the vocabulary of {count}")
    }
    if is_fused(table) {
        return table.contiguous()?.apply_op1(Embed { ids: ids.to_vec() });
    }
    let ids = Tensor::new(ids, table.device())?;
    if !table.track_op() {
        return table.index_select(&ids, 0);
    }
    table.apply_op1(Picked { table: table.detach(), ids })
}

/// Lookup by candle operations. The gradient is summed in a wider dtype, because in half precision the sum for a
/// frequent token would stop growing.
struct Picked {
    table: Tensor,
    ids: Tensor,
}

impl CustomOp1 for Picked {
    fn name(&self) -> &'static str {
        "embed-picked"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(&self.table.index_select(&self.ids, 0)?)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        on_cuda(&self.table.index_select(&self.ids, 0)?)
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let wide = composite_dtype(table.dtype());
        let zeros = Tensor::zeros(table.shape(), wide, table.device())?;
        let sum = zeros.index_add(&self.ids, &grad.detach().to_dtype(wide)?.contiguous()?, 0)?;
        sum.to_dtype(table.dtype()).map(Some)
    }
}

struct Embed {
    ids: Vec<u32>,
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (table, width) = (elements(storage, layout)?, layout.dims()[1]);
        let mut out = Vec::with_capacity(self.ids.len() * width);
        for id in &self.ids {
            out.extend_from_slice(&table[*id as usize * width..][..width]);
        }
        Ok((CpuStorage::F32(out), Shape::from((self.ids.len(), width))))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (storage, layout) = grad.storage_and_layout();
        let add = AddRows { ids: &self.ids, rows: tensor_elements(&storage, layout)? };
        let dtable = accumulate::of_or_zeros(table)?;
        dtable.sum().inplace_op1(&add)?;
        Ok(dtable.into_gradient())
    }
}

struct AddRows<'a> {
    ids: &'a [u32],
    rows: &'a [f32],
}

impl InplaceOp1 for AddRows<'_> {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (width, sum) = (layout.dims()[1], elements_mut(storage, layout)?);
        for (id, row) in self.ids.iter().zip(self.rows.chunks_exact(width)) {
            sum[*id as usize * width..][..width].iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, flat, values};
    use super::*;
    use candle_core::{DType, Var};

    #[test]
    fn matches_the_composite() {
        check(&[values(1, &[7, 5])], |t| embed(&t[0], &[3, 0, 6, 3]));
    }

    /// A running sum in bf16 stops at 256 of these gradients.
    #[test]
    fn a_frequent_token_gets_its_full_gradient_in_bf16() {
        let table = Var::from_tensor(&values(1, &[3, 4]).to_dtype(DType::BF16).unwrap()).unwrap();
        let grads =
            embed(&table, &[1; 1000]).unwrap().to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
        let sums = flat(grads.get(&table).unwrap());
        assert!(sums[4..8].iter().all(|sum| (sum / 1000.0 - 1.0).abs() < 0.005), "{sums:?}");
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_rejected() {
        assert!(embed(&values(1, &[7, 5]), &[2, 7]).unwrap_err().to_string().contains("token 7"));
    }
}

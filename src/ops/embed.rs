//! Rows of a table by index.

use super::{accumulate, elements, elements_mut, is_fused, tensor_elements};
use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape, Tensor, bail};

/// Rows `[T, D]` of `table` `[V, D]`.
///
/// The gradient flows to the table; it is added in place where [`backward`](super::backward) runs the
/// backward pass, and touches these rows alone. Fails when an index is not below `V`.
pub fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let count = table.dim(0)?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
        bail!("embed: token {id} is outside the vocabulary of {count}")
    }
    if is_fused(table) {
        return table.contiguous()?.apply_op1(Embed { ids: ids.to_vec() });
    }
    table.index_select(&Tensor::new(ids, table.device())?, 0)
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
    use super::super::testing::{check, values};
    use super::*;

    #[test]
    fn matches_the_composite() {
        check(&[values(1, &[7, 5])], |t| embed(&t[0], &[3, 0, 6, 3]));
    }

    #[test]
    fn a_token_outside_is_refused() {
        assert!(embed(&values(1, &[7, 5]), &[2, 7]).unwrap_err().to_string().contains("token 7"));
    }
}

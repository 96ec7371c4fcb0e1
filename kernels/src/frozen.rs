//! Snapshots of tensors that are copied only if the owner changes them.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::Tensor;
use safetensors::{Dtype, View};

/// Snapshot of training state that is written to disk while training continues.
///
/// Optimizer moments are shared: the optimizer copies one only if it has to change it while the snapshot exists. A
/// `Tensor` must be one whose storage is never written to.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// A tensor that does not change.
    Tensor(Tensor),
    /// Elements in `f32`, in row-major order.
    Host {
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Elements of the tensor.
        data: Arc<Vec<f32>>,
    },
}

impl From<Tensor> for Frozen {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl View for &Frozen {
    fn dtype(&self) -> Dtype {
        match self {
            Frozen::Tensor(tensor) => View::dtype(&tensor),
            Frozen::Host { .. } => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Frozen::Tensor(tensor) => tensor.dims(),
            Frozen::Host { shape, .. } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Frozen::Tensor(tensor) => Cow::Owned(View::data(&tensor).into_owned()),
            Frozen::Host { data, .. } => {
                if cfg!(target_endian = "little") {
                    Cow::Borrowed(bytemuck::cast_slice(data))
                } else {
                    Cow::Owned(data.iter().flat_map(|x| x.to_le_bytes()).collect())
                }
            }
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Frozen::Tensor(tensor) => View::data_len(&tensor),
            Frozen::Host { data, .. } => data.len() * size_of::<f32>(),
        }
    }
}

//! A tensor as it was at one moment, without a copy unless its owner moves on.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::Tensor;
use safetensors::{Dtype, View};

/// What is to be written of training, while training goes on.
///
/// Moments of the optimizer are shared: the optimizer copies one only if it has to change it while it is still held. A tensor
/// must be one that nobody writes into.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// A tensor that stays as it is.
    Tensor(Tensor),
    /// Elements in `f32`, in row-major order.
    Host {
        /// Their shape.
        shape: Vec<usize>,
        /// The elements.
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

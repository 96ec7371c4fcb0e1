//! Number formats of weights and of matrix products, as the configuration names them.

use candle_core::DType;

use crate::config::{MatmulPrecision, WeightDtype};

/// Returns candle's name of a number format.
pub fn dtype(dtype: WeightDtype) -> DType {
    match dtype {
        WeightDtype::F32 => DType::F32,
        WeightDtype::Bf16 => DType::BF16,
    }
}

/// Sets the precision of all later `f32` matrix products of this process (`policy.matmul_precision`).
pub fn set_matmul_precision(precision: MatmulPrecision) {
    candle_core::cuda::set_gemm_reduced_precision_f32(precision != MatmulPrecision::Highest);
    kernels::set_parts(match precision {
        MatmulPrecision::Highest => 3,
        MatmulPrecision::High => 2,
        MatmulPrecision::Medium => 1,
    });
}

//! tmp
pub mod algo;
pub mod generate;
pub mod model;
#[allow(missing_docs)]
pub mod ops;
pub mod rollout;
pub mod seed;

//! tmp
pub mod algo;
pub mod generate;
pub mod model;
pub mod ops;
pub mod rollout;
pub mod seed;

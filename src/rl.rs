//! Reinforcement learning without tensors: algorithms, the ledger of prompt groups, statistics.

pub mod algo;
pub mod ledger;
pub mod statistics;

//! Decoder-only language models with one code path for training and for cached generation.
//!
//! A model works on a flat row of `T` tokens without a batch dimension: everything except attention is a function of
//! one token, and the caller provides attention as an [`Attend`]. A training pass provides a [`pack::Pack`] (a group's
//! prompt once, followed by its completions), a decode step a cache. Both run the same layers, so the log-probabilities
//! of generation and of training agree by construction.

pub mod attention;
pub mod bert;
pub mod cache;
pub mod config;
mod copies;
pub mod decoder;
pub mod export;
pub mod family;
mod layer;
pub mod lora;
pub mod pack;
pub mod rope;
pub mod trie;
pub mod weights;

pub use attention::{Attend, PackedAttention};
pub use bert::{Bert, BertConfig, Embedder};
pub use cache::KvCache;
pub use config::ModelConfig;
pub use copies::DeviceReplicas;
pub use decoder::Decoder;
pub use family::Family;
pub use lora::Lora;
pub use pack::Pack;
pub use trie::{Prefix, Trie};
pub use weights::{LoadTarget, Weights};

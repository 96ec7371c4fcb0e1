//! Decoder-only language models, trainable and cached by one code path.
//!
//! A model works on a flat row of `T` tokens, with no batch dimension: everything but attention is a function
//! of one token, and attention is given from outside as an [`Attend`]. A training pass hands it a
//! [`pack::Pack`] (a group's prompt once, its completions after it), a decode step hands it a cache.
//! Because both run the same layers, the log-probabilities of generation and of training agree by construction.

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
pub use weights::{Onto, Weights};

//! Validation of model files (sizes, counts, offsets, types) before the libraries that read them. Candle, tokenizers
//! and safetensors assume well-formed files.

pub mod gguf;
pub mod quantised;
pub mod safetensors;
pub mod tokenizer;
pub mod types;

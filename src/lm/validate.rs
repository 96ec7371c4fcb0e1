//! Files of models, looked at before the libraries that read them are given them: sizes, counts, places, kinds of parts.
//! Those libraries trust their files.

pub mod gguf;
pub mod quantised;
pub mod safetensors;
pub mod tokenizer;
pub mod types;

//! Language models: their files, tokenizers and chat templates, and the decoder that is trained.

pub mod model;
pub mod precision;
pub mod source;
pub mod tokens;
pub mod validate;

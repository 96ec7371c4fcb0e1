//! Language models: files, tokenizers, chat templates, and the decoder that is trained.

pub mod load;
pub mod model;
pub mod precision;
pub mod source;
pub mod tokens;
pub mod validate;

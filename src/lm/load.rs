//! A model with its tokenizer, from the source that a reference names.

use std::time::Duration;

use anyhow::{Context, Result};

use super::model::{Decoder, LoadTarget, Weights};
use super::source::{self, ModelFiles, ModelRef, ResolveOptions};
use super::tokens::Tokenizer;

/// Loads the model that `reference` names, on the device and in the number format of `onto`. Returns the model, its
/// tokenizer and a description of its source.
///
/// # Errors
/// If no candidate of `reference` is available, or its files cannot be used.
pub fn load(
    reference: &ModelRef,
    onto: LoadTarget<'_>,
    timeout: Duration,
    progress: bool,
) -> Result<(Decoder, Tokenizer, String)> {
    let options = ResolveOptions { timeout, progress, ..ResolveOptions::default() };
    let resolved = source::resolve(reference, &options)?;
    let (mut config, weights) = match &resolved.files {
        ModelFiles::Gguf(path) => Weights::from_gguf(path, onto)?,
        ModelFiles::Directory(dir) => Weights::from_directory(dir, onto)?,
    };
    let tokenizer = Tokenizer::from_files(&resolved.files)?;
    // The tokenizer's end token comes first, because it is the one that programs with a single end token use.
    let described = std::mem::replace(&mut config.eos, tokenizer.eos_ids().to_vec());
    config.add_ends(&described);
    let model = Decoder::new(&config, &weights).with_context(|| format!("in {}", resolved.origin))?;
    Ok((model, tokenizer, resolved.origin))
}

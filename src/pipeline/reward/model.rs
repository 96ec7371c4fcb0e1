//! A reward model: a decoder with a scalar head on its last hidden state (Lee et al. 2023, §2.2).

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use crate::lm::model::config::Head;
use crate::lm::model::{Decoder, Pack, Weights, export};
use crate::lm::tokens::Tokenizer;

pub use crate::lm::model::weights::SCORE as HEAD;

/// Reward model r(x, y) = h·w, where h is the hidden state of the last token of y.
#[derive(Debug, Clone)]
pub struct RewardModel {
    /// The decoder.
    pub model: Decoder,
    /// Weight w of the scalar head, `[1, D]`.
    pub head: Tensor,
}

impl RewardModel {
    /// Opens a Hugging Face directory in the format of [`Self::save`].
    ///
    /// # Errors
    /// If a file or tensor is missing or invalid; the error names it. A directory without a scalar head is refused by
    /// its architecture.
    pub fn open(dir: &Path, device: &Device) -> Result<Self> {
        let (config, mut weights) = Weights::from_directory_as(dir, Head::Scalar, device)?;
        let head = weights.get(HEAD, &[1, config.hidden_size]).with_context(|| format!("in {}", dir.display()))?;
        weights.0.remove(HEAD);
        let model = Decoder::new(&config, &weights).with_context(|| format!("in {}", dir.display()))?;
        Ok(Self { model, head })
    }

    /// Returns the scores `[k]` of `continuations` of `prefix`.
    ///
    /// # Errors
    /// If a sequence exceeds the model's context.
    pub fn scores<S: AsRef<[u32]>>(&self, prefix: &[u32], continuations: &[S]) -> Result<Tensor> {
        let last = self.model.predicting(&Pack::complete(prefix, continuations))?; // [k, D]
        Ok(last.to_dtype(DType::F32)?.matmul(&self.head.t()?)?.squeeze(1)?)
    }

    /// Returns all tensors by name, including the head.
    pub fn weights(&self) -> Weights {
        let mut weights = self.model.weights().clone();
        weights.0.insert(HEAD.to_owned(), self.head.clone());
        weights
    }

    /// Writes a Hugging Face directory, including the tokenizer, for `AutoModelForSequenceClassification`.
    ///
    /// # Errors
    /// If a file cannot be written; the error names it.
    pub fn save(&self, dir: &Path, tokenizer: &Tokenizer, dtype: DType) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let weights = self.weights();
        let pad = pad(tokenizer, self.model.config().vocab_size);
        if pad.is_none() {
            tracing::warn!(
                "the tokenizer has no token for padding except those that end a completion: {} has no pad token, so transformers can score only one text at a time with it",
                dir.display()
            );
        }
        export::write_scorer(dir, self.model.config(), &weights, pad, dtype)?;
        tokenizer.clone().padded_with(pad).save(dir)
    }
}

/// Returns the padding token for `transformers`, which reads the score at the last token that is not padding. It must
/// not be a token that ends an answer in this program's pairs, since the score would then be read at the token before.
/// Candidates in order are the tokenizer's own padding token, its tokens for unknown text and for the beginning of a
/// document, and any other special token.
fn pad(tokenizer: &Tokenizer, rows: usize) -> Option<u32> {
    let ends = tokenizer.eos_ids();
    let own = [tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.bos_id()].into_iter().flatten();
    let fits = |id: &u32| (*id as usize) < rows;
    let non_end = own.clone().filter(fits).find(|id| !ends.contains(id));
    // A second end token, as in Qwen's tokenizers.
    let end_ids = [tokenizer.end(true), tokenizer.end(false)];
    let unused_end = tokenizer.pad_id().filter(fits).filter(|id| !end_ids.contains(&Some(*id)));
    let special = || tokenizer.special_ids().into_iter().filter(fits).find(|id| !ends.contains(id));
    non_end.or(unused_end).or_else(special)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::source::ModelFiles;

    /// Returns the byte tokenizer with the given named tokens: 256 `<|pad|>`, 257 `<|im_start|>`, 258 `<|im_end|>`.
    fn tokenizer(named: &serde_json::Value, ends: &serde_json::Value) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::bytes().save(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join("special_tokens_map.json")).unwrap();
        for (name, json) in [("tokenizer_config.json", named), ("generation_config.json", ends)] {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        Tokenizer::from_files(&ModelFiles::Directory(dir.path().to_owned())).unwrap()
    }

    #[test]
    fn the_pad_token_never_ends_an_answer() {
        use serde_json::json;
        let [pad, start, end] = ["<|pad|>", "<|im_start|>", "<|im_end|>"];
        for (named, ends, expected) in [
            (json!({ "eos_token": end, "pad_token": pad }), json!({}), Some(256)),
            // As in Qwen: the padding token is a second end token.
            (json!({ "eos_token": end, "pad_token": pad }), json!({ "eos_token_id": [258, 256] }), Some(256)),
            (json!({ "eos_token": end, "pad_token": end, "bos_token": start }), json!({}), Some(257)),
            (json!({ "eos_token": end, "pad_token": end }), json!({}), Some(256)),
            (json!({ "eos_token": end, "bos_token": end }), json!({ "eos_token_id": [256, 257] }), None),
        ] {
            assert_eq!(pad_of(&named, &ends), expected, "{named} {ends}");
        }
    }

    fn pad_of(named: &serde_json::Value, ends: &serde_json::Value) -> Option<u32> {
        pad(&tokenizer(named, ends), 259)
    }
}

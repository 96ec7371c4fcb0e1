//! A reward model: a decoder with a scalar head on its last hidden state (Lee et al. 2023, §2.2).

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use crate::model::config::Head;
use crate::model::{Decoder, ModelConfig, Pack, Weights, export};
use crate::tokens::Tokenizer;

/// Name of the head's tensor, `[1, D]`, as `transformers` calls it.
pub const HEAD: &str = "score.weight";

/// r(x, y) = h·w, h the hidden state of the last token of y.
#[derive(Debug, Clone)]
pub struct RewardModel {
    /// The decoder.
    pub model: Decoder,
    /// The head `[1, D]`.
    pub head: Tensor,
}

impl RewardModel {
    /// Opens a Hugging Face directory as [`Self::save`] writes it.
    ///
    /// # Errors
    /// Names the file or tensor at fault; a directory without a scalar head is refused by its architecture.
    pub fn open(dir: &Path, device: &Device) -> Result<Self> {
        let config = ModelConfig::from_directory_as(dir, Head::Scalar)?;
        let mut weights = Weights::read_directory(dir, device)?;
        let head = weights.get(HEAD, &[1, config.hidden_size]).with_context(|| format!("in {}", dir.display()))?;
        weights.0.remove(HEAD);
        weights.0.remove("lm_head.weight");
        let model = Decoder::new(&config, &weights).with_context(|| format!("in {}", dir.display()))?;
        Ok(Self { model, head })
    }

    /// Scores `[k]` of `continuations` of `prefix`.
    ///
    /// # Errors
    /// A sequence beyond the model's context.
    pub fn scores<S: AsRef<[u32]>>(&self, prefix: &[u32], continuations: &[S]) -> Result<Tensor> {
        let last = self.model.predicting(&Pack::whole(prefix, continuations))?; // [k, D]
        Ok(last.to_dtype(DType::F32)?.matmul(&self.head.t()?)?.squeeze(1)?)
    }

    /// All its tensors by name, the head among them.
    pub fn weights(&self) -> Weights {
        let mut weights = self.model.weights().clone();
        weights.0.insert(HEAD.to_owned(), self.head.clone());
        weights
    }

    /// Writes a Hugging Face directory that `AutoModelForSequenceClassification` opens, tokenizer included.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn save(&self, dir: &Path, tokenizer: &Tokenizer, dtype: DType) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let weights = self.weights();
        // `transformers` reads the score at the last token that is no padding. Where padding is the end token, as
        // many models have it, that would be the token before the end.
        let [pad, unk, bos] = [tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.bos_id()];
        let pad = [pad, unk, bos].into_iter().flatten().find(|id| !tokenizer.eos_ids().contains(id));
        export::write_scorer(dir, self.model.config(), &weights, pad, dtype)?;
        tokenizer.clone().padded_with(pad).save(dir)
    }
}

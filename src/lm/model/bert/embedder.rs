//! Sentence embeddings by an encoder that was trained for them (Reimers & Gurevych 2019).

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use serde_json::Value;
use tokenizers::{PostProcessor, TruncationParams};

use super::{Bert, BertConfig};
use crate::lm::model::Weights;
use crate::lm::validate;
use crate::util::read_bounded;

/// Largest number of tokens per pass of the encoder: enough for efficient matrix products, few enough for the cache.
const ROW: usize = 512;

/// Lower bound of norms, which prevents a division by zero.
const MIN_NORM: f64 = 1e-12;

/// Frozen BERT encoder with its tokenizer.
pub struct Embedder {
    model: Bert,
    tokenizer: tokenizers::Tokenizer,
    identity: u64,
    parameters: usize,
}

impl Embedder {
    /// Reads a Hugging Face directory: `config.json`, `model.safetensors`, `tokenizer.json`.
    ///
    /// Texts are truncated at their end to `max_position_embeddings` tokens, or to `max_seq_length` of
    /// `sentence_bert_config.json` if it exists and is smaller, as in sentence-transformers. The special tokens of the
    /// tokenizer's post-processor (`[CLS]`, `[SEP]`) count and are kept. The truncation and padding settings of
    /// `tokenizer.json` are ignored.
    ///
    /// # Errors
    /// If a file is missing, invalid or not supported; the error names it.
    pub fn from_directory(dir: &Path, device: &Device) -> Result<Self> {
        let config = BertConfig::from_directory(dir)?;
        check_pooling(dir)?;
        let weights = Weights::read_directory(dir, device)?;
        let model = Bert::new(&config, &weights).with_context(|| format!("in {}", dir.display()))?;
        let path = dir.join("tokenizer.json");
        let mut tokenizer = validate::tokenizer::read(&path)?;
        let limit = limit(dir, config.context)?;
        let added = tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        ensure!(
            limit > added,
            "texts of {limit} tokens (max_position_embeddings, or max_seq_length of sentence_bert_config.json) leave no room after {added} special tokens"
        );
        let truncation = TruncationParams { max_length: limit, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|error| anyhow!(error))?;
        tokenizer.with_padding(None);
        Ok(Self { model, tokenizer, identity: weights.fingerprint()?, parameters: weights.parameters() })
    }

    /// Returns the fingerprint of the weights.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Returns the number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Returns the width of an embedding, `D`.
    pub fn width(&self) -> usize {
        self.model.config().hidden_size
    }

    /// Returns one embedding `[D]` of length 1 per text: the normalised mean of the last hidden states of all its
    /// tokens.
    ///
    /// # Errors
    /// If the tokenizer rejects a text, the model lacks a token, or the hidden states are not finite.
    pub fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let encode = |text: &&str| {
            let encoding =
                self.tokenizer.encode_fast(*text, true).map_err(|error| anyhow!("cannot tokenise: {error}"))?;
            Ok(encoding.get_ids().to_vec())
        };
        let ids = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let mut embeddings = Vec::with_capacity(ids.len());
        for row in rows(&ids) {
            let hidden = self.model.hidden(&row)?;
            let mut at = 0;
            for text in row {
                embeddings.push(pool(&hidden.narrow(0, at, text.len())?)?);
                at += text.len();
            }
        }
        Ok(embeddings)
    }
}

/// Returns the largest number of tokens of a text, including special tokens.
fn limit(dir: &Path, context: usize) -> Result<usize> {
    let length = optional_json(&dir.join("sentence_bert_config.json"))?["max_seq_length"].as_u64();
    Ok(length.map_or(context, |length| context.min(length as usize)))
}

/// Rejects a model whose description specifies another pooling than the mean.
fn check_pooling(dir: &Path) -> Result<()> {
    let path = dir.join("1_Pooling").join("config.json");
    let mean = optional_json(&path)?["pooling_mode_mean_tokens"].as_bool();
    ensure!(
        mean != Some(false),
        "{} says that the model does not use mean pooling, the only supported kind; use a model that does",
        path.display()
    );
    Ok(())
}

/// Reads a JSON file; null if it does not exist.
fn optional_json(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let text = read_bounded::text(path, read_bounded::DESCRIPTION)
        .with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// Groups consecutive texts into rows of at most [`ROW`] tokens; a longer text is a separate row.
fn rows(texts: &[Vec<u32>]) -> Vec<Vec<&[u32]>> {
    let (mut rows, mut tokens) = (Vec::<Vec<&[u32]>>::new(), 0);
    for text in texts {
        tokens += text.len();
        match rows.last_mut() {
            Some(row) if tokens <= ROW => row.push(text),
            _ => {
                rows.push(vec![text]);
                tokens = text.len();
            }
        }
    }
    rows
}

/// Returns the mean of hidden states `[n, D]`, normalised to length 1.
fn pool(hidden: &Tensor) -> Result<Vec<f32>> {
    let mean = hidden.mean(0)?.to_vec1::<f32>()?;
    let norm = mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    ensure!(norm.is_finite(), "the encoder's states are not finite; its weights may be damaged");
    Ok(mean.into_iter().map(|x| (f64::from(x) / norm.max(MIN_NORM)) as f32).collect())
}

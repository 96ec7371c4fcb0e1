//! Sentence embeddings: a text's direction in the space of an encoder trained for it (Reimers & Gurevych 2019).

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use serde_json::Value;
use tokenizers::{PostProcessor, TruncationParams};

use super::{Bert, BertConfig};
use crate::lm::model::Weights;
use crate::lm::validate;
use crate::util::read_bounded;

/// Tokens that go through the encoder at once: enough to fill its matrix products, few enough to stay near the cache.
const ROW: usize = 512;

/// Norms below this count as this, so that no text divides by zero.
const LEAST_NORM: f64 = 1e-12;

/// A frozen BERT encoder with its tokenizer.
pub struct Embedder {
    model: Bert,
    tokenizer: tokenizers::Tokenizer,
    identity: u64,
    parameters: usize,
}

impl Embedder {
    /// Reads a Hugging Face directory: `config.json`, `model.safetensors`, `tokenizer.json`.
    ///
    /// A text is cut at its end to `max_position_embeddings` tokens, the special tokens that the tokenizer's
    /// post-processor adds (`[CLS]`, `[SEP]`) counted and kept; to `max_seq_length` of `sentence_bert_config.json`
    /// where that is there and smaller, as in sentence-transformers. What `tokenizer.json` itself says of truncation
    /// and padding is ignored.
    ///
    /// # Errors
    /// Names the file at fault, and what is missing or not supported in it.
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
            "texts of {limit} tokens (max_position_embeddings, or max_seq_length of sentence_bert_config.json) have no room beside {added} special tokens"
        );
        let truncation = TruncationParams { max_length: limit, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|error| anyhow!(error))?;
        tokenizer.with_padding(None);
        Ok(Self { model, tokenizer, identity: weights.fingerprint()?, parameters: weights.parameters() })
    }

    /// Fingerprint of the weights.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Number of values in all its tensors.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Width of an embedding, `D`.
    pub fn width(&self) -> usize {
        self.model.config().hidden_size
    }

    /// One embedding `[D]` of length 1 per text: the mean of the last hidden states of all its tokens, normalised.
    ///
    /// # Errors
    /// A text that the tokenizer refuses, a token that the model lacks, or states that are not finite.
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

/// Most tokens of a text, special tokens included.
fn limit(dir: &Path, context: usize) -> Result<usize> {
    let length = optional_json(&dir.join("sentence_bert_config.json"))?["max_seq_length"].as_u64();
    Ok(length.map_or(context, |length| context.min(length as usize)))
}

/// Refuses a model whose own description, where there is one, pools in another way.
fn check_pooling(dir: &Path) -> Result<()> {
    let path = dir.join("1_Pooling").join("config.json");
    let mean = optional_json(&path)?["pooling_mode_mean_tokens"].as_bool();
    ensure!(
        mean != Some(false),
        "{} says that the model is not pooled by the mean of its tokens, which is what works here; use one that is",
        path.display()
    );
    Ok(())
}

/// A JSON file that may be absent, which reads as null.
fn optional_json(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let text = read_bounded::text(path, read_bounded::DESCRIPTION)
        .with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// Texts in order, together while they have at most [`ROW`] tokens.
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

/// The mean of hidden states `[n, D]`, at length 1.
fn pool(hidden: &Tensor) -> Result<Vec<f32>> {
    let mean = hidden.mean(0)?.to_vec1::<f32>()?;
    let norm = mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    ensure!(norm.is_finite(), "the encoder's states are not finite; its weights may be damaged");
    Ok(mean.into_iter().map(|x| (f64::from(x) / norm.max(LEAST_NORM)) as f32).collect())
}

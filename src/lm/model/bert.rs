//! BERT: a post-norm bidirectional encoder (Devlin et al. 2019), frozen, forward pass only.
//!
//! Several texts form one flat row of tokens: every layer is a function of one token except attention, which is
//! computed text by text. So no padding and no mask are needed.

pub mod config;
pub mod embedder;

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use super::weights::Weights;
pub use config::BertConfig;
pub use embedder::Embedder;

/// BERT encoder without its pooler.
#[derive(Debug, Clone)]
pub struct Bert {
    config: BertConfig,
    words: Tensor,
    /// Position embeddings plus the embedding of the first token type, which all tokens here have.
    positions: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
}

#[derive(Debug, Clone)]
struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    feed_forward_norm: Norm,
}

impl Bert {
    /// Builds the encoder from weights under their Hugging Face names, with or without a leading `bert.`. Ignores
    /// tensors that it does not need (a pooler, a head).
    ///
    /// # Errors
    /// If a tensor is missing or has the wrong shape; the error names it.
    pub fn new(config: &BertConfig, weights: &Weights) -> anyhow::Result<Self> {
        let d = config.hidden_size;
        let prefix = if weights.0.keys().any(|name| name.starts_with("bert.")) { "bert." } else { "" };
        let get = |name: &str, shape: &[usize]| weights.get(&format!("{prefix}{name}"), shape);
        let linear = |name: &str, out: usize, into: usize| {
            let (weight, bias) = (get(&format!("{name}.weight"), &[out, into])?, get(&format!("{name}.bias"), &[out])?);
            anyhow::Ok(Linear { weight, bias })
        };
        let norm = |name: &str| {
            let (weight, bias) = (get(&format!("{name}.weight"), &[d])?, get(&format!("{name}.bias"), &[d])?);
            anyhow::Ok(Norm { weight, bias, eps: config.layer_norm_eps })
        };
        let layers = (0..config.layers)
            .map(|i| {
                let at = |name: &str| format!("encoder.layer.{i}.{name}");
                Ok(Layer {
                    q: linear(&at("attention.self.query"), d, d)?,
                    k: linear(&at("attention.self.key"), d, d)?,
                    v: linear(&at("attention.self.value"), d, d)?,
                    o: linear(&at("attention.output.dense"), d, d)?,
                    attention_norm: norm(&at("attention.output.LayerNorm"))?,
                    up: linear(&at("intermediate.dense"), config.intermediate_size, d)?,
                    down: linear(&at("output.dense"), d, config.intermediate_size)?,
                    feed_forward_norm: norm(&at("output.LayerNorm"))?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let types = get("embeddings.token_type_embeddings.weight", &[config.token_types, d])?;
        let positions = get("embeddings.position_embeddings.weight", &[config.context, d])?;
        Ok(Self {
            config: config.clone(),
            words: get("embeddings.word_embeddings.weight", &[config.vocab_size, d])?,
            positions: positions.broadcast_add(&types.get(0)?)?,
            norm: norm("embeddings.LayerNorm")?,
            layers,
        })
    }

    /// Returns the model's hyper-parameters.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        self.words.device()
    }

    /// Returns the last hidden states `[T, D]` of the texts' tokens, one text after another; `T` is their total number
    /// of tokens.
    ///
    /// # Errors
    /// If no text is given, a text has no tokens or more than the context, or a token is not in the vocabulary.
    pub fn hidden(&self, texts: &[&[u32]]) -> Result<Tensor> {
        let spans = spans(texts);
        let context = self.config.context;
        if let Some(span) = spans.iter().find(|span| span.is_empty() || span.len() > context) {
            candle_core::bail!("a text of {} tokens is not within the encoder's 1 to {context}", span.len())
        }
        let positions: Vec<u32> = texts.iter().flat_map(|ids| 0..ids.len() as u32).collect();
        let words = self.words.index_select(&Tensor::new(texts.concat(), self.device())?, 0)?;
        let positions = self.positions.index_select(&Tensor::new(positions, self.device())?, 0)?;
        let mut x = self.norm.forward(&(words + positions)?)?;
        for layer in &self.layers {
            let mixed = self.attend(layer, &x, &spans)?;
            x = layer.attention_norm.forward(&(x + layer.o.forward(&mixed)?)?)?;
            let h = layer.up.forward(&x)?.gelu_erf()?;
            x = layer.feed_forward_norm.forward(&(x + layer.down.forward(&h)?)?)?;
        }
        Ok(x)
    }

    /// Computes attention within each text, `[T, D]` before the output projection.
    fn attend(&self, layer: &Layer, x: &Tensor, spans: &[Range<usize>]) -> Result<Tensor> {
        let (t, d) = x.dims2()?;
        let (heads, head_dim) = (self.config.heads, d / self.config.heads);
        let split = |linear: &Linear| linear.forward(x)?.reshape((t, heads, head_dim))?.transpose(0, 1);
        let (q, k, v) = (split(&layer.q)?, split(&layer.k)?.transpose(1, 2)?, split(&layer.v)?);
        let mixed = spans.iter().map(|span| {
            let (at, n) = (span.start, span.len());
            // On CUDA, candle's product needs matrices without gaps between their rows.
            let (q, k, v) = (q.narrow(1, at, n)?, k.narrow(2, at, n)?, v.narrow(1, at, n)?);
            let scores = q.contiguous()?.matmul(&k.contiguous()?)?; // [H, n, n]
            let weights = kernels::masked_softmax(&scores, None, 1.0 / (head_dim as f64).sqrt())?;
            weights.matmul(&v.contiguous()?)?.transpose(0, 1)?.reshape((n, d))
        });
        Tensor::cat(&mixed.collect::<Result<Vec<_>>>()?, 0)
    }
}

/// Returns the range of rows of each text.
fn spans(texts: &[&[u32]]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |ids: &&[u32]| {
        let start = end;
        end += ids.len();
        start..end
    };
    texts.iter().map(next).collect()
}

/// Linear layer `x·Wᵀ + b`.
#[derive(Debug, Clone)]
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }
}

/// Layer normalisation `(x − mean) / sqrt(variance + eps) · weight + bias` over the last dimension (Ba et al. 2016).
#[derive(Debug, Clone)]
struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let deviation = (x.sqr()?.mean_keepdim(1)? + self.eps)?.sqrt()?;
        x.broadcast_div(&deviation)?.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

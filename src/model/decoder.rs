//! The decoder that the supported families share: pre-norm, rotary positions, grouped queries, gated feed-forward
//! (Touvron et al. 2023). What a family adds, `family/` says.

use candle_core::{Device, Result, Tensor, Var};

use super::attention::{Attend, PackedAttention};
use super::config::ModelConfig;
use super::pack::Pack;
use super::rope;
use super::weights::Weights;
use crate::ops;

/// A decoder over borrowed storage: building one from [`Weights`] copies nothing.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: ModelConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Weights,
}

/// What makes queries, keys or values of a hidden state.
#[derive(Debug, Clone)]
struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
    /// Weight of the norm over each head.
    norm: Option<Tensor>,
}

impl Projection {
    /// `[T, heads, hd]` of hidden states `[T, D]`.
    fn heads(&self, x: &Tensor, heads: usize, eps: f64) -> Result<Tensor> {
        let mut out = linear(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            out = out.broadcast_add(bias)?;
        }
        let (t, width) = out.dims2()?;
        let hd = width / heads;
        match &self.norm {
            None => out.reshape((t, heads, hd)),
            Some(norm) => ops::rms_norm(&out.reshape((t * heads, hd))?, norm, eps)?.reshape((t, heads, hd)),
        }
    }
}

#[derive(Debug, Clone)]
struct Layer {
    attention_norm: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Decoder {
    /// Builds the model from weights under their Hugging Face names.
    ///
    /// # Errors
    /// Names the tensor that is missing or has the wrong shape.
    pub fn new(config: &ModelConfig, weights: &Weights) -> anyhow::Result<Self> {
        let (d, hd) = (config.hidden_size, config.head_dim);
        let (q, kv, ffn) = (config.heads * hd, config.kv_heads * hd, config.intermediate_size);
        let layers = (0..config.layers)
            .map(|i| {
                let named = |name: &str, shape: &[usize]| weights.get(&format!("model.layers.{i}.{name}"), shape);
                let get = |name: &str, shape: &[usize]| named(&format!("{name}.weight"), shape);
                let projection = |letter: &str, width: usize| {
                    let (bias, norm) = (config.family.qkv_bias, config.family.qk_norm && letter != "v");
                    anyhow::Ok(Projection {
                        weight: get(&format!("self_attn.{letter}_proj"), &[width, d])?,
                        bias: bias.then(|| named(&format!("self_attn.{letter}_proj.bias"), &[width])).transpose()?,
                        norm: norm.then(|| get(&format!("self_attn.{letter}_norm"), &[hd])).transpose()?,
                    })
                };
                Ok(Layer {
                    attention_norm: get("input_layernorm", &[d])?,
                    q: projection("q", q)?,
                    k: projection("k", kv)?,
                    v: projection("v", kv)?,
                    o: get("self_attn.o_proj", &[d, q])?,
                    feed_forward_norm: get("post_attention_layernorm", &[d])?,
                    gate: get("mlp.gate_proj", &[ffn, d])?,
                    up: get("mlp.up_proj", &[ffn, d])?,
                    down: get("mlp.down_proj", &[d, ffn])?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let embedding = weights.get("model.embed_tokens.weight", &[config.vocab_size, d])?;
        let head =
            if config.tied { embedding.clone() } else { weights.get("lm_head.weight", &[config.vocab_size, d])? };
        let (cos, sin) =
            rope::tables(config.context, config.head_dim, config.rope_theta, config.rope_scaling, embedding.device())?;
        Ok(Self {
            norm: weights.get("model.norm.weight", &[d])?,
            config: config.clone(),
            embedding,
            layers,
            head,
            cos,
            sin,
            weights: weights.clone(),
        })
    }

    /// A copy whose tensors are variables, and these by name. Without `head` it is for hidden states alone: a head of its
    /// own is left out, and the embedding stands where one is asked for.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn trainable(&self, head: bool) -> anyhow::Result<(Self, Vec<(String, Var)>)> {
        let config = ModelConfig { tied: self.config.tied || !head, ..self.config.clone() };
        let params = self
            .weights
            .0
            .iter()
            .filter(|(name, _)| head || *name != "lm_head.weight")
            .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(&tensor.copy()?)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let weights = Weights(params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
        Ok((Self::new(&config, &weights)?, params))
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tensors that the model runs on, by name.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// The head `[V, D]`.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Final hidden states `[T, D]` of `ids` at `positions`, normed, ready for the head.
    ///
    /// # Errors
    /// A position beyond the context, or shapes that do not fit.
    pub fn hidden(&self, ids: &[u32], positions: &[u32], attend: &mut dyn Attend) -> Result<Tensor> {
        if let Some(last) = positions.iter().max()
            && *last as usize >= self.config.context
        {
            candle_core::bail!("position {last} is beyond the model's context of {} tokens", self.config.context);
        }
        let config = &self.config;
        let positions = Tensor::new(positions, self.device())?;
        let cos = self.cos.index_select(&positions, 0)?;
        let sin = self.sin.index_select(&positions, 0)?;
        let mut x = self.embedding.index_select(&Tensor::new(ids, self.device())?, 0)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let h = ops::rms_norm(&x, &layer.attention_norm, config.rms_norm_eps)?;
            let q = layer.q.heads(&h, config.heads, config.rms_norm_eps)?;
            let k = layer.k.heads(&h, config.kv_heads, config.rms_norm_eps)?;
            let v = layer.v.heads(&h, config.kv_heads, config.rms_norm_eps)?;
            let (q, k) = (ops::rope(&q, &cos, &sin)?, ops::rope(&k, &cos, &sin)?);
            x = (x + linear(&attend.attend(i, &q, &k, &v)?, &layer.o)?)?;
            let h = ops::rms_norm(&x, &layer.feed_forward_norm, config.rms_norm_eps)?;
            let h = ops::swiglu(&linear(&h, &layer.gate)?, &linear(&h, &layer.up)?)?;
            x = (x + linear(&h, &layer.down)?)?;
        }
        ops::rms_norm(&x, &self.norm, config.rms_norm_eps)
    }

    /// Logits `[N, V]` of hidden states `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.head)
    }

    /// Hidden states `[N, D]` that predict the targets of `pack`.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn predicting(&self, pack: &Pack) -> Result<Tensor> {
        let mut attention = PackedAttention::new(pack, self.device())?;
        let hidden = self.hidden(&pack.ids, &pack.positions, &mut attention)?;
        hidden.index_select(&Tensor::new(pack.rows.as_slice(), self.device())?, 0)
    }

    /// Log-probability `[N]` of each target of `pack`, and entropy `[N]` of the distribution that
    /// predicted it, at `temperature`.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn logprobs(&self, pack: &Pack, temperature: f64) -> Result<(Tensor, Tensor)> {
        ops::linear_logprobs(&self.predicting(pack)?, &self.head, &pack.targets, temperature)
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

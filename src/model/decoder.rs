//! The decoder that the supported families share: pre-norm, rotary positions, grouped queries, gated feed-forward
//! (Touvron et al. 2023). What a family adds, `family/` says.

use candle_core::{Device, Result, Tensor, Var};

use super::attention::{Attend, PackedAttention, Scope};
use super::config::ModelConfig;
use super::lora::{Adapter, Lora, is_adapter};
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
    final_norm: Tensor,
    head: Tensor,
    rope: Rotary,
    /// Of layers with a window, where these have frequencies of their own.
    local_rope: Option<Rotary>,
    weights: Weights,
    lora: Option<Lora>,
}

/// cos and sin `[context, hd/2]`.
#[derive(Debug, Clone)]
struct Rotary(Tensor, Tensor);

impl Rotary {
    fn at(&self, positions: &Tensor) -> Result<Self> {
        Ok(Self(self.0.index_select(positions, 0)?, self.1.index_select(positions, 0)?))
    }
}

/// A matrix `[out, in]` that rows are multiplied with, and its adapter.
#[derive(Debug, Clone)]
struct Linear {
    weight: Tensor,
    adapter: Option<Adapter>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.adapter {
            None => ops::linear(x, &self.weight),
            Some(adapter) => adapter.add(&ops::linear(x, &self.weight)?, x),
        }
    }
}

/// What makes queries, keys or values of a hidden state.
#[derive(Debug, Clone)]
struct Projection {
    weight: Linear,
    bias: Option<Tensor>,
    /// Weight of the norm over each head.
    norm: Option<Tensor>,
}

#[derive(Debug, Clone)]
struct Layer {
    window: Option<usize>,
    local: bool,
    attention_norm: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Linear,
    /// After attention, before its result joins the stream.
    attended_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// After the feed-forward layer, likewise.
    fed_norm: Option<Tensor>,
}

impl Decoder {
    /// Builds the model from weights under their Hugging Face names.
    ///
    /// # Errors
    /// Names the tensor that is missing or has the wrong shape.
    pub fn new(config: &ModelConfig, weights: &Weights) -> anyhow::Result<Self> {
        Self::with_adapters(config, weights, None)
    }

    /// As [`Self::new`], with the adapters of `lora` among the weights: `….q_proj.lora_A.weight` and so on.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_adapters(config: &ModelConfig, weights: &Weights, lora: Option<&Lora>) -> anyhow::Result<Self> {
        let (d, hd) = (config.hidden_size, config.head_dim);
        let (q, kv, ffn) = (config.heads * hd, config.kv_heads * hd, config.intermediate_size);
        let layers = (0..config.layers)
            .map(|i| {
                let named = |name: &str, shape: &[usize]| weights.get(&format!("model.layers.{i}.{name}"), shape);
                let get = |name: &str, shape: &[usize]| named(&format!("{name}.weight"), shape);
                let matrix = |name: &str, shape: [usize; 2]| {
                    let adapter = |lora: &Lora| lora.adapter(weights, &format!("model.layers.{i}.{name}"), shape);
                    anyhow::Ok(Linear { weight: get(name, &shape)?, adapter: lora.map_or(Ok(None), adapter)? })
                };
                let projection = |letter: &str, width: usize| {
                    let (bias, norm) = (config.family.qkv_bias, config.family.qk_norm && letter != "v");
                    anyhow::Ok(Projection {
                        weight: matrix(&format!("self_attn.{letter}_proj"), [width, d])?,
                        bias: bias.then(|| named(&format!("self_attn.{letter}_proj.bias"), &[width])).transpose()?,
                        norm: norm.then(|| get(&format!("self_attn.{letter}_norm"), &[hd])).transpose()?,
                    })
                };
                let slides = config.window.as_ref().filter(|window| window.layers[i]);
                let both_sides = config.family.gemma.is_some();
                let before = if both_sides { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
                let after = |name: &str| both_sides.then(|| get(name, &[d])).transpose();
                Ok(Layer {
                    window: slides.map(|window| window.size),
                    local: slides.is_some(),
                    attention_norm: get("input_layernorm", &[d])?,
                    q: projection("q", q)?,
                    k: projection("k", kv)?,
                    v: projection("v", kv)?,
                    o: matrix("self_attn.o_proj", [d, q])?,
                    attended_norm: after("post_attention_layernorm")?,
                    feed_forward_norm: get(before, &[d])?,
                    gate: matrix("mlp.gate_proj", [ffn, d])?,
                    up: matrix("mlp.up_proj", [ffn, d])?,
                    down: matrix("mlp.down_proj", [d, ffn])?,
                    fed_norm: after("post_feedforward_layernorm")?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let embedding = weights.get("model.embed_tokens.weight", &[config.vocab_size, d])?;
        let head =
            if config.tied { embedding.clone() } else { weights.get("lm_head.weight", &[config.vocab_size, d])? };
        let rotary = |theta: f64, scaling: rope::Scaling| -> anyhow::Result<Rotary> {
            let (cos, sin) = rope::tables(config.context, config.head_dim, theta, scaling, embedding.device())?;
            Ok(Rotary(cos, sin))
        };
        let rope = rotary(config.rope_theta, config.rope_scaling)?;
        let local_rope = config.local_rope_theta.map(|theta| rotary(theta, rope::Scaling::None)).transpose()?;
        Ok(Self {
            final_norm: weights.get("model.norm.weight", &[d])?,
            config: config.clone(),
            embedding,
            layers,
            head,
            rope,
            local_rope,
            weights: weights.clone(),
            lora: lora.cloned(),
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
            .merged()?
            .0
            .iter()
            .filter(|(name, _)| head || *name != "lm_head.weight")
            .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(&tensor.copy()?)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let weights = Weights(params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
        Ok((Self::new(&config, &weights)?, params))
    }

    /// The same model whose matrices stay as they are, shared, under adapters that are variables; and these by name. They
    /// go on from the adapters there are; else they are made from `seed` and change nothing yet.
    ///
    /// # Errors
    /// Adapters of another size than those there are.
    pub fn adapted(&self, lora: &Lora, seed: u64) -> anyhow::Result<(Self, Vec<(String, Var)>)> {
        let mut weights = self.weights.clone();
        if self.lora.is_none() {
            weights.0.extend(lora.fresh(&self.weights, seed, self.device())?.0);
        }
        let mut params = Vec::new();
        for (name, tensor) in weights.0.iter_mut().filter(|(name, _)| is_adapter(name)) {
            let var = Var::from_tensor(&tensor.copy()?)?;
            *tensor = var.as_tensor().clone();
            params.push((name.clone(), var));
        }
        Ok((Self::with_adapters(&self.config, &weights, Some(lora))?, params))
    }

    /// An immutable copy of the model as it is now. What is not trained is shared.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn snapshot(&self) -> anyhow::Result<Self> {
        Self::with_adapters(&self.config, &self.weights.snapshot()?, self.lora.as_ref())
    }

    /// The weights without adapters: these are worked into the matrices.
    ///
    /// # Errors
    /// When memory for the product cannot be had.
    pub fn merged(&self) -> anyhow::Result<Weights> {
        self.lora.as_ref().map_or_else(|| Ok(self.weights.clone()), |lora| lora.merge(&self.weights))
    }

    /// The adapters' sizes, if it has any.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
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
        let (whole, local) =
            (self.rope.at(&positions)?, self.local_rope.as_ref().map(|rope| rope.at(&positions)).transpose()?);
        let mut x = ops::embed(&self.embedding, ids)?;
        if config.family.gemma.is_some() {
            x = (x * (config.hidden_size as f64).sqrt())?;
        }
        let after = |x: Tensor, norm: &Option<Tensor>| norm.as_ref().map_or(Ok(x.clone()), |norm| self.norm(&x, norm));
        // Attention divides by the root of the width of a head.
        let query_scale = config.query_scalar.map(|scalar| (config.head_dim as f64 / scalar as f64).sqrt());
        for (i, layer) in self.layers.iter().enumerate() {
            let h = self.norm(&x, &layer.attention_norm)?;
            let (q, k) = (self.heads(&layer.q, &h, config.heads)?, self.heads(&layer.k, &h, config.kv_heads)?);
            let v = self.heads(&layer.v, &h, config.kv_heads)?;
            let Rotary(cos, sin) = local.as_ref().filter(|_| layer.local).unwrap_or(&whole);
            let (mut q, k) = (ops::rope(&q, cos, sin)?, ops::rope(&k, cos, sin)?);
            if let Some(scale) = query_scale.filter(|scale| *scale != 1.0) {
                q = (q * scale)?;
            }
            let scope = Scope { layer: i, window: layer.window, cap: config.attention_cap };
            let h = layer.o.forward(&attend.attend(scope, &q, &k, &v)?)?;
            x = (x + after(h, &layer.attended_norm)?)?;
            let h = self.norm(&x, &layer.feed_forward_norm)?;
            let h = ops::gated(&layer.gate.forward(&h)?, &layer.up.forward(&h)?, config.family.activation)?;
            x = (x + after(layer.down.forward(&h)?, &layer.fed_norm)?)?;
        }
        self.norm(&x, &self.final_norm)
    }

    /// RMSNorm, by the weight or by one more than it.
    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        match self.config.family.gemma {
            None => ops::rms_norm(x, weight, self.config.rms_norm_eps),
            Some(_) => ops::rms_norm(x, &(weight + 1.0)?, self.config.rms_norm_eps),
        }
    }

    /// `[T, heads, hd]` of hidden states `[T, D]`.
    fn heads(&self, projection: &Projection, x: &Tensor, heads: usize) -> Result<Tensor> {
        let mut out = projection.weight.forward(x)?;
        if let Some(bias) = &projection.bias {
            out = out.broadcast_add(bias)?;
        }
        let (t, hd) = (x.dim(0)?, self.config.head_dim);
        match &projection.norm {
            None => out.reshape((t, heads, hd)),
            Some(norm) => self.norm(&out.reshape((t * heads, hd))?, norm)?.reshape((t, heads, hd)),
        }
    }

    /// Logits `[N, V]` of hidden states `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        ops::softcap(&ops::linear(hidden, &self.head)?, self.config.logit_cap)
    }

    /// Hidden states `[N, D]` that predict the targets of `pack`.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn predicting(&self, pack: &Pack) -> Result<Tensor> {
        let mut attention = PackedAttention::new(pack);
        let hidden = self.hidden(&pack.ids, &pack.positions, &mut attention)?;
        hidden.index_select(&Tensor::new(pack.rows.as_slice(), self.device())?, 0)
    }

    /// Log-probability `[N]` of each target of `pack`, and entropy `[N]` of the distribution that
    /// predicted it, at `temperature`.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn logprobs(&self, pack: &Pack, temperature: f64) -> Result<(Tensor, Tensor)> {
        self.logprobs_of(&self.predicting(pack)?, &pack.targets, temperature)
    }

    /// The same of targets `[N]` predicted by hidden states `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logprobs_of(&self, hidden: &Tensor, targets: &[u32], temperature: f64) -> Result<(Tensor, Tensor)> {
        ops::linear_logprobs(hidden, &self.head, self.config.logit_cap, targets, temperature)
    }
}

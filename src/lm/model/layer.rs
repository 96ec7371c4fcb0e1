//! One layer of a decoder: attention, then the gated feed-forward layer, each added to the residual stream.

use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

use super::attention::{Attend, Scope};
use super::config::ModelConfig;
use super::lora::Lora;
use super::rope::Angles;
use super::weights::Weights;
use kernels::{Format, Matrix, Quantized};

/// Tensors of a layer, its index and its window.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    config: Arc<ModelConfig>,
    index: usize,
    window: Option<usize>,
    attention_norm: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Linear,
    /// Norm of the attention's result before it is added to the stream, if the family has one.
    attended_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// Norm of the feed-forward layer's result before it is added to the stream, if the family has one.
    fed_norm: Option<Tensor>,
}

/// Linear map with an optional quantized copy of its weight.
#[derive(Debug, Clone)]
struct Linear {
    matrix: Matrix,
    /// Quantized weight, for few rows without a gradient.
    quantized: Option<Arc<Quantized>>,
}

/// Projection of hidden states to queries, keys or values.
#[derive(Debug, Clone)]
struct Projection {
    linear: Linear,
    /// Weight of the norm over each head.
    norm: Option<Tensor>,
}

impl Layer {
    /// Builds layer `index` from weights under their Hugging Face names.
    ///
    /// # Errors
    /// If a tensor is missing or has the wrong shape; the error names it.
    pub(super) fn new(
        index: usize,
        config: &Arc<ModelConfig>,
        weights: &Weights,
        lora: Option<&Lora>,
    ) -> anyhow::Result<Self> {
        let (d, hd) = (config.hidden_size, config.head_dim);
        let (q, kv, ffn) = (config.heads * hd, config.kv_heads * hd, config.intermediate_size);
        let named = |name: &str, shape: &[usize]| weights.get(&format!("model.layers.{index}.{name}"), shape);
        let get = |name: &str, shape: &[usize]| named(&format!("{name}.weight"), shape);
        let matrix = |name: &str, shape: [usize; 2]| {
            let adapter = |lora: &Lora| lora.adapter(weights, &format!("model.layers.{index}.{name}"), shape);
            let adapter = lora.map_or(Ok(None), adapter)?;
            anyhow::Ok(Linear { matrix: Matrix { adapter, ..get(name, &shape)?.into() }, quantized: None })
        };
        let projection = |letter: &str, width: usize| {
            let (bias, norm) = (config.family.qkv_bias, config.family.qk_norm && letter != "v");
            let mut linear = matrix(&format!("self_attn.{letter}_proj"), [width, d])?;
            linear.matrix.bias = bias.then(|| named(&format!("self_attn.{letter}_proj.bias"), &[width])).transpose()?;
            anyhow::Ok(Projection {
                linear,
                norm: norm.then(|| get(&format!("self_attn.{letter}_norm"), &[hd])).transpose()?,
            })
        };
        let slides = config.window.as_ref().filter(|window| window.layers[index]);
        let both_sides = config.family.gemma.is_some();
        let before = if both_sides { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let after = |name: &str| both_sides.then(|| get(name, &[d])).transpose();
        Ok(Self {
            config: Arc::clone(config),
            index,
            window: slides.map(|window| window.size),
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
    }

    /// Returns the layer with additional copies of its matrices in `format`.
    pub(super) fn quantized(&self, format: Format) -> Result<Self> {
        let mut layer = self.clone();
        let projections = [&mut layer.q, &mut layer.k, &mut layer.v].map(|projection| &mut projection.linear);
        let others = [&mut layer.o, &mut layer.gate, &mut layer.up, &mut layer.down];
        for linear in projections.into_iter().chain(others) {
            linear.quantized = Quantized::of(&linear.matrix.weight, format)?.map(Arc::new);
        }
        Ok(layer)
    }

    /// Returns the residual stream `[T, D]` after this layer; `angles` are those of the tokens' positions.
    pub(super) fn forward(&self, x: &Tensor, angles: &Angles, attend: &mut dyn Attend) -> Result<Tensor> {
        self.feed_forward(&self.attention(x, angles, attend)?)
    }

    /// Applies the norm after a half layer, or returns `x` unchanged for families without one.
    fn after(&self, x: Tensor, weight: &Option<Tensor>) -> Result<Tensor> {
        weight.as_ref().map_or(Ok(x.clone()), |weight| norm(&self.config, &x, weight))
    }

    fn attention(&self, x: &Tensor, angles: &Angles, attend: &mut dyn Attend) -> Result<Tensor> {
        let config = &*self.config;
        let (cos, sin) = angles.of(self.window.is_some());
        if let (Some(mask), true) = (attend.mask(), self.attention_is_plain(x)?) {
            let matrix = |projection: &Projection| projection.linear.matrix.clone();
            let block = kernels::SelfAttention {
                norm: self.attention_norm.clone(),
                eps: config.rms_norm_eps,
                q: matrix(&self.q),
                k: matrix(&self.k),
                v: matrix(&self.v),
                o: self.o.matrix.clone(),
                head_norms: self.q.norm.clone().zip(self.k.norm.clone()).map(Into::into),
                cos: cos.clone(),
                sin: sin.clone(),
                head_dim: config.head_dim,
                mask: Arc::clone(mask),
                window: self.window,
                cap: config.attention_cap,
            };
            return kernels::self_attention(x, &block);
        }
        let h = norm(config, x, &self.attention_norm)?;
        let (q, k) = (self.heads(&self.q, &h, config.heads)?, self.heads(&self.k, &h, config.kv_heads)?);
        let v = self.heads(&self.v, &h, config.kv_heads)?;
        let (mut q, k) = (kernels::rope(&q, cos, sin)?, kernels::rope(&k, cos, sin)?);
        // Attention itself divides by the square root of the width of a head.
        let scale = config.query_scalar.map(|scalar| (config.head_dim as f64 / scalar as f64).sqrt());
        if let Some(scale) = scale.filter(|scale| *scale != 1.0) {
            q = (q * scale)?;
        }
        let scope = Scope { layer: self.index, window: self.window, cap: config.attention_cap };
        let h = self.o.forward(&attend.attend(scope, &q, &k, &v)?)?;
        x + self.after(h, &self.attended_norm)?
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let config = &*self.config;
        if self.feed_forward_is_plain(x)? {
            let block = kernels::FeedForward {
                norm: self.feed_forward_norm.clone(),
                eps: config.rms_norm_eps,
                gate: self.gate.matrix.clone(),
                up: self.up.matrix.clone(),
                down: self.down.matrix.clone(),
                activation: config.family.activation,
            };
            return kernels::feed_forward(x, &block);
        }
        let h = norm(config, x, &self.feed_forward_norm)?;
        let h = kernels::gated(&self.gate.forward(&h)?, &self.up.forward(&h)?, config.family.activation)?;
        x + self.after(self.down.forward(&h)?, &self.fed_norm)?
    }

    /// Returns whether the attention half of the layer is exactly the computation of [`kernels::self_attention`].
    fn attention_is_plain(&self, x: &Tensor) -> Result<bool> {
        let linears = [&self.q.linear, &self.k.linear, &self.v.linear, &self.o];
        Ok(are_plain(x, linears)? && self.config.family.gemma.is_none() && self.config.query_scalar.is_none())
    }

    /// Returns whether the feed-forward half of the layer is exactly the computation of [`kernels::feed_forward`].
    fn feed_forward_is_plain(&self, x: &Tensor) -> Result<bool> {
        Ok(self.config.family.gemma.is_none() && are_plain(x, [&self.gate, &self.up, &self.down])?)
    }

    /// Returns the heads `[T, heads, hd]` of hidden states `[T, D]`.
    fn heads(&self, projection: &Projection, x: &Tensor, heads: usize) -> Result<Tensor> {
        let out = projection.linear.forward(x)?;
        let (t, hd) = (x.dim(0)?, self.config.head_dim);
        match &projection.norm {
            None => out.reshape((t, heads, hd)),
            Some(weight) => norm(&self.config, &out.reshape((t * heads, hd))?, weight)?.reshape((t, heads, hd)),
        }
    }
}

/// Returns whether rows `x` use the original matrices: few rows use quantized ones if they exist.
fn are_plain<'a>(x: &Tensor, linears: impl IntoIterator<Item = &'a Linear>) -> Result<bool> {
    let is_small_batch = x.dim(0)? <= kernels::SMALL_BATCH_ROWS;
    Ok(linears.into_iter().all(|linear| !(is_small_batch && linear.quantized.is_some())))
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.matrix.add_bias_and_adapter(linear(x, &self.matrix.weight, self.quantized.as_deref())?, x)
    }
}

/// Computes `x · weightᵀ`, with the quantized matrix if it exists and `x` has few rows and no gradient.
pub(super) fn linear(x: &Tensor, weight: &Tensor, quantized: Option<&Quantized>) -> Result<Tensor> {
    match quantized {
        Some(quantized) if x.dim(0)? <= kernels::SMALL_BATCH_ROWS && !x.track_op() => quantized.linear(x),
        _ => kernels::linear(x, weight),
    }
}

/// Computes RMSNorm with the weight, or with `1 + weight` for Gemma.
pub(super) fn norm(config: &ModelConfig, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    match config.family.gemma {
        None => kernels::rms_norm(x, weight, config.rms_norm_eps),
        Some(_) => {
            // In half precision the sum of 1 and a small number loses the small number.
            let wide = if weight.dtype() == DType::BF16 { weight.to_dtype(DType::F32)? } else { weight.clone() };
            kernels::rms_norm(x, &(wide + 1.0)?, config.rms_norm_eps)
        }
    }
}

//! One layer of a decoder: attention, then the gated feed-forward layer, each added to the stream.

use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

use super::attention::{Attend, Scope};
use super::config::ModelConfig;
use super::lora::Lora;
use super::rope::Angles;
use super::weights::Weights;
use kernels::{Format, Matrix, Quantized};

/// A layer's tensors, and where it stands.
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
    /// After attention, before its result joins the stream.
    attended_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// After the feed-forward layer, likewise.
    fed_norm: Option<Tensor>,
}

/// A matrix that rows are multiplied with.
#[derive(Debug, Clone)]
struct Linear {
    matrix: Matrix,
    /// Its weight in fewer bits, for few rows without a gradient.
    narrow: Option<Arc<Quantized>>,
}

/// What makes queries, keys or values of a hidden state.
#[derive(Debug, Clone)]
struct Projection {
    linear: Linear,
    /// Weight of the norm over each head.
    norm: Option<Tensor>,
}

impl Layer {
    /// Layer `index` from weights under their Hugging Face names.
    ///
    /// # Errors
    /// Names the tensor that is missing or has the wrong shape.
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
            anyhow::Ok(Linear { matrix: Matrix { adapter, ..get(name, &shape)?.into() }, narrow: None })
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

    /// The same layer with its matrices in `format` beside.
    pub(super) fn narrowed(&self, format: Format) -> Result<Self> {
        let mut layer = self.clone();
        let projections = [&mut layer.q, &mut layer.k, &mut layer.v].map(|projection| &mut projection.linear);
        let others = [&mut layer.o, &mut layer.gate, &mut layer.up, &mut layer.down];
        for linear in projections.into_iter().chain(others) {
            linear.narrow = Quantized::of(&linear.matrix.weight, format)?.map(Arc::new);
        }
        Ok(layer)
    }

    /// The stream `[T, D]` after this layer; `angles` are those of the tokens' positions.
    pub(super) fn forward(&self, x: &Tensor, angles: &Angles, attend: &mut dyn Attend) -> Result<Tensor> {
        self.feed_forward(&self.attention(x, angles, attend)?)
    }

    /// What the layer adds after its norm, or before where the family has none there.
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
        // Attention divides by the root of the width of a head.
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

    /// Whether nothing but what [`kernels::self_attention`] knows stands between the stream and the stream.
    fn attention_is_plain(&self, x: &Tensor) -> Result<bool> {
        let linears = [&self.q.linear, &self.k.linear, &self.v.linear, &self.o];
        Ok(are_plain(x, linears)? && self.config.family.gemma.is_none() && self.config.query_scalar.is_none())
    }

    /// Likewise for [`kernels::feed_forward`].
    fn feed_forward_is_plain(&self, x: &Tensor) -> Result<bool> {
        Ok(self.config.family.gemma.is_none() && are_plain(x, [&self.gate, &self.up, &self.down])?)
    }

    /// `[T, heads, hd]` of hidden states `[T, D]`.
    fn heads(&self, projection: &Projection, x: &Tensor, heads: usize) -> Result<Tensor> {
        let out = projection.linear.forward(x)?;
        let (t, hd) = (x.dim(0)?, self.config.head_dim);
        match &projection.norm {
            None => out.reshape((t, heads, hd)),
            Some(weight) => norm(&self.config, &out.reshape((t * heads, hd))?, weight)?.reshape((t, heads, hd)),
        }
    }
}

/// Whether rows `x` go by the matrices as they are: few go by those in fewer bits, where there are any.
fn are_plain<'a>(x: &Tensor, linears: impl IntoIterator<Item = &'a Linear>) -> Result<bool> {
    let few = x.dim(0)? <= kernels::SMALL_BATCH_ROWS;
    Ok(linears.into_iter().all(|linear| !(few && linear.narrow.is_some())))
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.matrix.beside(linear(x, &self.matrix.weight, self.narrow.as_deref())?, x)
    }
}

/// `x · weightᵀ`, by the matrix in fewer bits where there is one and `x` is few rows.
pub(super) fn linear(x: &Tensor, weight: &Tensor, narrow: Option<&Quantized>) -> Result<Tensor> {
    match narrow {
        Some(narrow) if x.dim(0)? <= kernels::SMALL_BATCH_ROWS && !x.track_op() => narrow.linear(x),
        _ => kernels::linear(x, weight),
    }
}

/// RMSNorm, by the weight or by one more than it.
pub(super) fn norm(config: &ModelConfig, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    match config.family.gemma {
        None => kernels::rms_norm(x, weight, config.rms_norm_eps),
        Some(_) => {
            // One more than a small number has no bits left for it in half precision.
            let wide = if weight.dtype() == DType::BF16 { weight.to_dtype(DType::F32)? } else { weight.clone() };
            kernels::rms_norm(x, &(wide + 1.0)?, config.rms_norm_eps)
        }
    }
}

//! The decoder that the supported families share: pre-norm, rotary positions, grouped queries, gated feed-forward
//! (Touvron et al. 2023). What a family adds, `family/` says.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::attention::{Attend, PackedAttention};
use super::config::ModelConfig;
use super::layer::{self, Layer};
use super::lora::{Lora, is_adapter};
use super::pack::Pack;
use super::rope::{Angles, Frequencies};
use super::weights::Weights;
use kernels::{Format, Quantized};

/// A decoder over borrowed storage: building one from [`Weights`] copies nothing.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Arc<ModelConfig>,
    embedding: Tensor,
    layers: Vec<Arc<Layer>>,
    final_norm: Tensor,
    head: Tensor,
    /// The head in fewer bits, for sampling.
    narrow_head: Option<Arc<Quantized>>,
    frequencies: Arc<Frequencies>,
    weights: Weights,
    lora: Option<Lora>,
    /// Whether a pass over a pack keeps what goes into each layer, and nothing within.
    checkpointed: bool,
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
        Self::build(&Arc::new(config.clone()), weights, lora)
    }

    fn build(config: &Arc<ModelConfig>, weights: &Weights, lora: Option<&Lora>) -> anyhow::Result<Self> {
        let d = config.hidden_size;
        let layers = (0..config.layers).map(|i| Ok(Arc::new(Layer::new(i, config, weights, lora)?)));
        let layers = layers.collect::<anyhow::Result<Vec<_>>>()?;
        let embedding = weights.get("model.embed_tokens.weight", &[config.vocab_size, d])?;
        let head =
            if config.tied { embedding.clone() } else { weights.get("lm_head.weight", &[config.vocab_size, d])? };
        Ok(Self {
            final_norm: weights.get("model.norm.weight", &[d])?,
            config: Arc::clone(config),
            embedding,
            layers,
            head,
            narrow_head: None,
            frequencies: Arc::new(Frequencies::new(config)),
            weights: weights.clone(),
            lora: lora.cloned(),
            checkpointed: false,
        })
    }

    /// The same model with its weights in `dtype`; shared where they are in it already.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn to_dtype(&self, dtype: DType) -> anyhow::Result<Self> {
        self.with_weights(&self.weights.to_dtype(dtype)?)
    }

    /// A model like this one that runs on `weights`.
    pub(super) fn with_weights(&self, weights: &Weights) -> anyhow::Result<Self> {
        Ok(self.alike(Self::build(&self.config, weights, self.lora.as_ref())?))
    }

    /// A copy whose tensors are variables, and these by name. Without `head` it is for hidden states alone: a head of its
    /// own is left out, and the embedding stands where one is asked for.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn trainable(&self, head: bool) -> anyhow::Result<(Self, Vec<(String, Var)>)> {
        let config = ModelConfig { tied: self.config.tied || !head, ..(*self.config).clone() };
        let params = self
            .merged()?
            .0
            .iter()
            .filter(|(name, _)| head || *name != "lm_head.weight")
            .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(&tensor.copy()?)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let weights = Weights(params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
        Ok((self.alike(Self::build(&Arc::new(config), &weights, None)?), params))
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
        Ok((self.alike(Self::build(&self.config, &weights, Some(lora))?), params))
    }

    /// An immutable copy of the model as it is now. What is not trained is shared.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn snapshot(&self) -> anyhow::Result<Self> {
        self.with_weights(&self.weights.snapshot()?)
    }

    /// The same model, shared, with its matrices in `format` beside: for sampling, where a step of few rows is bound by
    /// reading them. Products of more rows, and all that has a gradient, stay as they are.
    ///
    /// # Errors
    /// Tensor errors only.
    pub fn narrowed(&self, format: Format) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| layer.narrowed(format).map(Arc::new)).collect::<Result<_>>()?;
        Ok(Self { layers, narrow_head: Quantized::of(&self.head, format)?.map(Arc::new), ..self.clone() })
    }

    /// `copy`, which runs as this one does.
    fn alike(&self, copy: Self) -> Self {
        Self { checkpointed: self.checkpointed, ..copy }
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

    /// What it computes in.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// Activation checkpointing (Chen et al. 2016): keeps of a pass over a pack only what goes into each layer, and computes
    /// the rest again in the backward, which [`kernels::backward`] must run. DeviceReplicas for training or publishing do the same.
    pub fn checkpoint_activations(&mut self, checkpoint: bool) {
        self.checkpointed = checkpoint;
    }

    /// Final hidden states `[T, D]` of `ids` at `positions`, normed, ready for the head.
    ///
    /// # Errors
    /// A position beyond the context, or shapes that do not fit.
    pub fn hidden(&self, ids: &[u32], positions: &[u32], attend: &mut dyn Attend) -> Result<Tensor> {
        let angles = self.angles(positions)?;
        let x = self.layers.iter().try_fold(self.embedded(ids)?, |x, layer| layer.forward(&x, &angles, attend))?;
        layer::norm(&self.config, &x, &self.final_norm)
    }

    /// The same for a pack, each layer computed again in the backward.
    fn hidden_checkpointed(&self, pack: &Pack) -> Result<Tensor> {
        let (angles, mask) = (Arc::new(self.angles(&pack.positions)?), Arc::new(pack.mask()));
        let x = self.layers.iter().try_fold(self.embedded(&pack.ids)?, |x, layer| {
            let (layer, angles, mask) = (Arc::clone(layer), Arc::clone(&angles), Arc::clone(&mask));
            let segment: kernels::Segment =
                Arc::new(move |x| layer.forward(x, &angles, &mut PackedAttention::within(&mask)));
            kernels::checkpoint(&x, &segment)
        })?;
        layer::norm(&self.config, &x, &self.final_norm)
    }

    fn angles(&self, positions: &[u32]) -> Result<Angles> {
        if let Some(last) = positions.iter().max()
            && *last as usize >= self.config.context
        {
            candle_core::bail!("position {last} is beyond the model's context of {} tokens", self.config.context);
        }
        self.frequencies.at(positions, self.device())
    }

    fn embedded(&self, ids: &[u32]) -> Result<Tensor> {
        let x = kernels::embed(&self.embedding, ids)?;
        match self.config.family.gemma {
            None => Ok(x),
            Some(_) => x * (self.config.hidden_size as f64).sqrt(),
        }
    }

    /// Logits `[N, V]` of hidden states `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        kernels::softcap(&layer::linear(hidden, &self.head, self.narrow_head.as_deref())?, self.config.logit_cap)
    }

    /// Hidden states `[N, D]` that predict the targets of `pack`.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn predicting(&self, pack: &Pack) -> Result<Tensor> {
        let hidden = if self.checkpointed {
            self.hidden_checkpointed(pack)?
        } else {
            self.hidden(&pack.ids, &pack.positions, &mut PackedAttention::new(pack))?
        };
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

    /// The log-probabilities at each of several temperatures, without gradient, for one pass.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn score(&self, pack: &Pack, temperatures: &[f64]) -> Result<Vec<Vec<f32>>> {
        let hidden = self.predicting(pack)?;
        kernels::linear_logprobs_at(&hidden, &self.head, self.config.logit_cap, &pack.targets, temperatures)
    }

    /// The same of targets `[N]` predicted by hidden states `[N, D]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logprobs_of(&self, hidden: &Tensor, targets: &[u32], temperature: f64) -> Result<(Tensor, Tensor)> {
        kernels::linear_logprobs(hidden, &self.head, self.config.logit_cap, targets, temperature)
    }
}

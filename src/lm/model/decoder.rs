//! Decoder that the supported families share: pre-norm, rotary positions, grouped queries, gated feed-forward (Touvron
//! et al. 2023). The differences of each family are in `family/`.

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

/// Decoder model over shared storage: building one from [`Weights`] copies no tensors.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Arc<ModelConfig>,
    embedding: Tensor,
    layers: Vec<Arc<Layer>>,
    final_norm: Tensor,
    head: Tensor,
    /// Quantized head, for sampling.
    quantized_head: Option<Arc<Quantized>>,
    frequencies: Arc<Frequencies>,
    weights: Weights,
    lora: Option<Lora>,
    /// True if a pass over a pack keeps only the input of each layer for the backward.
    checkpointed: bool,
}

impl Decoder {
    /// Builds the model from weights under their Hugging Face names.
    ///
    /// # Errors
    /// If a tensor is missing or has the wrong shape; the error names it.
    pub fn new(config: &ModelConfig, weights: &Weights) -> anyhow::Result<Self> {
        Self::with_adapters(config, weights, None)
    }

    /// Builds the model as [`Self::new`] does, with the adapters of `lora` among the weights: `….q_proj.lora_A.weight`
    /// and so on.
    ///
    /// # Errors
    /// The same as for [`Self::new`].
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
            quantized_head: None,
            frequencies: Arc::new(Frequencies::new(config)),
            weights: weights.clone(),
            lora: lora.cloned(),
            checkpointed: false,
        })
    }

    /// Returns the model with its weights in `dtype`; tensors that already have it are shared.
    ///
    /// # Errors
    /// If memory for the copy is not available.
    pub fn to_dtype(&self, dtype: DType) -> anyhow::Result<Self> {
        self.with_weights(&self.weights.to_dtype(dtype)?)
    }

    /// Returns a model with the same configuration and settings and with these weights.
    pub(super) fn with_weights(&self, weights: &Weights) -> anyhow::Result<Self> {
        Ok(self.inherit_settings(Self::build(&self.config, weights, self.lora.as_ref())?))
    }

    /// Returns a copy whose tensors are variables, and these variables by name. Without `head` the copy is for hidden
    /// states only: an untied head is omitted, and the embedding takes its place.
    ///
    /// # Errors
    /// If memory for the copy is not available.
    pub fn trainable(&self, head: bool) -> anyhow::Result<(Self, Vec<(String, Var)>)> {
        let config = ModelConfig { tied: self.config.tied || !head, ..(*self.config).clone() };
        let params = self
            .merged()?
            .0
            .iter()
            .filter(|(name, _)| head || *name != "lm_head.weight")
            .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(&tensor.detach())?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let weights = Weights(params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
        Ok((self.inherit_settings(Self::build(&Arc::new(config), &weights, None)?), params))
    }

    /// Returns the model with its matrices frozen and shared and with trainable adapters, and the adapters' variables
    /// by name. Existing adapters are continued; otherwise they are initialised from `seed` and do not change the model
    /// yet.
    ///
    /// # Errors
    /// If the existing adapters have another size.
    pub fn adapted(&self, lora: &Lora, seed: u64) -> anyhow::Result<(Self, Vec<(String, Var)>)> {
        let mut weights = self.weights.clone();
        if self.lora.is_none() {
            weights.0.extend(lora.init(&self.weights, seed, self.device())?.0);
        }
        let mut params = Vec::new();
        for (name, tensor) in weights.0.iter_mut().filter(|(name, _)| is_adapter(name)) {
            let var = Var::from_tensor(&tensor.detach())?;
            *tensor = var.as_tensor().clone();
            params.push((name.clone(), var));
        }
        Ok((self.inherit_settings(Self::build(&self.config, &weights, Some(lora))?), params))
    }

    /// Returns a copy of this model on `device`, which has variables of its own where this model has those of `params`, and
    /// these variables by name. Other tensors are shared if they are on the device already.
    ///
    /// # Errors
    /// If memory for the copy is not available.
    pub fn trainable_on(
        &self,
        params: &[(String, Var)],
        device: &Device,
    ) -> anyhow::Result<(Self, Vec<(String, Var)>)> {
        let mut copies = Vec::with_capacity(params.len());
        let mut weights = self.weights.clone();
        for (name, tensor) in &mut weights.0 {
            if params.iter().any(|(param, _)| param == name) {
                let var = Var::from_tensor(&tensor.to_device(device)?.detach())?;
                *tensor = var.as_tensor().clone();
                copies.push((name.clone(), var));
            } else {
                *tensor = tensor.to_device(device)?.detach();
            }
        }
        Ok((self.with_weights(&weights)?, copies))
    }

    /// Returns the model with other variables, by name, in place of its own.
    ///
    /// # Errors
    /// If a variable has the wrong shape; the error names it.
    pub fn with_variables(&self, params: &[(String, Var)]) -> anyhow::Result<Self> {
        let mut weights = self.weights.clone();
        weights.0.extend(params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())));
        self.with_weights(&weights)
    }

    /// Returns the model with the same tensors, but without a computation graph. It follows changes of the variables.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn detached(&self) -> anyhow::Result<Self> {
        let mut weights = self.weights.clone();
        weights.0.values_mut().for_each(|tensor| *tensor = tensor.detach());
        self.with_weights(&weights)
    }

    /// Returns an immutable copy of the model in its current state. Frozen tensors are shared.
    ///
    /// # Errors
    /// If memory for the copy is not available.
    pub fn snapshot(&self) -> anyhow::Result<Self> {
        self.with_weights(&self.weights.snapshot()?)
    }

    /// Returns the model, shared, with additional copies of its matrices in `format` for sampling, where a decode step
    /// of few rows is bound by memory bandwidth. Products of more rows, and those with a gradient, use the original
    /// matrices.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn quantized(&self, format: Format) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| layer.quantized(format).map(Arc::new)).collect::<Result<_>>()?;
        Ok(Self { layers, quantized_head: Quantized::of(&self.head, format)?.map(Arc::new), ..self.clone() })
    }

    /// Returns `copy` with the settings of this model.
    fn inherit_settings(&self, copy: Self) -> Self {
        Self { checkpointed: self.checkpointed, ..copy }
    }

    /// Returns the weights with the adapters merged into the matrices.
    ///
    /// # Errors
    /// If memory for the product is not available.
    pub fn merged(&self) -> anyhow::Result<Weights> {
        self.lora.as_ref().map_or_else(|| Ok(self.weights.clone()), |lora| lora.merge(&self.weights))
    }

    /// Returns the adapters' configuration, if the model has adapters.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    /// Returns the model's hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the tensors of the model, by name.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Returns the dtype of the weights, in which the model computes.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// Sets whether activations are checkpointed (Chen et al. 2016): a pass over a pack keeps only the input of each
    /// layer and recomputes the rest in the backward, which must be run by [`kernels::backward`]. Copies for training
    /// or publishing inherit the setting.
    pub fn checkpoint_activations(&mut self, checkpoint: bool) {
        self.checkpointed = checkpoint;
    }

    /// Returns the final hidden states `[T, D]` of `ids` at `positions`, normed, as the head expects them.
    ///
    /// # Errors
    /// If a position is beyond the context, or the shapes do not match.
    pub fn hidden(&self, ids: &[u32], positions: &[u32], attend: &mut dyn Attend) -> Result<Tensor> {
        let angles = self.angles(positions)?;
        let x = self.layers.iter().try_fold(self.embedded(ids)?, |x, layer| layer.forward(&x, &angles, attend))?;
        layer::norm(&self.config, &x, &self.final_norm)
    }

    /// Returns the final hidden states of a pack; the backward recomputes each layer.
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

    /// Returns the logits `[N, V]` of hidden states `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        kernels::softcap(&layer::linear(hidden, &self.head, self.quantized_head.as_deref())?, self.config.logit_cap)
    }

    /// Returns the hidden states `[N, D]` that predict the targets of `pack`.
    ///
    /// # Errors
    /// The same as for [`Self::hidden`].
    pub fn predicting(&self, pack: &Pack) -> Result<Tensor> {
        let hidden = if self.checkpointed {
            self.hidden_checkpointed(pack)?
        } else {
            self.hidden(&pack.ids, &pack.positions, &mut PackedAttention::new(pack))?
        };
        hidden.index_select(&Tensor::new(pack.rows.as_slice(), self.device())?, 0)
    }

    /// Returns the log-probability `[N]` of each target of `pack`, and the entropy `[N]` of the distribution that
    /// predicts it, at `temperature`.
    ///
    /// # Errors
    /// The same as for [`Self::hidden`].
    pub fn logprobs(&self, pack: &Pack, temperature: f64) -> Result<(Tensor, Tensor)> {
        self.logprobs_of(&self.predicting(pack)?, &pack.targets, temperature)
    }

    /// Returns the targets' log-probabilities at each of several temperatures from one pass, without a gradient.
    ///
    /// # Errors
    /// The same as for [`Self::hidden`].
    pub fn score(&self, pack: &Pack, temperatures: &[f64]) -> Result<Vec<Vec<f32>>> {
        let hidden = self.predicting(pack)?;
        kernels::linear_logprobs_at(&hidden, &self.head, self.config.logit_cap, &pack.targets, temperatures)
    }

    /// Returns the log-probabilities and entropies, as [`Self::logprobs`], of targets `[N]` predicted by hidden states
    /// `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn logprobs_of(&self, hidden: &Tensor, targets: &[u32], temperature: f64) -> Result<(Tensor, Tensor)> {
        kernels::linear_logprobs(hidden, &self.head, self.config.logit_cap, targets, temperature)
    }
}

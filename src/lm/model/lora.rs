//! Low-rank adapters (Hu et al. 2021): `W·x + α/r · B·A·x`, with `W` frozen and shared.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::{Weights, export};
use crate::util::seed::{self, mix};
use kernels::Adapter;

/// Which matrices get an adapter, and of what size.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rows of A and columns of B, r.
    pub rank: usize,
    /// What the product is scaled by, times r.
    pub alpha: f64,
    /// Last parts of the names of the matrices, such as `q_proj`.
    pub targets: Vec<String>,
}

impl Lora {
    /// α/r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Whether the matrix called `name` (without `.weight`) gets an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        name.rsplit_once('.').is_some_and(|(_, last)| self.targets.iter().any(|target| target == last))
    }

    /// The adapter of the matrix called `name`, of this shape, among `weights`.
    ///
    /// # Errors
    /// Names the tensor that is missing or misshapen.
    pub(super) fn adapter(&self, weights: &Weights, name: &str, [out, width]: [usize; 2]) -> Result<Option<Adapter>> {
        if !self.adapts(name) {
            return Ok(None);
        }
        let a = weights.get(&format!("{name}.lora_A.weight"), &[self.rank, width])?;
        let b = weights.get(&format!("{name}.lora_B.weight"), &[out, self.rank])?;
        Ok(Some(Adapter { a, b, scale: self.scale() }))
    }

    /// Fresh adapters for `base`, by name: A uniform within ±1/√in, B zero, so that they change nothing yet. A function
    /// of `seed` and the names alone.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn fresh(&self, base: &Weights, seed: u64, device: &Device) -> Result<Weights> {
        let mut all = Weights::default();
        for (key, weight) in &base.0 {
            let Some(name) = key.strip_suffix(".weight").filter(|name| self.adapts(name)) else { continue };
            let (out, width) = weight.dims2()?;
            let mut rng = ChaCha8Rng::seed_from_u64(mix(seed ^ seed::text(name)));
            let bound = 1.0 / (width as f32).sqrt();
            let values: Vec<f32> = (0..self.rank * width).map(|_| rng.random_range(-bound..bound)).collect();
            let a = Tensor::from_vec(values, (self.rank, width), device)?;
            all.0.insert(format!("{name}.lora_A.weight"), a.to_dtype(weight.dtype())?);
            all.0.insert(format!("{name}.lora_B.weight"), Tensor::zeros((out, self.rank), weight.dtype(), device)?);
        }
        Ok(all)
    }

    /// `weights` with the adapters in them worked into the matrices, `W + α/r · B·A`.
    ///
    /// # Errors
    /// Names the adapter that is missing.
    pub fn merge(&self, weights: &Weights) -> Result<Weights> {
        let mut merged = Weights::default();
        for (key, weight) in weights.0.iter().filter(|(key, _)| !is_adapter(key)) {
            let name = key.strip_suffix(".weight").filter(|name| self.adapts(name));
            let weight = match name {
                None => weight.clone(),
                Some(name) => match self.adapter(weights, name, weight.dims2()?.into())? {
                    Some(Adapter { a, b, scale }) => (weight.detach() + (b.matmul(&a)? * scale)?)?.detach(),
                    None => weight.clone(),
                },
            };
            merged.0.insert(key.clone(), weight);
        }
        Ok(merged)
    }

    /// The adapters in `dir` as [`Self::write`] left them, by name.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn read(dir: &Path, device: &Device) -> Result<Weights> {
        let path = dir.join("adapter_model.safetensors");
        let tensors =
            candle_core::safetensors::load(&path, device).with_context(|| format!("cannot read {}", path.display()))?;
        let named = |(name, tensor): (String, Tensor)| {
            (name.strip_prefix("base_model.model.").unwrap_or(&name).to_owned(), tensor)
        };
        Ok(Weights(tensors.into_iter().map(named).collect()))
    }

    /// Writes the adapters among `weights` into `dir` as PEFT opens them. `base` names the model that they are for: a directory
    /// or a repository of a hub.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&self, dir: &Path, weights: &Weights, base: Option<&str>) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let tensors = weights.0.iter().filter(|(key, _)| is_adapter(key));
        let tensors =
            Weights(tensors.map(|(key, tensor)| (format!("base_model.model.{key}"), tensor.clone())).collect());
        export::write_tensors(&dir.join("adapter_model.safetensors"), &tensors, DType::F32)?;
        let description = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": self.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": false,
            "inference_mode": true,
        });
        export::write_json(&dir.join("adapter_config.json"), &description)
    }
}

/// Whether a tensor of this name is part of an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

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

/// Size of low-rank adapters, and the matrices that have one.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rank r: rows of A and columns of B.
    pub rank: usize,
    /// Numerator α of the scale α/r.
    pub alpha: f64,
    /// Last components of the names of the adapted matrices, such as `q_proj`.
    pub targets: Vec<String>,
}

impl Lora {
    /// Returns the scale, α/r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Returns whether the matrix called `name` (without `.weight`) has an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        name.rsplit_once('.').is_some_and(|(_, last)| self.targets.iter().any(|target| target == last))
    }

    /// Returns the adapter of the matrix called `name`, of this shape, from `weights`, or `None` if it has none.
    ///
    /// # Errors
    /// If a tensor is missing or has the wrong shape; the error names it.
    pub(super) fn adapter(&self, weights: &Weights, name: &str, [out, width]: [usize; 2]) -> Result<Option<Adapter>> {
        if !self.adapts(name) {
            return Ok(None);
        }
        let a = weights.get(&format!("{name}.lora_A.weight"), &[self.rank, width])?;
        let b = weights.get(&format!("{name}.lora_B.weight"), &[out, self.rank])?;
        Ok(Some(Adapter { a, b, scale: self.scale() }))
    }

    /// Returns initial adapters for `base`, by name: A uniform within ±1/√in, B zero, so that they do not change the
    /// model yet. The values depend on `seed` and the names only.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn init(&self, base: &Weights, seed: u64, device: &Device) -> Result<Weights> {
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

    /// Returns `weights` with their adapters merged into the matrices, `W + α/r · B·A`.
    ///
    /// # Errors
    /// If an adapter is missing; the error names it.
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

    /// Reads the adapters that [`Self::write`] wrote to `dir`, by name.
    ///
    /// # Errors
    /// If the file cannot be read; the error names it.
    pub fn read(dir: &Path, device: &Device) -> Result<Weights> {
        let path = dir.join("adapter_model.safetensors");
        let tensors =
            candle_core::safetensors::load(&path, device).with_context(|| format!("cannot read {}", path.display()))?;
        let named = |(name, tensor): (String, Tensor)| {
            (name.strip_prefix("base_model.model.").unwrap_or(&name).to_owned(), tensor)
        };
        Ok(Weights(tensors.into_iter().map(named).collect()))
    }

    /// Writes the adapters among `weights` to `dir` in the format of PEFT. `base` names the model to which they apply:
    /// a directory or a repository of a hub.
    ///
    /// # Errors
    /// If a file cannot be written; the error names it.
    pub fn write(&self, dir: &Path, weights: &Weights, base: Option<&str>) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
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

/// Returns whether a tensor of this name is part of an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

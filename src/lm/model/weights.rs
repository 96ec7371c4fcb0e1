//! Named tensors of a model, and the formats from which they are read.

mod directory;
mod fit;
mod gguf;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::ModelConfig;
use crate::util::seed::{self, mix};

/// Name of the tensor of a scalar head, `[1, D]`, as in `transformers`.
pub const SCORE: &str = "score.weight";

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Target device and dtype of tensors that are read.
#[derive(Debug, Clone, Copy)]
pub struct LoadTarget<'a> {
    /// Target device.
    pub device: &'a Device,
    /// Target dtype. Each tensor is converted while it is read, so that a second copy of the model never exists.
    pub dtype: DType,
}

impl<'a> From<&'a Device> for LoadTarget<'a> {
    /// Reads in f32.
    fn from(device: &'a Device) -> Self {
        Self { device, dtype: DType::F32 }
    }
}

/// A model's tensors by their Hugging Face names.
#[derive(Debug, Clone, Default)]
pub struct Weights(pub BTreeMap<String, Tensor>);

impl Weights {
    /// Returns the tensor called `name`, which must have this shape.
    ///
    /// # Errors
    /// If the tensor is missing or has another shape; the error names it.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.0.get(name).with_context(|| format!("the model has no tensor {name}"))?;
        ensure!(tensor.dims() == shape, "tensor {name} is {:?}, the configuration says {shape:?}", tensor.dims());
        Ok(tensor.clone())
    }

    /// Returns random initial weights: matrices from a normal distribution with standard deviation `std`, norms at one,
    /// biases at zero. The values depend on `seed` only.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn scratch(config: &ModelConfig, std: f64, seed: u64, device: &Device) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = BTreeMap::new();
        for (name, shape) in shapes(config) {
            let count = shape.iter().product();
            let values: Vec<f32> = if name.ends_with(".bias") {
                vec![0.0; count]
            } else if shape.len() == 1 {
                vec![if config.family.gemma.is_some() { 0.0 } else { 1.0 }; count]
            } else {
                (0..count).map(|_| (normal(&mut rng) * std) as f32).collect()
            };
            weights.insert(name, Tensor::from_vec(values, shape, device)?);
        }
        Ok(Self(weights))
    }

    /// Returns a copy that later changes of `self` do not affect. Variables are copied, other tensors are shared.
    ///
    /// # Errors
    /// If memory for the copy is not available.
    pub fn snapshot(&self) -> Result<Self> {
        Ok(Self(
            self.0
                .iter()
                .map(|(name, tensor)| {
                    let copy = if tensor.is_variable() { tensor.copy()?.detach() } else { tensor.clone() };
                    Ok((name.clone(), copy))
                })
                .collect::<Result<_>>()?,
        ))
    }

    /// Returns the weights in `dtype`; tensors that already have it are shared.
    ///
    /// # Errors
    /// If memory for the copies is not available.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let turned = self.0.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(dtype)?)));
        turned.collect::<Result<_>>().map(Self)
    }

    /// Returns a hash that identifies these weights, computed from the tensors' names and up to 256 evenly spaced
    /// values of each tensor. An optimizer step changes every value that has a gradient, so it changes the hash too; in
    /// half precision a small step may change none of the sampled values. The dtype is part of the hash: equal values
    /// in bf16 and f32 give different fingerprints, because they produce different results.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn fingerprint(&self) -> Result<u64> {
        const SAMPLED: usize = 256;
        let mut hash = self.0.len() as u64;
        for (name, tensor) in &self.0 {
            hash = mix(hash ^ seed::text(name));
            if tensor.dtype() != DType::F32 {
                hash = mix(hash ^ seed::text(tensor.dtype().as_str()));
            }
            let flat = tensor.flatten_all()?;
            let count = flat.elem_count();
            let picked: Vec<u32> = (0..SAMPLED.min(count)).map(|i| (i * count / SAMPLED.min(count)) as u32).collect();
            let picked = Tensor::new(picked, tensor.device())?;
            for value in flat.index_select(&picked, 0)?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
                hash = mix(hash ^ u64::from(value.to_bits()));
            }
        }
        Ok(hash)
    }

    /// Returns the number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.0.values().map(Tensor::elem_count).sum()
    }
}

/// Checks that every value of a floating-point tensor is finite, because a single one that is not makes every result
/// NaN.
fn finite(name: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.dtype().is_float() || tensor.elem_count() == 0 {
        return Ok(());
    }
    let sound = match (&*tensor.storage_and_layout().0, tensor.is_contiguous()) {
        (Storage::Cpu(CpuStorage::F32(values)), true) => values.iter().all(|value| value.is_finite()),
        (Storage::Cpu(CpuStorage::BF16(values)), true) => values.iter().all(|value| value.is_finite()),
        (Storage::Cpu(CpuStorage::F16(values)), true) => values.iter().all(|value| value.is_finite()),
        // Zero times a finite number is zero; zero times NaN or infinity is NaN.
        _ => tensor.affine(0.0, 0.0)?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0.0,
    };
    ensure!(
        sound,
        "tensor {name} has a value that is not finite (NaN or infinite); the file is damaged, or the model diverged when it was trained"
    );
    Ok(())
}

/// Draws a sample from the standard normal distribution (Box–Muller).
fn normal(rng: &mut impl Rng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Returns the names and shapes of all tensors of a model with this configuration.
fn shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (d, hd, ffn) = (config.hidden_size, config.head_dim, config.intermediate_size);
    let (q, kv) = (config.heads * hd, config.kv_heads * hd);
    let mut all = vec![(EMBEDDING.to_owned(), vec![config.vocab_size, d])];
    for i in 0..config.layers {
        for (name, shape) in [
            ("input_layernorm", vec![d]),
            ("self_attn.q_proj", vec![q, d]),
            ("self_attn.k_proj", vec![kv, d]),
            ("self_attn.v_proj", vec![kv, d]),
            ("self_attn.o_proj", vec![d, q]),
            ("post_attention_layernorm", vec![d]),
            ("mlp.gate_proj", vec![ffn, d]),
            ("mlp.up_proj", vec![ffn, d]),
            ("mlp.down_proj", vec![d, ffn]),
        ] {
            all.push((format!("model.layers.{i}.{name}.weight"), shape));
        }
        for (letter, width) in [("q", q), ("k", kv), ("v", kv)] {
            if config.family.qkv_bias {
                all.push((format!("model.layers.{i}.self_attn.{letter}_proj.bias"), vec![width]));
            }
            if config.family.qk_norm && letter != "v" {
                all.push((format!("model.layers.{i}.self_attn.{letter}_norm.weight"), vec![hd]));
            }
        }
    }
    if config.family.gemma.is_some() {
        for i in 0..config.layers {
            for side in ["pre", "post"] {
                all.push((format!("model.layers.{i}.{side}_feedforward_layernorm.weight"), vec![d]));
            }
        }
    }
    all.push(("model.norm.weight".to_owned(), vec![d]));
    if !config.tied {
        all.push((HEAD.to_owned(), vec![config.vocab_size, d]));
    }
    all
}

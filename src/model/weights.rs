//! Named tensors of a model, and where they come from.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::ModelConfig;
use super::family::Family;
use super::rope::Scaling;
use crate::seed::{self, mix};
use crate::{bounded, vetted};

/// Where tensors are read to, and in which dtype.
#[derive(Debug, Clone, Copy)]
pub struct Onto<'a> {
    /// The device.
    pub device: &'a Device,
    /// Each tensor is turned into it as it is read, so that no second copy of the model is ever held.
    pub dtype: DType,
}

impl<'a> From<&'a Device> for Onto<'a> {
    /// In f32.
    fn from(device: &'a Device) -> Self {
        Self { device, dtype: DType::F32 }
    }
}

/// A model's tensors under their Hugging Face names.
#[derive(Debug, Clone, Default)]
pub struct Weights(pub BTreeMap<String, Tensor>);

impl Weights {
    /// The tensor called `name`, whose shape must be `shape`.
    ///
    /// # Errors
    /// Names the tensor that is missing or misshapen.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.0.get(name).with_context(|| format!("the model has no tensor {name}"))?;
        ensure!(tensor.dims() == shape, "tensor {name} is {:?}, the configuration says {shape:?}", tensor.dims());
        Ok(tensor.clone())
    }

    /// Reads a GGUF file: every tensor dequantised to f32 on the host, query and key rows put back from GGUF's
    /// interleaved rotary order into the rotate-half order of Hugging Face.
    ///
    /// # Errors
    /// Names the file, and the key or tensor at fault.
    pub fn from_gguf<'a>(path: &Path, onto: impl Into<Onto<'a>>) -> Result<(ModelConfig, Self)> {
        let onto = onto.into();
        let (mut file, content) = vetted::gguf::read(path)?;
        let tied = !content.tensor_infos.contains_key("output.weight");
        let embedding =
            content.tensor_infos.get("token_embd.weight").context("GGUF tensor token_embd.weight is missing")?;
        let mut config = ModelConfig::from_gguf(&content.metadata, tied, embedding.shape.dims()[0])?;
        let mut weights = BTreeMap::new();
        for name in content.tensor_infos.keys() {
            if name == "rope_freqs.weight" {
                let factors = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
                config.rope_scaling = Scaling::from_factors(&factors.flatten_all()?.to_vec1()?, config.rope_theta)?;
                continue;
            }
            let Some(target) = hugging_face_name(name, config.family) else {
                bail!("GGUF tensor {name} is not part of a model of this kind")
            };
            let tensor = content
                .tensor(&mut file, name, &Device::Cpu)
                .and_then(|tensor| tensor.dequantize(&Device::Cpu))
                .with_context(|| format!("cannot read tensor {name} of {}", path.display()))?
                .to_dtype(DType::F32)?;
            let tensor = match target.rsplit_once('.').map_or("", |(stem, _)| stem) {
                // GGUF keeps the weight that is multiplied with, Hugging Face one less.
                stem if config.family.gemma.is_some() && stem.ends_with("norm") => (tensor - 1.0)?,
                _ if !config.family.gguf_interleaved => tensor,
                stem if stem.ends_with("q_proj") => unpermute(&tensor, config.heads)?,
                stem if stem.ends_with("k_proj") => unpermute(&tensor, config.kv_heads)?,
                _ => tensor,
            };
            let tensor = tensor.to_dtype(onto.dtype)?.to_device(onto.device)?;
            finite(&target, &tensor).with_context(|| format!("in {}", path.display()))?;
            weights.insert(target, tensor);
        }
        Ok((config, Self(weights)))
    }

    /// Reads a Hugging Face directory: `model.safetensors`, or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// Names the file at fault.
    pub fn from_directory<'a>(dir: &Path, onto: impl Into<Onto<'a>>) -> Result<(ModelConfig, Self)> {
        let config = ModelConfig::from_directory(dir)?;
        let mut weights = Self::read_directory(dir, onto)?;
        if config.tied {
            weights.0.remove("lm_head.weight");
        }
        Ok((config, weights))
    }

    /// As [`Self::from_directory`], without the configuration: every tensor, whatever the model is.
    ///
    /// # Errors
    /// Names the file at fault.
    pub fn read_directory<'a>(dir: &Path, onto: impl Into<Onto<'a>>) -> Result<Self> {
        let Onto { device, dtype } = onto.into();
        let index = dir.join("model.safetensors.index.json");
        let mut files: Vec<String> = if index.exists() {
            let text = bounded::text(&index, bounded::DESCRIPTION)
                .with_context(|| format!("cannot read {}", index.display()))?;
            let json: serde_json::Value =
                serde_json::from_str(&text).with_context(|| format!("{} is not JSON", index.display()))?;
            let map =
                json["weight_map"].as_object().with_context(|| format!("{} has no weight_map", index.display()))?;
            let files: Vec<String> = map.values().filter_map(|file| file.as_str().map(str::to_owned)).collect();
            let stray = files.iter().find(|file| Path::new(file).file_name() != Some(OsStr::new(file)));
            if let Some(stray) = stray {
                bail!("{} names {stray:?}; the parts of a model lie beside their index", index.display());
            }
            files
        } else {
            vec!["model.safetensors".to_owned()]
        };
        files.sort();
        files.dedup();
        let mut weights = BTreeMap::new();
        for file in files {
            let path = dir.join(file);
            vetted::safetensors::check(&path)?;
            let tensors = candle_core::safetensors::load(&path, device)
                .with_context(|| format!("cannot read {}", path.display()))?;
            for (name, tensor) in tensors {
                let tensor = tensor.to_dtype(dtype)?;
                finite(&name, &tensor).with_context(|| format!("in {}", path.display()))?;
                weights.insert(name, tensor);
            }
        }
        Ok(Self(weights))
    }

    /// Fresh weights: matrices normal with deviation `std`, norms at one. A function of `seed` alone.
    ///
    /// # Errors
    /// When a tensor cannot be put on the device.
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

    /// A copy in which nothing done to `self` afterwards can be seen. Variables are copied, all else is shared.
    ///
    /// # Errors
    /// When memory for the copy cannot be had.
    pub fn snapshot(&self) -> Result<Self> {
        Ok(Self(
            self.0
                .iter()
                .map(|(name, tensor)| {
                    let kept = if tensor.is_variable() { tensor.copy()?.detach() } else { tensor.clone() };
                    Ok((name.clone(), kept))
                })
                .collect::<Result<_>>()?,
        ))
    }

    /// The same weights in `dtype`; shared where they are in it already.
    ///
    /// # Errors
    /// When memory for the copies cannot be had.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let turned = self.0.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(dtype)?)));
        turned.collect::<Result<_>>().map(Self)
    }

    /// A number that tells these weights from others: a hash over up to 256 values of each tensor, evenly spread,
    /// and the tensors' names. An optimizer step moves every value that has a gradient, so it moves this too; in half
    /// precision a small step may move none of those that are looked at. Weights that were rounded to half precision are others
    /// than the same numbers in `f32`, for they compute otherwise.
    ///
    /// # Errors
    /// When a tensor cannot be read.
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

    /// Number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.0.values().map(Tensor::elem_count).sum()
    }
}

/// Checks that every value of a tensor of floats is finite: one that is not makes all that is computed with it no number.
fn finite(name: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.dtype().is_float() || tensor.elem_count() == 0 {
        return Ok(());
    }
    // Zero times a number is zero, and not so for what is no number or infinite.
    let sum = tensor.affine(0.0, 0.0)?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    ensure!(
        sum == 0.0,
        "tensor {name} has a value that is not finite (NaN or infinite); the file is damaged, or the model diverged when it was trained"
    );
    Ok(())
}

/// One draw from the standard normal distribution (Box–Muller).
fn normal(rng: &mut impl Rng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Every tensor of a model of this shape.
fn shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (d, hd, ffn) = (config.hidden_size, config.head_dim, config.intermediate_size);
    let (q, kv) = (config.heads * hd, config.kv_heads * hd);
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, d])];
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
        all.push(("lm_head.weight".to_owned(), vec![config.vocab_size, d]));
    }
    all
}

fn hugging_face_name(gguf: &str, family: &Family) -> Option<String> {
    match gguf {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, name) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let (stem, kind) = name.rsplit_once('.')?;
    let stem = match stem {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" if family.gemma.is_some() => "pre_feedforward_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_norm" | "post_attention_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{stem}.{kind}"))
}

/// Undoes GGUF's reordering of a projection's rows: within each head, row `2i + j` goes back to `j·hd/2 + i`.
fn unpermute(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    let half = rows / heads / 2;
    Ok(weight.reshape((heads, half, 2, columns))?.transpose(1, 2)?.contiguous()?.reshape((rows, columns))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_only_what_lies_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        for stray in ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "", ".."] {
            let index = format!("{{\"weight_map\": {{\"w\": \"{stray}\"}}}}");
            std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            let error = Weights::read_directory(dir.path(), &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains(&format!("names {stray:?}; the parts of a model lie beside")), "{stray}: {error}");
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_its_tensor() {
        for (value, sound) in [(1.5f32, true), (f32::MAX, true), (f32::NAN, false), (f32::NEG_INFINITY, false)] {
            let dir = tempfile::tempdir().unwrap();
            let tensor = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu).unwrap();
            let tensors = [("a".to_owned(), tensor([0.0; 3])), ("b".to_owned(), tensor([f32::MAX, value, -2.0]))];
            let path = dir.path().join("model.safetensors");
            candle_core::safetensors::save(&tensors.into_iter().collect(), path).unwrap();
            for dtype in [DType::F32, DType::BF16] {
                // Rounded to sixteen bits, the largest number is beyond the largest.
                let expected = sound && (dtype == DType::F32);
                let read = Weights::read_directory(dir.path(), Onto { device: &Device::Cpu, dtype });
                let error = read.err().map_or(String::new(), |error| format!("{error:#}"));
                assert_eq!(error.is_empty(), expected, "{value} {dtype:?}: {error}");
                assert!(expected || (error.contains("tensor b has") && error.contains("model.safetensors")), "{error}");
            }
        }
    }

    #[test]
    fn unpermute_restores_rotate_half_order() {
        // Two heads of width 4: GGUF keeps rows as pairs (0,2), (1,3).
        let stored = Tensor::new(&[[0f32], [2.], [1.], [3.], [4.], [6.], [5.], [7.]], &Device::Cpu).unwrap();
        let rows = unpermute(&stored, 2).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(rows, [0., 1., 2., 3., 4., 5., 6., 7.]);
    }
}

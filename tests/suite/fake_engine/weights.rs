//! Weights of the fake inference server: the base model and adapters, as vLLM and SGLang read them from directories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use preceptor::lm::model::{Decoder, Lora, ModelConfig, Weights};
use preceptor::lm::source::ModelFiles;
use preceptor::lm::tokens::Tokenizer;
use serde_json::Value;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The base model.
#[derive(Clone)]
pub struct Base {
    pub root: PathBuf,
    pub config: ModelConfig,
    pub tokenizer: Tokenizer,
    weights: Weights,
}

/// A low-rank adapter, read from a directory in the format of PEFT.
pub struct Adapter {
    pub name: String,
    pub path: PathBuf,
    pub lora: Lora,
    tensors: Weights,
}

impl Base {
    /// Reads a Hugging Face directory. A model without a tokenizer is served with one whose tokens are bytes.
    pub fn read(root: &Path) -> Result<Self> {
        let files = ModelFiles::Directory(root.to_owned());
        let has_tokenizer = root.join("tokenizer.json").is_file();
        let tokenizer = if has_tokenizer { Tokenizer::from_files(&files)? } else { Tokenizer::bytes() };
        let (mut config, weights) = Weights::from_directory(root, &Device::Cpu)?;
        if has_tokenizer {
            let described = std::mem::replace(&mut config.eos, tokenizer.eos_ids().to_vec());
            config.add_ends(&described);
        }
        let base = Self { root: root.to_owned(), config, tokenizer, weights };
        base.check(&tensors(root)?)?;
        Ok(base)
    }

    /// Builds the model, with the adapter if one is given.
    pub fn decoder(&self, adapter: Option<&Adapter>) -> Result<Decoder> {
        let mut weights = self.weights.clone();
        weights.0.extend(adapter.iter().flat_map(|adapter| adapter.tensors.0.clone()));
        Decoder::with_adapters(&self.config, &weights, adapter.map(|adapter| &adapter.lora))
    }

    /// Replaces the tensors by those of `dir`. Of a model whose head is tied to the embedding, vLLM keeps the old head
    /// unless the directory has a tensor `lm_head.weight`; SGLang ignores that tensor, and uses the new embedding
    /// (`keeps_head` is false).
    pub fn reload(&mut self, dir: &Path, keeps_head: bool) -> Result<()> {
        let mut new = tensors(dir)?;
        self.check(&new)?;
        if self.config.tied && keeps_head {
            self.config.tied = false;
            self.weights.0.insert(HEAD.to_owned(), self.weights.get(EMBEDDING, &self.embedding_shape())?);
        } else if self.config.tied {
            new.remove(HEAD);
        }
        self.weights.0.extend(new);
        Ok(())
    }

    fn embedding_shape(&self) -> [usize; 2] {
        [self.config.vocab_size, self.config.hidden_size]
    }

    /// Checks that the model has a tensor of the same name and shape for each of `new`.
    fn check(&self, new: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, tensor) in new {
            let head = self.embedding_shape();
            let known = if name == HEAD { Some(&head[..]) } else { self.weights.0.get(name).map(Tensor::dims) };
            let module = name.split('.').next().unwrap_or_default();
            let known = known.with_context(|| format!("There is no module or parameter named '{module}' ({name})"))?;
            ensure!(tensor.dims() == known, "{name} has the shape {:?}, and not {known:?}", tensor.dims());
        }
        Ok(())
    }
}

/// Reads all tensors of all safetensors files of `dir`, as vLLM does.
fn tensors(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    ensure!(dir.is_dir(), "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{}'", dir.display());
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            for (name, tensor) in candle_core::safetensors::load(&path, &Device::Cpu)? {
                all.insert(name, tensor.to_dtype(DType::F32)?);
            }
        }
    }
    ensure!(!all.is_empty(), "Cannot find any model weights with `{}`", dir.display());
    Ok(all)
}

impl Adapter {
    /// Reads the adapter in `path` and checks that it fits `base`.
    pub fn read(name: &str, path: &Path, base: &Base, max_rank: usize) -> Result<Self> {
        let config = std::fs::read_to_string(path.join("adapter_config.json"))?;
        let config: Value = serde_json::from_str(&config)?;
        let list = |name: &str| config[name].as_array().with_context(|| format!("adapter_config.json lacks {name}"));
        let lora = Lora {
            rank: config["r"].as_u64().context("adapter_config.json lacks r")? as usize,
            alpha: config["lora_alpha"].as_f64().context("adapter_config.json lacks lora_alpha")?,
            targets: list("target_modules")?.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect(),
        };
        if lora.rank > max_rank {
            bail!("LoRA rank {} is greater than max_lora_rank {max_rank}.", lora.rank);
        }
        let tensors = Lora::read(path, &Device::Cpu)?.to_dtype(DType::F32)?;
        let adapter = Self { name: name.to_owned(), path: path.to_owned(), lora, tensors };
        base.decoder(Some(&adapter))?;
        Ok(adapter)
    }

    /// Returns an adapter of this name and path that has the tensors of `other`, or none.
    pub fn unchanged(name: &str, path: &Path, other: Option<&Self>) -> Self {
        let (name, path) = (name.to_owned(), path.to_owned());
        match other {
            Some(Self { lora, tensors, .. }) => Self { name, path, lora: lora.clone(), tensors: tensors.clone() },
            None => {
                let lora = Lora { rank: 1, alpha: 1.0, targets: Vec::new() };
                Self { name, path, lora, tensors: Weights::default() }
            }
        }
    }
}

//! Reading of weights from a Hugging Face directory.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::tensor::{TensorInfo, TensorView};
use serde_json::Value as Json;

use super::{LoadTarget, Weights, finite};
use crate::lm::model::config::{Head, ModelConfig};
use crate::lm::validate;
use crate::lm::validate::safetensors::Layout;
use crate::util::read_bounded;

/// File of an unsharded model.
const SINGLE: &str = "model.safetensors";
/// Index of the files of a sharded model.
const INDEX: &str = "model.safetensors.index.json";

impl Weights {
    /// Reads a Hugging Face directory: `model.safetensors`, or the shards of `model.safetensors.index.json`. Tensors
    /// that the configuration does not need are dropped, which is logged.
    ///
    /// # Errors
    /// If a file or tensor is invalid; the error names it.
    pub fn from_directory<'a>(dir: &Path, onto: impl Into<LoadTarget<'a>>) -> Result<(ModelConfig, Self)> {
        Self::from_directory_as(dir, Head::Language, onto)
    }

    /// Reads a directory as [`Self::from_directory`] does, for a model with this head.
    ///
    /// # Errors
    /// The same as for [`Self::from_directory`].
    pub fn from_directory_as<'a>(
        dir: &Path,
        head: Head,
        onto: impl Into<LoadTarget<'a>>,
    ) -> Result<(ModelConfig, Self)> {
        let mut config = ModelConfig::from_directory_as(dir, head)?;
        let mut weights = Self::read_directory(dir, onto)?;
        weights.fit(&mut config, head).with_context(|| format!("in {}", dir.display()))?;
        Ok((config, weights))
    }

    /// Reads every tensor of a directory, without its configuration.
    ///
    /// # Errors
    /// If a file is invalid; the error names it.
    pub fn read_directory<'a>(dir: &Path, onto: impl Into<LoadTarget<'a>>) -> Result<Self> {
        let LoadTarget { device, dtype } = onto.into();
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let divided = index.exists();
        if divided && single.exists() {
            tracing::warn!(
                "{} has {SINGLE} and {INDEX}; transformers reads the single file, and so does this program",
                dir.display()
            );
        }
        let places = if divided && !single.exists() { Some(places(dir, &index)?) } else { None };
        let files: BTreeSet<String> = match &places {
            None => BTreeSet::from([SINGLE.to_owned()]),
            Some(places) => places.values().cloned().collect(),
        };
        let mut found: BTreeMap<String, String> = BTreeMap::new();
        let mut layouts = Vec::with_capacity(files.len());
        for file in files {
            let layout = validate::safetensors::check(&dir.join(&file))?;
            for (name, _) in &layout.tensors {
                if let Some(other) = found.insert(name.clone(), file.clone()) {
                    bail!(
                        "the tensor {name} is in {other} and in {file} of {}; delete the shards of another download or conversion",
                        dir.display()
                    );
                }
            }
            layouts.push((file, layout));
        }
        for (name, file) in places.iter().flatten() {
            ensure!(
                found.get(name) == Some(file),
                "{} places the tensor {name} in {file}, which does not have it{}; download index and shards together",
                index.display(),
                found.get(name).map_or(String::new(), |other| format!(" ({other} has)"))
            );
        }
        let mut weights = BTreeMap::new();
        for (file, layout) in layouts {
            let path = dir.join(file);
            let tensors = read(&path, &layout, device, dtype);
            weights.extend(tensors.with_context(|| format!("cannot read {}", path.display()))?);
        }
        Ok(Self(weights))
    }
}

/// Reads the tensors of a file, in parallel on a CPU. Never more of the file is in memory than one tensor per thread, in
/// addition to the result.
fn read(path: &Path, layout: &Layout, device: &Device, dtype: DType) -> Result<Vec<(String, Tensor)>> {
    let file = File::open(path)?;
    let read = |(name, info): &(String, TensorInfo)| -> Result<(String, Tensor)> {
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        file.read_exact_at(&mut bytes, layout.begin + from as u64)?;
        let tensor = TensorView::new(info.dtype, info.shape.clone(), &bytes)?.load(&Device::Cpu)?;
        drop(bytes);
        finite(name, &tensor)?;
        let tensor = tensor.to_dtype(dtype)?;
        if info.dtype.bitsize() > 8 * dtype.size_in_bytes() {
            // A narrower type may not hold the value.
            finite(name, &tensor)?;
        }
        Ok((name.clone(), tensor.to_device(device)?))
    };
    if device.is_cpu() {
        layout.tensors.par_iter().map(read).collect()
    } else {
        layout.tensors.iter().map(read).collect()
    }
}

/// Reads the file of each tensor from the index, and checks that all files exist.
fn places(dir: &Path, index: &Path) -> Result<BTreeMap<String, String>> {
    let text = read_bounded::text(index, read_bounded::DESCRIPTION)
        .with_context(|| format!("cannot read {}", index.display()))?;
    let json: Json = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", index.display()))?;
    let map = json["weight_map"].as_object().filter(|map| !map.is_empty());
    let map = map.with_context(|| format!("{} has no weight_map", index.display()))?;
    let mut places = BTreeMap::new();
    for (name, file) in map {
        let Some(file) = file.as_str() else {
            bail!("{} places the tensor {name} in {file}, and must name a file", index.display())
        };
        if Path::new(file).file_name() != Some(OsStr::new(file)) {
            bail!("{} names {file:?}; the shards of a model must be in the directory of their index", index.display());
        }
        places.insert(name.clone(), file.to_owned());
    }
    let files: BTreeSet<&str> = places.values().map(String::as_str).collect();
    let missing: Vec<&str> = files.iter().copied().filter(|file| !dir.join(file).exists()).collect();
    ensure!(
        missing.is_empty(),
        "{} names {} shards, of which {} missing: {}; download the complete model",
        index.display(),
        files.len(),
        if missing.len() == 1 { "1 is".to_owned() } else { format!("{} are", missing.len()) },
        missing.join(", ")
    );
    Ok(places)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device, Tensor};
    use serde_json::json;

    use super::*;

    #[test]
    fn an_index_may_only_name_files_of_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        for stray in ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "", ".."] {
            let index = format!("{{\"weight_map\": {{\"w\": \"{stray}\"}}}}");
            std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            let error = Weights::read_directory(dir.path(), &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains(&format!("names {stray:?}; the shards of a model must be in")), "{stray}: {error}");
        }
    }

    #[test]
    fn a_tensor_with_a_value_that_is_not_finite_is_rejected() {
        for (value, sound) in [(1.5f32, true), (f32::MAX, true), (f32::NAN, false), (f32::NEG_INFINITY, false)] {
            let dir = tempfile::tempdir().unwrap();
            let tensor = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu).unwrap();
            let tensors = [("a".to_owned(), tensor([0.0; 3])), ("b".to_owned(), tensor([f32::MAX, value, -2.0]))];
            let path = dir.path().join("model.safetensors");
            candle_core::safetensors::save(&tensors.into_iter().collect(), path).unwrap();
            for dtype in [DType::F32, DType::BF16] {
                // Rounded to sixteen bits, the largest f32 number exceeds the largest bf16 number.
                let expected = sound && (dtype == DType::F32);
                let read = Weights::read_directory(dir.path(), LoadTarget { device: &Device::Cpu, dtype });
                let error = read.err().map_or(String::new(), |error| format!("{error:#}"));
                assert_eq!(error.is_empty(), expected, "{value} {dtype:?}: {error}");
                assert!(expected || (error.contains("tensor b has") && error.contains("model.safetensors")), "{error}");
            }
        }
    }

    fn save(dir: &Path, file: &str, tensors: &[(&str, f32)]) {
        let tensor = |value: f32| Tensor::new(&[value], &Device::Cpu).unwrap();
        let tensors: HashMap<String, Tensor> =
            tensors.iter().map(|(name, value)| ((*name).to_owned(), tensor(*value))).collect();
        candle_core::safetensors::save(&tensors, dir.join(file)).unwrap();
    }

    #[test]
    fn index_and_shards_must_agree() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let read = || Weights::read_directory(dir, &Device::Cpu);
        let index = |map: Json| std::fs::write(dir.join(INDEX), json!({ "weight_map": map }).to_string()).unwrap();
        let refused = |words: &str| {
            let error = format!("{:#}", read().unwrap_err());
            assert!(error.contains(words), "{error}");
        };
        index(json!({ "a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors" }));
        save(dir, "1.safetensors", &[("a", 1.0)]);
        refused("names 3 shards, of which 2 are missing: 2.safetensors, 3.safetensors");
        save(dir, "2.safetensors", &[("a", 2.0), ("b", 2.0)]);
        save(dir, "3.safetensors", &[("c", 3.0)]);
        refused("the tensor a is in 1.safetensors and in 2.safetensors");
        save(dir, "2.safetensors", &[("d", 2.0)]);
        refused("places the tensor b in 2.safetensors, which does not have it");
        index(json!({ "a": "2.safetensors", "d": "1.safetensors" }));
        refused("places the tensor a in 2.safetensors, which does not have it (1.safetensors has)");
        index(json!({ "a": 1 }));
        refused("must name a file");
        index(json!({}));
        refused("has no weight_map");
        index(json!({ "a": "1.safetensors", "d": "2.safetensors" }));
        assert_eq!(read().unwrap().0.len(), 2);
        // The single file takes precedence, as in `transformers`.
        save(dir, SINGLE, &[("e", 5.0)]);
        assert_eq!(read().unwrap().0.into_keys().collect::<Vec<_>>(), ["e"]);
    }
}

//! Writing of models in the format of `transformers`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::config::Head;
use super::{ModelConfig, Weights};
use crate::util::disk;

/// Writes `config.json`, `generation_config.json` and `model.safetensors` to `dir`, which must exist.
///
/// # Errors
/// If a file cannot be written; the error names it.
pub fn write(dir: &Path, config: &ModelConfig, weights: &Weights, dtype: DType) -> Result<()> {
    write_described(dir, config.to_json(Head::Language), config, weights, dtype)
}

/// Writes a model with a scalar head `score.weight` `[1, D]` among its weights, in the format of
/// `AutoModelForSequenceClassification`. `pad` is its padding token.
///
/// # Errors
/// The same as for [`write()`].
pub fn write_scorer(dir: &Path, config: &ModelConfig, weights: &Weights, pad: Option<u32>, dtype: DType) -> Result<()> {
    let mut description = config.to_json(Head::Scalar);
    // `transformers` takes the number of outputs from here: one label, so one output.
    description["id2label"] = json!({ "0": "reward" });
    description["label2id"] = json!({ "reward": 0 });
    description["pad_token_id"] = json!(pad);
    write_described(dir, description, config, weights, dtype)
}

fn write_described(
    dir: &Path,
    mut description: serde_json::Value,
    config: &ModelConfig,
    weights: &Weights,
    dtype: DType,
) -> Result<()> {
    let dtype_name = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
    description["dtype"] = json!(dtype_name);
    description["torch_dtype"] = json!(dtype_name);
    write_json(&dir.join("config.json"), &description)?;
    write_json(&dir.join("generation_config.json"), &config.to_generation_json())?;
    write_tensors(&dir.join("model.safetensors"), weights, dtype)
}

/// Writes tensors by name to a safetensors file.
///
/// # Errors
/// If the file cannot be written; the error names it.
pub fn write_tensors(path: &Path, weights: &Weights, dtype: DType) -> Result<()> {
    // Converted on the host, because a card may have no memory for a second model.
    let turned = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(dtype);
    let tensors: Vec<(&String, Tensor)> =
        weights.0.iter().map(|(name, tensor)| Ok((name, turned(tensor)?))).collect::<Result<_>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    disk::open_to_umask(path)
}

/// Writes pretty-printed JSON.
///
/// # Errors
/// If the file cannot be written; the error names it.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    std::fs::write(path, serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", path.display()))
}

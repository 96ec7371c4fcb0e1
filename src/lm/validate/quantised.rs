//! Rejection of quantised weights, whose values are meaningless without their scales and cannot be trained.

use std::path::Path;

use anyhow::{Result, bail};
use safetensors::Dtype;
use serde_json::Value;

/// Remedy that every error names.
const REMEDY: &str =
    "quantised weights cannot be trained; use the model's own weights in bf16, f16 or f32, or dequantise them first";

/// Suffixes of tensor names that only quantised models have, with the kind of quantisation.
const SUFFIXES: [(&str, &str); 19] = [
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".scales", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    (".nested_absmax", "bitsandbytes, 4 bits"),
    (".nested_quant_map", "bitsandbytes, 4 bits"),
    (".quant_state.bitsandbytes__nf4", "bitsandbytes, 4 bits"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes, 4 bits"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".weight_scale", "compressed-tensors or FP8"),
    (".weight_scale_inv", "FP8 by blocks"),
    (".weight_scale_2", "ModelOpt"),
    (".weight_packed", "compressed-tensors"),
    (".weight_zero_point", "compressed-tensors"),
    (".input_scale", "FP8"),
    ("_blocks", "MXFP4"),
    ("_scales", "MXFP4"),
];

/// Rejects the `config.json` of a quantised model.
///
/// # Errors
/// If the model is quantised; the error names the key and the method.
pub fn check_config(config: &Value) -> Result<()> {
    for key in ["quantization_config", "compression_config"] {
        let value = &config[key];
        if value.is_null() {
            continue;
        }
        let flag = |name: &'static str| value[name].as_bool().filter(|set| *set).map(|_| name);
        let method = value["quant_method"].as_str().or(flag("load_in_4bit")).or(flag("load_in_8bit"));
        let method = method.or(value["quant_type"].as_str()).unwrap_or("not named");
        bail!("{key} says that the weights are quantised (method: {method}); {REMEDY}, and remove {key}");
    }
    Ok(())
}

/// Rejects a directory in which another file next to `config.json` describes a quantised model.
///
/// # Errors
/// If such a file exists; the error names it.
pub fn check_directory(dir: &Path) -> Result<()> {
    for (name, kind) in
        [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")]
    {
        let path = dir.join(name);
        if path.exists() {
            bail!("{} says that the weights are quantised (method: {kind}); {REMEDY}", path.display());
        }
    }
    Ok(())
}

/// Rejects a tensor that only a quantised model has, and parameters that are not floating-point numbers.
///
/// # Errors
/// If the tensor is quantised; the error names it and its type.
pub fn check_tensor(name: &str, dtype: Dtype) -> Result<()> {
    let short: String = name.chars().take(80).collect();
    if let Some((_, kind)) = SUFFIXES.iter().find(|(end, _)| name.ends_with(end)) {
        bail!("the tensor {short:?} belongs to quantised weights ({kind}); {REMEDY}");
    }
    let is_float = matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    // Buffers such as BERT's position ids are integers, parameters are not.
    let is_parameter = name.ends_with(".weight") || name.ends_with(".bias");
    let is_narrow = !matches!(
        dtype,
        Dtype::BOOL
            | Dtype::U8
            | Dtype::I8
            | Dtype::I16
            | Dtype::U16
            | Dtype::I32
            | Dtype::U32
            | Dtype::I64
            | Dtype::U64
            | Dtype::C64
    ) && !is_float;
    if is_narrow || (is_parameter && !is_float) {
        bail!("the tensor {short:?} holds values of type {dtype:?}, which are quantised; {REMEDY}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_quantised_model_is_rejected_by_its_method() {
        for (config, method) in [
            (json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [128, 128] } }), "fp8"),
            (json!({ "quantization_config": { "quant_method": "gptq", "bits": 4 } }), "gptq"),
            (json!({ "quantization_config": { "quant_method": "awq" } }), "awq"),
            (json!({ "quantization_config": { "load_in_4bit": true, "load_in_8bit": false } }), "load_in_4bit"),
            (json!({ "quantization_config": { "load_in_8bit": true } }), "load_in_8bit"),
            (json!({ "quantization_config": {} }), "not named"),
            (json!({ "compression_config": { "quant_method": "compressed-tensors" } }), "compressed-tensors"),
        ] {
            let error = check_config(&config).unwrap_err().to_string();
            assert!(error.contains(&format!("quantised (method: {method})")) && error.contains("_config"), "{error}");
        }
        check_config(&json!({ "quantization_config": null })).unwrap();
        check_config(&json!({})).unwrap();
        let dir = tempfile::tempdir().unwrap();
        check_directory(dir.path()).unwrap();
        std::fs::write(dir.path().join("hf_quant_config.json"), "{}").unwrap();
        assert!(check_directory(dir.path()).unwrap_err().to_string().contains("hf_quant_config.json"));
    }

    #[test]
    fn quantised_tensors_are_rejected_by_name_and_type() {
        let q = "model.layers.0.self_attn.q_proj";
        for (name, dtype) in [
            ("weight", Dtype::F8_E4M3),
            ("weight", Dtype::F8_E5M2),
            ("weight", Dtype::U8),
            ("weight", Dtype::I8),
            ("weight", Dtype::I64),
            ("bias", Dtype::I32),
            ("weight_scale_inv", Dtype::F32),
            ("weight_scale", Dtype::BF16),
            ("qweight", Dtype::I32),
            ("SCB", Dtype::F32),
            ("weight.absmax", Dtype::F32),
            ("weight.quant_state.bitsandbytes__nf4", Dtype::U8),
        ] {
            let name = format!("{q}.{name}");
            let error = check_tensor(&name, dtype).expect_err(&name).to_string();
            assert!(error.contains(&name) && error.contains("quantised"), "{error}");
        }
        for (name, dtype) in [
            ("embeddings.position_ids", Dtype::I64),
            ("model.embed_tokens.weight", Dtype::F16),
            ("model.norm.weight", Dtype::F64),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32),
        ] {
            check_tensor(name, dtype).unwrap();
        }
    }
}

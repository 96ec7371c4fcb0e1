//! Reading of weights from a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};

use super::{LoadTarget, Weights, finite};
use crate::lm::model::config::ModelConfig;
use crate::lm::model::family::Family;
use crate::lm::model::rope::Scaling;
use crate::lm::validate;

impl Weights {
    /// Reads a GGUF file. Every tensor is dequantised to f32 on the host; the rows of queries and keys are reordered
    /// from GGUF's interleaved rotary order to the rotate-half order of Hugging Face.
    ///
    /// # Errors
    /// If the file cannot be read, or a key or tensor is invalid; the error names it.
    pub fn from_gguf<'a>(path: &Path, onto: impl Into<LoadTarget<'a>>) -> Result<(ModelConfig, Self)> {
        let onto = onto.into();
        let (mut file, content) = validate::gguf::read(path)?;
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
                // GGUF stores 1 + w, Hugging Face stores w.
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

/// Undoes GGUF's reordering of a projection's rows: within each head, row `2i + j` moves back to `j·hd/2 + i`.
fn unpermute(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    let half = rows / heads / 2;
    Ok(weight.reshape((heads, half, 2, columns))?.transpose(1, 2)?.contiguous()?.reshape((rows, columns))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_restores_rotate_half_order() {
        // Two heads of width 4: GGUF stores rows as pairs (0,2), (1,3).
        let stored = Tensor::new(&[[0f32], [2.], [1.], [3.], [4.], [6.], [5.], [7.]], &Device::Cpu).unwrap();
        let rows = unpermute(&stored, 2).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(rows, [0., 1., 2., 3., 4., 5., 6., 7.]);
    }
}

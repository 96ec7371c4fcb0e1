//! Comparison of a file's tensors with those that a configuration needs.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};

use super::{EMBEDDING, HEAD, SCORE, Weights, shapes};
use crate::lm::model::config::{Head, ModelConfig};

/// Prefixes that programs add to the names of tensors, and how to remove them.
const PREFIXES: [(&str, &str); 5] = [
    ("_orig_mod.", "saved from a model under torch.compile: save the model that was compiled (model._orig_mod)"),
    ("module.", "saved from a model under DistributedDataParallel: save the model within (model.module)"),
    ("base_model.model.", "saved from a PEFT model: merge its adapters with merge_and_unload(), and save the result"),
    ("language_model.", "part of a model that takes images too: use the text model of its family"),
    ("transformer.", "of another architecture"),
];

/// Suffixes of buffers that earlier versions of `transformers` wrote and that are computed here.
const BUFFERS: [&str; 4] =
    ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias"];

impl Weights {
    /// Keeps the tensors that a model of this configuration has, and determines whether its head is tied to the
    /// embedding.
    ///
    /// # Errors
    /// If a tensor is missing; the error names the first one and the likely cause.
    pub(super) fn fit(&mut self, config: &mut ModelConfig, head: Head) -> Result<()> {
        if head == Head::Scalar {
            // A scalar head reads the hidden state, so the language head is not needed.
            self.0.remove(HEAD);
            config.tied = true;
        } else if config.tied {
            self.find_head(config)?;
        }
        let wanted: BTreeSet<String> = shapes(config).into_iter().map(|(name, _)| name).collect();
        let missing: Vec<&String> = wanted.iter().filter(|name| !self.0.contains_key(*name)).collect();
        if let Some(first) = missing.first() {
            let more = match missing.len() {
                1 => String::new(),
                count => format!(" (and {} more are missing)", count - 1),
            };
            bail!("the model has no tensor {first}{more}{}", self.cause(first, config));
        }
        let is_stray = |name: &str| !(wanted.contains(name) || (head == Head::Scalar && name == SCORE));
        let strays: Vec<String> = self.0.keys().filter(|name| is_stray(name)).cloned().collect();
        let unneeded: Vec<&str> =
            strays.iter().map(String::as_str).filter(|name| BUFFERS.iter().all(|end| !name.ends_with(end))).collect();
        if !unneeded.is_empty() {
            tracing::warn!(
                "{} tensors are not part of a {} of this configuration; they are left out, from checkpoints too, as transformers does: {}{}",
                unneeded.len(),
                config.family.architecture,
                unneeded[..unneeded.len().min(5)].join(", "),
                if unneeded.len() > 5 { ", …" } else { "" }
            );
        }
        for name in &strays {
            self.0.remove(name);
        }
        Ok(())
    }

    /// Resolves a tied head. If the file has both head and embedding, equal ones are tied and different ones are not,
    /// as in `transformers`; if it has only the head, that becomes the embedding.
    fn find_head(&mut self, config: &mut ModelConfig) -> Result<()> {
        let Some(head) = self.0.get(HEAD).cloned() else { return Ok(()) };
        match self.0.get(EMBEDDING) {
            None => {
                self.0.insert(EMBEDDING.to_owned(), head);
            }
            Some(embedding) if embedding.dims() == head.dims() && equal(embedding, &head)? => {}
            Some(_) => {
                tracing::warn!(
                    "config.json says tie_word_embeddings = true, and {HEAD} differs from {EMBEDDING}; both are used, and checkpoints say tie_word_embeddings = false, as transformers does"
                );
                config.tied = false;
                return Ok(());
            }
        }
        self.0.remove(HEAD);
        Ok(())
    }

    /// Returns the likely cause of a missing tensor, after a semicolon.
    fn cause(&self, name: &str, config: &ModelConfig) -> String {
        let names = || self.0.keys().map(String::as_str);
        let has = |part: &str| names().any(|name| name.contains(part));
        if has(".lora_A.") || has(".base_layer.") {
            return "; the file holds PEFT adapters: merge them with merge_and_unload(), and save the result".into();
        }
        if let Some(prefix) = names().find_map(|other| other.strip_suffix(name).filter(|prefix| !prefix.is_empty())) {
            let known = PREFIXES.iter().find(|(known, _)| prefix.contains(known));
            let why = known.map_or(String::new(), |(_, why)| format!(", {why}"));
            return format!("; its tensors begin with \"{prefix}\"{why}");
        }
        if name.strip_prefix("model.").is_some_and(|bare| self.0.contains_key(bare)) {
            return "; its tensors lack the prefix \"model.\", as a model without a head is saved (AutoModel): save it with AutoModelForCausalLM".into();
        }
        if name == HEAD {
            return "; config.json says that the head is not the embedding (tie_word_embeddings, false by default in this family): if it is, set tie_word_embeddings = true".into();
        }
        if has(".qkv_proj.") || has(".gate_up_proj.") || has(".W_pack.") {
            return format!("; its projections are fused, as {} has none", config.family.architecture);
        }
        if has(".experts.") {
            return "; it is a mixture of experts, which is not supported".into();
        }
        let layer = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        let layers: BTreeSet<usize> = names().filter_map(layer).collect();
        if let (Some(wanted), Some(last)) = (layer(name), layers.last())
            && wanted > *last
        {
            let (configured, found) = (config.layers, last + 1);
            return format!("; config.json says num_hidden_layers = {configured}, and the file has {found} layers");
        }
        format!("; check that the file is a complete {}", config.family.architecture)
    }
}

/// Returns whether two tensors of the same shape have equal values.
fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    const ROWS: usize = 4096;
    let rows = a.dim(0)?;
    for start in (0..rows).step_by(ROWS) {
        let part = |tensor: &Tensor| tensor.narrow(0, start, ROWS.min(rows - start));
        let unequal = part(a)?.ne(&part(b)?)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
        if unequal > 0.0 {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn config(tied: bool) -> ModelConfig {
        ModelConfig {
            hidden_size: 8,
            intermediate_size: 8,
            layers: 2,
            heads: 2,
            kv_heads: 2,
            head_dim: 4,
            vocab_size: 16,
            context: 32,
            tied,
            ..ModelConfig::llama()
        }
    }

    fn weights(tied: bool) -> Weights {
        Weights::scratch(&config(tied), 0.1, 1, &Device::Cpu).unwrap()
    }

    fn renamed(weights: Weights, name: impl Fn(String) -> String) -> Weights {
        Weights(weights.0.into_iter().map(|(key, tensor)| (name(key), tensor)).collect())
    }

    #[test]
    fn a_head_that_differs_from_the_embedding_is_kept_despite_tying() {
        // The head equals the embedding, differs from it, or is the only one.
        for (changed, alone) in [(false, false), (true, false), (false, true)] {
            let (mut config, mut found) = (config(true), weights(true));
            let embedding = found.0[EMBEDDING].clone();
            let head = if changed { (&embedding + 1.0).unwrap() } else { embedding.clone() };
            found.0.insert(HEAD.into(), head);
            if alone {
                found.0.remove(EMBEDDING);
            }
            found.fit(&mut config, Head::Language).unwrap();
            assert_eq!((config.tied, found.0.contains_key(HEAD)), (!changed, changed));
            assert!(equal(&found.0[EMBEDDING], &embedding).unwrap());
        }
    }

    #[test]
    fn unneeded_tensors_are_dropped() {
        let (mut config, mut found) = (config(true), weights(true));
        let wanted: Vec<String> = found.0.keys().cloned().collect();
        for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.9.mlp.up_proj.weight", SCORE] {
            found.0.insert(name.into(), found.0["model.norm.weight"].clone());
        }
        let mut scorer = found.clone();
        found.fit(&mut config, Head::Language).unwrap();
        assert_eq!(found.0.into_keys().collect::<Vec<_>>(), wanted);
        // The scalar head of a reward model belongs to it; the language head does not.
        let mut untied = ModelConfig { tied: false, ..config };
        scorer.0.insert(HEAD.into(), scorer.0[EMBEDDING].clone());
        scorer.fit(&mut untied, Head::Scalar).unwrap();
        assert!(scorer.0.contains_key(SCORE) && !scorer.0.contains_key(HEAD) && untied.tied);
    }

    #[test]
    fn a_missing_tensor_is_reported_with_the_likely_cause() {
        let prefixed = |prefix: &'static str| renamed(weights(false), move |name| format!("{prefix}{name}"));
        let without = |name: &str| {
            let mut weights = weights(false);
            weights.0.remove(name);
            weights
        };
        let mut adapted = weights(false);
        let q = "model.layers.0.self_attn.q_proj";
        let matrix = adapted.0.remove(&format!("{q}.weight")).unwrap();
        adapted.0.insert(format!("{q}.base_layer.weight"), matrix);
        let mut short = weights(false);
        short.0.retain(|name, _| !name.contains("layers.1."));
        for (mut found, words) in [
            (prefixed("_orig_mod."), "begin with \"_orig_mod.\", saved from a model under torch.compile"),
            (prefixed("module."), "begin with \"module.\", saved from a model under DistributedDataParallel"),
            (prefixed("base_model.model."), "merge_and_unload()"),
            (prefixed("module._orig_mod."), "begin with \"module._orig_mod.\""),
            (prefixed("model."), "begin with \"model.\""),
            (renamed(weights(false), |name| name.replacen("model.", "", 1)), "lack the prefix \"model.\""),
            (without(HEAD), "no tensor lm_head.weight; config.json says that the head is not the embedding"),
            (adapted, "PEFT adapters"),
            (short, "num_hidden_layers = 2, and the file has 1 layers"),
            (
                without("model.norm.weight"),
                "no tensor model.norm.weight; check that the file is a complete LlamaForCausalLM",
            ),
        ] {
            let error = found.fit(&mut config(false), Head::Language).unwrap_err().to_string();
            assert!(error.contains("the model has no tensor") && error.contains(words), "{words}: {error}");
        }
    }
}

//! Writing of `config.json` and `generation_config.json` for checkpoints.

use serde_json::{Value as Json, json};

use super::read::ids;
use super::{Head, ModelConfig, Window, activation};
use crate::lm::model::rope::Scaling;

impl ModelConfig {
    /// Returns the `generation_config.json` for `transformers`: all keys of the model's own, if it has one, and the
    /// tokens that end a completion here.
    pub fn to_generation_json(&self) -> Json {
        let mut described = match &self.generation {
            Json::Object(own) => Json::Object(own.clone()),
            _ => json!({ "bos_token_id": self.bos, "do_sample": false }),
        };
        // A single token may be written as a number or as a list.
        if ids(&described["eos_token_id"]) != self.eos || self.eos.is_empty() {
            described["eos_token_id"] = if self.eos.is_empty() { Json::Null } else { json!(self.eos) };
        }
        described
    }

    /// Returns the `config.json` for `transformers`, for a model with this head.
    pub fn to_json(&self, head: Head) -> Json {
        let mut rope = self.rope_scaling.to_json();
        let scaling = if self.rope_scaling == Scaling::None { Json::Null } else { rope.clone() };
        rope["rope_theta"] = json!(self.rope_theta);
        if let Some(theta) = self.local_rope_theta {
            let mut local = self.local_rope_scaling.to_json();
            local["rope_theta"] = json!(theta);
            rope = json!({ "full_attention": rope, "sliding_attention": local });
        }
        let (key, name) = activation(self.family);
        let mut described = json!({
            "architectures": [if head == Head::Scalar { self.family.scorer } else { self.family.architecture }],
            "model_type": self.family.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            key: name,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": self.bos,
            "pad_token_id": self.pad,
            "eos_token_id": match self.eos.as_slice() { [] => Json::Null, [one] => json!(one), many => json!(many) },
            "dtype": "float32",
            "torch_dtype": "float32",
        });
        described["sliding_window"] = json!(self.window.as_ref().map(|window| window.size));
        described["use_sliding_window"] = json!(self.window.is_some());
        // Listed only if it differs from the family's rule, because `transformers` misreads a Mistral that has the
        // list.
        let listed =
            |window: &&Window| (0..self.layers).any(|i| window.layers[i] != (self.family.slides)(&Json::Null, i));
        if let Some(window) = self.window.as_ref().filter(listed) {
            let kind = |slides: &bool| if *slides { "sliding_attention" } else { "full_attention" };
            described["layer_types"] = window.layers.iter().map(kind).collect();
        }
        if self.family.gemma.is_some() {
            described["attn_logit_softcapping"] = json!(self.attention_cap);
            described["final_logit_softcapping"] = json!(self.logit_cap);
            described["query_pre_attn_scalar"] = json!(self.query_scalar);
        }
        if let Some(theta) = self.local_rope_theta {
            described["rope_local_base_freq"] = json!(theta);
        }
        described
    }
}

//! Text to token ids and back, and a model's own chat template.

mod bytes;
pub mod chat;
mod gguf;

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use crate::source::ModelFiles;
use chat::Message;

/// A model's tokenizer.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<String>,
    special: Special,
}

/// Tokens with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq)]
struct Special {
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
}

impl Tokenizer {
    /// The tokenizer that comes with a model: rebuilt from a GGUF's metadata, or read from `tokenizer.json`.
    ///
    /// # Errors
    /// Names the file and what is missing in it.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        match files {
            ModelFiles::Gguf(path) => {
                gguf::read(path).with_context(|| format!("cannot rebuild the tokenizer of {}", path.display()))
            }
            ModelFiles::Directory(dir) => Self::from_directory(dir),
        }
    }

    /// A tokenizer whose tokens are the 256 bytes, for models made from scratch; with ChatML's three tokens.
    pub fn bytes() -> Self {
        bytes::tokenizer()
    }

    fn from_directory(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
        let optional = |name: &str| -> Result<Value> {
            let path = dir.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display())),
                Err(_) => Ok(Value::Null),
            }
        };
        let (config, generation, model) =
            (optional("tokenizer_config.json")?, optional("generation_config.json")?, optional("config.json")?);
        let template = match &config["chat_template"] {
            Value::String(text) => Some(text.clone()),
            Value::Array(named) => named
                .iter()
                .find(|one| one["name"] == "default")
                .or(named.first())
                .and_then(|one| one["template"].as_str().map(str::to_owned)),
            _ => std::fs::read_to_string(dir.join("chat_template.jinja")).ok(),
        };
        let named = |name: &str| {
            let text = config[name].as_str().or_else(|| config[name]["content"].as_str());
            text.and_then(|text| inner.token_to_id(text))
        };
        let ids = |value: &Value| -> Vec<u32> {
            match value {
                Value::Array(list) => list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
                one => one.as_u64().map(|id| id as u32).into_iter().collect(),
            }
        };
        let eos =
            [ids(&generation["eos_token_id"]), ids(&model["eos_token_id"]), named("eos_token").into_iter().collect()]
                .into_iter()
                .find(|ids| !ids.is_empty())
                .unwrap_or_default();
        let special = Special { bos: named("bos_token"), eos, pad: named("pad_token"), unk: named("unk_token") };
        Ok(Self { inner, template, special })
    }

    /// From the JSON form of a tokenizer.
    fn from_json(description: &Value, template: Option<String>, special: Special) -> Result<Self> {
        let inner =
            tokenizers::Tokenizer::from_bytes(serde_json::to_vec(description)?).map_err(|error| anyhow!(error))?;
        Ok(Self { inner, template, special })
    }

    /// Token ids of `text`. Special tokens in it are recognised, none are added.
    ///
    /// # Errors
    /// Text that the tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| anyhow!("cannot tokenise: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// Ids that the tokenizer refuses.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| anyhow!("cannot decode: {error}"))
    }

    /// The conversation as the model's own template writes it; with `answer`, up to where the model's answer begins.
    ///
    /// # Errors
    /// No template, or one that cannot be filled in.
    pub fn render_chat(&self, messages: &[Message], answer: bool) -> Result<String> {
        let template = self.template.as_ref().context("the model has no chat template")?;
        let token = |id: Option<u32>| id.and_then(|id| self.inner.id_to_token(id)).unwrap_or_default();
        chat::render(template, messages, answer, &token(self.special.bos), &token(self.special.eos.first().copied()))
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Tokens that end a completion.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// The token that begins a document.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token called `token`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`, which `transformers` opens.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join("tokenizer.json");
        self.inner.save(&path, false).map_err(|error| anyhow!("cannot write {}: {error}", path.display()))?;
        let mut named = serde_json::Map::new();
        for (name, id) in [
            ("bos_token", self.special.bos),
            ("eos_token", self.special.eos.first().copied()),
            ("pad_token", self.special.pad),
            ("unk_token", self.special.unk),
        ] {
            if let Some(token) = id.and_then(|id| self.inner.id_to_token(id)) {
                named.insert(name.into(), json!(token));
            }
        }
        let mut config = named.clone();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(template) = &self.template {
            config.insert("chat_template".into(), json!(template));
        }
        for (name, value) in [("tokenizer_config.json", config), ("special_tokens_map.json", named)] {
            let path = dir.join(name);
            std::fs::write(&path, serde_json::to_vec_pretty(&value)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

//! Chat templates of a model directory, by name, as `transformers` finds them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::optional_text;

/// Folder of templates next to `chat_template.jinja`, one file per name.
const FOLDER: &str = "additional_chat_templates";
/// Name of the template for conversations without tools.
pub(super) const DEFAULT: &str = "default";

/// Sources of a model's chat templates, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Templates(pub(super) BTreeMap<String, String>);

impl Templates {
    /// Creates the templates of a model with at most the default one.
    pub(super) fn single(source: Option<String>) -> Self {
        Self(source.map(|source| (DEFAULT.to_owned(), source)).into_iter().collect())
    }

    /// Reads the templates of the directory `dir`: `chat_template.jinja` and the files in `additional_chat_templates`.
    /// If none exist, uses `configured`, the value of `chat_template` in `tokenizer_config.json`.
    ///
    /// # Errors
    /// If a file cannot be read or a value is not a template; the error names it.
    pub(super) fn in_directory(dir: &Path, configured: &Value) -> Result<Self> {
        let mut found = Self::single(optional_text(&dir.join("chat_template.jinja"))?);
        let folder = dir.join(FOLDER);
        if folder.is_dir() {
            let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
            for entry in entries {
                let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
                let is_template = path.extension().is_some_and(|extension| extension == "jinja");
                let Some(name) = path.file_stem().and_then(|name| name.to_str()).filter(|_| is_template) else {
                    continue;
                };
                if let Some(source) = optional_text(&path)? {
                    found.0.insert(name.to_owned(), source);
                }
            }
        }
        if found.0.is_empty() { Self::configured(configured) } else { Ok(found) }
    }

    fn configured(value: &Value) -> Result<Self> {
        let named = |name: &Value, template: &Value| match (name.as_str(), template.as_str()) {
            (Some(name), Some(template)) => Ok((name.to_owned(), template.to_owned())),
            _ => bail!("chat_template in tokenizer_config.json has an entry that is not a name and a template"),
        };
        Ok(match value {
            Value::Null => Self(BTreeMap::new()),
            Value::String(source) => Self::single(Some(source.clone())),
            Value::Array(list) => {
                Self(list.iter().map(|entry| named(&entry["name"], &entry["template"])).collect::<Result<_>>()?)
            }
            Value::Object(by_name) => {
                let pairs = by_name.iter().map(|(name, template)| named(&json!(name), template));
                Self(pairs.collect::<Result<_>>()?)
            }
            other => {
                bail!("chat_template in tokenizer_config.json is {other}, and must be a text or a list of templates")
            }
        })
    }

    /// Returns the template for conversations.
    pub(super) fn main(&self) -> Option<&String> {
        self.0.get(DEFAULT)
    }

    /// Returns the templates in the form of `tokenizer_config.json`; `None` if there are none.
    pub(super) fn to_json(&self) -> Option<Value> {
        match (self.main(), self.0.len()) {
            (_, 0) => None,
            (Some(source), 1) => Some(json!(source)),
            _ => Some(self.0.iter().map(|(name, source)| json!({ "name": name, "template": source })).collect()),
        }
    }

    /// Returns the error for a model without a template for conversations.
    pub(super) fn missing(&self) -> anyhow::Error {
        if self.0.is_empty() {
            return anyhow::anyhow!("the model has no chat template");
        }
        let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
        anyhow::anyhow!(
            "the model has chat templates named {}, and none named {DEFAULT}; rename one, or put it into chat_template.jinja",
            names.join(", ")
        )
    }
}

//! Tokenizers, and the models' own chat templates.

mod added;
mod bytes;
pub mod chat;
mod ends;
mod gguf;
mod spm;
mod templates;
mod text;

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::lm::source::ModelFiles;
use crate::lm::validate;
use crate::lm::validate::types::{self, Type};
use crate::util::read_bounded;
use chat::{Message, OPENS_REASONING, Template, Variables};
use templates::{DEFAULT, Templates};

/// Tokenizer of a model. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// The same tokenizer without recognition of special tokens; created on first use.
    plain: Arc<OnceLock<tokenizers::Tokenizer>>,
    /// Properties that follow from the tokens; computed on first use.
    properties: Arc<OnceLock<text::Properties>>,
    template: Option<Arc<Template>>,
    /// Variables of the chat template besides the conversation.
    variables: Arc<Variables>,
    /// Sources of all chat templates, including the default one.
    templates: Arc<Templates>,
    special: Special,
    /// Token that the chat template writes after an answer.
    turn_end: Option<u32>,
    /// True if the tokenizer or a configuration names a token that ends a completion.
    named_end: bool,
    /// Token that the model's own tokenizer puts before a text, if any.
    opening: Option<u32>,
    vocab_size: usize,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens, {:?})", self.vocab_size, self.special)
    }
}

/// Special tokens by their function.
#[derive(Debug, Clone, Default, PartialEq)]
struct Special {
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
}

impl Tokenizer {
    /// Returns the tokenizer of a model: rebuilt from a GGUF's metadata, or read from `tokenizer.json`.
    ///
    /// # Errors
    /// If a file is missing or invalid; the error names it.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        match files {
            ModelFiles::Gguf(path) => {
                gguf::read(path).with_context(|| format!("cannot rebuild the tokenizer of {}", path.display()))
            }
            ModelFiles::Directory(dir) => Self::from_directory(dir),
        }
    }

    /// Returns a tokenizer whose tokens are the 256 bytes and ChatML's three special tokens, for models from scratch.
    pub fn bytes() -> Self {
        bytes::tokenizer()
    }

    fn from_directory(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let mut inner = validate::tokenizer::read(&path)?;
        let mut config = optional_json(&dir.join("tokenizer_config.json"))?;
        // The tokenizers of older models name their special tokens in this file.
        let older = optional_json(&dir.join("special_tokens_map.json"))?;
        if config.is_null() {
            config = json!({});
        }
        if let (Some(config), Value::Object(older)) = (config.as_object_mut(), older) {
            for (name, token) in older {
                config.entry(name).or_insert(token);
            }
        }
        added::add(&mut inner, &config, dir)?;
        let named = |name: &str| {
            let text = config[name].as_str().or_else(|| config[name]["content"].as_str());
            text.and_then(|text| inner.token_to_id(text))
        };
        // The turns of a chat model end with the tokenizer's token, its documents with the model's: both end a
        // completion.
        let ends = |name: &str| -> Result<Vec<u32>> {
            let path = dir.join(name);
            let config = optional_json(&path)?;
            let keys = [("eos_token_id", Type::Ids)];
            types::check(&config, &keys).with_context(|| format!("in {}", path.display()))?;
            Ok(ids(&config["eos_token_id"]))
        };
        let eos_token = &config["eos_token"];
        let own = named("eos_token");
        if let (None, Some(text)) = (own, eos_token.as_str().or(eos_token["content"].as_str())) {
            bail!(
                "{} names the end token {text:?}, which {} does not have, so that no completion could end with it; correct eos_token",
                dir.join("tokenizer_config.json").display(),
                path.display()
            );
        }
        let mut eos: Vec<u32> = Vec::new();
        for id in own.into_iter().chain(ends("generation_config.json")?).chain(ends("config.json")?) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let special = Special { bos: named("bos_token"), eos, pad: named("pad_token"), unk: named("unk_token") };
        let templates =
            Templates::in_directory(dir, &config["chat_template"]).with_context(|| format!("in {}", dir.display()))?;
        Self::new(inner, templates, special).with_context(|| format!("in {}", dir.display()))
    }

    /// Builds the tokenizer from its JSON description.
    fn from_json(description: &Value, template: Option<String>, special: Special) -> Result<Self> {
        let templates = Templates::single(template);
        Self::new(validate::tokenizer::parse(&serde_json::to_vec(description)?)?, templates, special)
    }

    fn new(mut inner: tokenizers::Tokenizer, templates: Templates, special: Special) -> Result<Self> {
        // Some files enable these; here the ids of a text are always all of its tokens and no others.
        inner.with_truncation(None).map_err(|error| anyhow!(error))?;
        inner.with_padding(None);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let template = templates.main().cloned().map(Template::new).transpose()?.map(Arc::new);
        let opened = inner.encode_fast("", true).map_err(|error| anyhow!(error))?;
        let opening = opened.get_ids().first().copied().filter(|id| Some(*id) == special.bos);
        let (inner, templates) = (Arc::new(inner), Arc::new(templates));
        let (plain, properties, variables) = (Arc::default(), Arc::default(), Arc::default());
        let (named_end, turn_end) = (!special.eos.is_empty(), None);
        let tokenizer = Self {
            inner,
            plain,
            properties,
            template,
            variables,
            templates,
            special,
            turn_end,
            named_end,
            opening,
            vocab_size,
        };
        Ok(tokenizer.with_turn_end())
    }

    /// Adds the token with which the chat template ends an answer to those that end a completion.
    fn with_turn_end(mut self) -> Self {
        self.turn_end = self.detect_turn_end();
        if let Some(end) = self.turn_end.filter(|end| !self.special.eos.contains(end)) {
            self.special.eos.push(end);
            // The end token is one more control token.
            self.properties = Arc::default();
        }
        self
    }

    /// Returns the token ids of `text`. Special tokens in it are recognised, none are added.
    ///
    /// # Errors
    /// If the tokenizer rejects the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| anyhow!("cannot tokenise: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the token ids of a text that follows no other text and was not written by a chat template:
    /// [`Self::encode`] after the token that begins a document, if the model was trained with one.
    ///
    /// # Errors
    /// The same as for [`Self::encode`].
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        let opening = self.opening.filter(|opening| ids.first() != Some(opening));
        Ok(opening.into_iter().chain(ids).collect())
    }

    /// Returns the text of `ids` without special tokens.
    ///
    /// # Errors
    /// If the tokenizer rejects the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| anyhow!("cannot decode: {error}"))
    }

    /// Renders a conversation by the model's own chat template; with `answer`, up to the beginning of the model's
    /// answer.
    ///
    /// # Errors
    /// If the model has no template, or rendering fails.
    pub fn render_chat(&self, messages: &[Message], answer: bool) -> Result<String> {
        self.render(messages, answer, true)
    }

    /// Renders a question by the model's own chat template, up to the beginning of the answer, so that a reasoning
    /// model answers without reasoning. The template's switch (`enable_thinking`) is set to false, and a reasoning
    /// block that the template opens is closed without content.
    ///
    /// # Errors
    /// The same as for [`Self::render_chat`].
    pub fn render_question(&self, messages: &[Message]) -> Result<String> {
        let mut text = self.render(messages, true, false)?;
        if text.trim_end().ends_with(OPENS_REASONING) {
            text.truncate(text.trim_end().len());
            text += "\n\n</think>\n\n";
        }
        Ok(text)
    }

    /// Returns whether the model reasons before its answers, according to its chat template.
    pub fn thinks(&self) -> bool {
        self.template.as_ref().is_some_and(|template| template.thinks())
    }

    fn render(&self, messages: &[Message], answer: bool, thinking: bool) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| self.templates.missing())?;
        let special = self.named_special();
        template.render(messages, answer, thinking, &special, &self.variables)
    }

    /// Returns the texts of the model's special tokens, by their names in `tokenizer_config.json`.
    fn named_special(&self) -> Vec<(&'static str, String)> {
        let Special { bos, eos, pad, unk } = &self.special;
        let named =
            [("bos_token", *bos), ("eos_token", eos.first().copied()), ("pad_token", *pad), ("unk_token", *unk)];
        named.into_iter().filter_map(|(name, id)| Some((name, self.inner.id_to_token(id?)?))).collect()
    }

    /// Sets the variables of the chat template besides the conversation.
    #[must_use]
    pub fn with_variables(mut self, variables: Variables) -> Self {
        self.variables = Arc::new(variables);
        self
    }

    /// Returns whether the model has a chat template. If it has several and none for plain conversations, rendering
    /// fails.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.0.is_empty()
    }

    /// Returns the source of the model's chat template, in Jinja; `None` if the model has none.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().map(|template| template.source.as_str())
    }

    /// Returns the highest token id plus one, including special tokens. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the tokens that end a completion; the first is the tokenizer's own.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// Returns the texts of the tokens with more than one character that structure a conversation or a document
    /// (special tokens, and those that begin or end a text), longest first. [`Self::encode`] turns such a text into its
    /// token.
    pub fn control_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        let special = added.values().filter(|token| token.special).map(|token| token.content.clone());
        let ends = self.special.eos.iter().chain(&self.special.bos).filter_map(|id| self.inner.id_to_token(*id));
        let mut tokens: Vec<String> = special.chain(ends).collect();
        tokens.retain(|token| token.chars().count() > 1 && !token.trim().is_empty());
        tokens.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        tokens.dedup();
        tokens
    }

    /// Returns the ids of the special tokens, in ascending order.
    pub fn special_ids(&self) -> Vec<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let mut ids: Vec<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Returns the token that begins a document.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// Returns the padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad
    }

    /// Returns the token for text that the vocabulary does not cover.
    pub fn unk_id(&self) -> Option<u32> {
        self.special.unk
    }

    /// Sets the padding token, which does not affect the ids of texts.
    pub fn padded_with(mut self, pad: Option<u32>) -> Self {
        self.special.pad = pad;
        self
    }

    /// Replaces the chat template, which has the format of `chat_template.jinja`.
    ///
    /// # Errors
    /// If the template is not valid Jinja.
    pub fn with_chat_template(mut self, source: String) -> Result<Self> {
        self.template = Some(Arc::new(Template::new(source.clone())?));
        let mut templates = (*self.templates).clone();
        templates.0.insert(DEFAULT.to_owned(), source);
        self.templates = Arc::new(templates);
        Ok(self.with_turn_end())
    }

    /// Returns the text of the token with this id; `None` if the tokenizer has no such id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns the id of the token with this text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` in the format of `transformers`.
    ///
    /// # Errors
    /// If a file cannot be written; the error names it.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join("tokenizer.json");
        self.inner.save(&path, false).map_err(|error| anyhow!("cannot write {}: {error}", path.display()))?;
        let special = self.named_special().into_iter();
        let named: serde_json::Map<String, Value> = special.map(|(name, token)| (name.into(), json!(token))).collect();
        let mut config = named.clone();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(templates) = self.templates.to_json() {
            config.insert("chat_template".into(), templates);
        }
        for (name, value) in [("tokenizer_config.json", config), ("special_tokens_map.json", named)] {
            let path = dir.join(name);
            std::fs::write(&path, serde_json::to_vec_pretty(&value)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Reads token ids, which configurations write as one number or as a list.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

/// Reads a JSON file; null if it does not exist.
fn optional_json(path: &Path) -> Result<Value> {
    let Some(text) = optional_text(path)? else { return Ok(Value::Null) };
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

fn optional_text(path: &Path) -> Result<Option<String>> {
    match read_bounded::text(path, read_bounded::DESCRIPTION) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a directory with the files of `save`, then replaces some by `files`.
    fn directory(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::bytes().save(dir.path()).unwrap();
        for (name, value) in files {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        dir
    }

    fn open(dir: &tempfile::TempDir) -> Result<Tokenizer> {
        Tokenizer::from_files(&ModelFiles::Directory(dir.path().to_owned()))
    }

    fn hello() -> [Message; 1] {
        [Message { role: "user".into(), content: "Hé".into() }]
    }

    #[test]
    fn a_reasoning_judge_is_prompted_to_answer_without_reasoning() {
        // The ends of the templates of Qwen3, and of models that always reason.
        let switch = r"{{ messages[0].content }}|{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}";
        let opens = r"{{ messages[0].content }}|{{ '<think>\n' }}";
        let plain = "{{ messages[0].content }}|";
        for (template, chat, question, thinks) in [
            (switch, "Hé|", "Hé|<think>\n\n</think>\n\n", true),
            (opens, "Hé|<think>\n", "Hé|<think>\n\n</think>\n\n", true),
            (plain, "Hé|", "Hé|", false),
        ] {
            let tokenizer = Tokenizer::bytes().with_chat_template(template.to_owned()).unwrap();
            assert_eq!(tokenizer.render_chat(&hello(), true).unwrap(), chat);
            assert_eq!((tokenizer.render_question(&hello()).unwrap().as_str(), tokenizer.thinks()), (question, thinks));
        }
    }

    #[test]
    fn a_saved_tokenizer_round_trips() {
        let (before, after) = (Tokenizer::bytes(), open(&directory(&[])).unwrap());
        let text = before.render_chat(&hello(), true).unwrap();
        assert_eq!(after.render_chat(&hello(), true).unwrap(), text);
        assert_eq!(after.encode(&text).unwrap(), before.encode(&text).unwrap());
        assert_eq!((after.special.clone(), after.vocab_size()), (before.special, 259));
        assert_eq!(after.id_of("<|im_end|>"), Some(258));
        assert_eq!(after.pad_id(), Some(256));
    }

    #[test]
    fn end_tokens_are_those_of_the_tokenizer_and_the_model() {
        for (files, expected) in [
            (vec![("config.json", json!({ "eos_token_id": 7 }))], vec![258, 7]),
            (vec![("config.json", json!({ "eos_token_id": [258] }))], vec![258]),
            (
                vec![
                    ("config.json", json!({ "eos_token_id": 7 })),
                    ("generation_config.json", json!({ "eos_token_id": [256, 258] })),
                ],
                vec![258, 256, 7],
            ),
            (vec![("tokenizer_config.json", json!({ "eos_token": { "content": "<|pad|>" } }))], vec![256]),
            // The template's own end of a turn is added.
            (
                vec![(
                    "tokenizer_config.json",
                    json!({ "eos_token": "<|pad|>", "chat_template": "{{ messages[-1].content }}<|im_end|>\n" }),
                )],
                vec![256, 258],
            ),
            (vec![("tokenizer_config.json", json!({})), ("config.json", json!({ "eos_token_id": null }))], vec![258]),
            (vec![("tokenizer_config.json", json!({})), ("special_tokens_map.json", json!({}))], vec![]),
        ] {
            assert_eq!(open(&directory(&files)).unwrap().eos_ids(), expected, "{files:?}");
        }
    }

    #[test]
    fn an_answer_ends_with_the_token_of_the_chat_template() {
        let tokenizer = |template: &str| {
            let config = json!({ "eos_token": "<|pad|>", "bos_token": "<|im_start|>", "chat_template": template });
            open(&directory(&[("tokenizer_config.json", config)])).unwrap()
        };
        for (template, end) in [
            ("{{ messages[-1].content }}<|im_end|>\n", 258),
            ("{{ messages[-1].content }} <|im_end|>", 258),
            ("{{ messages[-1].content }}{{ eos_token }}", 256),
            // No token, a plain text, and a token that begins the next turn.
            ("{{ messages[-1].content }}", 256),
            ("{{ messages[-1].content }}\n\nHuman: <|im_end|>", 256),
            ("{{ messages[-1].content }}<|im_start|>", 256),
            ("{{ raise_exception('no') }}", 256),
        ] {
            let tokenizer = tokenizer(template);
            assert_eq!((tokenizer.end(true), tokenizer.end(false)), (Some(end), Some(256)), "{template}");
        }
        let without = Tokenizer::from_json(
            &serde_json::from_str(&Tokenizer::bytes().inner.to_string(false).unwrap()).unwrap(),
            None,
            Special::default(),
        );
        assert_eq!(without.unwrap().end(true), None);
    }

    #[test]
    fn an_end_token_that_the_vocabulary_lacks_is_rejected() {
        let error = open(&directory(&[("tokenizer_config.json", json!({ "eos_token": "<|eot|>" }))])).unwrap_err();
        assert!(error.to_string().contains("names the end token \"<|eot|>\""), "{error}");
    }

    #[test]
    fn all_chat_templates_are_kept() {
        let list = json!([{ "name": "tool_use", "template": "t" }, { "name": "default", "template": "d" }]);
        let dir = directory(&[("tokenizer_config.json", json!({ "chat_template": list }))]);
        let saved = |tokenizer: &Tokenizer| -> Value {
            let dir = tempfile::tempdir().unwrap();
            tokenizer.save(dir.path()).unwrap();
            let text = std::fs::read_to_string(dir.path().join("tokenizer_config.json")).unwrap();
            serde_json::from_str::<Value>(&text).unwrap()["chat_template"].clone()
        };
        let entry = |name: &str, template: &str| json!({ "name": name, "template": template });
        assert_eq!(saved(&open(&dir).unwrap()), json!([entry("default", "d"), entry("tool_use", "t")]));
        // Files take precedence over all of these, as in `transformers`.
        let folder = dir.path().join("additional_chat_templates");
        std::fs::create_dir(&folder).unwrap();
        for (name, text) in [("rag.jinja", "r"), ("notes.txt", "n")] {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let error = open(&dir).unwrap().render_chat(&hello(), false).unwrap_err().to_string();
        assert!(error.contains("chat templates named rag, and none named default"), "{error}");
        assert!(open(&dir).unwrap().has_chat_template());
        std::fs::write(folder.join("default.jinja"), "D").unwrap();
        assert_eq!(open(&dir).unwrap().render_chat(&hello(), false).unwrap(), "D");
        let changed = open(&dir).unwrap().with_chat_template("C".into()).unwrap();
        assert_eq!(saved(&changed), json!([entry("default", "C"), entry("rag", "r")]));
    }

    #[test]
    fn an_end_token_of_another_type_is_rejected() {
        for name in ["config.json", "generation_config.json"] {
            let error = open(&directory(&[(name, json!({ "eos_token_id": ["7"] }))])).err().unwrap();
            let error = format!("{error:#}");
            assert!(
                error.contains(name) && error.contains("eos_token_id is [\"7\"], and must be a token id"),
                "{error}"
            );
        }
    }

    #[test]
    fn templates_are_found_in_all_locations() {
        let named =
            json!({ "chat_template": [{ "name": "tool", "template": "t" }, { "name": "default", "template": "d" }] });
        let dir = directory(&[("tokenizer_config.json", named)]);
        assert_eq!(open(&dir).unwrap().render_chat(&hello(), false).unwrap(), "d");
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
        assert_eq!(open(&dir).unwrap().render_chat(&hello(), false).unwrap(), "Hé");
        let without = open(&directory(&[("tokenizer_config.json", json!({}))])).unwrap();
        assert!(!without.has_chat_template());
        assert!(without.render_chat(&hello(), true).unwrap_err().to_string().contains("no chat template"));
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_ignored() {
        let dir = directory(&[]);
        let path = dir.path().join("tokenizer.json");
        let mut value: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        value["truncation"] = json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
        value["padding"] = json!({ "strategy": { "Fixed": 9 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 256, "pad_type_id": 0, "pad_token": "<|pad|>" });
        std::fs::write(&path, value.to_string()).unwrap();
        assert_eq!(open(&dir).unwrap().encode("abc").unwrap(), [97, 98, 99]);
    }

    #[test]
    fn a_damaged_directory_is_rejected_by_file() {
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let dir = directory(&[]);
            std::fs::write(dir.path().join(name), "{").unwrap();
            let error = format!("{:#}", open(&dir).unwrap_err());
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}

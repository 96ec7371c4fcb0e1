//! Prompts and preference pairs: read on demand, tokenised, shuffled by seed, split by content. `docs/data.md`
//! documents the supported formats.

pub mod corrupt;
pub mod dialogue;
mod faults;
pub mod format;
pub mod pairs;
pub mod preferences;
pub mod rows;
pub mod source;
pub mod split;

use std::io::ErrorKind;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::Value;

use crate::lm::tokens::Tokenizer;
use crate::types::Prompt;
use crate::util::seed::{self, mix};

pub use dialogue::Dialogue;
use faults::Faults;
pub use faults::{Notes, OnBad};
pub use format::PromptFormat;
pub use preferences::{PairOptions, PreferencePair, Preferences};
pub use rows::Rows;
pub use split::{Part, Split};

/// Describes a value of a row in words: "a text", "the number 3", "an object with the keys …".
fn described(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("{value}"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) if text.trim().is_empty() => "an empty text".to_owned(),
        Value::String(_) => "a text".to_owned(),
        Value::Array(list) if list.is_empty() => "an empty list".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(fields) => match fields.get(rows::BINARY) {
            Some(bytes) => format!("{bytes} bytes of binary data"),
            None if fields.is_empty() => "an empty object".to_owned(),
            None => {
                let keys: Vec<String> = fields.keys().take(10).map(|key| format!("{key:?}")).collect();
                format!("an object with the keys {}", keys.join(", "))
            }
        },
    }
}

/// Treatment of a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLong {
    /// Refuse the data set.
    Error,
    /// Skip the row, and report the number of skipped rows.
    Skip,
}

/// Settings for reading a data set.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// Conversion of a row to a prompt.
    pub format: PromptFormat,
    /// Maximum number of tokens of a prompt.
    pub limit: usize,
    /// Change of the configuration that raises the limit, for error messages.
    pub remedy: String,
    /// Treatment of a longer prompt.
    pub on_long: OnLong,
    /// Treatment of a row that cannot be used.
    pub on_bad: OnBad,
    /// Part of the data set to read.
    pub split: Split,
    /// True if every row must have a reference answer.
    pub needs_references: bool,
    /// Limits of the model that reads the prompts.
    pub model: ModelBounds,
}

/// Vocabulary and context limits of a model.
#[derive(Debug, Clone, Copy)]
pub struct ModelBounds {
    /// Number of rows of the embedding; token ids must be below it.
    pub vocabulary: usize,
    /// Maximum number of tokens of a prompt and an answer together.
    pub context: usize,
}

impl ModelBounds {
    /// Checks that each of `ids` has a row in the embedding.
    ///
    /// # Errors
    /// If a token has no row; the error names the first one.
    pub fn check(&self, ids: &[u32], tokenizer: &Tokenizer) -> Result<()> {
        let Some(id) = ids.iter().find(|id| **id as usize >= self.vocabulary) else { return Ok(()) };
        bail!(
            "the token {:?} (id {id}) has no row in the model's embedding, which has {}; add rows to the embedding (transformers: resize_token_embeddings), or remove the token from the text",
            tokenizer.token(*id).unwrap_or_default(),
            self.vocabulary
        )
    }
}

/// The prompts of a run. Only row indices are kept in memory: a prompt is read and tokenised when it is requested.
pub struct Dataset {
    rows: Rows,
    usable: Vec<u32>,
    options: ReadOptions,
    tokenizer: Tokenizer,
    blank: Arc<[u32]>,
    seed: u64,
    shuffle: bool,
    longest: usize,
    identity: u64,
    /// Number of rows skipped because they are too long.
    pub skipped: usize,
    /// Number of rows skipped because they cannot be used.
    pub bad: usize,
    /// Report of the first of these rows with their locations and reasons.
    left_out: Option<String>,
    /// Remarks on the rows that are used.
    pub notes: Notes,
}

/// Calls `map` concurrently for the numbers below `count`, and `each` with each result in order. Works in chunks, so that
/// a file of many short lines takes little more memory than its line offsets.
fn for_each_in_order<T: Send>(count: usize, map: impl Fn(usize) -> T + Sync, mut each: impl FnMut(usize, T)) {
    const PART: usize = 1 << 16;
    for start in (0..count).step_by(PART) {
        let part = start..(start + PART).min(count);
        let found: Vec<T> = part.clone().into_par_iter().map(&map).collect();
        part.zip(found).for_each(|(i, found)| each(i, found));
    }
}

/// Result of the first pass over a row.
enum Found {
    /// Number of tokens, hash of the text, and remarks.
    Usable(usize, u64, Notes),
    /// The row is longer than the limit, with the error if that is one.
    TooLong(Option<anyhow::Error>),
    NotSelected,
    Blank,
}

impl Dataset {
    /// Reads every row of `rows` once, so that all faults are reported before compute is spent.
    ///
    /// # Errors
    /// If rows are not JSON, lack a field, are too long or have tokens outside the model's vocabulary. The error names
    /// the file and up to ten faulty rows.
    pub fn read(rows: Rows, options: ReadOptions, tokenizer: &Tokenizer) -> Result<Self> {
        let name = rows.name();
        ensure!(u32::try_from(rows.len()).is_ok(), "the data set {name} has more than 4 billion rows");
        ensure!(!rows.is_empty(), "the data set {name} is empty");
        let blank = options.format.blank(tokenizer)?;
        options.model.check(&blank, tokenizer).context("the chat template or data.instruction cannot be used")?;
        if options.needs_references {
            let end: Vec<u32> = tokenizer.end(options.format.chat).into_iter().collect();
            options.model.check(&end, tokenizer).context("the end token of reference answers cannot be used")?;
        }
        let mut data = Self {
            rows,
            usable: Vec::new(),
            options,
            tokenizer: tokenizer.clone(),
            blank,
            seed: 0,
            shuffle: false,
            longest: 0,
            identity: 0,
            skipped: 0,
            bad: 0,
            left_out: None,
            notes: Notes::default(),
        };
        let (mut faults, mut long, mut notes) = (Faults::default(), Faults::default(), Notes::default());
        let (mut usable, mut identity, mut longest, mut skipped, mut exhausted) = (Vec::new(), 0, 0, 0, None);
        for_each_in_order(
            data.rows.len(),
            |i| data.check_row(i),
            |i, found| match found {
                Ok(Found::Usable(tokens, text, remarks)) => {
                    usable.push(i as u32);
                    identity = mix(identity ^ mix(i as u64) ^ text);
                    longest = longest.max(tokens);
                    notes.merge(remarks);
                }
                Ok(Found::TooLong(None)) => skipped += 1,
                Ok(Found::TooLong(Some(error))) => long.add(&data.rows.place(i), &error),
                Ok(Found::NotSelected | Found::Blank) => {}
                Err(error) if is_exhaustion(&error) => exhausted = Some(error),
                Err(error) => faults.add(&data.rows.place(i), &error),
            },
        );
        if let Some(error) = exhausted {
            return Err(error.context(format!("cannot read the data set {name}")));
        }
        (data.usable, data.identity, data.longest, data.skipped) = (usable, identity, longest, skipped);
        (data.bad, data.notes) = (faults.count(), notes);
        // One report lists both kinds of fault, unless the faulty rows are skipped.
        let (unread, too_long) = (data.bad > 0 && data.options.on_bad == OnBad::Error, long.count() > 0);
        if unread && too_long {
            faults.append(long);
        } else {
            long.report_long()?;
        }
        let all_bad = data.usable.is_empty() && skipped == 0;
        data.left_out = faults.report(data.options.on_bad, all_bad)?;
        ensure!(
            !data.usable.is_empty(),
            "the data set {name} has no usable prompt ({} left out as too long)",
            data.skipped
        );
        Ok(data)
    }

    /// Logs the rows that are skipped because they cannot be used, and each remark on the used rows once.
    pub fn log_notes(&self) {
        if let Some(report) = &self.left_out {
            tracing::warn!("{report}");
        }
        self.notes.log(&self.rows.name());
    }

    fn check_row(&self, i: usize) -> Result<Found> {
        let Some(row) = self.rows.get(i)? else { return Ok(Found::Blank) };
        let (options, mut notes) = (&self.options, Notes::default());
        let (dialogue, reference) = options.format.read(&row, options.needs_references, &mut notes)?;
        if !options.split.contains(&dialogue.text()) {
            return Ok(Found::NotSelected);
        }
        let limit = options.limit;
        let bytes = dialogue.turns.iter().map(|turn| turn.content.len()).sum();
        let too_long = |words: String| {
            let error = || anyhow!("{words}, or set data.on_long = \"skip\"");
            Ok(Found::TooLong((options.on_long == OnLong::Error).then(error)))
        };
        if certainly_longer(bytes, limit) {
            return too_long(format!(
                "the prompt has {bytes} bytes, and the limit of {limit} tokens is far below that; shorten it"
            ));
        }
        let ids = options.format.encode_dialogue(&dialogue, &self.tokenizer)?;
        ensure!(!ids.is_empty(), "the prompt has no tokens");
        options.model.check(&ids, &self.tokenizer)?;
        let tokens = ids.len();
        if tokens > limit {
            return too_long(format!("the prompt has {tokens} tokens, the limit is {limit}; {}", options.remedy));
        }
        if let Some(text) = reference.filter(|_| options.needs_references) {
            self.check_reference(&text, tokens, &mut notes)?;
        }
        Ok(Found::Usable(tokens, seed::text(&dialogue.text()), notes))
    }

    /// Checks a reference answer used for training, after a prompt of `prompt` tokens.
    fn check_reference(&self, text: &str, prompt: usize, notes: &mut Notes) -> Result<()> {
        let room = self.options.model.context.saturating_sub(prompt);
        let long = certainly_longer(text.len(), room) || {
            let ids = self.tokenizer.encode_answer(text)?;
            ensure!(!ids.is_empty(), "the reference answer has no tokens");
            self.options.model.check(&ids, &self.tokenizer).context("in the reference answer")?;
            ids.len() + self.tokenizer.eos_ids().len().min(1) > room
        };
        if long {
            notes.add("the reference answer exceeds the model's context: its end is cut off and not trained on");
        }
        Ok(())
    }

    /// Sets the order to one that is shuffled by `seed`, differently in each epoch.
    pub fn shuffled(self, seed: u64) -> Self {
        Self { seed, shuffle: true, ..self }
    }

    /// Returns whether the empty prompt has tokens, which likelihood labels need.
    pub fn has_blank(&self) -> bool {
        !self.blank.is_empty()
    }

    /// Returns the number of prompts in one epoch.
    pub fn len(&self) -> usize {
        self.usable.len()
    }

    /// Always returns false: an empty data set is refused.
    pub fn is_empty(&self) -> bool {
        self.usable.is_empty()
    }

    /// Returns a hash of these prompts in this order.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Returns the number of tokens of the longest prompt.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Returns the order of rows in `epoch`, a function of the seed and the epoch alone.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        order(self.usable.len(), self.shuffle.then_some(self.seed), epoch)
    }

    /// Returns prompt number `seq` of the run, given the order of its epoch.
    ///
    /// # Errors
    /// If the row was changed since the data set was opened.
    pub fn prompt(&self, seq: u64, order: &[usize]) -> Result<Prompt> {
        let n = self.usable.len() as u64;
        let i = self.usable[order[(seq % n) as usize]] as usize;
        // The row was valid when the file was opened.
        let read = || {
            let row = self.rows.get(i)?.context("the row is gone")?;
            self.options.format.read(&row, self.options.needs_references, &mut Notes::default())
        };
        let (dialogue, reference) =
            read().with_context(|| format!("{} was changed while it was in use", self.rows.place(i)))?;
        let fill = || -> Result<Prompt> {
            Ok(Prompt {
                seq,
                epoch: seq / n,
                row: i,
                text: dialogue.text().into(),
                ids: self.options.format.encode_dialogue(&dialogue, &self.tokenizer)?.into(),
                blank: Arc::clone(&self.blank),
                reference: reference.as_deref().map(Into::into),
            })
        };
        fill().with_context(|| format!("{} cannot be turned into a prompt", self.rows.place(i)))
    }
}

/// Returns whether the error is a lack of threads or memory, in which case the row is not at fault.
fn is_exhaustion(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::OutOfMemory))
}

/// Returns whether a text of `bytes` certainly has more than `limit` tokens, so that it need not be tokenised, which
/// takes memory of about a hundred times its size. No tokenizer averages this many bytes per token over a text.
pub(crate) fn certainly_longer(bytes: usize, limit: usize) -> bool {
    const MAX_BYTES_PER_TOKEN: usize = 32;
    const SHORT: usize = 64 << 10;
    bytes > SHORT && bytes / MAX_BYTES_PER_TOKEN > limit
}

/// Returns the numbers below `n`, shuffled by `seed` and `epoch`, or in order without a seed.
fn order(n: usize, seed: Option<u64>, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if let Some(seed) = seed {
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(seed ^ mix(epoch))));
    }
    order
}

//! The data: prompts and preferences, read on demand, tokenised, shuffled by seed, split by content.

pub mod corrupt;
pub mod dialogue;
pub mod pairs;
pub mod preferences;
pub mod rows;
pub mod source;
pub mod split;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::context;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::Value;

use crate::rollout::Prompt;
use crate::seed::{self, mix};
use crate::template;
use crate::tokens::Tokenizer;
use crate::tokens::chat::Message;

pub use dialogue::Dialogue;
pub use preferences::{PreferencePair, Preferences};
pub use rows::Rows;
pub use split::{Part, Split};

/// How a row of the data set becomes a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptFormat {
    /// Field of the row that holds the text or the dialogue.
    pub field: String,
    /// Field of the row that holds a good answer, if there is one.
    pub reference_field: String,
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
        self.encode_dialogue(&Dialogue::single(text), tokenizer)
    }

    /// Token ids that the policy is fed for `dialogue`.
    ///
    /// # Errors
    /// As [`Self::encode`], and an instruction that would have to stand around a dialogue of several turns.
    pub fn encode_dialogue(&self, dialogue: &Dialogue, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(Message { role: "system".into(), content: system.clone() });
        }
        if let [one] = dialogue.turns.as_slice()
            && one.role == "user"
        {
            let filled = self.fill(&one.content)?;
            if !self.chat {
                return tokenizer.encode_document(&filled);
            }
            messages.push(Message { role: "user".into(), content: filled });
        } else {
            ensure!(
                self.instruction.trim() == "{{ prompt }}",
                "the prompt is a dialogue of {} turns, which data.instruction cannot stand around; leave it at \"{{{{ prompt }}}}\"",
                dialogue.turns.len()
            );
            if !self.chat {
                return tokenizer.encode_document(&format!("{}\n\nAssistant:", dialogue.text()));
            }
            messages.extend(dialogue.turns.iter().cloned());
        }
        tokenizer.encode(&tokenizer.render_chat(&messages, true)?)
    }

    fn fill(&self, text: &str) -> Result<String> {
        template::fill_text(&self.instruction, context! { prompt => text })
            .context("data.instruction is not a template that takes {{ prompt }}")
    }

    fn dialogue(&self, row: &Value) -> Result<Dialogue> {
        let value = field(row, &self.field).with_context(|| "set data.prompt_field")?;
        Dialogue::from_json(value).map_err(|error| anyhow!("field {:?} {error}", self.field))
    }
}

/// A field of a row.
fn field<'a>(row: &'a Value, name: &str) -> Result<&'a Value> {
    row.get(name).ok_or_else(|| {
        let fields: Vec<&str> = row.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        anyhow!("no field {name:?}; the row has {}", fields.join(", "))
    })
}

/// What to do with a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLong {
    /// Refuse the data set.
    Error,
    /// Leave the line out, and say how many were.
    Skip,
}

/// How a data set is read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// From a row to a prompt.
    pub format: PromptFormat,
    /// Most tokens that a prompt may have.
    pub limit: usize,
    /// The change of the configuration that raises the limit.
    pub remedy: String,
    /// What happens to a longer one.
    pub on_long: OnLong,
    /// Which rows.
    pub split: Split,
    /// Whether every row must have a reference.
    pub needs_references: bool,
}

/// The prompts of a run. Only where they stand is kept in memory: a prompt is read and tokenised when its turn comes.
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
    /// Rows left out for their length.
    pub skipped: usize,
}

/// Runs `look` for the numbers below `count` side by side, and `take` for each in order: in parts, so that a file of many
/// short lines takes little more memory than the places of its lines.
fn in_parts<T: Send>(count: usize, look: impl Fn(usize) -> T + Sync, mut take: impl FnMut(usize, T)) {
    const PART: usize = 1 << 16;
    for start in (0..count).step_by(PART) {
        let part = start..(start + PART).min(count);
        let found: Vec<T> = part.clone().into_par_iter().map(&look).collect();
        part.zip(found).for_each(|(i, found)| take(i, found));
    }
}

/// What the first pass finds of a row.
enum Found {
    /// Its tokens, and a hash of what it says.
    Usable(usize, u64),
    TooLong,
    NotMeant,
    Blank,
}

impl Dataset {
    /// Opens `path` and goes through every row once, so that whatever is wrong is told before compute is spent.
    ///
    /// # Errors
    /// Names the file, and all faulty rows up to ten: not JSON, no such field, too long.
    pub fn read(path: &Path, options: ReadOptions, tokenizer: &Tokenizer) -> Result<Self> {
        let rows = Rows::open(path)?;
        ensure!(u32::try_from(rows.len()).is_ok(), "the data set {} has more than 4 billion rows", path.display());
        let blank = options.format.encode("", tokenizer)?.into();
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
        };
        let mut faults = Faults::default();
        let (mut usable, mut identity, mut longest, mut skipped, mut exhausted) = (Vec::new(), 0, 0, 0, None);
        in_parts(
            data.rows.len(),
            |i| data.look(i),
            |i, found| match found {
                Ok(Found::Usable(tokens, text)) => {
                    usable.push(i as u32);
                    identity = mix(identity ^ mix(i as u64) ^ text);
                    longest = longest.max(tokens);
                }
                Ok(Found::TooLong) => skipped += 1,
                Ok(Found::NotMeant | Found::Blank) => {}
                Err(error) if is_exhaustion(&error) => exhausted = Some(error),
                Err(error) => faults.add(&data.rows.place(i), &error),
            },
        );
        if let Some(error) = exhausted {
            return Err(error.context(format!("cannot read the data set {}", path.display())));
        }
        (data.usable, data.identity, data.longest, data.skipped) = (usable, identity, longest, skipped);
        faults.report()?;
        ensure!(
            !data.usable.is_empty(),
            "the data set {} has no usable prompt ({} left out as too long)",
            path.display(),
            data.skipped
        );
        Ok(data)
    }

    fn look(&self, i: usize) -> Result<Found> {
        let Some(row) = self.rows.get(i)? else { return Ok(Found::Blank) };
        let dialogue = self.options.format.dialogue(&row)?;
        if !self.options.split.takes(&dialogue.text()) {
            return Ok(Found::NotMeant);
        }
        if self.options.needs_references && self.reference(&row).is_none() {
            let name = &self.options.format.reference_field;
            field(&row, name).with_context(|| "set data.reference_field")?;
            bail!("field {name:?} is no text");
        }
        let limit = self.options.limit;
        let bytes = dialogue.turns.iter().map(|turn| turn.content.len()).sum();
        if surely_longer(bytes, limit) {
            if self.options.on_long == OnLong::Skip {
                return Ok(Found::TooLong);
            }
            bail!(
                "the prompt has {bytes} bytes, and the limit of {limit} tokens is far below that; shorten it, or set data.on_long = \"skip\""
            );
        }
        let tokens = self.options.format.encode_dialogue(&dialogue, &self.tokenizer)?.len();
        ensure!(tokens > 0, "the prompt has no tokens");
        if tokens <= limit {
            return Ok(Found::Usable(tokens, seed::text(&dialogue.text())));
        }
        if self.options.on_long == OnLong::Skip {
            return Ok(Found::TooLong);
        }
        bail!(
            "the prompt has {tokens} tokens, the limit is {limit}; {}, or set data.on_long = \"skip\"",
            self.options.remedy
        )
    }

    fn reference(&self, row: &Value) -> Option<Arc<str>> {
        row.get(&self.options.format.reference_field).and_then(Value::as_str).map(Into::into)
    }

    /// The same data set, gone through in an order that `seed` shuffles anew each epoch.
    pub fn shuffled(self, seed: u64) -> Self {
        Self { seed, shuffle: true, ..self }
    }

    /// Number of prompts in one epoch.
    pub fn len(&self) -> usize {
        self.usable.len()
    }

    /// Always false: an empty data set is refused.
    pub fn is_empty(&self) -> bool {
        self.usable.is_empty()
    }

    /// A number that tells these prompts, in this order, from others.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Most tokens that any prompt has.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Order of rows in `epoch`: a function of the seed and the epoch alone.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        order(self.usable.len(), self.shuffle.then_some(self.seed), epoch)
    }

    /// Prompt number `seq` of the run, given the order of its epoch.
    ///
    /// # Errors
    /// A row that was changed since the data set was opened.
    pub fn prompt(&self, seq: u64, order: &[usize]) -> Result<Prompt> {
        let n = self.usable.len() as u64;
        let i = self.usable[order[(seq % n) as usize]] as usize;
        // The row was sound when the file was opened.
        let read = || {
            let row = self.rows.get(i)?.context("the row is gone")?;
            anyhow::Ok((self.options.format.dialogue(&row)?, row))
        };
        let (dialogue, row) =
            read().with_context(|| format!("{} was changed while it was in use", self.rows.place(i)))?;
        let fill = || -> Result<Prompt> {
            Ok(Prompt {
                seq,
                epoch: seq / n,
                row: i,
                text: dialogue.text().into(),
                ids: self.options.format.encode_dialogue(&dialogue, &self.tokenizer)?.into(),
                blank: Arc::clone(&self.blank),
                reference: self.reference(&row),
            })
        };
        fill().with_context(|| format!("no prompt can be made of {}", self.rows.place(i)))
    }
}

/// Returns whether the machine lacks threads or memory, in which case the row is not at fault.
fn is_exhaustion(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::OutOfMemory))
}

/// Whether a text of `bytes` has more than `limit` tokens without a doubt, so that it need not be tokenised, which takes a
/// hundred times its size. No tokenizer comes near this many bytes a token over a whole text.
pub(crate) fn surely_longer(bytes: usize, limit: usize) -> bool {
    const MOST_BYTES_PER_TOKEN: usize = 32;
    const SHORT: usize = 64 << 10;
    bytes > SHORT && bytes / MOST_BYTES_PER_TOKEN > limit
}

/// The numbers below `n`, in an order that `seed` shuffles anew each epoch, or as they are without a seed.
fn order(n: usize, seed: Option<u64>, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if let Some(seed) = seed {
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(seed ^ mix(epoch))));
    }
    order
}

/// What is wrong with a file, the first few rows of it in full.
#[derive(Default)]
struct Faults {
    lines: Vec<String>,
    more: usize,
}

impl Faults {
    const SHOWN: usize = 10;

    fn add(&mut self, place: &str, error: &anyhow::Error) {
        if self.lines.len() < Self::SHOWN {
            // The remedy stands outermost in the chain, and reads better last.
            let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            causes.reverse();
            self.lines.push(format!("{place}: {}", causes.join("; ")));
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

//! Preference pairs: two answers and which is better, read from files in common formats.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::faults::Notes;
use super::format::{field, is_blank, likely_prompt, note_unread, with_system_column};
use super::{Dialogue, Faults, OnBad, Rows, Split, for_each_in_order, order};

/// A prompt with two answers.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferencePair {
    /// Row number in the data, from zero.
    pub row: usize,
    /// The prompt.
    pub dialogue: Dialogue,
    /// First answer.
    pub first: String,
    /// Second answer.
    pub second: String,
    /// P(first is better), from 0 to 1; 1 or 0 for a human choice.
    pub preference: Option<f64>,
}

impl PreferencePair {
    /// Returns the reason why the pair has no training signal; `None` if it has one.
    fn no_signal_reason(&self, keep_equal: bool) -> Option<&'static str> {
        if [&self.first, &self.second].into_iter().any(|answer| answer.trim().is_empty()) {
            return Some("left out, since an answer is empty");
        }
        let equal = !keep_equal && self.first.trim() == self.second.trim();
        equal.then_some("left out, since both answers are the same")
    }
}

/// Result of the first pass over a row.
enum Found {
    /// A valid pair, with remarks.
    Pair(Notes),
    /// A pair without training signal, with the reason.
    Empty(&'static str),
    /// A blank line, or a row outside the selected part.
    NotSelected,
}

/// Settings for reading pairs.
#[derive(Debug, Clone)]
pub struct PairOptions {
    /// Part of the data set to read.
    pub split: Split,
    /// True if a row must state which answer is better.
    pub labeled: bool,
    /// Treatment of a row that cannot be read as a pair.
    pub on_bad: OnBad,
    /// True if pairs of equal answers are kept. They have no training signal, but an evaluation counts them.
    pub keep_equal: bool,
    /// Field of the prompt in rows without the field `prompt`.
    pub prompt_field: String,
}

impl Default for PairOptions {
    /// Returns settings that accept all pairs of different answers, labeled or not, and refuse rows that are not pairs.
    fn default() -> Self {
        Self {
            split: Split::default(),
            labeled: false,
            on_bad: OnBad::Error,
            keep_equal: false,
            prompt_field: "prompt".into(),
        }
    }
}

/// A file of preference pairs, read on demand. The format of a row is recognised by its fields:
/// - `chosen`, `rejected`: two complete dialogues that diverge at an assistant turn, usually the last (the format of
///   Anthropic's HH), or two texts whose common prefix is the prompt;
/// - `prompt`, `chosen`, `rejected`: the prompt and two answers, or two complete dialogues that include the prompt;
/// - `prompt`, `first`, `second`, and optionally `preference`, the probability that the first is better: the format
///   that `preceptor label` reads and writes.
pub struct Preferences {
    rows: Rows,
    usable: Vec<u32>,
    prompt_field: String,
}

impl Preferences {
    /// Opens `path`, as [`Rows::open`] does, and reads every row once.
    ///
    /// # Errors
    /// The same as for [`Self::of`].
    pub fn read(path: &Path, options: &PairOptions) -> Result<Self> {
        Self::of(Rows::open(path)?, options)
    }

    /// Checks every row of `rows` and indexes the pairs.
    ///
    /// # Errors
    /// If rows are faulty, unless `options` skips them, or if no row is a pair. The error names the file and up to ten
    /// faulty rows.
    pub fn of(rows: Rows, options: &PairOptions) -> Result<Self> {
        let name = rows.name();
        ensure!(u32::try_from(rows.len()).is_ok(), "{name} has more than 4 billion rows");
        let check_row = |i: usize| -> Result<Found> {
            let Some(row) = rows.get(i)? else { return Ok(Found::NotSelected) };
            let mut notes = Notes::default();
            // Label files contain null for pairs that the judge did not decide; these have no training signal.
            let undecided = options.labeled && row.get("preference").is_some_and(Value::is_null);
            let pair = pair(i, &row, &options.prompt_field, &mut notes)?;
            if undecided {
                return Ok(Found::NotSelected);
            }
            if let Some(why) = pair.no_signal_reason(options.keep_equal) {
                return Ok(Found::Empty(why));
            }
            let known = !options.labeled || pair.preference.is_some();
            ensure!(known, "no field \"preference\" names the better answer");
            Ok(if options.split.contains(&pair.dialogue.text()) { Found::Pair(notes) } else { Found::NotSelected })
        };
        let (mut usable, mut faults, mut notes) = (Vec::new(), Faults::default(), Notes::default());
        let mut left_out = Notes::default();
        for_each_in_order(rows.len(), check_row, |i, found| match found {
            Ok(Found::Pair(remarks)) => {
                usable.push(i as u32);
                notes.merge(remarks);
            }
            Ok(Found::Empty(why)) => left_out.add(why),
            Ok(Found::NotSelected) => {}
            Err(error) => faults.add(&rows.place(i), &error),
        });
        if let Some(report) = faults.report(options.on_bad, usable.is_empty())? {
            tracing::warn!("{report}");
        }
        let why: String = left_out.lines().map(|line| format!("; {line}")).collect();
        ensure!(!usable.is_empty(), "{name} has no pair to read{why}");
        left_out.log(&name);
        notes.log(&name);
        Ok(Self { rows, usable, prompt_field: options.prompt_field.clone() })
    }

    /// Returns the names of the files, for messages.
    pub fn name(&self) -> String {
        self.rows.name()
    }

    /// Returns the number of pairs.
    pub fn len(&self) -> usize {
        self.usable.len()
    }

    /// Always returns false: a file without pairs is refused.
    pub fn is_empty(&self) -> bool {
        self.usable.is_empty()
    }

    /// Returns pair number `i`.
    ///
    /// # Errors
    /// If the row was changed since the file was opened.
    pub fn get(&self, i: usize) -> Result<PreferencePair> {
        let row = self.usable[i] as usize;
        let read = || {
            let value = self.rows.get(row)?.context("the row is gone")?;
            pair(row, &value, &self.prompt_field, &mut Notes::default())
        };
        read().with_context(|| format!("{} was changed while it was in use", self.rows.place(row)))
    }

    /// Returns the location of pair number `i`, for messages.
    pub fn place(&self, i: usize) -> String {
        self.rows.place(self.usable[i] as usize)
    }

    /// Returns the order of pairs in `epoch`, a function of the seed and the epoch alone.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<usize> {
        order(self.usable.len(), Some(seed), epoch)
    }
}

/// One of a row's two answers, in its format.
enum Side {
    /// A text that is an answer.
    Answer(String),
    /// Turns that continue the prompt, the assistant's first.
    Continuation(Dialogue),
    /// A complete dialogue, including the prompt.
    Complete(Dialogue),
}

/// Reads a row in any of the formats.
///
/// # Errors
/// If the row is not a pair: it lacks the fields or a prompt, or its dialogues do not diverge at an answer.
fn pair(row: usize, value: &Value, prompt_field: &str, notes: &mut Notes) -> Result<PreferencePair> {
    let has = |name: &str| value.get(name).is_some_and(|value| !value.is_null());
    let (ours, theirs) = (has("first") || has("second"), has("chosen") || has("rejected"));
    ensure!(
        !(ours && theirs),
        "it has chosen and rejected as well as first and second, which are two pairs; remove one of the two"
    );
    ensure!(ours || theirs, "{}", no_pair(value));
    let names = if ours { ["first", "second"] } else { ["chosen", "rejected"] };
    let preference = if ours { preference(value)? } else { Some(1.0) };
    let [a, b] = names.map(|name| side(value, name, notes));
    let (a, b) = (a?, b?);
    let used = ["prompt", prompt_field].into_iter().find(|name| {
        !["chosen", "rejected", "first", "second"].contains(name)
            && value.get(name).is_some_and(|value| !is_blank(value))
    });
    let prompt = match used {
        None => None,
        Some(name) => {
            let read = Dialogue::read(&value[name], notes).map_err(|error| anyhow!("field {name:?} {error}"))?;
            Some((name, read))
        }
    };
    let (dialogue, first, second) = match (a, b) {
        (Side::Complete(a), Side::Complete(b)) => split_dialogues([a, b], prompt, names, notes)?,
        (Side::Complete(_), _) | (_, Side::Complete(_)) => bail!(
            "one of {} and {} is a complete dialogue and the other one is not; give both in the same form",
            names[0],
            names[1]
        ),
        (a, b) => match prompt {
            Some((name, prompt)) => {
                let (prompt, answer) = prompt.into_prompt().map_err(|error| anyhow!("field {name:?} {error}"))?;
                ensure!(
                    answer.is_none(),
                    "field {name:?} ends with the assistant's turn, and must end with the user's; remove the turn, or move it into the answers"
                );
                note_repetition(&prompt, &a, &b, notes);
                (prompt, answered(a, names[0], notes)?, answered(b, names[1], notes)?)
            }
            None => implicit(value, a, b, names)?,
        },
    };
    let dialogue = with_system_column(value, dialogue, used.unwrap_or_default())?;
    note_unread(value, &[used.unwrap_or("prompt")], notes);
    Ok(PreferencePair { row, dialogue, first, second, preference })
}

/// Describes a row that lacks a pair's fields.
fn no_pair(value: &Value) -> String {
    let has = |name: &str| value.get(name).is_some();
    let hint = if has("label") && has("completion") {
        "; it rates one answer (completion and label), which is not a pair"
    } else if has("completions") || has("responses") {
        "; it holds several answers with their scores; choose two of them"
    } else {
        ""
    };
    let fields: Vec<&str> = value.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    format!(
        "is not a preference pair: it has neither chosen and rejected nor first and second; the row has {}{hint}",
        fields.join(", ")
    )
}

/// Returns the probability that the first answer is better. In tables, numbers are texts.
fn preference(value: &Value) -> Result<Option<f64>> {
    let number = match value.get("preference") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(number) => number,
    };
    let p = number.as_f64().or_else(|| number.as_str()?.trim().parse().ok());
    let p = p.filter(|p| (0.0..=1.0).contains(p));
    Ok(Some(p.ok_or_else(|| anyhow!("field \"preference\" is {number}, not a probability from 0 to 1"))?))
}

fn side(row: &Value, name: &str, notes: &mut Notes) -> Result<Side> {
    let value = field(row, name)?;
    let read = Dialogue::read(value, notes).map_err(|error| anyhow!("field {name:?} {error}"))?;
    Ok(match (value, read.turns.as_slice()) {
        // A text in turns is a dialogue; any other text is an answer.
        (Value::String(text), [one]) if one.role == "user" && one.content == *text => Side::Answer(text.clone()),
        (_, [one, ..]) if one.role == "assistant" => Side::Continuation(read),
        _ => Side::Complete(read),
    })
}

/// Returns the answer that follows a prompt.
fn answered(side: Side, name: &str, notes: &mut Notes) -> Result<String> {
    match side {
        Side::Answer(text) => Ok(text),
        Side::Continuation(dialogue) | Side::Complete(dialogue) => {
            if dialogue.turns.len() > 1 {
                notes.add(SEVERAL);
            }
            dialogue.as_answer().map_err(|error| anyhow!("the turns of {name:?} {error}"))
        }
    }
}

const SEVERAL: &str = "an answer spans several turns, which are compared as one text";

/// Splits two complete dialogues, which must contain `prompt`, into prompt and answers.
fn split_dialogues(
    [a, b]: [Dialogue; 2],
    prompt: Option<(&str, Dialogue)>,
    names: [&str; 2],
    notes: &mut Notes,
) -> Result<(Dialogue, String, String)> {
    let longest = a.turns.len().max(b.turns.len());
    let (shared, first, second) =
        a.split_common(b).map_err(|error| anyhow!("{} and {} {error}", names[0], names[1]))?;
    if longest > shared.turns.len() + 1 {
        notes.add(SEVERAL);
    }
    let (shared, answer) =
        shared.into_prompt().map_err(|error| anyhow!("the common turns of {} and {} {error}", names[0], names[1]))?;
    ensure!(answer.is_none(), "{} and {} diverge after an assistant turn instead of at one", names[0], names[1]);
    let Some((name, prompt)) = prompt else { return Ok((shared, first, second)) };
    let (prompt, _) = prompt.into_prompt().map_err(|error| anyhow!("field {name:?} {error}"))?;
    let same = |a: &Dialogue, b: &Dialogue| {
        let (longer, shorter) = (a.turns.iter().rev(), b.turns.iter().rev());
        a.turns.len() >= b.turns.len()
            && longer.zip(shorter).all(|(a, b)| a.role == b.role && a.content.trim() == b.content.trim())
    };
    // A text prompt may equal any of the user's turns, since data sets differ in this.
    let one_turn = |turn: &str| {
        let users = shared.turns.iter().filter(|turn| turn.role == "user");
        users.into_iter().any(|own| own.content.trim() == turn.trim())
    };
    if same(&shared, &prompt) {
        return Ok((shared, first, second));
    }
    if same(&prompt, &shared) {
        return Ok((prompt, first, second));
    }
    match prompt.turns.as_slice() {
        [one] if one_turn(&one.content) => Ok((shared, first, second)),
        _ => bail!(
            "field {name:?} is another prompt than the one that the dialogues in {} and {} hold; correct it, or remove it",
            names[0],
            names[1]
        ),
    }
}

/// Splits a row without a prompt whose answers are texts: the prompt is their common prefix, as in TRL.
fn implicit(row: &Value, a: Side, b: Side, names: [&str; 2]) -> Result<(Dialogue, String, String)> {
    if let Some(column) = likely_prompt(row) {
        bail!("no field \"prompt\"; set data.prompt_field = {column:?}, or rename that field");
    }
    let (Side::Answer(a), Side::Answer(b)) = (a, b) else {
        bail!("{} and {} have no prompt: they begin with the assistant's turn", names[0], names[1]);
    };
    let parted = a.char_indices().zip(b.chars()).find(|((_, c), other)| c != other);
    let common = parted.map_or(a.len().min(b.len()), |((at, _), _)| at);
    // A space before the answers belongs to them.
    let common = if a[..common].ends_with(' ') { common - 1 } else { common };
    ensure!(
        !a[..common].trim().is_empty(),
        "{} and {} have nothing in common: there is no prompt; add a field \"prompt\"",
        names[0],
        names[1]
    );
    Ok((Dialogue::single(&a[..common]), a[common..].to_owned(), b[common..].to_owned()))
}

/// Notes that both answers repeat a prompt that is too long to be repeated by chance.
fn note_repetition(prompt: &Dialogue, a: &Side, b: &Side, notes: &mut Notes) {
    const LONG: usize = 32;
    let ([one], Side::Answer(a), Side::Answer(b)) = (prompt.turns.as_slice(), a, b) else { return };
    let text = one.content.trim();
    if text.len() >= LONG && [a, b].iter().all(|answer| answer.trim_start().starts_with(text)) {
        notes.add("both answers begin with the prompt's own text, which they then repeat; remove it from the answers");
    }
}

#[cfg(test)]
mod tests;

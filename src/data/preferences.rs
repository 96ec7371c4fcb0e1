//! Pairs of answers and which is better, from files in the forms that people use.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::{Dialogue, Faults, Rows, Split, field, in_parts, order};

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferencePair {
    /// Row of the file, from zero.
    pub row: usize,
    /// What was asked.
    pub dialogue: Dialogue,
    /// One answer.
    pub first: String,
    /// The other.
    pub second: String,
    /// P(first is better), from 0 to 1: 1 or 0 where a person chose.
    pub preference: Option<f64>,
}

/// A file of pairs, read on demand. Forms of a row, told apart by their fields:
/// - `chosen`, `rejected`: two whole dialogues that part at an answer of the assistant's, mostly the last turn (the form
///   of Anthropic's HH);
/// - `prompt`, `chosen`, `rejected`: the prompt and two answers;
/// - `prompt`, `first`, `second`, and where it is known `preference`, the probability that the first is better: what
///   `preceptor label` writes and reads.
pub struct Preferences {
    rows: Rows,
    usable: Vec<u32>,
}

impl Preferences {
    /// Opens `path` and goes through every row once. With `labeled`, a row must say which answer is better.
    ///
    /// # Errors
    /// Names the file, and all faulty rows up to ten.
    pub fn read(path: &Path, split: &Split, labeled: bool) -> Result<Self> {
        let rows = Rows::open(path)?;
        ensure!(u32::try_from(rows.len()).is_ok(), "the file {} has more than 4 billion rows", path.display());
        let look = |i: usize| -> Result<bool> {
            let Some(row) = rows.get(i)? else { return Ok(false) };
            let pair = pair(i, &row)?;
            // What a judge would not decide stands in a file of labels as null, and teaches nothing.
            if labeled && row.get("preference").is_some_and(Value::is_null) {
                return Ok(false);
            }
            ensure!(!labeled || pair.preference.is_some(), "no field \"preference\" says which answer is better");
            Ok(split.takes(&pair.dialogue.text()))
        };
        let (mut usable, mut faults) = (Vec::new(), Faults::default());
        in_parts(rows.len(), look, |i, found| match found {
            Ok(true) => usable.push(i as u32),
            Ok(false) => {}
            Err(error) => faults.add(&rows.place(i), &error),
        });
        faults.report()?;
        ensure!(!usable.is_empty(), "{} has no pair to read", path.display());
        Ok(Self { rows, usable })
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.usable.len()
    }

    /// Always false: a file without pairs is refused.
    pub fn is_empty(&self) -> bool {
        self.usable.is_empty()
    }

    /// Pair number `i`.
    ///
    /// # Errors
    /// A row that was changed since the file was opened.
    pub fn get(&self, i: usize) -> Result<PreferencePair> {
        let row = self.usable[i] as usize;
        let read = || pair(row, &self.rows.get(row)?.context("the row is gone")?);
        read().with_context(|| format!("{} was changed while it was in use", self.rows.place(row)))
    }

    /// Where pair number `i` stands, for errors.
    pub fn place(&self, i: usize) -> String {
        self.rows.place(self.usable[i] as usize)
    }

    /// Order of pairs in `epoch`: a function of the seed and the epoch alone.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<usize> {
        order(self.usable.len(), Some(seed), epoch)
    }
}

/// Reads a row in whichever form it is.
fn pair(row: usize, value: &Value) -> Result<PreferencePair> {
    let answer =
        |name: &str| -> Result<String> { answer(field(value, name)?).map_err(|e| anyhow!("field {name:?} {e}")) };
    let dialogue = |name: &str| -> Result<Dialogue> {
        Dialogue::from_json(field(value, name)?).map_err(|error| anyhow!("field {name:?} {error}"))
    };
    if value.get("first").is_some() || value.get("second").is_some() {
        let preference = match value.get("preference") {
            None | Some(Value::Null) => None,
            Some(number) => Some(
                number
                    .as_f64()
                    .filter(|p| (0.0..=1.0).contains(p))
                    .ok_or_else(|| anyhow!("field \"preference\" is {number}, not a probability from 0 to 1"))?,
            ),
        };
        return Ok(PreferencePair {
            row,
            dialogue: dialogue("prompt")?,
            first: answer("first")?,
            second: answer("second")?,
            preference,
        });
    }
    if value.get("prompt").is_some_and(|prompt| !prompt.is_null()) {
        let (first, second) = (answer("chosen")?, answer("rejected")?);
        return Ok(PreferencePair { row, dialogue: dialogue("prompt")?, first, second, preference: Some(1.0) });
    }
    if value.get("chosen").is_none() && value.get("rejected").is_none() {
        bail!(
            "is no preference pair: it has neither chosen and rejected nor first and second; the row has {}",
            value.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        );
    }
    let whole = |name: &str| -> Result<Dialogue> {
        Dialogue::whole_from_json(field(value, name)?).map_err(|error| anyhow!("field {name:?} {error}"))
    };
    let parted = whole("chosen")?.part(whole("rejected")?);
    let (dialogue, first, second) = parted.map_err(|error| anyhow!("chosen and rejected {error}"))?;
    Ok(PreferencePair { row, dialogue, first, second, preference: Some(1.0) })
}

/// An answer: a text, or a list with the assistant's message last, as some sets write it.
fn answer(value: &Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(_) => {
            let last = Dialogue::from_json(value)?.turns.pop().context("is a list without messages")?;
            ensure!(last.role == "assistant", "does not end with the assistant's message");
            Ok(last.content)
        }
        _ => bail!("is no text and no list of messages"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pairs_are_read_in_each_form() {
        let messages =
            |text: &str| json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": text }]);
        for (row, expected) in [
            (
                json!({ "chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b" }),
                Some(1.0),
            ),
            (json!({ "chosen": messages("a"), "rejected": messages("b") }), Some(1.0)),
            (json!({ "prompt": "hi", "chosen": "a", "rejected": "b" }), Some(1.0)),
            (json!({ "prompt": "hi", "chosen": messages("a"), "rejected": messages("b") }), Some(1.0)),
            (json!({ "prompt": "hi", "first": "a", "second": "b", "preference": 0.25 }), Some(0.25)),
            (json!({ "prompt": "hi", "first": "a", "second": "b" }), None),
        ] {
            let pair = pair(3, &row).unwrap_or_else(|error| panic!("{row}: {error}"));
            assert_eq!((pair.dialogue.text().as_str(), pair.first.as_str(), pair.second.as_str()), ("hi", "a", "b"));
            assert_eq!(pair.preference, expected);
        }
    }

    #[test]
    fn what_is_no_pair_is_refused_with_the_reason() {
        for (row, words) in [
            (json!({ "text": "x" }), "no preference pair"),
            (json!({ "chosen": "\n\nHuman: hi\n\nAssistant: a" }), "no field \"rejected\""),
            (
                json!({ "chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: b" }),
                "from turn 1 on",
            ),
            (json!({ "chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi" }), "do not part at an answer"),
            (json!({ "prompt": "hi", "first": "a", "second": "b", "preference": 1.5 }), "not a probability"),
            (json!({ "prompt": "hi", "chosen": 3, "rejected": "b" }), "field \"chosen\" is no text"),
        ] {
            let error = format!("{:#}", pair(0, &row).unwrap_err());
            assert!(error.contains(words), "{row}: {error}");
        }
    }

    #[test]
    fn a_file_is_refused_by_row() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, "{\"prompt\": \"p\", \"first\": \"a\", \"second\": \"b\"}\n{\"a\": 1}\n").unwrap();
        let error = Preferences::read(&path, &Split::default(), true).err().unwrap().to_string();
        assert!(error.contains("pairs.jsonl:1: no field \"preference\"") && error.contains("pairs.jsonl:2"), "{error}");
    }
}

//! Faults of rows, and what of the rows is read otherwise than somebody might expect.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// Reaction to a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnBad {
    /// Refuse the data set.
    #[default]
    Error,
    /// Leave the row out, and log how many rows were left out and why.
    Skip,
}

/// Most faults that are listed one by one.
const SHOWN: usize = 10;

/// Rows that cannot be used: the first ten with their place and reason, and the number of the others.
#[derive(Default)]
pub(super) struct Faults {
    lines: Vec<String>,
    more: usize,
}

impl Faults {
    pub(super) fn add(&mut self, place: &str, error: &anyhow::Error) {
        if self.lines.len() < SHOWN {
            // The remedy stands outermost in the chain, and reads better last.
            let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            causes.reverse();
            self.lines.push(format!("{place}: {}", causes.join("; ")));
        } else {
            self.more += 1;
        }
    }

    /// Refuses the data set for rows that are too long.
    ///
    /// # Errors
    /// The faults if there are any.
    pub(super) fn report_long(self) -> Result<()> {
        let Some(listed) = self.listed() else { return Ok(()) };
        bail!("the data set cannot be used:\n{listed}")
    }

    fn listed(&self) -> Option<String> {
        let more = if self.more > 0 { format!("\nand {} more", self.more) } else { String::new() };
        (!self.lines.is_empty()).then(|| format!("{}{more}", self.lines.join("\n")))
    }

    /// Adds the faults of `other` behind these.
    pub(super) fn append(&mut self, other: Self) {
        self.more += other.more;
        for line in other.lines {
            if self.lines.len() < SHOWN {
                self.lines.push(line);
            } else {
                self.more += 1;
            }
        }
    }

    /// Number of faulty rows.
    pub(super) fn count(&self) -> usize {
        self.lines.len() + self.more
    }

    /// Refuses the data set, or returns a report of the rows that are left out, as `on_bad` says; none without faults. With
    /// `all`, no row is left, and the data set is refused in any case.
    ///
    /// # Errors
    /// With [`OnBad::Error`], the faults if there are any.
    pub(super) fn report(self, on_bad: OnBad, all: bool) -> Result<Option<String>> {
        let Some(listed) = self.listed() else { return Ok(None) };
        match on_bad {
            OnBad::Skip if all => bail!("the data set cannot be used: none of its rows can be read:\n{listed}"),
            OnBad::Error => bail!(
                "the data set cannot be used; mend these rows, or leave them out by data.on_bad = \"skip\":\n{listed}"
            ),
            OnBad::Skip => {
                let rows = if self.count() == 1 { "row is" } else { "rows are" };
                Ok(Some(format!("{} {rows} left out, since they cannot be used:\n{listed}", self.count())))
            }
        }
    }
}

/// Remarks on rows that are used, each with the number of rows that it is about.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Notes(BTreeMap<Cow<'static, str>, usize>);

impl Notes {
    /// Remarks `note` on a row.
    pub(super) fn add(&mut self, note: impl Into<Cow<'static, str>>) {
        *self.0.entry(note.into()).or_insert(0) += 1;
    }

    /// Adds the remarks on another row, each once.
    pub(super) fn merge(&mut self, row: Self) {
        for note in row.0.into_keys() {
            self.add(note);
        }
    }

    /// The remarks as lines.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(note, rows)| format!("{rows} {}: {note}", if *rows == 1 { "row" } else { "rows" }))
    }

    /// Logs each remark once; `data` names the data set.
    pub(super) fn log(&self, data: &str) {
        for line in self.lines() {
            tracing::warn!("{data}: {line}");
        }
    }
}

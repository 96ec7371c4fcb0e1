//! Faults of rows, and remarks on rows that are read in an unexpected way.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// Treatment of a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnBad {
    /// Refuse the data set.
    #[default]
    Error,
    /// Skip the row, and log the number of skipped rows and the reasons.
    Skip,
}

/// Maximum number of faults that are listed one by one.
const SHOWN: usize = 10;

/// Rows that cannot be used: the first ten with their location and reason, and the number of further ones.
#[derive(Default)]
pub(super) struct Faults {
    lines: Vec<String>,
    more: usize,
}

impl Faults {
    pub(super) fn add(&mut self, place: &str, error: &anyhow::Error) {
        if self.lines.len() < SHOWN {
            // The remedy is outermost in the error chain, but reads better last.
            let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            causes.reverse();
            self.lines.push(format!("{place}: {}", causes.join("; ")));
        } else {
            self.more += 1;
        }
    }

    /// Refuses the data set if rows are too long.
    ///
    /// # Errors
    /// If there are any faults.
    pub(super) fn report_long(self) -> Result<()> {
        let Some(listed) = self.listed() else { return Ok(()) };
        bail!("the data set cannot be used:\n{listed}")
    }

    fn listed(&self) -> Option<String> {
        let more = if self.more > 0 { format!("\nand {} more", self.more) } else { String::new() };
        (!self.lines.is_empty()).then(|| format!("{}{more}", self.lines.join("\n")))
    }

    /// Appends the faults of `other`.
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

    /// Returns the number of faulty rows.
    pub(super) fn count(&self) -> usize {
        self.lines.len() + self.more
    }

    /// Depending on `on_bad`, refuses the data set or returns a report of the skipped rows; `None` without faults. If `all`
    /// is set, every row is faulty, and the data set is refused in any case.
    ///
    /// # Errors
    /// With [`OnBad::Error`] or `all`, if there are any faults.
    pub(super) fn report(self, on_bad: OnBad, all: bool) -> Result<Option<String>> {
        let Some(listed) = self.listed() else { return Ok(None) };
        match on_bad {
            OnBad::Skip if all => bail!("the data set cannot be used: none of its rows can be read:\n{listed}"),
            OnBad::Error => bail!(
                "the data set cannot be used; correct these rows, or skip them with data.on_bad = \"skip\":\n{listed}"
            ),
            OnBad::Skip => {
                let rows = if self.count() == 1 { "row is" } else { "rows are" };
                Ok(Some(format!("{} {rows} left out because they cannot be used:\n{listed}", self.count())))
            }
        }
    }
}

/// Remarks on rows that are used, each with the number of rows it applies to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Notes(BTreeMap<Cow<'static, str>, usize>);

impl Notes {
    /// Adds the remark `note` on a row.
    pub(super) fn add(&mut self, note: impl Into<Cow<'static, str>>) {
        *self.0.entry(note.into()).or_insert(0) += 1;
    }

    /// Adds the remarks on another row, each once.
    pub(super) fn merge(&mut self, row: Self) {
        for note in row.0.into_keys() {
            self.add(note);
        }
    }

    /// Returns the remarks as lines of text.
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

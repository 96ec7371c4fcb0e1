//! The file that labels are written to. Each pair occurs once, even if the program is killed at any time.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Annotation, Annotations};
use crate::observe::progress::Progress;
use crate::pipeline::data::{Dialogue, PreferencePair, Preferences};
use crate::pipeline::label::backend::Usage;
use crate::types::Verdict;
use crate::util::seed;

/// Identity of the labeler, which must be the same for all lines of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// Kind of labeler.
    pub labeler: String,
    /// Identity hash of the judge's model.
    pub model: u64,
    /// Hash of the judge's template.
    pub template: u64,
}

/// Totals of a label file and of the present labeling run.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Number of pairs with a label, including those of earlier runs.
    pub labels: u64,
    /// Number of pairs on which the labeler abstained, including those of earlier runs.
    pub abstentions: u64,
    /// Number of pairs whose labeling failed in this run.
    pub failures: u64,
    /// Error of the first failure.
    pub first_failure: Option<String>,
    /// Questions, tokens and cost of this run.
    pub usage: Usage,
    /// Numbers of pairs read in both orders in this run, and of those where the same position was preferred both times.
    pub orders: [u64; 2],
}

/// A JSON-lines file of labels, to which batches are appended.
pub struct LabelFile {
    path: PathBuf,
    file: File,
    provenance: Provenance,
    pairs: std::sync::Arc<Preferences>,
    done: HashSet<usize>,
    totals: Totals,
    progress: Progress,
}

impl LabelFile {
    /// Opens `path` to continue an earlier run, or creates it. An incomplete last line is removed.
    ///
    /// # Errors
    /// If the file is not a file of labels, or belongs to another input or labeler.
    pub fn open(path: &Path, pairs: std::sync::Arc<Preferences>, provenance: Provenance) -> Result<Self> {
        let special = std::fs::metadata(path).is_ok_and(|found| !found.is_file());
        ensure!(
            !special,
            "{} is not a regular file, and labels are written where they can be read again",
            path.display()
        );
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let (mut done, mut totals, mut end) = (HashSet::new(), Totals::default(), 0);
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        for number in 1.. {
            line.clear();
            let read = reader.read_line(&mut line).with_context(|| format!("cannot read {}", path.display()))?;
            if read == 0 || !line.ends_with('\n') {
                break;
            }
            let place = || format!("{}:{number}", path.display());
            let row: Value = serde_json::from_str(&line).with_context(|| format!("{} is not JSON", place()))?;
            let i = known(&row, &pairs, &provenance).with_context(place)?;
            ensure!(done.insert(i), "{}: pair {i} occurs twice in the file", place());
            let counter = if row["preference"].is_null() { &mut totals.abstentions } else { &mut totals.labels };
            *counter += 1;
            end += read as u64;
        }
        file.set_len(end)?;
        file.seek(SeekFrom::End(0))?;
        let progress = Progress::new("labeling", "pairs", pairs.len() as u64);
        progress.at(done.len() as u64);
        Ok(Self { path: path.to_owned(), file, provenance, pairs, done, totals, progress })
    }

    /// Returns the indices of pairs without a line, in order.
    pub fn todo(&self) -> Vec<usize> {
        (0..self.pairs.len()).filter(|i| !self.done.contains(i)).collect()
    }

    /// Returns the totals so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Removes the progress bar.
    pub fn finish(&self) {
        self.progress.finish();
    }

    fn line(&mut self, one: &Annotation) -> Result<Option<String>> {
        let Some(preference) = one.labels.preferences.first() else {
            bail!("internal error: the labeler returned no verdict")
        };
        let abstention = match &preference.verdict {
            Verdict::Failure(why) => {
                self.totals.failures += 1;
                self.totals.first_failure.get_or_insert_with(|| why.clone());
                return Ok(None);
            }
            Verdict::Abstention(why) => {
                self.totals.abstentions += 1;
                Some(why)
            }
            Verdict::Label(_) => {
                self.totals.labels += 1;
                None
            }
        };
        let pair = self.pairs.get(one.question)?;
        let scores: Vec<Option<f64>> = one.labels.scores.iter().map(Verdict::label).collect();
        let mut line = json!({
            "pair": one.question,
            "key": format!("{:016x}", key(&pair)),
            "prompt": dialogue(&pair.dialogue),
            "first": pair.first,
            "second": pair.second,
            "preference": preference.probability(),
            "orders": preference.orders,
            "human": pair.preference,
            "labeler": self.provenance.labeler,
            "model": format!("{:016x}", self.provenance.model),
            "template": format!("{:016x}", self.provenance.template),
        });
        if let Some(why) = abstention {
            line["abstention"] = json!(why);
        }
        if !scores.is_empty() {
            line["scores"] = json!(scores);
        }
        Ok(Some(line.to_string()))
    }
}

impl Annotations for LabelFile {
    fn take(&mut self, batch: Vec<Annotation>) -> Result<()> {
        let mut text = String::new();
        for annotation in &batch {
            if self.done.contains(&annotation.question) {
                continue;
            }
            self.totals.usage += annotation.labels.usage;
            if let Some(flipped) = annotation.labels.preferences.first().and_then(|preference| preference.flipped()) {
                self.totals.orders[0] += 1;
                self.totals.orders[1] += u64::from(flipped);
            }
            if let Some(line) = self.line(annotation)? {
                self.done.insert(annotation.question);
                text.push_str(&line);
                text.push('\n');
            }
        }
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.progress.at(self.done.len() as u64);
        let Totals { failures, usage, .. } = &self.totals;
        self.progress.message(format!("{failures} failed, cost {:.4}", usage.cost));
        Ok(())
    }
}

/// Returns the index of the pair of a line, after checking that the line belongs to this input and labeler.
fn known(row: &Value, pairs: &Preferences, provenance: &Provenance) -> Result<usize> {
    let i = row["pair"].as_u64().context("the line is not a label: it has no \"pair\"")? as usize;
    ensure!(i < pairs.len(), "pair {i} is not in the input, which has {}; give another --output", pairs.len());
    ensure!(
        row["key"] == json!(format!("{:016x}", key(&pairs.get(i)?))),
        "pair {i} differs from the one in the input; give another --output"
    );
    let Provenance { labeler, model, template } = provenance;
    for (name, expected) in
        [("labeler", labeler.clone()), ("model", format!("{model:016x}")), ("template", format!("{template:016x}"))]
    {
        ensure!(row[name] == json!(expected), "the line was labeled by another {name}; give another --output");
    }
    Ok(i)
}

/// Returns a hash of the pair's content.
fn key(pair: &PreferencePair) -> u64 {
    seed::text(&[pair.dialogue.text().as_str(), &pair.first, &pair.second].join("\0"))
}

/// Returns a dialogue as JSON for files: a string if it is a single user message, else a list of messages.
fn dialogue(dialogue: &Dialogue) -> Value {
    match dialogue.turns.as_slice() {
        [one] if one.role == "user" => json!(one.content),
        turns => json!(turns),
    }
}

//! Whether a run may be begun in a directory: nothing of an earlier run is overwritten.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::journal::{self, Entry, Journal};
use super::phases::FINE_TUNING;
use super::{reference, rewind};
use crate::run::checkpoint::Opened;
use crate::run::checkpoint::store::{self, PENDING};
use crate::util::disk;

/// What the file [`PENDING`] says to a person.
const NOTE: &str = "This run has no checkpoint yet. Until it has one, `preceptor train --resume` begins it again.\n";

/// What precedes the date of the chat templates in that file.
const DATE: &str = "The date in its chat templates is ";

/// Refuses to begin in `run` by `--resume` where it holds steps or checkpoints of a run.
///
/// A run that was killed before its first checkpoint is begun again: the file [`PENDING`] says that it is one.
///
/// # Errors
/// Names what it holds, and the ways out.
pub(super) fn check(run: &Path) -> Result<()> {
    let held = held(run)?;
    if held.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = held.iter().map(|path| path.display().to_string()).collect();
    bail!(
        "{} has no checkpoint to resume from, but it holds a run ({}), which is not overwritten; put a checkpoint back, or resume from one that was set aside by --resume=CHECKPOINT; to begin again, move the directory away or give another --run-dir",
        run.display(),
        names.join(", ")
    )
}

/// Notes that the run in `run`, which is about to begin, has no checkpoint yet, and the `date` of its chat templates.
///
/// # Errors
/// Names the file that cannot be written.
pub(super) fn note(run: &Path, date: Option<&str>) -> Result<()> {
    let date = date.map_or(String::new(), |date| format!("{DATE}{date}\n"));
    disk::replace(&run.join(PENDING), format!("{NOTE}{date}").as_bytes())
}

/// The date that chat templates have in the run in `run`, which `checkpoint` belongs to: that of the run's beginning, and
/// today's where it begins. None for a run of an earlier program, which did not note it.
///
/// # Errors
/// Names the file that cannot be read.
pub(super) fn date(run: &Path, checkpoint: Option<&Opened>) -> Result<Option<String>> {
    if let Some(checkpoint) = checkpoint {
        let config: toml::Table = checkpoint.config().parse()?;
        return Ok(config.get("data").and_then(|data| data.get("date")?.as_str()).map(str::to_owned));
    }
    let pending = run.join(PENDING);
    if disk::exists(&pending)? {
        let note = std::fs::read_to_string(&pending).map_err(|error| disk::cannot("read", &pending, error))?;
        return Ok(note.lines().find_map(|line| line.strip_prefix(DATE)).map(str::to_owned));
    }
    if disk::exists(&run.join(FINE_TUNING))? || disk::exists(&reference::place(run))? {
        return Ok(None);
    }
    let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    Ok(now.split_once('T').map(|(day, _)| day.to_owned()))
}

/// What `run` holds of a run that began, and had a checkpoint as far as can be known.
fn held(run: &Path) -> Result<Vec<PathBuf>> {
    let checkpoint = |path: &PathBuf| store::step(path).is_some() || store::step_set_aside(path).is_some();
    let mut held: Vec<PathBuf> = store::list(&run.join("checkpoints"))?.into_iter().filter(checkpoint).collect();
    let tuned = store::list(&run.join(FINE_TUNING).join("checkpoints"))?;
    // Those with a step of their own are resumed from, or refused by name.
    held.extend(tuned.into_iter().filter(|path| store::step_set_aside(path).is_some()));
    held.sort();
    if !disk::exists(&run.join(PENDING))? {
        held.extend(steps(run)?);
    }
    Ok(held)
}

/// Files in `run` that hold learner steps.
pub(super) fn steps(run: &Path) -> Result<Vec<PathBuf>> {
    let mut held = Vec::new();
    for name in ["metrics.jsonl", "samples.jsonl"] {
        if disk::length(&run.join(name))?.is_some_and(|length| length > 0) {
            held.push(run.join(name));
        }
    }
    let path = run.join(journal::NAME);
    if disk::length(&path)?.is_some() {
        // One that is damaged may have had steps.
        let step = |entry: Result<Entry>| !matches!(entry, Ok(Entry::Config(_)));
        if Journal::open(run)?.any(step) {
            held.push(path);
        }
    }
    if rewind::is_under_way(run)? {
        held.push(run.join(".rewind"));
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_begun_only_where_nothing_of_one_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path();
        check(run).unwrap();
        std::fs::write(run.join(journal::NAME), journal::config("a = 1").unwrap()).unwrap();
        check(run).unwrap();
        let refused = |name: &str| {
            let error = check(run).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("move the directory away"), "{error}");
        };
        let mut bytes = journal::config("a = 1").unwrap();
        bytes.extend(journal::step(1, 2, &[]).unwrap());
        std::fs::write(run.join(journal::NAME), bytes).unwrap();
        refused("journal.bin");
        // It was killed before its first checkpoint.
        note(run, Some("2026-11-29")).unwrap();
        assert_eq!(date(run, None).unwrap().unwrap(), "2026-11-29");
        check(run).unwrap();
        for name in ["checkpoints/step-000020.damaged-1", "fine-tuning/checkpoints/step-000002.damaged-3"] {
            std::fs::create_dir_all(run.join(name)).unwrap();
            refused(name);
            std::fs::remove_dir(run.join(name)).unwrap();
        }
        std::fs::remove_file(run.join(PENDING)).unwrap();
        std::fs::remove_file(run.join(journal::NAME)).unwrap();
        check(run).unwrap();
        std::fs::write(run.join("metrics.jsonl"), "{}\n").unwrap();
        refused("metrics.jsonl");
    }
}

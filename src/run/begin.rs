//! Checks that a new run overwrites nothing of an earlier one, and marks a run that has no checkpoint yet.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::journal::{self, Entry, Journal};
use super::phases::FINE_TUNING;
use super::{reference, rewind};
use crate::run::checkpoint::OpenedCheckpoint;
use crate::run::checkpoint::store::{self, PENDING};
use crate::util::disk;

/// First line of the file [`PENDING`].
const PENDING_TEXT: &str =
    "This run has no checkpoint yet. Until it has one, `preceptor train --resume` starts it again.\n";

/// Prefix of the line of [`PENDING`] that holds the date of the chat templates.
const DATE_PREFIX: &str = "The date in its chat templates is ";

/// Checks that `--resume` may start the run in `run` at step 0, since the directory has no checkpoint. A run that was
/// killed before its first checkpoint has the file [`PENDING`] and may be started again.
///
/// # Errors
/// If the directory holds steps or checkpoints of a run. The error lists them and the remedies.
pub(super) fn check_empty(run: &Path) -> Result<()> {
    let found = leftovers(run)?;
    if found.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = found.iter().map(|path| path.display().to_string()).collect();
    bail!(
        "{} has no checkpoint to resume from, but holds a run ({}), which is not overwritten; restore a checkpoint, or resume from one that was set aside with --resume=CHECKPOINT; to start again, move the directory away or give another --run-dir",
        run.display(),
        names.join(", ")
    )
}

/// Writes the file [`PENDING`], which marks the run in `run` as without a checkpoint, with the `date` of its chat
/// templates.
///
/// # Errors
/// Names the file that cannot be written.
pub(super) fn write_pending(run: &Path, date: Option<&str>) -> Result<()> {
    let date = date.map_or(String::new(), |date| format!("{DATE_PREFIX}{date}\n"));
    disk::replace(&run.join(PENDING), format!("{PENDING_TEXT}{date}").as_bytes())
}

/// Returns the date that chat templates have in the run in `run`: the one in the configuration of `checkpoint` or in
/// [`PENDING`], or today's date for a run that starts now. Returns `None` for a run of an earlier version of the
/// program, which did not record the date.
///
/// # Errors
/// Names the file that cannot be read.
pub(super) fn template_date(run: &Path, checkpoint: Option<&OpenedCheckpoint>) -> Result<Option<String>> {
    if let Some(checkpoint) = checkpoint {
        let config: toml::Table = checkpoint.config().parse()?;
        return Ok(config.get("data").and_then(|data| data.get("date")?.as_str()).map(str::to_owned));
    }
    let pending = run.join(PENDING);
    if disk::exists(&pending)? {
        let note = std::fs::read_to_string(&pending).map_err(|error| disk::cannot("read", &pending, error))?;
        return Ok(note.lines().find_map(|line| line.strip_prefix(DATE_PREFIX)).map(str::to_owned));
    }
    if disk::exists(&run.join(FINE_TUNING))? || disk::exists(&reference::directory(run))? {
        return Ok(None);
    }
    let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    Ok(now.split_once('T').map(|(day, _)| day.to_owned()))
}

/// Returns the checkpoints in `run` and, unless [`PENDING`] marks the run as without a checkpoint, its files with learner
/// steps.
fn leftovers(run: &Path) -> Result<Vec<PathBuf>> {
    let checkpoint = |path: &PathBuf| store::step(path).is_some() || store::step_of_aside(path).is_some();
    let mut found: Vec<PathBuf> = store::list(&run.join("checkpoints"))?.into_iter().filter(checkpoint).collect();
    let tuned = store::list(&run.join(FINE_TUNING).join("checkpoints"))?;
    // Checkpoints with a plain name are resumed from, or refused by name.
    found.extend(tuned.into_iter().filter(|path| store::step_of_aside(path).is_some()));
    found.sort();
    if !disk::exists(&run.join(PENDING))? {
        found.extend(step_files(run)?);
    }
    Ok(found)
}

/// Returns the files in `run` that hold learner steps.
pub(super) fn step_files(run: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in ["metrics.jsonl", "samples.jsonl"] {
        if disk::length(&run.join(name))?.is_some_and(|length| length > 0) {
            found.push(run.join(name));
        }
    }
    let path = run.join(journal::NAME);
    if disk::length(&path)?.is_some() {
        // A damaged entry may have been a step.
        let step = |entry: Result<Entry>| !matches!(entry, Ok(Entry::Config(_)));
        if Journal::open(run)?.any(step) {
            found.push(path);
        }
    }
    if rewind::is_in_progress(run)? {
        found.push(run.join(".rewind"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_starts_only_in_a_directory_without_steps_or_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path();
        check_empty(run).unwrap();
        std::fs::write(run.join(journal::NAME), journal::encode_config("a = 1").unwrap()).unwrap();
        check_empty(run).unwrap();
        let refused = |name: &str| {
            let error = check_empty(run).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("move the directory away"), "{error}");
        };
        let mut bytes = journal::encode_config("a = 1").unwrap();
        bytes.extend(journal::encode_step(1, 2, &[]).unwrap());
        std::fs::write(run.join(journal::NAME), bytes).unwrap();
        refused("journal.bin");
        // The run was killed before its first checkpoint.
        write_pending(run, Some("2026-11-29")).unwrap();
        assert_eq!(template_date(run, None).unwrap().unwrap(), "2026-11-29");
        check_empty(run).unwrap();
        for name in ["checkpoints/step-000020.damaged-1", "fine-tuning/checkpoints/step-000002.damaged-3"] {
            std::fs::create_dir_all(run.join(name)).unwrap();
            refused(name);
            std::fs::remove_dir(run.join(name)).unwrap();
        }
        std::fs::remove_file(run.join(PENDING)).unwrap();
        std::fs::remove_file(run.join(journal::NAME)).unwrap();
        check_empty(run).unwrap();
        std::fs::write(run.join("metrics.jsonl"), "{}\n").unwrap();
        refused("metrics.jsonl");
    }
}

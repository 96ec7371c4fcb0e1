//! Rewinds the directory of a run to one of its checkpoints.
//!
//! The steps after the checkpoint will be repeated, so the tails of the run's files are cut off and later checkpoints
//! are renamed. If there are later checkpoints, the tails are stored in `superseded-N/`, so that the run can be resumed
//! from one of them again. A process may be killed at any point:
//!
//! 1. `.rewind.partial/` receives the plan and the tails. Nothing else is changed before it is complete and synced.
//! 2. It is renamed to `.rewind/`. From here on the plan is completed, by this process or by the next one that opens
//!    the directory, with any command.
//! 3. Checkpoints are renamed and files are cut off. Each of these changes may be repeated.
//! 4. `.rewind/` is renamed to `superseded-N/`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::run::checkpoint::store;
use crate::util::disk;
use crate::util::failpoints;

/// Directory of a plan that is being written.
const PARTIAL: &str = ".rewind.partial";

/// Directory of a plan that is being executed.
const COMMITTED: &str = ".rewind";

/// Prefix of the directories of completed plans.
const DONE: &str = "superseded-";

/// File of the plan in its directory.
const PLAN: &str = "rewind.json";

/// Changes that rewind a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Plan {
    /// Step to which the run is rewound.
    step: u64,
    /// Old and new paths of checkpoints, relative to the run's directory, in the order of renaming.
    renames: Vec<(PathBuf, PathBuf)>,
    /// New ends of the run's files, by name.
    files: BTreeMap<String, FileEnd>,
}

/// New end of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct FileEnd {
    /// Length in bytes of the part that is kept.
    length: u64,
    /// Bytes appended after that part: the folder that holds them, and their number.
    append: Option<(String, u64)>,
}

/// Lengths in bytes of a run's files, by name.
pub(super) type FileLengths = BTreeMap<String, u64>;

/// Completes the plan of a killed process and removes a partly written plan.
///
/// # Errors
/// Names the file that cannot be read or changed. The next call tries again.
pub(super) fn complete(run: &Path) -> Result<()> {
    let partial = run.join(PARTIAL);
    if disk::exists(&partial)? {
        std::fs::remove_dir_all(&partial).map_err(|error| disk::cannot("remove", &partial, error))?;
    }
    let committed = run.join(COMMITTED);
    if !disk::exists(&committed)? {
        return Ok(());
    }
    let plan = read(&committed)?;
    for (from, to) in &plan.renames {
        let (from, to) = (run.join(from), run.join(to));
        if disk::exists(&from)? && !disk::exists(&to)? {
            std::fs::rename(&from, &to).map_err(|error| disk::cannot("rename", &from, error))?;
        }
        failpoints::point("rewind.renamed")?;
        sync_parent(&to)?;
    }
    for (name, end) in &plan.files {
        set_end(run, name, end)?;
        failpoints::point("rewind.cut")?;
    }
    let done = free_name(run)?;
    std::fs::rename(&committed, &done).map_err(|error| disk::cannot("rename", &committed, error))?;
    disk::sync(run)
}

/// Rewinds the files of `run` to `lengths`, those at `step`, and renames the checkpoints `aside`, each for a reason
/// such as "superseded". Returns their new paths.
///
/// # Errors
/// If a file is shorter than its length, in which case nothing is changed; or names the file that cannot be read or
/// written.
pub(super) fn rewind(run: &Path, step: u64, lengths: &FileLengths, aside: &[(PathBuf, &str)]) -> Result<Vec<PathBuf>> {
    for (name, length) in lengths {
        let (path, found) = (run.join(name), disk::length(&run.join(name))?);
        ensure!(
            found.is_none_or(|found| found >= *length),
            "{} has {} bytes, but the checkpoint recorded {length}; restore the file, or resume from an earlier checkpoint",
            path.display(),
            found.unwrap_or_default()
        );
    }
    let files: BTreeMap<String, FileEnd> =
        lengths.iter().map(|(name, length)| (name.clone(), FileEnd { length: *length, append: None })).collect();
    if aside.is_empty() {
        // No checkpoint has the discarded steps, so their tails are not needed.
        files.iter().try_for_each(|(name, end)| set_end(run, name, end))?;
        return Ok(Vec::new());
    }
    let renames =
        aside.iter().map(|(path, why)| Ok((relative(run, path)?, relative(run, &store::aside_path(path, why)?)?)));
    let plan = Plan { step, renames: renames.collect::<Result<_>>()?, files };
    let names = plan.renames.iter().map(|(_, to)| run.join(to)).collect();
    execute(run, &plan)?;
    Ok(names)
}

/// A checkpoint that was set aside, which can be restored together with the tails of the run's files.
pub(super) struct SetAside {
    path: PathBuf,
    /// Its original path, relative to the run's directory.
    name: PathBuf,
    /// The folder with the tails, in the run's directory.
    directory: String,
    plan: Plan,
}

impl SetAside {
    /// Finds the plan that set aside the checkpoint at `path` of `run`.
    ///
    /// # Errors
    /// If an earlier version of the program set it aside, which stored no tails; or if the run was later rewound to a
    /// step before the one at which this checkpoint branched.
    pub(super) fn find(run: &Path, path: &Path) -> Result<Self> {
        let (mut found, own) = (None, relative(run, path)?);
        for (n, kept) in plans(run)? {
            let plan = read(&run.join(&kept))?;
            if let Some((name, _)) = plan.renames.iter().find(|(_, to)| *to == own) {
                found = Some((n, Self { path: path.to_owned(), name: name.clone(), directory: kept, plan }));
            }
        }
        let Some((n, found)) = found else {
            bail!(
                "{} was set aside by a version of the program that did not store the tails of the run's files; start a new run from its weights with policy.model = \"{}\"",
                path.display(),
                path.display()
            );
        };
        for (_, kept) in plans(run)?.into_iter().filter(|(later, _)| *later > n) {
            let later = read(&run.join(&kept))?;
            let below = |(name, end): (&String, &FileEnd)| {
                found.plan.files.get(name).is_some_and(|own| end.length < own.length)
            };
            if later.files.iter().any(below) {
                let first = later.renames.first().map(|(_, to)| run.join(to)).unwrap_or_default();
                bail!(
                    "{} belongs to steps that were themselves set aside later; resume first from {}",
                    path.display(),
                    first.display()
                );
            }
        }
        Ok(found)
    }

    /// Returns the last step that the set-aside checkpoint shares with the current run.
    pub(super) fn branch(&self) -> u64 {
        self.plan.step
    }

    /// Restores the checkpoint: rewinds `run` to the branching point, appends the stored tails up to `lengths`, and
    /// in exchange stores the current tails and renames the checkpoints `aside`. Returns the new paths of these
    /// checkpoints. `step` is the step of the checkpoint that is restored.
    ///
    /// # Errors
    /// If a stored tail is too short, in which case nothing is changed; or names the file that cannot be read or
    /// written.
    pub(super) fn restore(
        &self,
        run: &Path,
        step: u64,
        lengths: &FileLengths,
        aside: &[PathBuf],
    ) -> Result<Vec<PathBuf>> {
        let mut files = BTreeMap::new();
        for (name, end) in lengths {
            let Some(base) = self.plan.files.get(name).map(|end| end.length) else { continue };
            let bytes =
                end.checked_sub(base).with_context(|| format!("{name} is shorter than at the branching point"))?;
            let kept = self.tail_path(run, name);
            let there = disk::length(&kept)?.unwrap_or_default();
            ensure!(there >= bytes, "{} has {there} bytes, but the checkpoint recorded {bytes}", kept.display());
            files.insert(name.clone(), FileEnd { length: base, append: Some((self.directory.clone(), bytes)) });
        }
        let mut renames = Vec::new();
        for path in aside {
            renames.push((relative(run, path)?, relative(run, &store::aside_path(path, "superseded")?)?));
        }
        let names = renames.iter().map(|(_, to)| run.join(to)).collect();
        renames.push((relative(run, &self.path)?, self.name.clone()));
        execute(run, &Plan { step: self.plan.step.min(step), renames, files })?;
        Ok(names)
    }

    /// Returns the path of the stored tail of the file `name`.
    pub(super) fn tail_path(&self, run: &Path, name: &str) -> PathBuf {
        run.join(&self.directory).join(name)
    }

    /// Returns the length in bytes of the file `name` before its stored tail.
    pub(super) fn base_length(&self, name: &str) -> u64 {
        self.plan.files.get(name).map_or(0, |end| end.length)
    }
}

/// Returns whether the directory has a plan that is not completed.
pub(super) fn is_in_progress(run: &Path) -> Result<bool> {
    disk::exists(&run.join(COMMITTED))
}

/// Writes `plan` and the tails that it cuts off, and executes it.
fn execute(run: &Path, plan: &Plan) -> Result<()> {
    let (partial, committed) = (run.join(PARTIAL), run.join(COMMITTED));
    let write = || -> Result<()> {
        std::fs::create_dir(&partial).map_err(|error| disk::cannot("make", &partial, error))?;
        for (name, end) in &plan.files {
            save_tail(run, name, end.length, &partial)?;
        }
        disk::replace(&partial.join(PLAN), &serde_json::to_vec_pretty(plan)?)?;
        disk::sync(&partial)?;
        failpoints::point("rewind.commit")?;
        std::fs::rename(&partial, &committed).map_err(|error| disk::cannot("rename", &partial, error))
    };
    if let Err(error) = write() {
        // If it cannot be removed now, the next process that opens the directory removes it.
        let _ = std::fs::remove_dir_all(&partial);
        return Err(error);
    }
    disk::sync(run)?;
    complete(run)
}

/// Copies the bytes of the file `name` after `length` to the folder `into`.
fn save_tail(run: &Path, name: &str, length: u64, into: &Path) -> Result<()> {
    let (from, to) = (run.join(name), into.join(name));
    if disk::length(&from)?.is_none_or(|found| found <= length) {
        return Ok(());
    }
    let mut source = File::open(&from).map_err(|error| disk::cannot("read", &from, error))?;
    source.seek(SeekFrom::Start(length)).map_err(|error| disk::cannot("read", &from, error))?;
    let mut target = File::create(&to).map_err(|error| disk::cannot("write", &to, error))?;
    std::io::copy(&mut source, &mut target)
        .and_then(|_| target.sync_all())
        .map_err(|error| disk::cannot("write", &to, error))
}

/// Sets the end of the file `name`. A missing file was removed by the user and is created again later.
fn set_end(run: &Path, name: &str, end: &FileEnd) -> Result<()> {
    let path = run.join(name);
    let found = disk::length(&path)?;
    if found.is_none() || (end.append.is_none() && found == Some(end.length)) {
        return Ok(());
    }
    let cannot = |error| disk::cannot("change", &path, error);
    let mut file = OpenOptions::new().write(true).open(&path).map_err(cannot)?;
    if found > Some(end.length) {
        file.set_len(end.length).map_err(cannot)?;
    }
    if let Some((kept, bytes)) = &end.append {
        let kept = run.join(kept).join(name);
        if *bytes > 0 {
            let source = File::open(&kept).map_err(|error| disk::cannot("read", &kept, error))?;
            file.seek(SeekFrom::Start(end.length)).map_err(cannot)?;
            std::io::copy(&mut source.take(*bytes), &mut file).map_err(cannot)?;
        }
        file.flush().map_err(cannot)?;
    }
    file.sync_all().map_err(cannot)
}

fn read(dir: &Path) -> Result<Plan> {
    let path = dir.join(PLAN);
    let text = std::fs::read(&path).map_err(|error| disk::cannot("read", &path, error))?;
    serde_json::from_slice(&text).map_err(|error| anyhow!("{} cannot be decoded: {error}", path.display()))
}

/// Returns the numbers and names of the directories of completed plans, in ascending order.
fn plans(run: &Path) -> Result<Vec<(u64, String)>> {
    let named = store::list(run)?.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name.strip_prefix(DONE)?.parse().ok()?, name))
    });
    let mut all: Vec<(u64, String)> = named.filter(|(_, name)| run.join(name).join(PLAN).is_file()).collect();
    all.sort();
    Ok(all)
}

/// Returns the path of the next directory of a completed plan.
fn free_name(run: &Path) -> Result<PathBuf> {
    let last = plans(run)?.last().map_or(0, |(n, _)| *n);
    for n in last + 1.. {
        let path = run.join(format!("{DONE}{n}"));
        if !disk::exists(&path)? {
            return Ok(path);
        }
    }
    bail!("no name is free in {}", run.display())
}

/// Returns `path` relative to the directory `run`.
fn relative(run: &Path, path: &Path) -> Result<PathBuf> {
    let (run, path) = (std::path::absolute(run)?, std::path::absolute(path)?);
    Ok(path.strip_prefix(&run).with_context(|| format!("{} is not in {}", path.display(), run.display()))?.to_owned())
}

fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), disk::sync)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a run with steps 1 to 4, each with a line and a checkpoint.
    fn run() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), "1\n2\n3\n4\n").unwrap();
        for step in 1..=4 {
            std::fs::create_dir_all(checkpoint(dir.path(), step)).unwrap();
        }
        dir
    }

    fn checkpoint(run: &Path, step: u64) -> PathBuf {
        run.join("checkpoints").join(store::name(step))
    }

    fn lengths(steps: u64) -> FileLengths {
        FileLengths::from([("metrics.jsonl".to_owned(), 2 * steps)])
    }

    fn text(run: &Path) -> String {
        std::fs::read_to_string(run.join("metrics.jsonl")).unwrap()
    }

    /// Rewinds the run to `step` and continues it with other lines.
    fn branch_off(run: &Path, step: u64, more: &str) {
        let later: Vec<_> = (step + 1..=9).map(|n| checkpoint(run, n)).filter(|path| path.exists()).collect();
        let later: Vec<_> = later.into_iter().map(|path| (path, "superseded")).collect();
        rewind(run, step, &lengths(step), &later).unwrap();
        let mut file = OpenOptions::new().append(true).open(run.join("metrics.jsonl")).unwrap();
        file.write_all(more.as_bytes()).unwrap();
        for n in step + 1..=step + more.len() as u64 / 2 {
            std::fs::create_dir_all(checkpoint(run, n)).unwrap();
        }
    }

    #[test]
    fn a_set_aside_checkpoint_is_restored_with_the_tails_of_its_files() {
        let dir = run();
        let run = dir.path();
        branch_off(run, 2, "a\nb\nc\n");
        assert_eq!(text(run), "1\n2\na\nb\nc\n");
        let third = run.join("checkpoints/step-000003.superseded-1");
        let aside = SetAside::find(run, &third).unwrap();
        assert_eq!(aside.branch(), 2);
        let later: Vec<_> = (3..=5).map(|n| checkpoint(run, n)).collect();
        aside.restore(run, 3, &lengths(3), &later).unwrap();
        assert_eq!(text(run), "1\n2\n3\n");
        assert!(checkpoint(run, 3).exists() && !checkpoint(run, 4).exists() && !third.exists());
        // The other branch can be restored again.
        let fifth = run.join("checkpoints/step-000005.superseded-1");
        let aside = SetAside::find(run, &fifth).unwrap();
        aside.restore(run, 5, &lengths(5), &[checkpoint(run, 3)]).unwrap();
        assert_eq!(text(run), "1\n2\na\nb\nc\n");
        // A branch that starts at steps which are themselves set aside is restored after them.
        branch_off(run, 1, "x\n");
        let fourth = run.join("checkpoints/step-000004.superseded-1");
        let error = SetAside::find(run, &fourth).err().unwrap().to_string();
        assert!(error.contains("resume first from") && error.contains("superseded"), "{error}");
        let error = SetAside::find(run, &run.join("checkpoints/step-000009.superseded-1")).err().unwrap().to_string();
        assert!(error.contains("did not store the tails"), "{error}");
    }

    #[test]
    fn a_shorter_file_is_refused_before_anything_is_changed() {
        let dir = run();
        let run = dir.path();
        std::fs::write(run.join("journal.bin"), "1").unwrap();
        let lengths = FileLengths::from([("journal.bin".to_owned(), 2), ("metrics.jsonl".to_owned(), 2)]);
        let error = rewind(run, 1, &lengths, &[(checkpoint(run, 4), "superseded")]).unwrap_err().to_string();
        assert!(error.contains("journal.bin has 1 bytes, but the checkpoint recorded 2"), "{error}");
        assert_eq!(text(run), "1\n2\n3\n4\n");
        assert!(checkpoint(run, 4).exists());
    }

    #[test]
    fn every_state_between_the_changes_is_completed_to_the_same_end() {
        let reference = run();
        branch_off(reference.path(), 2, "");
        let plan = read(&reference.path().join("superseded-1")).unwrap();
        // Bit `i` of the state: change `i` was made before the process was killed.
        for state in 0..8 {
            let dir = run();
            let run = dir.path();
            let committed = run.join(COMMITTED);
            std::fs::create_dir(&committed).unwrap();
            save_tail(run, "metrics.jsonl", 4, &committed).unwrap();
            std::fs::write(committed.join(PLAN), serde_json::to_vec(&plan).unwrap()).unwrap();
            for (i, (from, to)) in plan.renames.iter().enumerate().filter(|(i, _)| state >> i & 1 == 1) {
                std::fs::rename(run.join(from), run.join(to)).unwrap_or_else(|error| panic!("{i}: {error}"));
            }
            if state >> 2 & 1 == 1 {
                std::fs::write(run.join("metrics.jsonl"), "1\n2\n").unwrap();
            }
            complete(run).unwrap();
            assert_eq!(text(run), "1\n2\n");
            assert_eq!(std::fs::read_to_string(run.join("superseded-1/metrics.jsonl")).unwrap(), "3\n4\n");
            assert!(checkpoint(run, 2).exists() && !checkpoint(run, 3).exists());
            assert!(run.join("checkpoints/step-000004.superseded-1").exists());
        }
    }
}

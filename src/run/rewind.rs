//! Takes the directory of a run back to one of its checkpoints.
//!
//! The steps after the checkpoint are taken again, so that the ends of the run's files are cut off and later checkpoints are
//! renamed. Where there are later checkpoints, the ends are kept in `superseded-N/`, so that the run can be resumed from one
//! of them again. A process may be killed at any instant:
//!
//! 1. `.rewind.partial/` gets the plan and the ends. Until it is complete and on the disk, nothing else is changed.
//! 2. It is renamed to `.rewind/`. From here on the plan is completed, by this process or by the next one that opens the
//!    directory, whatever that is asked to do.
//! 3. Checkpoints are renamed and files are cut. Each of these changes may be made twice.
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

/// The directory of a plan that is being written.
const PARTIAL: &str = ".rewind.partial";

/// The directory of a plan that is being carried out.
const COMMITTED: &str = ".rewind";

/// What the directories of plans that were carried out begin with.
const DONE: &str = "superseded-";

/// The plan's file in its directory.
const PLAN: &str = "rewind.json";

/// The changes that take a run back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Plan {
    /// The step that the run is taken back to.
    step: u64,
    /// Checkpoints and their new names, in the run's directory, in the order in which they are renamed.
    renames: Vec<(PathBuf, PathBuf)>,
    /// The run's files and how they end.
    files: BTreeMap<String, End>,
}

/// How a file ends after the run was taken back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct End {
    /// Bytes that are kept.
    length: u64,
    /// Bytes that follow them: the directory that has them, and their number.
    append: Option<(String, u64)>,
}

/// Lengths of a run's files by name.
pub(super) type Ends = BTreeMap<String, u64>;

/// Completes what a killed process began, and removes what it left half written.
///
/// # Errors
/// Names what cannot be read or changed; the next call tries again.
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
        cut(run, name, end)?;
        failpoints::point("rewind.cut")?;
    }
    let done = free(run)?;
    std::fs::rename(&committed, &done).map_err(|error| disk::cannot("rename", &committed, error))?;
    disk::sync(run)
}

/// Takes the files of `run` back to the lengths `ends`, those at `step`, and sets checkpoints aside, each for a reason such as
/// "superseded". Returns their new paths.
///
/// # Errors
/// A file that is shorter, before anything is changed; names what cannot be read or written.
pub(super) fn to(run: &Path, step: u64, ends: &Ends, aside: &[(PathBuf, &str)]) -> Result<Vec<PathBuf>> {
    for (name, length) in ends {
        let (path, found) = (run.join(name), disk::length(&run.join(name))?);
        ensure!(
            found.is_none_or(|found| found >= *length),
            "{} has {} bytes, and the checkpoint knows of {length}; put the file back, or resume from an earlier checkpoint",
            path.display(),
            found.unwrap_or_default()
        );
    }
    let files: BTreeMap<String, End> =
        ends.iter().map(|(name, length)| (name.clone(), End { length: *length, append: None })).collect();
    if aside.is_empty() {
        // The steps that go are in no checkpoint.
        files.iter().try_for_each(|(name, end)| cut(run, name, end))?;
        return Ok(Vec::new());
    }
    let renames =
        aside.iter().map(|(path, why)| Ok((inside(run, path)?, inside(run, &store::name_aside(path, why)?)?)));
    let plan = Plan { step, renames: renames.collect::<Result<_>>()?, files };
    let names = plan.renames.iter().map(|(_, to)| run.join(to)).collect();
    carry_out(run, &plan)?;
    Ok(names)
}

/// A checkpoint that was set aside, to be put back with the ends of the files that belong to it.
pub(super) struct SetAside {
    path: PathBuf,
    /// Its name before.
    name: PathBuf,
    /// The directory with the ends, in the run's.
    kept: String,
    plan: Plan,
}

impl SetAside {
    /// Finds what was kept with the checkpoint at `path` of `run`.
    ///
    /// # Errors
    /// One of an earlier program, which kept no ends; one before whose branch the run was taken back since.
    pub(super) fn find(run: &Path, path: &Path) -> Result<Self> {
        let (mut found, own) = (None, inside(run, path)?);
        for (n, kept) in plans(run)? {
            let plan = read(&run.join(&kept))?;
            if let Some((name, _)) = plan.renames.iter().find(|(_, to)| *to == own) {
                found = Some((n, Self { path: path.to_owned(), name: name.clone(), kept, plan }));
            }
        }
        let Some((n, found)) = found else {
            bail!(
                "{} was set aside by a program that did not keep the ends of the run's files with it; start a new run from its weights with policy.model = \"{}\"",
                path.display(),
                path.display()
            );
        };
        for (_, kept) in plans(run)?.into_iter().filter(|(later, _)| *later > n) {
            let later = read(&run.join(&kept))?;
            let below =
                |(name, end): (&String, &End)| found.plan.files.get(name).is_some_and(|own| end.length < own.length);
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

    /// The step up to which the run had the same course.
    pub(super) fn branch(&self) -> u64 {
        self.plan.step
    }

    /// Takes `run` to the checkpoint, whose files end at `ends` (`step` counts for files without an end): the present ends and
    /// the checkpoints `aside` are set aside in turn. Returns the new paths of the latter.
    ///
    /// # Errors
    /// Ends that are not there in full, before anything is changed; names what cannot be read or written.
    pub(super) fn put_back(&self, run: &Path, step: u64, ends: &Ends, aside: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let mut files = BTreeMap::new();
        for (name, end) in ends {
            let Some(base) = self.plan.files.get(name).map(|end| end.length) else { continue };
            let bytes =
                end.checked_sub(base).with_context(|| format!("{name} is shorter than where the run branched"))?;
            let kept = self.end(run, name);
            let there = disk::length(&kept)?.unwrap_or_default();
            ensure!(there >= bytes, "{} has {there} bytes, and the checkpoint knows of {bytes}", kept.display());
            files.insert(name.clone(), End { length: base, append: Some((self.kept.clone(), bytes)) });
        }
        let mut renames = Vec::new();
        for path in aside {
            renames.push((inside(run, path)?, inside(run, &store::name_aside(path, "superseded")?)?));
        }
        let names = renames.iter().map(|(_, to)| run.join(to)).collect();
        renames.push((inside(run, &self.path)?, self.name.clone()));
        carry_out(run, &Plan { step: self.plan.step.min(step), renames, files })?;
        Ok(names)
    }

    /// Where the end of the file called `name` is kept.
    pub(super) fn end(&self, run: &Path, name: &str) -> PathBuf {
        run.join(&self.kept).join(name)
    }

    /// Bytes of the file called `name` before its end.
    pub(super) fn base(&self, name: &str) -> u64 {
        self.plan.files.get(name).map_or(0, |end| end.length)
    }
}

/// Whether the directory has a plan that is not completed.
pub(super) fn is_under_way(run: &Path) -> Result<bool> {
    disk::exists(&run.join(COMMITTED))
}

/// Writes `plan` with the ends that it cuts off, and completes it.
fn carry_out(run: &Path, plan: &Plan) -> Result<()> {
    let (partial, committed) = (run.join(PARTIAL), run.join(COMMITTED));
    let write = || -> Result<()> {
        std::fs::create_dir(&partial).map_err(|error| disk::cannot("make", &partial, error))?;
        for (name, end) in &plan.files {
            keep(run, name, end.length, &partial)?;
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

/// Copies what the file called `name` has beyond `length` to the folder `into`.
fn keep(run: &Path, name: &str, length: u64, into: &Path) -> Result<()> {
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

/// Gives the file called `name` its `end`. A file that is not there was removed by somebody, and begins again.
fn cut(run: &Path, name: &str, end: &End) -> Result<()> {
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
    serde_json::from_slice(&text).map_err(|error| anyhow!("{} cannot be understood: {error}", path.display()))
}

/// Numbers and names of the directories of plans that were carried out, in order.
fn plans(run: &Path) -> Result<Vec<(u64, String)>> {
    let named = store::list(run)?.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name.strip_prefix(DONE)?.parse().ok()?, name))
    });
    let mut all: Vec<(u64, String)> = named.filter(|(_, name)| run.join(name).join(PLAN).is_file()).collect();
    all.sort();
    Ok(all)
}

/// A name for the directory of the next plan that was carried out.
fn free(run: &Path) -> Result<PathBuf> {
    let last = plans(run)?.last().map_or(0, |(n, _)| *n);
    for n in last + 1.. {
        let path = run.join(format!("{DONE}{n}"));
        if !disk::exists(&path)? {
            return Ok(path);
        }
    }
    bail!("no name is free in {}", run.display())
}

/// `path` in the directory `run`, without the latter's.
fn inside(run: &Path, path: &Path) -> Result<PathBuf> {
    let (run, path) = (std::path::absolute(run)?, std::path::absolute(path)?);
    Ok(path.strip_prefix(&run).with_context(|| format!("{} is not in {}", path.display(), run.display()))?.to_owned())
}

fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), disk::sync)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run with steps 1 to 4, a line and a checkpoint for each.
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

    fn ends(steps: u64) -> Ends {
        Ends::from([("metrics.jsonl".to_owned(), 2 * steps)])
    }

    fn text(run: &Path) -> String {
        std::fs::read_to_string(run.join("metrics.jsonl")).unwrap()
    }

    /// Takes the run back to `step`, and writes another course from there on.
    fn back(run: &Path, step: u64, more: &str) {
        let later: Vec<_> = (step + 1..=9).map(|n| checkpoint(run, n)).filter(|path| path.exists()).collect();
        let later: Vec<_> = later.into_iter().map(|path| (path, "superseded")).collect();
        to(run, step, &ends(step), &later).unwrap();
        let mut file = OpenOptions::new().append(true).open(run.join("metrics.jsonl")).unwrap();
        file.write_all(more.as_bytes()).unwrap();
        for n in step + 1..=step + more.len() as u64 / 2 {
            std::fs::create_dir_all(checkpoint(run, n)).unwrap();
        }
    }

    #[test]
    fn a_set_aside_checkpoint_is_put_back_with_the_ends_of_its_files() {
        let dir = run();
        let run = dir.path();
        back(run, 2, "a\nb\nc\n");
        assert_eq!(text(run), "1\n2\na\nb\nc\n");
        let third = run.join("checkpoints/step-000003.superseded-1");
        let aside = SetAside::find(run, &third).unwrap();
        assert_eq!(aside.branch(), 2);
        let later: Vec<_> = (3..=5).map(|n| checkpoint(run, n)).collect();
        aside.put_back(run, 3, &ends(3), &later).unwrap();
        assert_eq!(text(run), "1\n2\n3\n");
        assert!(checkpoint(run, 3).exists() && !checkpoint(run, 4).exists() && !third.exists());
        // And the other course again.
        let fifth = run.join("checkpoints/step-000005.superseded-1");
        let aside = SetAside::find(run, &fifth).unwrap();
        aside.put_back(run, 5, &ends(5), &[checkpoint(run, 3)]).unwrap();
        assert_eq!(text(run), "1\n2\na\nb\nc\n");
        // A course that branched from steps which are themselves aside is put back after them.
        back(run, 1, "x\n");
        let fourth = run.join("checkpoints/step-000004.superseded-1");
        let error = SetAside::find(run, &fourth).err().unwrap().to_string();
        assert!(error.contains("resume first from") && error.contains("superseded"), "{error}");
        let error = SetAside::find(run, &run.join("checkpoints/step-000009.superseded-1")).err().unwrap().to_string();
        assert!(error.contains("did not keep the ends"), "{error}");
    }

    #[test]
    fn a_shorter_file_is_refused_before_anything_is_changed() {
        let dir = run();
        let run = dir.path();
        std::fs::write(run.join("journal.bin"), "1").unwrap();
        let ends = Ends::from([("journal.bin".to_owned(), 2), ("metrics.jsonl".to_owned(), 2)]);
        let error = to(run, 1, &ends, &[(checkpoint(run, 4), "superseded")]).unwrap_err().to_string();
        assert!(error.contains("journal.bin has 1 bytes, and the checkpoint knows of 2"), "{error}");
        assert_eq!(text(run), "1\n2\n3\n4\n");
        assert!(checkpoint(run, 4).exists());
    }

    #[test]
    fn every_state_between_the_changes_is_completed_to_the_same_end() {
        let whole = run();
        back(whole.path(), 2, "");
        let plan = read(&whole.path().join("superseded-1")).unwrap();
        // Bit `i` of the state: change `i` was made before the process died.
        for state in 0..8 {
            let dir = run();
            let run = dir.path();
            let committed = run.join(COMMITTED);
            std::fs::create_dir(&committed).unwrap();
            keep(run, "metrics.jsonl", 4, &committed).unwrap();
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

//! Checksums of a directory, in the format of `sha256sum -c SHA256SUMS`.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::Result;
use sha2::{Digest, Sha256};

use crate::util::disk;

/// Name of the file of checksums.
pub const NAME: &str = "SHA256SUMS";

/// Writes the checksums of all files below `dir`, and syncs these files and their folders. Returns their total size in
/// bytes.
///
/// # Errors
/// Names the file that cannot be read or synced.
pub fn write_sums(dir: &Path) -> Result<u64> {
    let mut text = String::new();
    let (mut files, folders) = walk(dir)?;
    files.retain(|path| *path != dir.join(NAME));
    let mut bytes = 0;
    for path in &files {
        let (sum, length) = sum(path)?;
        bytes += length;
        let name = path.strip_prefix(dir)?.display();
        text.push_str(&format!("{sum}  {name}\n"));
    }
    let path = dir.join(NAME);
    std::fs::write(&path, &text).map_err(|error| disk::cannot("write", &path, error))?;
    files.extend(folders.into_iter().chain([path, dir.to_owned()]));
    disk::sync_all(&files)?;
    Ok(bytes + text.len() as u64)
}

/// Error for a directory that differs from its checksums.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Damage(String);

/// Files that a run is resumed from. One of these without a checksum counts as damage; any other file without one is an
/// addition by the user.
const REQUIRED: &[&str] = &[
    "config.json",
    "config.toml",
    "preceptor.json",
    "model.safetensors",
    "value_model.safetensors",
    "value_model/model.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "reward_model/model.safetensors",
    "resume/state.postcard",
    "resume/policy.safetensors",
    "resume/optimizer.safetensors",
    "resume/value_optimizer.safetensors",
    "resume/reward_model.safetensors",
    "resume/reward_optimizer.safetensors",
];

/// Compares the files below `dir` with their checksums. Files that the user added are ignored.
///
/// # Errors
/// [`Damage`] if a file is missing or differs. Any other error means that a file could not be read, and says nothing
/// about the directory.
pub fn verify(dir: &Path) -> Result<()> {
    let path = dir.join(NAME);
    let known = read_list(&path)?;
    for (expected, name) in &known {
        let file = dir.join(name);
        let (found, _) = listed_sum(&file)?;
        ensure_sound(found == *expected, || {
            format!("{} is damaged: its checksum is not the one in {NAME}", file.display())
        })?;
    }
    for name in REQUIRED {
        let file = dir.join(name);
        let is_listed = known.iter().any(|(_, known)| known == name) || !disk::exists(&file)?;
        ensure_sound(is_listed, || format!("{} has no checksum in {NAME}; the list is damaged", file.display()))?;
    }
    Ok(())
}

/// Returns the checksums and names in the list at `path`.
fn read_list(path: &Path) -> Result<Vec<(String, String)>> {
    let bytes = match disk::length(path) {
        Ok(Some(_)) => std::fs::read(path).map_err(|error| disk::cannot("read", path, error))?,
        Ok(None) => return Err(Damage(format!("{} is missing; the checkpoint is not complete", path.display())).into()),
        Err(error) => return Err(error),
    };
    let text =
        String::from_utf8(bytes).map_err(|_| Damage(format!("{} is damaged: it is not text", path.display())))?;
    let mut known = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let parts = line.split_once("  ").filter(|(_, name)| is_inside(name));
        let (sum, name) =
            parts.ok_or_else(|| Damage(format!("{} is damaged: line {} is not a checksum", path.display(), i + 1)))?;
        known.push((sum.to_owned(), name.to_owned()));
    }
    ensure_sound(!known.is_empty(), || format!("{} is damaged: it is empty", path.display()))?;
    Ok(known)
}

/// Returns whether `name` is a relative path that stays below the directory.
fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

fn ensure_sound(sound: bool, why: impl FnOnce() -> String) -> Result<()> {
    if sound { Ok(()) } else { Err(Damage(why()).into()) }
}

/// Returns the checksum and size of a listed file. Anything but a file at `path` is [`Damage`].
fn listed_sum(path: &Path) -> Result<(String, u64)> {
    match std::fs::metadata(path) {
        Ok(found) => ensure_sound(found.is_file(), || format!("{} is damaged: it is not a file", path.display()))?,
        Err(error) if disk::is_absence(&error) => {
            return Err(Damage(format!("{} is damaged: it is missing", path.display())).into());
        }
        // A damaged list may hold a name that is too long or invalid.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::InvalidFilename) => {
            return Err(Damage(format!("{} is damaged: no file can have this name", path.display())).into());
        }
        Err(error) => return Err(disk::cannot("read", path, error)),
    }
    sum(path)
}

/// Returns the paths of all files below `dir`.
///
/// # Errors
/// If a folder cannot be listed.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(walk(dir)?.0)
}

/// Returns the SHA-256 of a file, in hexadecimal, and its size in bytes.
fn sum(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).map_err(|error| disk::cannot("read", path, error))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let n = match file.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read.map_err(|error| disk::cannot("read", path, error))?,
        };
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        length += n as u64;
    }
    Ok((hex(&hash.finalize()), length))
}

/// Formats bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the files and the folders below `dir`, each sorted by path.
fn walk(dir: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut files, mut folders, mut open) = (Vec::new(), Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = open.pop() {
        let cannot = |error| disk::cannot("list", &folder, error);
        for entry in std::fs::read_dir(&folder).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let path = entry.path();
            if entry.file_type().map_err(cannot)?.is_dir() {
                folders.push(path.clone());
                open.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    folders.sort();
    Ok((files, folders))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_missing_and_added_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        write("a", "one");
        write("in/b", "two");
        // Output of `printf one | sha256sum` and `printf two | sha256sum`.
        let expected = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed  a\n\
                        3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3  in/b\n";
        write_sums(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join(NAME)).unwrap(), expected);
        verify(dir.path()).unwrap();
        let damage = || verify(dir.path()).unwrap_err().downcast::<Damage>().unwrap().to_string();
        write("in/b", "twO");
        assert!(damage().contains("in/b is damaged"), "{}", damage());
        write("in/b", "two");
        // An added file is ignored, unless a run would be resumed from it.
        write("model.gguf", "");
        verify(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("resume")).unwrap();
        write("resume/policy.safetensors", "");
        assert!(damage().contains("policy.safetensors has no checksum"), "{}", damage());
        std::fs::remove_file(dir.path().join("resume/policy.safetensors")).unwrap();
        std::fs::remove_file(dir.path().join("a")).unwrap();
        assert!(damage().contains("a is damaged: it is missing"), "{}", damage());
        std::fs::create_dir(dir.path().join("a")).unwrap();
        assert!(damage().contains("a is damaged: it is not a file"), "{}", damage());
        for text in ["", "x", "7692  /etc/passwd\n", "7692  ../a\n"] {
            write(NAME, text);
            assert!(damage().contains("SHA256SUMS is damaged"), "{text:?}: {}", damage());
        }
        std::fs::write(dir.path().join(NAME), [0xff]).unwrap();
        assert!(damage().contains("it is not text"), "{}", damage());
        std::fs::remove_file(dir.path().join(NAME)).unwrap();
        assert!(damage().contains("SHA256SUMS is missing"), "{}", damage());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_damage() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "one").unwrap();
        write_sums(dir.path()).unwrap();
        // A symbolic link to itself, which no user can open.
        std::fs::remove_file(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("a")).unwrap();
        let error = verify(dir.path()).unwrap_err();
        assert!(error.downcast_ref::<Damage>().is_none() && error.to_string().contains("cannot read"), "{error:#}");
    }
}

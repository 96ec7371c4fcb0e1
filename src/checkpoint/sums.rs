//! Checksums of a directory, in the form that `sha256sum -c SHA256SUMS` reads.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// The file's name.
pub const NAME: &str = "SHA256SUMS";

/// Writes the sums of all files below `dir`, and waits until they and their folders are on the disk. Returns their size.
///
/// # Errors
/// Names the file that cannot be read or synced.
pub fn seal(dir: &Path) -> Result<u64> {
    let mut text = String::new();
    let (files, folders) = walk(dir)?;
    let mut bytes = 0;
    for path in &files {
        let (sum, length) = sum(path)?;
        bytes += length;
        File::open(path)?.sync_all().with_context(|| format!("cannot sync {}", path.display()))?;
        let name = path.strip_prefix(dir)?.display();
        text.push_str(&format!("{sum}  {name}\n"));
    }
    let path = dir.join(NAME);
    std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    for path in folders.iter().chain([&path, &dir.to_owned()]) {
        File::open(path)?.sync_all().with_context(|| format!("cannot sync {}", path.display()))?;
    }
    Ok(bytes + text.len() as u64)
}

/// Compares all files below `dir` with their sums.
///
/// # Errors
/// Names the file that is missing, damaged, or there without a sum.
pub fn verify(dir: &Path) -> Result<()> {
    let path = dir.join(NAME);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} cannot be read; the checkpoint is not complete", path.display()))?;
    let mut known = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let (expected, name) =
            line.split_once("  ").with_context(|| format!("line {} of {} is no checksum", i + 1, path.display()))?;
        let file = dir.join(name);
        let (found, _) = sum(&file)?;
        ensure!(found == expected, "{} is damaged: its checksum is not the one in {NAME}", file.display());
        known.push(file);
    }
    let (files, _) = walk(dir)?;
    if let Some(extra) = files.iter().find(|file| **file != path && !known.contains(file)) {
        bail!("{} has no checksum in {NAME}; it was not written with the checkpoint", extra.display());
    }
    Ok(())
}

/// All files below `dir`.
///
/// # Errors
/// A folder that cannot be listed.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(walk(dir)?.0)
}

/// The file's sum and length.
fn sum(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        length += n as u64;
    }
    Ok((hex(&hash.finalize()), length))
}

/// As digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files and folders below `dir`, by name.
fn walk(dir: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut files, mut folders, mut open) = (Vec::new(), Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = open.pop() {
        let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
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
    fn what_is_changed_missing_or_added_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        write("a", "one");
        write("in/b", "two");
        // Of `printf one | sha256sum` and `printf two | sha256sum`.
        let expected = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed  a\n\
                        3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3  in/b\n";
        seal(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join(NAME)).unwrap(), expected);
        verify(dir.path()).unwrap();
        let complaint = || verify(dir.path()).unwrap_err().to_string();
        write("in/b", "twO");
        assert!(complaint().contains("in/b is damaged"), "{}", complaint());
        write("in/b", "two");
        write("c", "");
        assert!(complaint().contains("c has no checksum"), "{}", complaint());
        std::fs::remove_file(dir.path().join("c")).unwrap();
        std::fs::remove_file(dir.path().join("a")).unwrap();
        assert!(complaint().contains("cannot open"), "{}", complaint());
    }
}

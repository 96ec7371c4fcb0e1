//! Storage of published weights where servers can read them.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use sha2::{Digest, Sha256};

use crate::lm::model::{Decoder, Weights, export};
use crate::util::disk;
use crate::util::mutex::lock;

/// Name of a version of the weights of one run. It is never reused for other weights: the fingerprint is part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Identifier of the run.
    pub run: u32,
    /// Version of the weights, which is the number of learner steps.
    pub version: u64,
    /// Fingerprint of the weights.
    pub fingerprint: u64,
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "policy-{:08x}-{}-{:08x}", self.run, self.version, self.fingerprint as u32)
    }
}

impl Tag {
    /// Returns the run and the version of the tag written as `text`, or `None` if `text` is not a tag.
    pub fn parse(text: &str) -> Option<(u32, u64)> {
        let (run, rest) = text.strip_prefix("policy-")?.split_once('-')?;
        let (version, fingerprint) = rest.split_once('-')?;
        u32::from_str_radix(fingerprint, 16).ok()?;
        Some((u32::from_str_radix(run, 16).ok()?, version.parse().ok()?))
    }
}

/// A stored version of the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Name of the version.
    pub tag: Tag,
    /// Location of the weights as servers see it.
    pub location: String,
    /// Form of the weights.
    pub content: Content,
    /// SHA-256 of the list of checksums, in hexadecimal digits.
    pub sha256: String,
}

/// Form in which a server gets a version of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Adapters for the server's base model.
    Adapters,
    /// All weights.
    Full,
}

/// Place where published weights are written for servers, and for workers on other machines.
pub trait WeightStore: Send + Sync {
    /// Stores `weights` under `tag`. A version that is stored already is not written again.
    ///
    /// # Errors
    /// If the weights cannot be written completely; nothing is then visible under the tag.
    fn put(&self, tag: Tag, weights: &Decoder) -> Result<Stored>;

    /// Stores a folder that `fill` fills under `name`, unless it is there already. Returns the SHA-256 of its list of
    /// checksums.
    ///
    /// # Errors
    /// If the folder cannot be written completely; nothing is then visible under the name.
    fn put_folder(&self, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<String>;

    /// Removes the versions of the run `run` for which `is_used` returns false. Failures are logged.
    fn retain(&self, run: u32, is_used: &dyn Fn(u64) -> bool);

    /// Ends a transfer under way with an error, and refuses later ones. A store without transfers has nothing to end.
    fn cancel(&self) {}
}

/// Store in a folder that this process and the servers share.
pub struct FolderStore {
    folder: PathBuf,
    /// Path under which servers see the folder.
    seen_as: PathBuf,
    /// Name of the base model, for the configuration of adapters.
    base: Option<String>,
    dtype: DType,
    /// Held while files are changed: each server has a thread that may store the same version.
    changing: Mutex<()>,
}

/// File with the SHA-256 of each other file of a version. It is written last.
pub const SUMS: &str = "SHA256SUMS";

/// Returns the SHA-256 of `bytes` in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(Sha256::new_with_prefix(bytes))
}

/// Returns the SHA-256 of the file at `path` in hexadecimal digits. The file is not read into memory as a whole.
///
/// # Errors
/// If the file cannot be read; the error names it.
pub fn sha256_of_file(path: &Path) -> Result<String> {
    let read = || -> std::io::Result<String> {
        let (mut file, mut hash) = (std::fs::File::open(path)?, Sha256::new());
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hexadecimal(hash)),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes the list of checksums of the files in `dir`, and makes all of them durable.
fn seal(dir: &Path) -> Result<()> {
    let mut sums = String::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hex = sha256_of_file(&path)?;
        sums += &format!("{hex}  {}\n", path.file_name().unwrap_or_default().to_string_lossy());
        std::fs::File::open(&path)?.sync_all()?;
    }
    disk::replace(&dir.join(SUMS), sums.as_bytes())
}

/// Returns whether `name` can be the name of a folder or a file of a store: letters, digits, `-`, `_` and `.`, which is not
/// the first character.
pub fn is_plain(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(allowed)
}

/// Returns the SHA-256 and the name of each file in the list of checksums `sums`.
///
/// # Errors
/// If a line has another form, or names a file elsewhere.
pub fn listed(sums: &str) -> Result<Vec<(&str, &str)>> {
    let entry = |line: &'_ str| -> Result<()> {
        let (hex, name) = line.split_once("  ").context("a line has no name")?;
        ensure!(hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()), "a line has no SHA-256");
        ensure!(is_plain(name), "it names a file elsewhere: {name:?}");
        Ok(())
    };
    sums.lines().try_for_each(entry)?;
    Ok(sums.lines().filter_map(|line| line.split_once("  ")).collect())
}

/// Checks the files of the folder `dir` of a store against its list of checksums, whose own SHA-256 must be `expected`.
///
/// # Errors
/// If a file is missing or differs; the error names it.
pub fn verify(dir: &Path, expected: &str) -> Result<()> {
    let list = dir.join(SUMS);
    let sums = std::fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let found = sha256(sums.as_bytes());
    ensure!(found == expected, "{} has the SHA-256 {found}, not {expected}", list.display());
    for (hex, name) in listed(&sums).with_context(|| format!("{} is damaged", list.display()))? {
        let path = dir.join(name);
        let found = sha256_of_file(&path)?;
        ensure!(found == hex, "{} has the SHA-256 {found}, not {hex}", path.display());
    }
    Ok(())
}

impl FolderStore {
    /// Creates the folder if needed. Servers see it as `seen_as`. Full weights are written as `dtype`.
    ///
    /// # Errors
    /// If the folder cannot be created or its absolute path cannot be determined.
    pub fn new(folder: &Path, seen_as: Option<&Path>, base: Option<String>, dtype: DType) -> Result<Self> {
        let place = || format!("cannot create {}", folder.display());
        std::fs::create_dir_all(folder).with_context(place)?;
        let folder = folder.canonicalize().with_context(place)?;
        let seen_as = seen_as.map_or_else(|| folder.clone(), Path::to_owned);
        Ok(Self { folder, seen_as, base, dtype, changing: Mutex::new(()) })
    }

    fn fill(&self, dir: &Path, weights: &Decoder) -> Result<()> {
        match weights.lora() {
            Some(lora) => lora.write(dir, weights.weights(), self.base.as_deref())?,
            None => {
                let mut all = Weights(weights.weights().0.clone());
                // vLLM keeps its old output head if a file of a model with a tied head does not have the head itself.
                if let Some(embedding) = all.0.get("model.embed_tokens.weight").cloned() {
                    all.0.entry("lm_head.weight".to_owned()).or_insert(embedding);
                }
                export::write_tensors(&dir.join("model.safetensors"), &all, self.dtype)?;
            }
        }
        Ok(())
    }

    /// Returns the path of the folder as servers and workers see it.
    pub fn seen_as(&self) -> &Path {
        &self.seen_as
    }

    /// Returns the absolute path of the folder in this process.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl WeightStore for FolderStore {
    fn put(&self, tag: Tag, weights: &Decoder) -> Result<Stored> {
        let name = tag.to_string();
        let sha256 = self.put_folder(&name, &|dir| self.fill(dir, weights))?;
        let location = self.seen_as.join(&name).display().to_string();
        let content = if weights.lora().is_some() { Content::Adapters } else { Content::Full };
        Ok(Stored { tag, location, content, sha256 })
    }

    fn put_folder(&self, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<String> {
        let _guard = lock(&self.changing);
        let (dir, partial) = (self.folder.join(name), self.folder.join(format!(".{name}.partial")));
        let write = || -> Result<String> {
            if !dir.join(SUMS).exists() {
                for old in [&dir, &partial] {
                    if old.exists() {
                        std::fs::remove_dir_all(old)?;
                    }
                }
                std::fs::create_dir_all(&partial)?;
                fill(&partial)?;
                seal(&partial)?;
                std::fs::rename(&partial, &dir)?;
                std::fs::File::open(&self.folder)?.sync_all()?;
            }
            Ok(sha256(&std::fs::read(dir.join(SUMS))?))
        };
        write().with_context(|| format!("cannot write {}", dir.display()))
    }

    fn retain(&self, run: u32, is_used: &dyn Fn(u64) -> bool) {
        let _guard = lock(&self.changing);
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let stale = Tag::parse(&name.to_string_lossy()).is_some_and(|(of, version)| of == run && !is_used(version));
            if stale && let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!("cannot remove old weights {}: {error}", entry.path().display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::lm::model::{Lora, ModelConfig};

    #[test]
    fn tags_are_parsed_as_they_are_written() {
        let tag = Tag { run: 0xab, version: 12, fingerprint: 0x0123_4567_89ab_cdef };
        assert_eq!(tag.to_string(), "policy-000000ab-12-89abcdef");
        assert_eq!(Tag::parse(&tag.to_string()), Some((0xab, 12)));
        for other in ["policy", "policy-1", "policy-xyz-1-0", "policy-1-x-0", "base", "policy-1-1-g"] {
            assert_eq!(Tag::parse(other), None, "{other}");
        }
    }

    #[test]
    fn lists_name_plain_files_only() {
        let hex = "0a".repeat(32);
        let list = format!("{hex}  model.safetensors\n{hex}  model-00001-of-00002.safetensors\n");
        let files: Vec<&str> = listed(&list).unwrap().into_iter().map(|(_, file)| file).collect();
        assert_eq!(files, ["model.safetensors", "model-00001-of-00002.safetensors"]);
        for file in ["../model", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "", "a b", "a\0b"] {
            assert!(listed(&format!("{hex}  {file}\n")).is_err(), "{file:?}");
        }
        assert!(listed("no checksum\n").is_err() && listed("abc  model\n").is_err());
    }

    #[test]
    fn a_version_has_all_weights_with_the_head_or_the_adapters_alone() {
        let config = ModelConfig::tiny(50);
        let weights = Weights::scratch(&config, 0.2, 3, &Device::Cpu).unwrap();
        let model = Decoder::new(&config, &weights).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::new(&dir.path().join("w"), Some(Path::new("/seen")), None, DType::F32).unwrap();
        let tag = Tag { run: 1, version: 3, fingerprint: 9 };
        let stored = store.put(tag, &model).unwrap();
        assert_eq!((stored.location.as_str(), stored.content), ("/seen/policy-00000001-3-00000009", Content::Full));
        let read = |file: &str| candle_core::safetensors::load(dir.path().join("w").join(file), &Device::Cpu).unwrap();
        let written = read("policy-00000001-3-00000009/model.safetensors");
        let flat = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&written["lm_head.weight"]), flat(&weights.0["model.embed_tokens.weight"]));

        let lora = Lora { rank: 2, alpha: 4.0, targets: vec!["q_proj".into()] };
        let (adapted, _) = model.adapted(&lora, 1).unwrap();
        let next = Tag { version: 4, ..tag };
        assert_eq!(store.put(next, &adapted).unwrap().content, Content::Adapters);
        let written = read("policy-00000001-4-00000009/adapter_model.safetensors");
        assert!(written.keys().all(|name| name.contains("lora_")), "{:?}", written.keys());
        store.retain(1, &|version| version == 4);
        assert!(!dir.path().join("w/policy-00000001-3-00000009").exists());
        assert!(dir.path().join("w/policy-00000001-4-00000009/SHA256SUMS").exists());
    }
}

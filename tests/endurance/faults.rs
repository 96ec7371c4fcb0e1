//! Faults at a random point, time and kind, given by a seed. The run must finish, or report exactly one error and
//! finish after a resume, with the counts and weights of an undisturbed run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use preceptor::util::failpoints::POINTS;

use crate::run::{Random, checkpoints, fingerprint, last_checkpoint, metrics, to_the_end, train, trained};

/// Number of learner steps of each run, and number of groups in them.
const STEPS: u64 = 5;
const GROUPS: u64 = 2 * STEPS;

/// Time after which the run's watchdog restarts a stage without progress.
const WATCHDOG: Duration = Duration::from_secs(1);

/// Maximum duration of a run: three restarts by the watchdog, each with the same grace period, on a slow machine.
const DEADLINE: Duration = Duration::from_secs(60);

pub fn trial(count: u32, seed: u64) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let modes: [(&str, &[&str]); 2] = [
        ("direct", &["checkpoint.every_steps=1", "sft.steps=4", "sft.batch=2", "sft.lr=1e-3"]),
        ("distilled", &["run.mode=distilled", "reward_model.batch_pairs=3", "reward_model.warm_up_groups=2"]),
    ];
    for (mode, overrides) in modes {
        to_the_end(&mut train(dir.path(), &format!("undisturbed-{mode}"), &settings(overrides)))?;
    }
    let mut random = Random(seed);
    let mut ends: BTreeMap<&str, u32> = BTreeMap::new();
    let mut injected = BTreeMap::new();
    let mut longest = Duration::ZERO;
    for i in 0..count {
        let point = POINTS[i as usize % POINTS.len()];
        let (mode, overrides) = modes[(i as usize / POINTS.len()) % modes.len()];
        let kinds = ["1*return(injected)", "3*return(injected)", "10*return(injected)", "1*panic", "1*sleep(3000)"];
        let kind = kinds[(random.share() * kinds.len() as f64) as usize];
        // Faults at points that a run rarely passes are injected at one of the first passes.
        let passes = if RARE.iter().any(|rare| point.starts_with(rare)) { 3.0 } else { 12.0 };
        let fault = format!("{point}={}*off->{kind}->off", (random.share() * passes) as u32);
        // A full disk at the end, with and without waiting.
        let retry = format!("checkpoint.retry_s={}", if i % 2 == 0 { 0 } else { 20 });
        let overrides = [settings(overrides), vec![retry]].concat();
        let name = format!("fault-{i}");
        let began = Instant::now();
        let end = run_with_fault(dir.path(), &name, &fault, &overrides)
            .with_context(|| format!("fault {i} ({mode}): FAILPOINTS='{fault}'"))?;
        longest = longest.max(began.elapsed());
        *ends.entry(end).or_default() += 1;
        *injected.entry(point).or_insert(0u32) += 1;
        // After a labeler failed at every retry its pairs are missing, so that the run rightly differs.
        let same = point != "label.ask" || kind.starts_with("1*");
        compare(&dir.path().join(&name), &dir.path().join(format!("undisturbed-{mode}")), same)
            .with_context(|| format!("fault {i} ({mode}): FAILPOINTS='{fault}'"))?;
        std::fs::remove_dir_all(dir.path().join(&name))?;
    }
    let unread = count.div_ceil(20);
    for i in 0..unread {
        let overrides = settings(modes[i as usize % modes.len()].1);
        unreadable(dir.path(), "unreadable", &overrides, &mut random)
            .with_context(|| format!("unreadable file {i}"))?;
    }
    let ends: Vec<String> = ends.iter().map(|(end, count)| format!("{count} {end}")).collect();
    let least = injected.values().min().copied().unwrap_or_default();
    Ok(format!(
        "faults: {count} at {} points, at least {least} each, seed {seed}: {}; each run in the end with {GROUPS} groups trained once each and the weights and figures of an undisturbed one; the longest took {:.1} s, with a watchdog of {} s; {unread} checkpoints with an unreadable file were left as they are",
        injected.len(),
        ends.join(", "),
        longest.as_secs_f64(),
        WATCHDOG.as_secs(),
    ))
}

fn settings(overrides: &[&str]) -> Vec<String> {
    let common = [
        format!("run.steps={STEPS}"),
        "learner.eta=0".into(),
        "supervision.backoff_s=0.01".into(),
        "supervision.max_backoff_s=0.05".into(),
        format!("supervision.stall_after_s={}", WATCHDOG.as_secs_f64() / 2.0),
        format!("supervision.restart_after_s={}", WATCHDOG.as_secs_f64()),
        "supervision.halt_grace_s=4".into(),
        "checkpoint.retry_s=0".into(),
    ];
    common.into_iter().chain(overrides.iter().map(|one| (*one).to_owned())).collect()
}

/// Points that a run passes a few times at most.
const RARE: &[&str] = &["rewind.", "prepare.", "files.", "reference.", "checkpoint.", "graph."];

/// Replaces a file of the last checkpoint by a link to itself, which no user can read. `--resume` must refuse
/// repeatedly and change nothing, and continue once the file is back.
fn unreadable(dir: &Path, name: &str, overrides: &[String], random: &mut Random) -> Result<()> {
    to_the_end(&mut train(dir, name, overrides))?;
    let run = dir.join(name);
    let files =
        ["model.safetensors", "preceptor.json", "SHA256SUMS", "resume/state.postcard", "resume/optimizer.safetensors"];
    let path = last_checkpoint(&run)?.join(files[(random.share() * files.len() as f64) as usize]);
    let aside = dir.join("aside");
    std::fs::rename(&path, &aside)?;
    std::os::unix::fs::symlink(path.file_name().context("a file has a name")?, &path)?;
    let before = fingerprint(&run)?;
    for _ in 0..2 {
        let (status, text) = within(train(dir, name, overrides).arg("--resume"))?;
        ensure!(!status && text.contains("nothing was changed"), "{} was not reported: {text}", path.display());
        ensure!(fingerprint(&run)? == before, "{} cannot be read, and files were changed", path.display());
    }
    std::fs::remove_file(&path)?;
    std::fs::rename(&aside, &path)?;
    to_the_end(train(dir, name, overrides).arg("--resume"))?;
    std::fs::remove_dir_all(&run)?;
    Ok(())
}

/// Runs with the fault, and resumes without it if it ended the run. Returns a description of the end.
fn run_with_fault(dir: &Path, name: &str, fault: &str, overrides: &[String]) -> Result<&'static str> {
    let mut command = train(dir, name, overrides);
    if fault.starts_with("rewind.") {
        // The fault strikes while the finished run is rewound to its first checkpoint.
        let kept = [overrides, &["checkpoint.every_steps=1".to_owned(), "checkpoint.keep=9".to_owned()]].concat();
        to_the_end(&mut train(dir, name, &kept))?;
        let first = checkpoints(&dir.join(name))?.into_iter().next().context("it has no checkpoint")?;
        command.arg(format!("--resume={name}/checkpoints/{first}"));
    }
    let (status, text) = within(command.env("FAILPOINTS", fault))?;
    if status {
        let quiet = !text.contains("restarting the graph") && !text.contains("training continues");
        return Ok(if quiet { "finished undisturbed" } else { "finished after restarts or retries" });
    }
    // A panic prints a separate line before; only one error may follow.
    let errors = text.lines().filter(|line| line.starts_with("error: ")).count();
    ensure!(errors == 1, "the run ended with {errors} errors: {text}");
    let (status, text) = within(train(dir, name, overrides).arg("--resume"))?;
    ensure!(status, "the run could not be resumed: {text}");
    Ok("ended with one error and finished by a resume")
}

/// Runs `command` to its end, which must come within the time limit.
fn within(command: &mut Command) -> Result<(bool, String)> {
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut errors = child.stderr.take().context("standard error is piped")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut errors, &mut text).map(|_| text)
    });
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            let text = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
            return Ok((status.success(), text));
        }
        if began.elapsed() > DEADLINE {
            child.kill()?;
            let text = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
            bail!("the run hung: {text}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn compare(run: &Path, undisturbed: &Path, same: bool) -> Result<()> {
    let seqs = trained(run)?;
    ensure!(seqs == (0..GROUPS).collect::<Vec<_>>(), "groups were not trained once each, in order: {seqs:?}");
    let (a, b) = (metrics(run)?, metrics(undisturbed)?);
    ensure!(a.len() == b.len(), "{} steps are in the metrics", a.len());
    if !same {
        return Ok(());
    }
    ensure!(a == b, "the figures differ from those of an undisturbed run");
    let (a, b) = (last_checkpoint(run)?, last_checkpoint(undisturbed)?);
    for file in ["model.safetensors", "resume/optimizer.safetensors"] {
        ensure!(std::fs::read(a.join(file))? == std::fs::read(b.join(file))?, "{file} differs");
    }
    Ok(())
}

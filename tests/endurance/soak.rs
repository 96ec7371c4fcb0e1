//! Soak test: the offline run for an hour, with checks for growing memory, handles, threads and label cache.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::mock_judge::{Act, MockJudge};
use crate::run::{metrics, train};

/// Maximum number of answers in the label cache.
const MOST_LABELS: u64 = 2000;

/// Resources that a process holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    resident: u64,
    handles: usize,
    threads: usize,
    cache: u64,
}

pub fn trial(minutes: f64) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let mock = MockJudge::start(|_, _, body| {
        let p = (preceptor::util::seed::text(&body.to_string()) % 97) as f64 / 97.0;
        Act::Tokens(vec![("7", 0.2 + 0.7 * p), ("2", 0.8 - 0.7 * p)])
    });
    let cache = dir.path().join("labels");
    let overrides = [
        "run.steps=100000000".to_owned(),
        "rollout.workers=2".into(),
        "checkpoint.every_minutes=1".into(),
        "labeler.type=direct".into(),
        format!("labeler.remote={{ url = \"{}\", model = \"mock\" }}", mock.url),
        format!("labeler.cache=\"{}\"", cache.display()),
        format!("labeler.cache_entries={MOST_LABELS}"),
        // The metrics are served, as in a production node.
        "serve.enabled=true".into(),
        "serve.listen=127.0.0.1:0".into(),
    ];
    let mut child = train(dir.path(), "run", &overrides).stderr(Stdio::null()).spawn()?;
    let began = Instant::now();
    let minute = |n: f64| Duration::from_secs_f64(60.0 * n);
    // Compares the tenth minute of sixty with the last one; in a shorter trial, intervals of the same proportion.
    // Within a minute memory rises by a checkpoint's size and falls when the allocator returns it, so medians are
    // compared, not instants.
    let (early_at, part) = (minutes / 6.0, minutes / 60.0);
    let (mut early, mut last) = (Vec::new(), Vec::new());
    while began.elapsed() < minute(minutes) {
        std::thread::sleep(Duration::from_secs(1).min(minute(minutes / 200.0)));
        ensure!(child.try_wait()?.is_none(), "the run ended");
        let now = began.elapsed();
        let of = if now >= minute(minutes - part) {
            &mut last
        } else if now >= minute(early_at - part / 2.0) && now < minute(early_at + part / 2.0) {
            &mut early
        } else {
            continue;
        };
        of.push(held(child.id(), &cache)?);
    }
    let (early, last) = median(early).zip(median(last)).context("the trial was too short to look twice")?;
    ensure!(std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status()?.success(), "no kill");
    let status = child.wait()?;
    ensure!(status.success(), "the run ended with {status}");
    let steps = metrics(&dir.path().join("run"))?.len();
    let grown = last.resident as f64 / early.resident as f64 - 1.0;
    let text = format!(
        "soak: {minutes} minutes, {steps} steps; resident memory {:.1} MiB at first, {:.1} MiB at last ({:+.2} %), handles {} and {}, threads {} and {}, label cache {:.1} and {:.1} MiB",
        early.resident as f64 / 1_048_576.0,
        last.resident as f64 / 1_048_576.0,
        100.0 * grown,
        early.handles,
        last.handles,
        early.threads,
        last.threads,
        early.cache as f64 / 1_048_576.0,
        last.cache as f64 / 1_048_576.0,
    );
    ensure!(grown < 0.05, "memory grew: {text}");
    // A checkpoint or a request may be under way at either time.
    ensure!(
        last.handles <= early.handles + 8 && last.threads <= early.threads + 4,
        "something is never closed: {text}"
    );
    ensure!(last.cache <= 2 * early.cache.max(1 << 22), "the label cache grew: {text}");
    Ok(text)
}

/// Returns the median of each value.
fn median(mut seen: Vec<Held>) -> Option<Held> {
    let mut middle = |figure: fn(&Held) -> u64| {
        seen.sort_unstable_by_key(figure);
        seen.get(seen.len() / 2).map(figure)
    };
    Some(Held {
        resident: middle(|held| held.resident)?,
        handles: middle(|held| held.handles as u64)? as usize,
        threads: middle(|held| held.threads as u64)? as usize,
        cache: middle(|held| held.cache)?,
    })
}

fn held(pid: u32, cache: &Path) -> Result<Held> {
    let proc = Path::new("/proc").join(pid.to_string());
    let count = |name: &str| -> Result<usize> { Ok(std::fs::read_dir(proc.join(name))?.count()) };
    let statm = std::fs::read_to_string(proc.join("statm"))?;
    let pages: u64 = statm.split_whitespace().nth(1).context("statm has two numbers")?.parse()?;
    let cache = std::fs::metadata(cache.join("labels.sqlite")).map_or(0, |metadata| metadata.len());
    Ok(Held { resident: 4096 * pages, handles: count("fd")?, threads: count("task")?, cache })
}

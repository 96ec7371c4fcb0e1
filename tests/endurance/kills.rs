//! A long synchronous run with a remote judge that is killed repeatedly, also while it is rewound to an earlier
//! checkpoint, with refused attempts in between to resume it under another configuration.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use preceptor::pipeline::label::cache::Store;

use crate::mock_judge::{Act, MockJudge};
use crate::run::{Random, checkpoints, fingerprint, last_checkpoint, metrics, to_the_end, train, trained};

/// Number of completions that one labeler actor asks about at a time.
const AT_ONCE: u64 = 4;

pub fn trial(count: u32, seed: u64) -> Result<String> {
    let dir = tempfile::tempdir()?;
    // Number of times that each question was asked by the killed run.
    let asked: Arc<Mutex<HashMap<String, u64>>> = Arc::default();
    let seen = Arc::clone(&asked);
    let mock = MockJudge::start(move |_, path, body| {
        if path.starts_with("/v1") {
            *seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).entry(body.to_string()).or_default() += 1;
        }
        // A rating that is a function of the question.
        let p = (preceptor::util::seed::text(&body.to_string()) % 97) as f64 / 97.0;
        Act::Tokens(vec![("7", 0.2 + 0.7 * p), ("2", 0.8 - 0.7 * p)])
    });
    let steps = 100 + 40 * u64::from(count);
    let overrides = |name: &str| -> Vec<String> {
        vec![
            format!("run.steps={steps}"),
            "learner.eta=0".into(),
            "checkpoint.every_steps=2".into(),
            "labeler.type=direct".into(),
            // Without the question at start-up, so that each question that the mock receives is one of the run.
            format!("labeler.remote={{ url = \"{}\", model = \"mock\", probe = false }}", mock.url),
            format!("labeler.cache=\"{}\"", dir.path().join(name).join("labels").display()),
        ]
    };
    let uninterrupted = dir.path().join("uninterrupted");
    to_the_end(&mut train(dir.path(), "uninterrupted", &overrides("uninterrupted")))?;
    asked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();

    let (run, cache) = (dir.path().join("killed"), dir.path().join("killed/labels"));
    let mut random = Random(seed);
    let (mut kills, mut early, mut lost, mut most_lost, mut resumed) = (0, 0u32, 0u64, 0u64, 0u32);
    let (mut back, mut refused) = (0u32, 0u32);
    loop {
        // Every fourth time the run is rewound to an earlier checkpoint, and is killed sooner.
        let older = if kills % 4 == 3 && kills < count { earlier(&run, random.share())? } else { None };
        let from = older.as_ref().map_or("--resume".to_owned(), |name| format!("--resume=killed/checkpoints/{name}"));
        if kills % 8 == 5 && kills < count {
            refused += u32::from(is_refused(dir.path(), &overrides("killed"))?);
        }
        let mut child = train(dir.path(), "killed", &overrides("killed")).arg(&from).stderr(Stdio::null()).spawn()?;
        if kills < count {
            // From before the models are loaded to a dozen steps later.
            let most = if older.is_some() { 0.15 } else { 0.6 };
            std::thread::sleep(Duration::from_secs_f64(0.02 + most * random.share()));
            if child.try_wait()?.is_none() {
                child.kill()?;
                child.wait()?;
                kills += 1;
                back += u32::from(older.is_some());
                let here = last_checkpoint(&run).is_ok();
                early += u32::from(!here);
                resumed += u32::from(here);
                // A request may have been sent and not yet received.
                mock.settle();
                // Answers that arrived but were not stored, because the process died in between.
                let answers: u64 = asked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).values().sum();
                let gone = answers - kept(&cache)?;
                most_lost = most_lost.max(gone.saturating_sub(lost));
                lost = gone;
                continue;
            }
        }
        let status = child.wait()?;
        ensure!(status.success(), "the run ended with {status}, after {kills} kills");
        break;
    }
    ensure!(kills == count, "the run of {steps} steps was over after {kills} kills");

    let seqs = trained(&run)?;
    ensure!(seqs == (0..2 * steps).collect::<Vec<_>>(), "groups were not trained once each, in order: {seqs:?}");
    ensure!(metrics(&run)? == metrics(&uninterrupted)?, "the metrics differ from those of the run that was not killed");
    let (a, b) = (last_checkpoint(&uninterrupted)?, last_checkpoint(&run)?);
    for file in ["model.safetensors", "value_model/model.safetensors", "resume/optimizer.safetensors"] {
        ensure!(std::fs::read(a.join(file))? == std::fs::read(b.join(file))?, "{file} differs");
    }
    let asked = asked.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (questions, answers): (u64, u64) = (asked.len() as u64, asked.values().sum());
    let labels = kept(&cache)?;
    ensure!(labels == questions, "{questions} questions were asked and {labels} answers are kept");
    // Only questions that were in flight at a kill were asked again; stored answers were not.
    ensure!(
        answers - questions == lost,
        "{} answers were bought again, {lost} were lost in kills",
        answers - questions
    );
    ensure!(most_lost <= AT_ONCE, "{most_lost} answers were lost in one kill");
    Ok(format!(
        "kills: {kills} ({early} before the first checkpoint, {resumed} after, {back} of them while or after the run was rewound), seed {seed}; {refused} resumes as another run refused without a changed file; {steps} steps, {} groups trained once each; weights, optimizer and metrics equal those of the uninterrupted run; {labels} labels kept, none of them bought twice; {lost} answers were in flight when the process died and were asked for again (at most {most_lost} at a time)",
        seqs.len()
    ))
}

/// Returns the name of a random checkpoint before the latest, if there are several.
fn earlier(run: &Path, share: f64) -> Result<Option<String>> {
    let mut all = checkpoints(run)?;
    all.pop();
    let at = (share * all.len() as f64) as usize;
    Ok(all.into_iter().nth(at))
}

/// Tries to resume the run with another seed, which must be refused and change nothing. Returns false if it has no
/// checkpoint.
fn is_refused(dir: &Path, overrides: &[String]) -> Result<bool> {
    let run = dir.join("killed");
    // An interrupted rewind would be completed first, which changes files even if the resume is refused.
    if checkpoints(&run)?.is_empty() || run.join(".rewind").exists() || run.join(".rewind.partial").exists() {
        return Ok(false);
    }
    let (before, other) = (fingerprint(&run)?, [overrides, &["run.seed=7".to_owned()]].concat());
    let output = train(dir, "killed", &other).arg("--resume").output()?;
    ensure!(!output.status.success(), "the run was resumed as one of another seed");
    ensure!(fingerprint(&run)? == before, "a refused resume changed the run's directory");
    Ok(true)
}

/// Returns the number of answers in the label cache.
fn kept(cache: &Path) -> Result<u64> {
    if !cache.join("labels.sqlite").exists() {
        return Ok(0);
    }
    Store::open(cache, u64::MAX).context("after a kill")?.len()
}

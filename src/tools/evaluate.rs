//! Evaluation of labelers, reward models and checkpoints (Lee et al. 2023, §3).

pub mod alignment;
pub mod answers;
pub mod attacks;
pub mod harmless;
pub mod reward_accuracy;
pub mod win_rate;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, bail};

use crate::config::Config;
use crate::observe::progress::Progress;
use crate::pipeline::label::Labels;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::stage::Wants;
use crate::pipeline::topology::labelers::labeler_on;
use crate::tools::batch_label::{Annotation, Annotations, Job, Questions, annotate};
use crate::util::signals::Interrupted;

/// Stores labels in memory, in the order of the questions.
struct Kept {
    labels: Vec<Option<Labels>>,
    taken: u64,
    progress: Progress,
}

impl Annotations for Kept {
    fn take(&mut self, batch: Vec<Annotation>) -> Result<()> {
        for one in batch {
            self.labels[one.question] = Some(one.labels);
            self.taken += 1;
        }
        self.progress.at(self.taken);
        Ok(())
    }
}

/// Returns the labels of `count` questions, by the configured labeler on the backends `backends`. `what` is the
/// title of the progress bar.
///
/// # Errors
/// If the labeler fails more often than its restart budget allows, or the user interrupts.
fn judge(
    config: &Config,
    backends: &[JudgeBackend],
    questions: Arc<dyn Questions>,
    count: usize,
    wants: Wants,
    what: &str,
) -> Result<Vec<Labels>> {
    let progress = Progress::new(what, "questions", count as u64);
    let kept = Kept { labels: (0..count).map(|_| None).collect(), taken: 0, progress };
    let kept = Arc::new(Mutex::new(kept));
    let (settings, backends) = (config.clone(), backends.to_vec());
    let gave_up = Arc::new(AtomicBool::new(false));
    let job = Job {
        gave_up: Arc::clone(&gave_up),
        config: config.clone(),
        questions,
        todo: (0..count).collect(),
        batch: 4,
        wants,
        labelers: Box::new(move || labeler_on(&settings, &backends)),
    };
    let whole = annotate(job, kept.clone());
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    kept.progress.finish();
    if !whole? {
        return Err(Interrupted::new("interrupted before all questions were answered").into());
    }
    let labels: Vec<Labels> = std::mem::take(&mut kept.labels).into_iter().flatten().collect();
    if gave_up.load(Ordering::SeqCst) {
        let why = labels.iter().find_map(Labels::failure).unwrap_or("the judge did not answer");
        bail!("{what} ended: {why}");
    }
    Ok(labels)
}

//! Evaluation of labelers, reward models and checkpoints (Lee et al. 2023, §3).

pub mod alignment;
pub mod answers;
pub mod attacks;
pub mod harmless;
pub mod reward_accuracy;
pub mod win_rate;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};

use crate::config::Config;
use crate::observe::progress::Progress;
use crate::pipeline::label::Labels;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::stage::Wants;
use crate::pipeline::topology::labelers::labeler_on;
use crate::tools::batch_label::{Annotation, Annotations, Job, Questions, annotate};
use crate::util::mutex::lock;
use crate::util::signals::Interrupted;

/// Stores labels in memory, in the order of the questions.
struct CollectedLabels {
    labels: Vec<Option<Labels>>,
    count: u64,
    progress: Progress,
}

impl Annotations for CollectedLabels {
    fn take(&mut self, batch: Vec<Annotation>) -> Result<()> {
        for annotation in batch {
            self.labels[annotation.question] = Some(annotation.labels);
            self.count += 1;
        }
        self.progress.at(self.count);
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
    let collected = CollectedLabels { labels: (0..count).map(|_| None).collect(), count: 0, progress };
    let collected = Arc::new(Mutex::new(collected));
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
    let is_complete = annotate(job, collected.clone());
    let mut collected = lock(&collected);
    collected.progress.finish();
    if !is_complete? {
        return Err(Interrupted::new("interrupted before all questions were answered").into());
    }
    let labels: Vec<Labels> = std::mem::take(&mut collected.labels).into_iter().flatten().collect();
    if gave_up.load(Ordering::SeqCst) {
        let why = labels.iter().find_map(Labels::failure).unwrap_or("the judge did not answer");
        bail!("{what} ended: {why}");
    }
    Ok(labels)
}

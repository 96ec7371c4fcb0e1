//! Settings of a coordinator, the names of its queues, and the base model that workers need first.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use preceptor_actors::Admission;
use preceptor_actors::transport::QueueLimits;

use super::super::protocol::{Bounds, JudgeNotice, LoraNotice, MAX_MESSAGE, SamplingNotice};
use crate::lm::model::config::Head;
use crate::lm::model::{Decoder, export};
use crate::lm::tokens::Tokenizer;
use crate::pipeline::served::WeightStore;

/// Lease of a result. It may be long, because only the coordinator takes results and a dead one's queues are removed; and it
/// has to be long, because the first result of a group waits for the last.
const RESULT_LEASE: Duration = Duration::from_secs(3600);
/// Settings of a [`Coordinator`](super::Coordinator).
#[derive(Debug, Clone)]
pub struct CoordinatorPlan {
    /// Name of the run, which its workers join.
    pub run: String,
    /// Number of the run in the names of weights.
    pub tag: u32,
    /// Lineage of this start of the run.
    pub lineage: u64,
    /// Size of a batch, and how far work may run ahead.
    pub admission: Admission,
    /// Sampling of completions.
    pub sampling: SamplingNotice,
    /// Bounds of results.
    pub bounds: Bounds,
    /// Adapters that are trained, if not all weights are.
    pub lora: Option<LoraNotice>,
    /// Number of completions of a prompt.
    pub group_size: usize,
    /// Maximum number of completions in a piece of work, at least one.
    pub part: usize,
    /// Longest time without a sign of life of a worker.
    pub lease: Duration,
    /// A worker whose time per token is more than this multiple of the median takes no work; 0 lets all work.
    pub slowest: f64,
    /// Store of weights as workers may see it: the path of a folder, or a URL.
    pub store: String,
    /// Folder below the store with the model's configuration and tokenizer, and the SHA-256 of its list of checksums.
    pub base: (String, String),
    /// True if workers sample.
    pub samples: bool,
    /// Judges whose weights are on workers.
    pub judges: Vec<JudgeNotice>,
}

impl CoordinatorPlan {
    /// Returns the number of pieces of work of a group.
    pub fn parts(&self) -> usize {
        self.group_size.div_ceil(self.part)
    }
}

/// Names of a lineage's queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueNames {
    /// Queue of prompts.
    pub work: String,
    /// Queue of results.
    pub results: String,
    /// Queue of questions for judges.
    pub questions: String,
    /// Queue of the judges' answers.
    pub answers: String,
}

impl QueueNames {
    /// Returns the names for a lineage of a run.
    pub fn of(run: &str, lineage: u64) -> Self {
        let name = |queue: &str| format!("{run}.{lineage:016x}.{queue}");
        Self { work: name("rollout"), results: name("results"), questions: name("questions"), answers: name("answers") }
    }

    /// Returns all names.
    pub fn all(&self) -> [&String; 4] {
        [&self.work, &self.results, &self.questions, &self.answers]
    }
}

/// Stores what workers must have of `model` before its first version: its configuration and tokenizer, and its weights if
/// only adapters are trained. Returns the name of the folder and the SHA-256 of its list of checksums.
///
/// # Errors
/// If the folder cannot be written completely.
pub fn put_base(
    store: &dyn WeightStore,
    model: &Decoder,
    tokenizer: &Tokenizer,
    with_weights: bool,
) -> Result<(String, String)> {
    let form = if with_weights { "base-weights" } else { "base" };
    let name = format!("{form}-{:016x}", model.weights().fingerprint()?);
    let fill = |dir: &Path| {
        if with_weights {
            export::write(dir, model.config(), model.weights(), model.dtype())?;
        } else {
            export::write_json(&dir.join("config.json"), &model.config().to_json(Head::Language))?;
            export::write_json(&dir.join("generation_config.json"), &model.config().to_generation_json())?;
        }
        tokenizer.save(dir)
    };
    let sha256 = store.put_folder(&name, &fill)?;
    Ok((name, sha256))
}

/// Returns the limits of the queues of work and of results.
pub(super) fn limits(plan: &CoordinatorPlan) -> [QueueLimits; 2] {
    [plan.lease, RESULT_LEASE].map(|lease| QueueLimits { lease, messages: 100_000, bytes: MAX_MESSAGE })
}

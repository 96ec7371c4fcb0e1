//! Checkpoints: Hugging Face directories that are complete or absent, with all state that a resumed run needs.
//!
//! ```text
//! step-000050/
//!   config.json, model.safetensors, tokenizer…   the policy, as `transformers` opens it; adapters merged
//!   adapter/, value_model/, reward_model/        if the run has them. There is no other .safetensors at the top, because
//!                                                servers of models read all of these
//!   preceptor.json, config.toml                  description and configuration
//!   resume/state.postcard                        counters, ledger with unfinished groups, lengths of the run's files
//!   resume/….safetensors                         optimizers, gradients, and weights that the above rounds or merges
//!   SHA256SUMS                                   checksums of all these files, for `sha256sum -c`
//! ```

pub mod mirror;
pub mod read;
pub mod store;
pub mod sums;
pub mod win_rates;
pub mod write;
pub mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use mirror::Mirror;
pub use read::OpenedCheckpoint;
pub use store::{BestCheckpoint, CheckpointStore};
pub use win_rates::WinRates;
pub use write::CheckpointFormat;
pub use writer::CheckpointWriter;

use crate::pipeline::learn::{TrainState, state};
use crate::pipeline::reward::RewardTrainer;
use crate::pipeline::reward::trainer;
use crate::rl::ledger::{Ledger, SharedLedger};
use crate::util::failpoints;
use crate::util::mutex::lock;

/// Version of the checkpoint format, the only one that is read.
pub const FORMAT: u64 = 1;

/// Folder of the value model in a checkpoint.
const VALUE: &str = "value_model";
/// File of the value model in checkpoints of earlier versions of the program.
const EARLIER_VALUE: &str = "value_model.safetensors";

/// Properties other than the configuration that a run and its checkpoint must share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Fingerprint of the reference policy π_ref.
    pub reference: u64,
    /// Hash of the data, see [`crate::pipeline::data::Dataset::identity`].
    pub data: u64,
}

/// Hashes of the contents behind the names in `[labeler]` (template files, preamble files, weights), by key.
pub type JudgeContents = BTreeMap<String, String>;

/// Lengths in bytes of the run's files at a checkpoint. Later bytes belong to steps that a resumed run repeats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// Length of `metrics.jsonl`.
    pub metrics: u64,
    /// Length of `samples.jsonl`.
    pub samples: u64,
    /// Length of `phases.jsonl`.
    pub phases: u64,
    /// Length of `journal.bin`.
    pub journal: u64,
}

/// State of a run between two steps, which can be written while the run continues.
pub struct Snapshot {
    /// State of the learner.
    pub learner: state::Saved,
    /// State of the reward model, if the run has one.
    pub reward_model: Option<trainer::Saved>,
    /// The ledger. The reward model has been trained on exactly its rewarded groups.
    pub ledger: Ledger,
    /// Lengths of the run's files.
    pub lengths: Lengths,
    /// Files that are synced before the checkpoint is renamed into place.
    pub files: Vec<PathBuf>,
    /// Value of the figure that selects the best checkpoint.
    pub figure: Option<f64>,
}

impl Snapshot {
    /// Takes a snapshot. The caller holds the lock of `state`, which is between two steps.
    ///
    /// # Errors
    /// If the state cannot be copied, for example for lack of memory.
    pub fn take(
        state: &TrainState,
        reward_model: Option<&Mutex<RewardTrainer>>,
        ledger: &SharedLedger,
        (lengths, files): (Lengths, Vec<PathBuf>),
        figure: Option<f64>,
    ) -> Result<Self> {
        failpoints::point("checkpoint.snapshot")?;
        // The reward stage writes into the ledger while it holds its model, so both are read under the same lock.
        let trainer = reward_model.map(|trainer| lock(trainer));
        let ledger = ledger.copy();
        let reward_model = trainer.map(|trainer| trainer.save()).transpose()?;
        Ok(Self { learner: state.save()?, reward_model, ledger, lengths, files, figure })
    }

    /// Returns the step of the snapshot.
    pub fn step(&self) -> u64 {
        self.learner.counters.step
    }
}

/// Contents of `resume/state.postcard`.
#[derive(Serialize, Deserialize)]
struct StoredState {
    identity: Identity,
    learner: state::Counters,
    reward_model: Option<trainer::Counters>,
    ledger: Ledger,
    lengths: Lengths,
}

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct WrittenCheckpoint {
    /// Directory of the checkpoint.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Time that writing took.
    pub took: Duration,
}

//! A checkpoint: a Hugging Face directory that is complete or not there at all, with all that it takes to go on from it.
//!
//! ```text
//! step-000050/
//!   config.json, model.safetensors, tokenizer…   the policy, as `transformers` opens it; adapters merged
//!   adapter/, value_model/, reward_model/        where there are such. At the top there is no other .safetensors: programs
//!                                                that serve models read all they find there
//!   preceptor.json, config.toml                  what it is, to read
//!   resume/state.postcard                        counters, the ledger with the groups under way, lengths of the run's files
//!   resume/….safetensors                         optimizers, gradients, and weights that the above rounds or merges
//!   SHA256SUMS                                   of all these, as `sha256sum -c` reads it
//! ```

pub mod mirror;
pub mod read;
pub mod shelf;
pub mod sums;
pub mod win_rates;
pub mod write;
pub mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use mirror::Mirror;
pub use read::Opened;
pub use shelf::{Best, CheckpointStore};
pub use win_rates::WinRates;
pub use write::CheckpointFormat;
pub use writer::Writer;

use crate::pipeline::learn::{TrainState, state};
use crate::pipeline::reward::RewardTrainer;
use crate::pipeline::reward::trainer;
use crate::rl::ledger::{Ledger, SharedLedger};
use crate::util::failpoints;

/// The format that this program writes, and the only one that it reads.
pub const FORMAT: u64 = 1;

/// The folder of the value model in a checkpoint.
const VALUE: &str = "value_model";
/// Its file in checkpoints of earlier programs.
const EARLIER_VALUE: &str = "value_model.safetensors";

/// What a run must have in common with a checkpoint to go on from it, besides its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Fingerprint of π_ref.
    pub reference: u64,
    /// That of the data, see [`crate::pipeline::data::Dataset::identity`].
    pub data: u64,
}

/// Hashes of the contents behind the names in `[labeler]` (template files, preamble files, weights), by key.
pub type JudgeContents = BTreeMap<String, String>;

/// Bytes of the run's files that belong to the steps up to a checkpoint; what is beyond is of steps that are taken again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// `metrics.jsonl`
    pub metrics: u64,
    /// `samples.jsonl`
    pub samples: u64,
    /// `phases.jsonl`
    pub phases: u64,
    /// `journal.bin`
    pub journal: u64,
}

/// A run at the end of a step, to be written while it goes on.
pub struct Snapshot {
    /// The learner.
    pub learner: state::Saved,
    /// The reward model, where there is one.
    pub reward_model: Option<trainer::Saved>,
    /// The ledger; its rewarded groups are those that the reward model has seen.
    pub ledger: Ledger,
    /// Of the run's files.
    pub lengths: Lengths,
    /// These files, to be on the disk before the checkpoint is.
    pub files: Vec<PathBuf>,
    /// The figure that the best checkpoint is chosen by.
    pub figure: Option<f64>,
}

impl Snapshot {
    /// The run as it is. `state` is between two steps, and the caller holds it.
    ///
    /// # Errors
    /// When memory for what has to be copied cannot be had.
    pub fn take(
        state: &TrainState,
        reward_model: Option<&Mutex<RewardTrainer>>,
        book: &SharedLedger,
        (lengths, files): (Lengths, Vec<PathBuf>),
        figure: Option<f64>,
    ) -> Result<Self> {
        failpoints::point("checkpoint.snapshot")?;
        // The reward actor writes into the ledger while it holds its model, so the two belong together here.
        let trainer = reward_model.map(|trainer| trainer.lock().unwrap_or_else(PoisonError::into_inner));
        let ledger = book.copy();
        let reward_model = trainer.map(|trainer| trainer.save()).transpose()?;
        Ok(Self { learner: state.save()?, reward_model, ledger, lengths, files, figure })
    }

    /// The step it is of.
    pub fn step(&self) -> u64 {
        self.learner.counters.step
    }
}

/// What is written as `resume/state.postcard`.
#[derive(Serialize, Deserialize)]
struct Stored {
    identity: Identity,
    learner: state::Counters,
    reward_model: Option<trainer::Counters>,
    ledger: Ledger,
    lengths: Lengths,
}

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The directory.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

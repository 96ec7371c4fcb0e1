//! AI feedback: a frozen model says how good a completion is.

pub mod direct;
pub mod embedding;
pub mod likelihood;
pub mod stage;

use std::sync::Arc;

use anyhow::Result;

use crate::model::Llama;
use crate::rollout::{Group, Verdict};
use crate::tokens::Tokenizer;

/// A frozen model that judges.
#[derive(Clone)]
pub struct Judge {
    /// The model; its weights never change.
    pub model: Arc<Llama>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Fingerprint of its weights.
    pub identity: u64,
    /// Whether prompts for it go through its chat template.
    pub chat: bool,
}

/// What a labeler returns for a group.
pub struct Labels {
    /// One verdict per completion.
    pub verdicts: Vec<Verdict>,
    /// Per token log-probabilities of the completions under the judge, where they fell off anyway.
    pub logprobs: Option<Vec<Vec<f32>>>,
}

/// A way to turn a group into verdicts.
pub trait Labeler: Send {
    /// The name that metrics and samples give it.
    fn name(&self) -> &'static str;

    /// Hash of the template it asks with; zero where it asks with none.
    fn template(&self) -> u64 {
        0
    }

    /// Identity of the model it runs.
    fn model(&self) -> u64;

    /// Judges every completion of `group`.
    ///
    /// # Errors
    /// When the judge could not be asked; the caller retries, then masks the group.
    fn label(&self, group: &Group) -> Result<Labels>;
}

//! The interface between labelers and language models, local or behind a server.

use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::shape::Shape;
use crate::util::limit::AdjustableLimit;

/// One question with a closed set of answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ask {
    /// Complete prompt as text; the backend wraps it in a chat template if the model needs one.
    pub prompt: String,
    /// Possible continuations, without leading space, such as `1` and `2`.
    pub answers: Vec<String>,
}

/// Sampling settings for free text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decoding {
    /// Maximum number of tokens, at least one.
    pub max_tokens: usize,
    /// Sampling temperature; zero decodes greedily.
    pub temperature: f64,
    /// Sample among the `k` most likely tokens only; `None` samples among all.
    pub top_k: Option<usize>,
    /// Seed of the samples. Each prompt has its own random stream; equal prompts of one call have different streams.
    pub seed: u64,
}

/// Reason for a missing answer. It is never turned into a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoAnswer {
    /// The model was reached but did not or could not decide; asking again would not help.
    Abstention(String),
    /// The model could not be asked; asking again may help.
    Failure(String),
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abstention(why) => write!(f, "abstained: {why}"),
            Self::Failure(why) => write!(f, "failed: {why}"),
        }
    }
}

/// An answer, or the reason why it is missing.
pub type Reply<T> = Result<T, NoAnswer>;

/// Requests, tokens and cost of judge calls. Values add up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Number of answers computed or bought, retries included.
    pub requests: u64,
    /// Number of answers found in the label cache.
    pub cached: u64,
    /// Number of prompt tokens; a shared prefix that was computed once counts once.
    pub prompt_tokens: u64,
    /// Number of generated tokens.
    pub completion_tokens: u64,
    /// Cost, in the currency of the configured prices.
    pub cost: f64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.cached += other.cached;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.cost += other.cost;
    }
}

/// Callback that is called with a note while a judge is waited for, as a sign of life of the waiting actor. Returns
/// whether the actor still wants the answer, which is false once its graph was halted.
pub type Alive = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// A language model that is used as a judge.
pub trait Backend: Send + Sync {
    /// Returns an identifier of the model: a fingerprint of its weights, or a hash of its address and name.
    fn identity(&self) -> u64;

    /// Returns hashes of everything except the questions that determines this model's answers. The label cache uses
    /// them as part of its keys. Unlike [`Self::identity`], they do not include the model's address.
    fn shape(&self) -> Shape;

    /// Registers `alive`, under the actor's name, as the callback to call while an unavailable judge is waited for.
    fn register_liveness(&self, _name: &str, _alive: &Alive) {}

    /// Returns whether a failure is only reported after waiting, so that asking again at once does not help. True if
    /// the model is behind a server.
    fn waits(&self) -> bool {
        false
    }

    /// Returns the model name that the server reports; `None` if the model is local, the server has not answered yet,
    /// or any model may answer.
    fn reported_model(&self) -> Option<String> {
        None
    }

    /// Returns a description of how answers become probabilities (log-probabilities or votes); `None` if the model is
    /// local or its server has not answered yet.
    fn evidence(&self) -> Option<String> {
        None
    }

    /// Returns the adjustable limit of concurrent requests if the backend is a server.
    fn concurrency_limit(&self) -> Option<Arc<AdjustableLimit>> {
        None
    }

    /// Precomputes the common prefix of `examples`, prompts of one template whose filled-in texts have nothing in common.
    /// Does nothing if the backend cannot share prefixes.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    fn warm(&self, _examples: &[String]) -> anyhow::Result<()> {
        Ok(())
    }

    /// Returns the probability of each answer as the next text after each prompt, not renormalised over the answers. If
    /// one answer is a prefix of another (`1` of `10`), the longer one's probability is excluded from the shorter
    /// one's. One reply per question, in order.
    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>>;

    /// Generates a continuation of each prompt, in order.
    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>>;
}

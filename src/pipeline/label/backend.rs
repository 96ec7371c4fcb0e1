//! What a labeler needs of a language model, whether its weights are here or behind a server.

use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::shape::Shape;
use crate::util::limit::AdjustableLimit;

/// One question with a closed set of answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ask {
    /// All that the model is told, as text; the backend puts it into a chat where the model wants one.
    pub prompt: String,
    /// What may come next, as texts without leading space, such as `1` and `2`.
    pub answers: Vec<String>,
}

/// How free text is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// Most tokens, at least one.
    pub max_tokens: usize,
    /// Sampling temperature; zero takes the most likely token.
    pub temperature: f64,
    /// Draw among this many of the likeliest tokens only; absent draws among all.
    pub top_k: Option<usize>,
    /// Seed of the draws. Each prompt draws from a stream of its own, equal prompts of a call from different ones.
    pub seed: u64,
}

/// Why there is no answer. Never turned into a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoAnswer {
    /// The model was reached and would not, or cannot, decide; asking again would not help.
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

/// An answer, or why there is none.
pub type Reply<T> = Result<T, NoAnswer>;

/// What asking took. Adds up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Answers that were computed or bought, retries included.
    pub requests: u64,
    /// Answers that the label cache had.
    pub cached: u64,
    /// Tokens read; a prefix that was computed once and shared counts once.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// Money, in the currency of the configured prices.
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

/// Called with a note while a judge is waited for, as a sign of life of the actor that waits. Returns whether the actor
/// still wants the answer: not once its graph was halted.
pub type Alive = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// A language model that judges.
pub trait Backend: Send + Sync {
    /// Tells this model from others: a fingerprint of its weights, or a hash of its address and name.
    fn identity(&self) -> u64;

    /// Everything besides the questions that shapes this model's answers, by which the label cache keeps them. Unlike the
    /// identity it leaves out where the model is.
    fn shape(&self) -> Shape;

    /// Whom to give a sign of life, by name, while the judge is away and is waited for.
    fn attend(&self, _name: &str, _alive: &Alive) {}

    /// Whether a failure was waited for already, so that asking again at once does not help: the model is behind a server.
    fn waits(&self) -> bool {
        false
    }

    /// The model that answers, by the name that its server reports; `None` where it is here, has not answered yet, or may be
    /// any.
    fn reported_model(&self) -> Option<String> {
        None
    }

    /// How answers become probabilities (log-probabilities or votes), in words; `None` where the model is local or its server
    /// has not answered yet.
    fn evidence(&self) -> Option<String> {
        None
    }

    /// How many exchanges may be under way at once, where it is a server that is asked.
    fn knob(&self) -> Option<Arc<AdjustableLimit>> {
        None
    }

    /// Given prompts of one template that differ as much as its prompts will: what they begin with need be computed
    /// once only. Does nothing where there is nothing to save.
    ///
    /// # Errors
    /// A prompt that cannot be read.
    fn warm(&self, _examples: &[String]) -> anyhow::Result<()> {
        Ok(())
    }

    /// The probability of each answer as the next text after each prompt, not renormalised over the answers.
    /// Where one answer's text begins another's (`1` begins `10`), the shorter one's probability is that of the
    /// shorter one alone. One reply per ask, in order.
    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>>;

    /// Text that continues each prompt, in order.
    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>>;
}

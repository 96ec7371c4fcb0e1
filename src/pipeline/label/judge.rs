//! Judges of labelers: a model in this process, a sentence encoder, a model on workers, or a model behind a server.

use std::sync::Arc;

use super::backend::Backend;
use super::cache::{Cached, Store};
use super::embedding::Embedding;
use super::local::Local;
use super::workers::WorkerJudge;
use crate::lm::tokens::Tokenizer;

/// Judge that a labeling method uses, local or on a server.
#[derive(Clone)]
pub enum JudgeBackend {
    /// A language model in this process.
    Model(Arc<Local>),
    /// A sentence encoder.
    Embedder(Embedding),
    /// A language model in this process, behind the label cache.
    Cached {
        /// The model without the cache.
        local: Arc<Local>,
        /// The model behind the label cache.
        backend: Arc<dyn Backend>,
    },
    /// A language model whose weights are on workers.
    OnWorkers {
        /// The model without the label cache.
        judge: Arc<WorkerJudge>,
        /// The label cache, if there is one.
        cache: Option<Arc<Store>>,
    },
    /// A language model behind a server, with or without the label cache.
    Asked(Arc<dyn Backend>),
}

impl JudgeBackend {
    /// Returns an identifier of the judge: a fingerprint of its weights, or a hash of the server and its model.
    pub fn identity(&self) -> u64 {
        match self {
            Self::Model(local) | Self::Cached { local, .. } => local.judge().identity,
            Self::Embedder(embedding) => embedding.identity,
            Self::OnWorkers { judge, .. } => judge.facts.identity,
            Self::Asked(backend) => backend.identity(),
        }
    }

    /// Returns the language model that answers questions in text; `None` for a sentence encoder.
    pub fn backend(&self) -> Option<Arc<dyn Backend>> {
        Some(match self {
            Self::Model(local) => Arc::clone(local) as _,
            Self::Cached { backend, .. } | Self::Asked(backend) => Arc::clone(backend),
            Self::OnWorkers { judge, cache: None } => Arc::clone(judge) as _,
            Self::OnWorkers { judge, cache: Some(store) } => {
                Arc::new(Cached::new(Arc::clone(judge) as _, Arc::clone(store)))
            }
            Self::Embedder(_) => return None,
        })
    }

    /// Returns the same judge for askers outside of the run's graph, such as evaluations.
    #[must_use]
    pub fn outside_graph(&self) -> Self {
        match self {
            Self::OnWorkers { judge, cache } => {
                Self::OnWorkers { judge: Arc::new(judge.outside_graph()), cache: cache.clone() }
            }
            Self::Embedder(Embedding { embedder, identity }) => {
                let embedder = embedder.outside_graph().unwrap_or_else(|| Arc::clone(embedder));
                Self::Embedder(Embedding { embedder, identity: *identity })
            }
            Self::Model(_) | Self::Cached { .. } | Self::Asked(_) => self.clone(),
        }
    }

    /// Returns the model if its weights are in this process.
    pub fn local(&self) -> Option<&Arc<Local>> {
        match self {
            Self::Model(local) | Self::Cached { local, .. } => Some(local),
            Self::Embedder(_) | Self::OnWorkers { .. } | Self::Asked(_) => None,
        }
    }

    /// Returns the tokenizer of a language model whose files are known.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        match self {
            Self::Model(local) | Self::Cached { local, .. } => Some(&local.judge().tokenizer),
            Self::OnWorkers { judge, .. } => judge.facts.tokenizer.as_ref(),
            Self::Embedder(_) | Self::Asked(_) => None,
        }
    }

    /// Returns the maximum number of tokens that a language model reads, and whether its questions are in chat format, if its
    /// files are known.
    pub fn context_and_chat(&self) -> Option<(usize, bool)> {
        match self {
            Self::Model(local) | Self::Cached { local, .. } => {
                Some((local.judge().model.config().context, local.judge().chat))
            }
            Self::OnWorkers { judge, .. } => Some((judge.facts.context, judge.facts.chat)),
            Self::Embedder(_) | Self::Asked(_) => None,
        }
    }
}

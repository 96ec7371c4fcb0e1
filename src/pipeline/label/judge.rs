//! The judges that labelers ask: a model in this process, a sentence encoder, or a model on a server.

use std::sync::Arc;

use super::backend::Backend;
use super::embedding::Embedding;
use super::local::Local;

/// Judge that a labeling method asks.
#[derive(Clone)]
pub enum JudgeBackend {
    /// A language model whose weights are here.
    Model(Arc<Local>),
    /// A sentence encoder.
    Embedder(Embedding),
    /// A language model whose weights are here and whose answers are kept.
    Cached {
        /// The model.
        local: Arc<Local>,
        /// The same behind the label cache.
        backend: Arc<dyn Backend>,
    },
    /// A language model on a server, with or without the label cache before it.
    Asked(Arc<dyn Backend>),
}

impl JudgeBackend {
    /// Tells the judge from others: a fingerprint of its weights, or a hash of the server and the model there.
    pub fn identity(&self) -> u64 {
        match self {
            Self::Model(local) | Self::Cached { local, .. } => local.judge().identity,
            Self::Embedder(embedding) => embedding.identity,
            Self::Asked(backend) => backend.identity(),
        }
    }

    /// The model, where its weights are here.
    pub fn local(&self) -> Option<&Arc<Local>> {
        match self {
            Self::Model(local) | Self::Cached { local, .. } => Some(local),
            Self::Embedder(_) | Self::Asked(_) => None,
        }
    }
}

//! The hand-over of weights to servers that sample, while the run trains.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::supervise::run_interruptible;
use crate::config::Config;
use crate::lm::precision;
use crate::pipeline::served::{Fleet, FolderStore};
use crate::pipeline::topology::Node;
use crate::util::exit::refusal;

/// Stops the hand-over of weights to servers when it is dropped.
pub(super) struct HandOver(Arc<Fleet>);

impl HandOver {
    /// Hands the published weights of `node` to the servers that sample, and compares their log-probabilities with the
    /// policy's. `None` if this process samples. `run` is the run's directory.
    ///
    /// # Errors
    /// If a server does not take the weights, or has another model.
    pub(super) async fn start(config: &Config, node: &Node, run: &Path) -> Result<Option<Self>> {
        let Some(fleet) = node.fleet.clone() else { return Ok(None) };
        let rollout = &config.rollout;
        let dir = rollout.weights_dir.clone().unwrap_or_else(|| run.join("served"));
        let base = config.policy.model.name_at(&node.prepared.origin);
        let dtype = precision::dtype(config.checkpoint.dtype);
        let store = FolderStore::new(&dir, rollout.server_weights_dir.as_deref(), base, dtype)
            .context("rollout.weights_dir")?;
        let hand_over = Self(Arc::clone(&fleet));
        let cell = Arc::clone(&node.cell);
        let start = move || fleet.start(&cell, Arc::new(store));
        run_interruptible("handing the weights to the rollout servers", start).await.map_err(refusal)?;
        Ok(Some(hand_over))
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        self.0.stop();
    }
}

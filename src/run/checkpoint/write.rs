//! Writes the contents of a checkpoint's directory.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::json;

use super::{FORMAT, Identity, JudgeContents, Snapshot, StoredState, VALUE, sums};
use crate::config::Config;
use crate::lm::model::export;
use crate::lm::tokens::Tokenizer;
use crate::util::disk;
use kernels::Frozen;

/// Contents that all checkpoints of a run share.
pub struct CheckpointFormat {
    /// Tokenizer of the policy.
    pub tokenizer: Tokenizer,
    /// Name of the model that the policy started from, for the configuration of adapters.
    pub base: Option<String>,
    /// Number format of the weights that other programs open.
    pub dtype: DType,
    /// The resolved configuration, as TOML.
    pub config: String,
    /// Identity of the policy's reference and of the data.
    pub identity: Identity,
    /// Hashes of the judge's contents, by key.
    pub judge: JudgeContents,
    /// Name of the figure that selects the best checkpoint.
    pub best: Option<String>,
}

impl CheckpointFormat {
    /// Creates the format of a run's checkpoints. `tokenizer` is that of the policy, and `origin` describes where the
    /// policy was loaded from.
    pub fn new(
        config: &Config,
        (tokenizer, origin): (Tokenizer, &str),
        dtype: DType,
        identity: Identity,
        judge: JudgeContents,
    ) -> Self {
        let base = config.policy.model.name_at(origin);
        Self { tokenizer, base, dtype, config: config.to_toml(), identity, judge, best: config.checkpoint.best.clone() }
    }

    /// Writes a checkpoint of `snapshot` to `dir`, an empty directory. Returns its size in bytes.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn fill(&self, dir: &Path, snapshot: &Snapshot) -> Result<u64> {
        let learner = &snapshot.learner;
        let (policy, exact) = (&learner.policy, self.dtype == DType::F32);
        let resume = dir.join("resume");
        std::fs::create_dir_all(&resume).with_context(|| format!("cannot create {}", resume.display()))?;
        export::write(dir, policy.config(), &policy.merged()?, self.dtype)?;
        if let Some(lora) = policy.lora() {
            lora.write(&dir.join("adapter"), policy.weights(), self.base.as_deref())?;
        }
        if !exact || policy.lora().is_some() {
            save(&resume.join("policy.safetensors"), &learner.params)?;
        }
        save(&resume.join("optimizer.safetensors"), &learner.optimizer)?;
        self.tokenizer.save(dir)?;
        if let Some(value) = &learner.value {
            let place = dir.join(VALUE);
            std::fs::create_dir_all(&place).with_context(|| format!("cannot create {}", place.display()))?;
            save(&place.join("model.safetensors"), value)?;
            save(&resume.join("value_optimizer.safetensors"), &learner.value_optimizer)?;
        }
        if let Some(saved) = &snapshot.reward_model {
            saved.model.save(&dir.join("reward_model"), &self.tokenizer, self.dtype)?;
            save(&resume.join("reward_optimizer.safetensors"), &saved.state)?;
            if !exact {
                let weights = saved.model.weights().0.into_iter();
                let weights: Vec<_> = weights.map(|(name, tensor)| (name, tensor.into())).collect();
                save(&resume.join("reward_model.safetensors"), &weights)?;
            }
        }
        let stored = StoredState {
            identity: self.identity.clone(),
            learner: learner.counters.clone(),
            reward_model: snapshot.reward_model.as_ref().map(|saved| saved.counters.clone()),
            ledger: snapshot.ledger.clone(),
            lengths: snapshot.lengths,
        };
        let path = resume.join("state.postcard");
        std::fs::write(&path, postcard::to_stdvec(&stored)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        std::fs::write(dir.join("config.toml"), &self.config)
            .with_context(|| format!("cannot write {}", dir.join("config.toml").display()))?;
        export::write_json(&dir.join("preceptor.json"), &self.description(snapshot)?)?;
        sums::write_sums(dir)
    }

    /// Returns the contents of `preceptor.json`.
    fn description(&self, snapshot: &Snapshot) -> Result<serde_json::Value> {
        use sha2::{Digest, Sha256};
        Ok(json!({
            "format": FORMAT,
            "program": concat!("preceptor ", env!("CARGO_PKG_VERSION")),
            "step": snapshot.step(),
            "policy": format!("{:016x}", snapshot.learner.policy.weights().fingerprint()?),
            "reference": format!("{:016x}", self.identity.reference),
            "data": format!("{:016x}", self.identity.data),
            "judge": self.judge,
            "config_sha256": sums::hex(&Sha256::digest(&self.config)),
            "groups": snapshot.ledger.count(),
            "best": self.best.as_ref().map(|name| json!({ "figure": name, "value": snapshot.figure })),
        }))
    }
}

/// Writes named tensors to a safetensors file.
fn save(path: &Path, tensors: &[(String, Frozen)]) -> Result<()> {
    safetensors::serialize_to_file(tensors.iter().map(|(name, one)| (name, one)), None, path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    disk::open_to_umask(path)
}

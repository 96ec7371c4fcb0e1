//! Opens a checkpoint and restores a run from it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::sums::Damage;
use super::{EARLIER_VALUE, FORMAT, Identity, JudgeContents, Lengths, StoredState, VALUE, store, sums};
use crate::pipeline::learn::TrainState;
use crate::pipeline::learn::state::Restored;
use crate::pipeline::reward::RewardTrainer;
use crate::rl::ledger::Ledger;
use crate::util::disk;
use crate::util::mutex::lock;

/// A checkpoint whose checksums have been verified.
pub struct OpenedCheckpoint {
    path: PathBuf,
    config: String,
    judge: JudgeContents,
    stored: StoredState,
}

/// Error for a checkpoint of another format, which is not damaged but cannot be read by this version of the program.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OtherFormat(String);

impl OpenedCheckpoint {
    /// Opens the checkpoint at `path` and verifies all its checksums.
    ///
    /// # Errors
    /// [`Damage`] names the file that differs from the one that was written; [`OtherFormat`] reports another format.
    /// Any other error means that a file could not be read, and says nothing about the checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let found = disk::exists(path)?;
        ensure!(found, "{} does not exist{}", path.display(), store::aside_hint(path));
        let about = path.join("preceptor.json");
        if let Err(error) = sums::verify(path) {
            // Another format may have no checksums, or different ones.
            if error.downcast_ref::<Damage>().is_some() && !disk::exists(&path.join(sums::NAME))? {
                let text = std::fs::read_to_string(&about).unwrap_or_default();
                let other: Value = serde_json::from_str(&text).unwrap_or_default();
                if other["format"].as_u64().is_some_and(|format| format != FORMAT) {
                    return Err(other_format(path, &other).into());
                }
            }
            return Err(error);
        }
        let text = std::fs::read_to_string(&about).map_err(|error| disk::cannot("read", &about, error))?;
        let description: Value = serde_json::from_str(&text).unwrap_or_default();
        if description["format"].as_u64() != Some(FORMAT) {
            return Err(other_format(path, &description).into());
        }
        let state = path.join("resume/state.postcard");
        let stored = std::fs::read(&state).map_err(|error| disk::cannot("read", &state, error))?;
        let stored: StoredState =
            postcard::from_bytes(&stored).map_err(|error| anyhow!("{} cannot be decoded: {error}", state.display()))?;
        ensure!(
            store::step(path).is_none_or(|step| step == stored.learner.step),
            "{} is the checkpoint of step {}, which differs from its name; rename it to {} or move it away",
            path.display(),
            stored.learner.step,
            store::name(stored.learner.step)
        );
        let config = path.join("config.toml");
        let config = std::fs::read_to_string(&config).map_err(|error| disk::cannot("read", &config, error))?;
        // Earlier versions of the program did not record the judge.
        let judge = serde_json::from_value(description["judge"].clone()).unwrap_or_default();
        Ok(Self { path: path.to_owned(), config, judge, stored })
    }

    /// Returns the directory of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the step of the checkpoint.
    pub fn step(&self) -> u64 {
        self.stored.learner.step
    }

    /// Returns the configuration under which the checkpoint was written, as TOML.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// Returns the hashes of the judge's contents; empty if an earlier version of the program wrote the checkpoint.
    pub fn judge(&self) -> &JudgeContents {
        &self.judge
    }

    /// Returns the lengths of the run's files at the checkpoint.
    pub fn lengths(&self) -> Lengths {
        self.stored.lengths
    }

    /// Checks that a run of `identity` may continue from the checkpoint.
    ///
    /// # Errors
    /// If the data or the initial policy differ.
    pub fn check_identity(&self, identity: &Identity) -> Result<()> {
        let place = self.path.display();
        ensure!(
            identity.data == self.stored.identity.data,
            "the data set is not the one that {place} was trained on; restore the old file, or start a new run from its weights with policy.model = \"{place}\""
        );
        ensure!(
            identity.reference == self.stored.identity.reference,
            "the model that the policy starts from is not the one that {place} was trained from; restore the old one, or start a new run from its weights with policy.model = \"{place}\""
        );
        Ok(())
    }

    /// Restores the learner and the reward model from the checkpoint, and returns its ledger.
    ///
    /// # Errors
    /// Names the file that cannot be read or the tensor that does not fit; also if only one of run and checkpoint has a
    /// reward model.
    pub fn restore(&self, state: &mut TrainState, reward_model: Option<&Mutex<RewardTrainer>>) -> Result<Ledger> {
        let exact = self.path.join("resume/policy.safetensors");
        let policy = if exact.exists() { exact } else { self.path.join("model.safetensors") };
        let value = self.path.join(VALUE).join("model.safetensors");
        let value = if value.exists() { value } else { self.path.join(EARLIER_VALUE) };
        let (value, value_optimizer) = if value.exists() {
            (Some(load(&value)?), load(&self.path.join("resume/value_optimizer.safetensors"))?)
        } else {
            (None, HashMap::new())
        };
        let optimizer = load(&self.path.join("resume/optimizer.safetensors"))?;
        let tensors = Restored { params: load(&policy)?, optimizer, value, value_optimizer };
        state
            .restore(&self.stored.learner, tensors)
            .with_context(|| format!("{} does not fit this run", self.path.display()))?;
        match (reward_model, &self.stored.reward_model) {
            (None, None) => {}
            (Some(trainer), Some(counters)) => {
                let exact = self.path.join("resume/reward_model.safetensors");
                let weights = if exact.exists() { exact } else { self.path.join("reward_model/model.safetensors") };
                let optimizer = load(&self.path.join("resume/reward_optimizer.safetensors"))?;
                let mut trainer = lock(trainer);
                trainer
                    .restore(counters.clone(), &load(&weights)?, &optimizer)
                    .with_context(|| format!("{} does not fit this run", weights.display()))?;
            }
            (own, _) => {
                let (asks, has) = if own.is_some() { ("a", "none") } else { ("no", "one") };
                anyhow::bail!("the run has {asks} reward model, and {} has {has}", self.path.display());
            }
        }
        Ok(self.stored.ledger.clone())
    }
}

/// Returns the error for a checkpoint whose `description` names another format.
fn other_format(path: &Path, description: &Value) -> OtherFormat {
    let (written, program) = match description["format"].as_u64() {
        None => ("an older format".to_owned(), "another version of this program".to_owned()),
        Some(n) => (format!("format {n}"), description["program"].as_str().unwrap_or_default().to_owned()),
    };
    OtherFormat(format!(
        "{} is in {written}, and this program reads format {FORMAT}; resume with {program}, or start a new run from its weights with policy.model = \"{}\"",
        path.display(),
        path.display()
    ))
}

fn load(path: &Path) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(path, &Device::Cpu).with_context(|| format!("cannot read {}", path.display()))
}

//! Going on from a checkpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::sums::Damage;
use super::{EARLIER_VALUE, FORMAT, Identity, JudgeContents, Lengths, Stored, VALUE, store, sums};
use crate::pipeline::learn::TrainState;
use crate::pipeline::learn::state::Restored;
use crate::pipeline::reward::RewardTrainer;
use crate::rl::ledger::Ledger;
use crate::util::disk;

/// A checkpoint that is whole.
pub struct Opened {
    path: PathBuf,
    config: String,
    judge: JudgeContents,
    stored: Stored,
}

/// A checkpoint of another format: no damage, but not for this program.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(String);

impl Opened {
    /// Opens the checkpoint at `path`, once all its checksums are found right.
    ///
    /// # Errors
    /// [`Damage`] names the file that is not as it was written; [`Unreadable`] says that the checkpoint is of another format.
    /// Any other error says that a file could not be read, and nothing about the checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let found = disk::exists(path)?;
        ensure!(found, "{} does not exist{}", path.display(), store::set_aside_as(path));
        let about = path.join("preceptor.json");
        if let Err(error) = sums::verify(path) {
            // Another format may have no checksums, or others.
            if error.downcast_ref::<Damage>().is_some() && !disk::exists(&path.join(sums::NAME))? {
                let text = std::fs::read_to_string(&about).unwrap_or_default();
                let other: Value = serde_json::from_str(&text).unwrap_or_default();
                if other["format"].as_u64().is_some_and(|format| format != FORMAT) {
                    return Err(unreadable(path, &other).into());
                }
            }
            return Err(error);
        }
        let text = std::fs::read_to_string(&about).map_err(|error| disk::cannot("read", &about, error))?;
        let description: Value = serde_json::from_str(&text).unwrap_or_default();
        if description["format"].as_u64() != Some(FORMAT) {
            return Err(unreadable(path, &description).into());
        }
        let state = path.join("resume/state.postcard");
        let stored = std::fs::read(&state).map_err(|error| disk::cannot("read", &state, error))?;
        let stored: Stored = postcard::from_bytes(&stored)
            .map_err(|error| anyhow!("{} cannot be understood: {error}", state.display()))?;
        ensure!(
            store::step(path).is_none_or(|step| step == stored.learner.step),
            "{} is the checkpoint of step {}, not of the one that it is named after; rename it to {} or move it away",
            path.display(),
            stored.learner.step,
            store::name(stored.learner.step)
        );
        let config = path.join("config.toml");
        let config = std::fs::read_to_string(&config).map_err(|error| disk::cannot("read", &config, error))?;
        // Checkpoints from before it was noted have none.
        let judge = serde_json::from_value(description["judge"].clone()).unwrap_or_default();
        Ok(Self { path: path.to_owned(), config, judge, stored })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its step.
    pub fn step(&self) -> u64 {
        self.stored.learner.step
    }

    /// The configuration that it was written under.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// Hashes of what its labeler used; empty where the program that wrote it did not note them.
    pub fn judge(&self) -> &JudgeContents {
        &self.judge
    }

    /// Bytes of the run's files that belong to it.
    pub fn lengths(&self) -> Lengths {
        self.stored.lengths
    }

    /// Whether a run of `identity` may go on from it.
    ///
    /// # Errors
    /// Says what is another.
    pub fn suits(&self, identity: &Identity) -> Result<()> {
        let place = self.path.display();
        ensure!(
            identity.data == self.stored.identity.data,
            "the data set is not the one that {place} was trained on; put the old file back, or start a new run from its weights with policy.model = \"{place}\""
        );
        ensure!(
            identity.reference == self.stored.identity.reference,
            "the model that the policy starts from is not the one that {place} was trained from; put the old one back, or start a new run from its weights with policy.model = \"{place}\""
        );
        Ok(())
    }

    /// Puts learner and reward model into the state of the checkpoint, and gives its ledger.
    ///
    /// # Errors
    /// Names the file and the tensor that do not fit.
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
                let mut trainer = trainer.lock().unwrap_or_else(PoisonError::into_inner);
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

/// The error of a checkpoint whose `description` names another format.
fn unreadable(path: &Path, description: &Value) -> Unreadable {
    let (written, program) = match description["format"].as_u64() {
        None => ("an older format".to_owned(), "another version of this program".to_owned()),
        Some(n) => (format!("format {n}"), description["program"].as_str().unwrap_or_default().to_owned()),
    };
    Unreadable(format!(
        "{} is in {written}, and this program reads format {FORMAT}; resume with {program}, or start a new run from its weights with policy.model = \"{}\"",
        path.display(),
        path.display()
    ))
}

fn load(path: &Path) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(path, &Device::Cpu).with_context(|| format!("cannot read {}", path.display()))
}

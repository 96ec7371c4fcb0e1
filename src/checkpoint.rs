//! A checkpoint: a Hugging Face directory that is complete or not there at all.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::json;

use crate::learn::TrainState;
use crate::model::export;
use crate::reward::RewardTrainer;
use crate::tokens::Tokenizer;

/// Where a run's checkpoints go, and how.
pub struct Checkpoints {
    dir: PathBuf,
    tokenizer: Tokenizer,
    dtype: DType,
    keep: usize,
}

impl Checkpoints {
    /// Checkpoints under `run_dir/checkpoints`, weights written as `dtype`, the last `keep` kept.
    pub fn new(run_dir: &Path, tokenizer: Tokenizer, dtype: DType, keep: usize) -> Self {
        Self { dir: run_dir.join("checkpoints"), tokenizer, dtype, keep }
    }

    /// Writes the state after its last step, and the reward model as it stands into `reward_model/` in it; returns
    /// the directory. Written aside, synced, then renamed, so
    /// that whatever happens in between leaves no half of one.
    ///
    /// # Errors
    /// Names what could not be written, with the room there is and the room it takes.
    pub fn write(&self, state: &TrainState, reward_model: Option<&Mutex<RewardTrainer>>) -> Result<PathBuf> {
        let name = format!("step-{:06}", state.step);
        let (aside, done) = (self.dir.join(format!(".{name}.partial")), self.dir.join(&name));
        if done.exists() {
            return Ok(done);
        }
        let written = self.fill(&aside, state, reward_model).and_then(|()| {
            std::fs::rename(&aside, &done).with_context(|| format!("cannot rename {} into place", aside.display()))?;
            std::fs::File::open(&self.dir)?.sync_all().with_context(|| format!("cannot sync {}", self.dir.display()))
        });
        if let Err(error) = written {
            // What was written aside is of no use; if it cannot be removed either, the first error says more.
            let _ = std::fs::remove_dir_all(&aside);
            let need = (state.config().parameters() * self.dtype.size_in_bytes()) >> 20;
            return Err(error.context(format!(
                "the checkpoint of step {} was not written; it takes about {need} MiB in {}",
                state.step,
                self.dir.display()
            )));
        }
        self.prune();
        Ok(done)
    }

    fn fill(&self, dir: &Path, state: &TrainState, reward_model: Option<&Mutex<RewardTrainer>>) -> Result<()> {
        if dir.exists() {
            std::fs::remove_dir_all(dir).with_context(|| format!("cannot clear {}", dir.display()))?;
        }
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        export::write(dir, state.config(), &state.model.merged()?, self.dtype)?;
        if let Some(lora) = state.model.lora() {
            lora.write(&dir.join("adapter"), state.model.weights())?;
        }
        self.tokenizer.save(dir)?;
        if let Some(value) = &state.value {
            let path = dir.join("value_model.safetensors");
            let tensors = value.tensors().into_iter().collect();
            candle_core::safetensors::save(&tensors, &path)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        if let Some(trainer) = reward_model {
            let trainer = trainer.lock().unwrap_or_else(PoisonError::into_inner);
            trainer.model().save(&dir.join("reward_model"), &self.tokenizer, self.dtype)?;
        }
        let state = json!({ "step": state.step, "program": concat!("preceptor ", env!("CARGO_PKG_VERSION")) });
        export::write_json(&dir.join("preceptor.json"), &state)
    }

    /// Removes all but the last few. A checkpoint that cannot be removed only costs room.
    fn prune(&self) {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return };
        let mut steps: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-")))
            .collect();
        steps.sort();
        for old in steps.iter().take(steps.len().saturating_sub(self.keep.max(1))) {
            if let Err(error) = std::fs::remove_dir_all(old) {
                tracing::warn!("cannot remove the old checkpoint {}: {error}", old.display());
            }
        }
    }
}

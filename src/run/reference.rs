//! The fine-tuned policy, kept beside the run: what it is reinforced from and measured against.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::{Value, json};

use super::files::RunFiles;
use crate::checkpoint::sums;
use crate::config::Config;
use crate::model::{Decoder, Lora, Weights, export};
use crate::prepare::Prepared;
use crate::say;
use crate::topology::learning::lora;

/// Its directory in the run's.
const NAME: &str = "reference";

/// In it, the adapters that it was tuned through.
const ADAPTER: &str = "adapter";

/// A fine-tuned policy that an earlier process left.
pub(super) struct Reference {
    path: PathBuf,
    /// Bytes of `phases.jsonl` that tell how it came about.
    pub(super) phases: u64,
}

/// The one in the run's directory, where the configuration asks for fine-tuning and it is done.
///
/// # Errors
/// One that is damaged.
pub(super) fn find(config: &Config, run: &Path) -> Result<Option<Reference>> {
    let path = run.join(NAME);
    if config.sft.steps == 0 || !path.exists() {
        return Ok(None);
    }
    sums::verify(&path).with_context(|| format!("remove {} to fine-tune again", path.display()))?;
    let text = std::fs::read_to_string(path.join("preceptor.json"))?;
    let phases = serde_json::from_str::<Value>(&text)?["phases_bytes"].as_u64().unwrap_or_default();
    Ok(Some(Reference { path, phases }))
}

/// Keeps the fine-tuned policy: the whole directory or none.
///
/// # Errors
/// Names what cannot be written.
pub(super) fn keep(prepared: &Prepared, files: &mut RunFiles) -> Result<()> {
    let (lengths, _) = files.lengths()?;
    let (aside, path) = (files.dir().join(format!(".{NAME}.partial")), files.dir().join(NAME));
    if aside.exists() {
        std::fs::remove_dir_all(&aside).with_context(|| format!("cannot clear {}", aside.display()))?;
    }
    std::fs::create_dir_all(&aside).with_context(|| format!("cannot make {}", aside.display()))?;
    export::write(&aside, prepared.policy.config(), &prepared.policy.merged()?, DType::F32)?;
    prepared.tokenizer.save(&aside)?;
    if let Some(lora) = prepared.policy.lora() {
        lora.write(&aside.join(ADAPTER), prepared.policy.weights())?;
    }
    export::write_json(&aside.join("preceptor.json"), &json!({ "phases_bytes": lengths.phases }))?;
    sums::seal(&aside)?;
    std::fs::rename(&aside, &path).with_context(|| format!("cannot rename {} into place", aside.display()))?;
    File::open(files.dir())?.sync_all().with_context(|| format!("cannot sync {}", files.dir().display()))
}

impl Reference {
    /// Puts it into the policy's place.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub(super) fn take(&self, config: &Config, prepared: Prepared) -> Result<Prepared> {
        let mut policy = match lora(config) {
            None => {
                let (shape, weights) = Weights::from_directory(&self.path, prepared.policy.device())?;
                Decoder::new(&shape, &weights)?
            }
            // Beside the matrices that they were tuned beside, which training goes on to share.
            Some((lora, _)) => {
                let mut weights = prepared.policy.weights().clone();
                weights.0.extend(Lora::read(&self.path.join(ADAPTER), prepared.policy.device())?.0);
                Decoder::with_adapters(prepared.policy.config(), &weights, Some(&lora))?
            }
        };
        policy.checkpoint_activations(config.learner.activation_checkpointing);
        let identity = policy.weights().fingerprint()?;
        say!("reference {}", self.path.display());
        Ok(Prepared { policy: Arc::new(policy), identity, ..prepared })
    }
}

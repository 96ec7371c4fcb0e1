//! The fine-tuned policy, stored in the run's directory: the start of reinforcement learning and the reference of its
//! KL.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::DType;
use serde_json::{Value, json};

use super::files::RunFiles;
use crate::config::Config;
use crate::lm::model::{Decoder, LoadTarget, Lora, Weights, export};
use crate::lm::precision;
use crate::observe::telemetry;
use crate::pipeline::setup::Prepared;
use crate::pipeline::topology::learning::lora;
use crate::run::checkpoint::sums::{self, Damage};
use crate::run::checkpoint::{CheckpointStore, Identity};
use crate::status;
use crate::util::disk;
use crate::util::failpoints;

/// Folder of the reference in a run's directory.
const NAME: &str = "reference";

/// Folder of the adapters in the folder of the reference.
const ADAPTER: &str = "adapter";

/// A fine-tuned policy that an earlier process stored.
pub(super) struct Reference {
    path: PathBuf,
    /// Length of `phases.jsonl` in bytes after fine-tuning.
    pub(super) phases: u64,
}

/// Removes a partly written reference of a process that was killed or whose disk was full.
///
/// # Errors
/// Names the directory that cannot be removed.
pub(super) fn remove_partial(run: &Path) -> Result<()> {
    let partial = run.join(format!(".{NAME}.partial"));
    match std::fs::remove_dir_all(&partial) {
        Err(error) if !disk::is_absence(&error) => Err(disk::cannot("remove", &partial, error)),
        _ => Ok(()),
    }
}

/// Returns the directory of the reference of the run in `run`.
pub(super) fn directory(run: &Path) -> PathBuf {
    run.join(NAME)
}

/// Returns a description of the reference for comparison: fingerprints of model and data before fine-tuning, and the
/// section `[sft]`.
fn origin(config: &Config, base: &Identity) -> Result<Value> {
    let config: toml::Table = config.to_toml().parse()?;
    Ok(json!({
        "model": format!("{:016x}", base.reference),
        "data": format!("{:016x}", base.data),
        "sft": config.get("sft"),
    }))
}

/// Returns the stored result of fine-tuning `base` in the run's directory, or `None` if the configuration does not ask
/// for fine-tuning or it is not completed.
///
/// # Errors
/// If the result is damaged, or was made from another model, data set or configuration.
pub(super) fn find(config: &Config, base: &Identity, run: &Path) -> Result<Option<Reference>> {
    let path = directory(run);
    if config.sft.steps == 0 || !disk::exists(&path)? {
        return Ok(None);
    }
    sums::verify(&path).map_err(|error| match error.downcast::<Damage>() {
        Ok(damage) => anyhow!("{damage}; restore an undamaged copy of {}, or remove it to fine-tune again if the run has no checkpoint yet", path.display()),
        Err(error) => error,
    })?;
    let about = path.join("preceptor.json");
    let text = std::fs::read_to_string(&about).map_err(|error| disk::cannot("read", &about, error))?;
    let about: Value = serde_json::from_str(&text)?;
    let origin = origin(config, base)?;
    ensure!(
        about["origin"] == origin,
        "{} was fine-tuned from other inputs: from {}, but the run asks for {origin}; restore these inputs, or remove it to fine-tune again",
        path.display(),
        about["origin"]
    );
    Ok(Some(Reference { path, phases: about["phases_bytes"].as_u64().unwrap_or_default() }))
}

/// Stores the policy that was fine-tuned from `base`, as a complete directory or not at all.
///
/// # Errors
/// Names the file that cannot be written.
pub(super) fn save(config: &Config, base: &Identity, prepared: &Prepared, files: &mut RunFiles) -> Result<()> {
    let (lengths, _) = files.lengths()?;
    let run = files.dir();
    remove_partial(run)?;
    let written = write(config, base, prepared, run, lengths.phases);
    if written.is_err() {
        // The first error is more informative than one of this removal.
        let _ = remove_partial(run);
    }
    written
}

fn write(config: &Config, base: &Identity, prepared: &Prepared, run: &Path, phases: u64) -> Result<()> {
    let (partial, path) = (run.join(format!(".{NAME}.partial")), directory(run));
    std::fs::create_dir_all(&partial).map_err(|error| disk::cannot("make", &partial, error))?;
    failpoints::point("reference.fill")?;
    export::write(&partial, prepared.policy().config(), &prepared.policy().merged()?, DType::F32)?;
    prepared.tokenizer.save(&partial)?;
    if let Some(lora) = prepared.policy().lora() {
        let base = config.policy.model.name_at(&prepared.origin);
        lora.write(&partial.join(ADAPTER), prepared.policy().weights(), base.as_deref())?;
    }
    let about = json!({ "phases_bytes": phases, "origin": origin(config, base)? });
    export::write_json(&partial.join("preceptor.json"), &about)?;
    sums::write_sums(&partial)?;
    std::fs::rename(&partial, &path).with_context(|| format!("cannot rename {} into place", partial.display()))?;
    disk::sync(run)
}

/// Copies the reference of `run` to the mirror of `store`, unless the mirror has a copy. Logs a failure.
pub(super) fn mirror(run: &Path, store: &CheckpointStore) {
    let path = directory(run);
    if path.exists()
        && let Err(error) = store.mirror_directory(&path)
    {
        telemetry::disk_error();
        status!("{error:#}; the original is in {}, and the end of the run tries again", path.display());
    }
}

impl Reference {
    /// Replaces the policy of `prepared` by the stored one.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub(super) fn load_into(&self, config: &Config, prepared: Prepared) -> Result<Prepared> {
        let mut policy = match lora(config) {
            None => {
                let onto =
                    LoadTarget { device: prepared.policy().device(), dtype: precision::dtype(config.policy.dtype) };
                let (shape, weights) = Weights::from_directory(&self.path, onto)?;
                Decoder::new(&shape, &weights)?
            }
            // Adapters share the base model's matrices with the original policy, in training as in fine-tuning.
            Some((lora, _)) => {
                let mut weights = prepared.policy().weights().clone();
                weights.0.extend(Lora::read(&self.path.join(ADAPTER), prepared.policy().device())?.0);
                Decoder::with_adapters(prepared.policy().config(), &weights, Some(&lora))?
            }
        };
        policy = policy.to_dtype(precision::dtype(config.policy.dtype))?;
        policy.checkpoint_activations(config.learner.activation_checkpointing);
        let identity = policy.weights().fingerprint()?;
        status!("reference {}", self.path.display());
        Ok(Prepared { policy: Some(Arc::new(policy)), identity, ..prepared })
    }
}

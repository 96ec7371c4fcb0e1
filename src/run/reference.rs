//! The fine-tuned policy, kept beside the run: what it is reinforced from and measured against.

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

/// Removes what a process that was killed, or whose disk was full, left of it half written.
///
/// # Errors
/// Names what cannot be removed.
pub(super) fn sweep(run: &Path) -> Result<()> {
    let aside = run.join(format!(".{NAME}.partial"));
    match std::fs::remove_dir_all(&aside) {
        Err(error) if !disk::is_absence(&error) => Err(disk::cannot("remove", &aside, error)),
        _ => Ok(()),
    }
}

/// Where it stands in the run's directory.
pub(super) fn place(run: &Path) -> PathBuf {
    run.join(NAME)
}

/// What it is made of, to be compared: the model and the data that it was tuned from and on, and how.
fn origin(config: &Config, base: &Identity) -> Result<Value> {
    let config: toml::Table = config.to_toml().parse()?;
    Ok(json!({
        "model": format!("{:016x}", base.reference),
        "data": format!("{:016x}", base.data),
        "sft": config.get("sft"),
    }))
}

/// The one in the run's directory, where the configuration asks for fine-tuning and it is done; `base` is what it is tuned
/// from and on.
///
/// # Errors
/// One that is damaged, or of another origin.
pub(super) fn find(config: &Config, base: &Identity, run: &Path) -> Result<Option<Reference>> {
    let path = place(run);
    if config.sft.steps == 0 || !disk::exists(&path)? {
        return Ok(None);
    }
    sums::verify(&path).map_err(|error| match error.downcast::<Damage>() {
        Ok(damage) => anyhow!("{damage}; put an undamaged copy of {} back, or remove it to fine-tune again where the run has no checkpoint yet", path.display()),
        Err(error) => error,
    })?;
    let about = path.join("preceptor.json");
    let text = std::fs::read_to_string(&about).map_err(|error| disk::cannot("read", &about, error))?;
    let about: Value = serde_json::from_str(&text)?;
    let origin = origin(config, base)?;
    ensure!(
        about["origin"] == origin,
        "{} was fine-tuned otherwise: it is of {}, and the run asks for {origin}; put that back, or remove it to fine-tune again",
        path.display(),
        about["origin"]
    );
    Ok(Some(Reference { path, phases: about["phases_bytes"].as_u64().unwrap_or_default() }))
}

/// Keeps the fine-tuned policy, tuned from and on `base`: the whole directory or none.
///
/// # Errors
/// Names what cannot be written.
pub(super) fn keep(config: &Config, base: &Identity, prepared: &Prepared, files: &mut RunFiles) -> Result<()> {
    let (lengths, _) = files.lengths()?;
    let run = files.dir();
    sweep(run)?;
    let written = write(config, base, prepared, run, lengths.phases);
    if written.is_err() {
        // It is of no use; the first error says more than one of this would.
        let _ = sweep(run);
    }
    written
}

fn write(config: &Config, base: &Identity, prepared: &Prepared, run: &Path, phases: u64) -> Result<()> {
    let (aside, path) = (run.join(format!(".{NAME}.partial")), place(run));
    std::fs::create_dir_all(&aside).map_err(|error| disk::cannot("make", &aside, error))?;
    failpoints::point("reference.fill")?;
    export::write(&aside, prepared.policy().config(), &prepared.policy().merged()?, DType::F32)?;
    prepared.tokenizer.save(&aside)?;
    if let Some(lora) = prepared.policy().lora() {
        let base = config.policy.model.name_at(&prepared.origin);
        lora.write(&aside.join(ADAPTER), prepared.policy().weights(), base.as_deref())?;
    }
    let about = json!({ "phases_bytes": phases, "origin": origin(config, base)? });
    export::write_json(&aside.join("preceptor.json"), &about)?;
    sums::seal(&aside)?;
    std::fs::rename(&aside, &path).with_context(|| format!("cannot rename {} into place", aside.display()))?;
    disk::sync(run)
}

/// Copies what `run` has of it to the mirror of `shelf`, if there is one that has no copy yet.
pub(super) fn copy(run: &Path, shelf: &CheckpointStore) {
    let path = place(run);
    if path.exists()
        && let Err(error) = shelf.copy_beside(&path)
    {
        telemetry::disk_error();
        status!("{error:#}; the original is in {}, and the end of the run tries again", path.display());
    }
}

impl Reference {
    /// Puts it into the policy's place.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub(super) fn take(&self, config: &Config, prepared: Prepared) -> Result<Prepared> {
        let mut policy = match lora(config) {
            None => {
                let onto =
                    LoadTarget { device: prepared.policy().device(), dtype: precision::dtype(config.policy.dtype) };
                let (shape, weights) = Weights::from_directory(&self.path, onto)?;
                Decoder::new(&shape, &weights)?
            }
            // Beside the matrices that they were tuned beside, which training goes on to share.
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

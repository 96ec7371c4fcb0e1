//! Judges whose weights go from the coordinator into the run's store, where workers read them.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;

use super::protocol::JudgeNotice;
use crate::lm::model::export;
use crate::pipeline::label::workers::{JudgeWeights, UnplacedJudge, WorkerJudges};
use crate::pipeline::served::WeightStore;
use crate::util::seed::{self, mix};

/// Puts the weights of `judges` into `store`, frees them here, and returns what workers must know of them.
/// `matmul_precision` is that of `policy.matmul_precision`.
///
/// # Errors
/// If a folder cannot be written completely.
pub fn put_judges(judges: &WorkerJudges, store: &dyn WeightStore, matmul_precision: &str) -> Result<Vec<JudgeNotice>> {
    judges.take().into_iter().map(|judge| put(judge, store, matmul_precision)).collect()
}

fn put(unplaced: UnplacedJudge, store: &dyn WeightStore, matmul_precision: &str) -> Result<JudgeNotice> {
    let (name, fingerprint, dtype, sha256) = match &unplaced.weights {
        JudgeWeights::Language(judge) => {
            let (model, tokenizer) = (&judge.model, &judge.tokenizer);
            let fingerprint = model.weights().fingerprint()?;
            // Models of equal weights may differ in the chat template.
            let template = tokenizer.chat_template().unwrap_or_default();
            let name = format!("judge-{:016x}", mix(fingerprint ^ seed::text(template)));
            let fill = |dir: &Path| {
                export::write(dir, model.config(), model.weights(), model.dtype())?;
                tokenizer.save(dir)
            };
            let sha256 = store.put_folder(&name, &fill)?;
            (name, fingerprint, model.dtype(), sha256)
        }
        JudgeWeights::Encoder(dir) => {
            let fingerprint = unplaced.judge.facts.identity;
            let name = format!("judge-{fingerprint:016x}");
            let sha256 = store.put_folder(&name, &|to| copy(dir, to))?;
            (name, fingerprint, DType::F32, sha256)
        }
    };
    unplaced.judge.place(&name);
    Ok(JudgeNotice {
        name,
        sha256,
        encodes: matches!(unplaced.weights, JudgeWeights::Encoder(_)),
        fingerprint,
        dtype: dtype.as_str().to_owned(),
        matmul_precision: matmul_precision.to_owned(),
        chat: unplaced.judge.facts.chat,
        chat_template_kwargs: unplaced.settings.kwargs,
        date: unplaced.settings.date,
    })
}

/// Copies the files of a model.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry?.path();
        let of_model =
            path.extension().is_some_and(|end| ["json", "safetensors", "txt"].iter().any(|known| end == *known));
        if let Some(name) = path.file_name().filter(|_| of_model && path.is_file()) {
            std::fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

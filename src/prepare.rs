//! Everything that can go wrong before compute is spent: models, tokenizers, data, lengths.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::Device;

use crate::config::{Config, LabelerKind, PolicyModel, Scratch};
use crate::data::{Dataset, OnLong, PromptFormat};
use crate::label::Judge;
use crate::model::{Llama, ModelConfig, Weights};
use crate::source::{self, ModelFiles, ModelRef, ResolveOptions};
use crate::tokens::Tokenizer;

/// Models and data, ready to train with.
pub struct Prepared {
    /// The policy as it starts; also the reference.
    pub policy: Arc<Llama>,
    /// Fingerprint of its weights.
    pub identity: u64,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Who judges.
    pub judge: Judge,
    /// The prompts.
    pub data: Arc<Dataset>,
    /// Where the policy came from, in words.
    pub origin: String,
}

/// Resolves and loads all that `config` names. `progress` shows downloads.
///
/// # Errors
/// The first thing that is missing or does not fit, with its remedy.
pub fn prepare(config: &Config, progress: bool) -> Result<Prepared> {
    let device = device(&config.policy.device)?;
    let timeout = Duration::from_secs(config.policy.resolve_timeout_s);
    let (policy, tokenizer, origin) = match &config.policy.model {
        PolicyModel::Scratch(scratch) => {
            let tokenizer = Tokenizer::bytes();
            let shape = scratch_shape(scratch, &tokenizer);
            shape.validate().context("policy.model.scratch does not fit together")?;
            let weights = Weights::scratch(&shape, scratch.init_std, scratch.seed, &device)?;
            (Llama::new(&shape, &weights)?, tokenizer, "made from scratch".to_owned())
        }
        PolicyModel::Reference(reference) => {
            load(reference, &device, timeout, progress).context("policy.model cannot be loaded")?
        }
    };
    let policy = Arc::new(policy);
    let identity = policy.weights().fingerprint()?;
    let judge = match &config.labeler.model {
        None => Judge { model: Arc::clone(&policy), tokenizer: tokenizer.clone(), identity, chat: config.data.chat },
        Some(reference) => {
            let (model, judge_tokenizer, _) =
                load(reference, &device, timeout, progress).context("labeler.model cannot be loaded")?;
            ensure!(
                config.labeler.kind != LabelerKind::Likelihood || same_vocabulary(&tokenizer, &judge_tokenizer)?,
                "labeler.type = \"likelihood\" reads the policy's tokens, but labeler.model has another vocabulary; use a labeler of the policy's family, or labeler.type = \"direct\""
            );
            let identity = model.weights().fingerprint()?;
            let chat = config.data.chat && judge_tokenizer.has_chat_template();
            Judge { model: Arc::new(model), tokenizer: judge_tokenizer, identity, chat }
        }
    };
    let context = policy.config().context.min(judge.model.config().context);
    let new = config.rollout.max_new_tokens;
    ensure!(
        new < context,
        "rollout.max_new_tokens = {new} leaves no room for a prompt in the model's context of {context} tokens"
    );
    let format = prompt_format(config);
    ensure!(
        !format.chat || tokenizer.has_chat_template(),
        "data.chat = true, but the model has no chat template; set data.chat = false"
    );
    let limit = config.data.max_prompt_tokens.min(context - new);
    let on_long = if config.data.on_long == crate::config::OnLong::Skip { OnLong::Skip } else { OnLong::Error };
    let data = Dataset::read(&config.data.path, &format, &tokenizer, limit, on_long)?;
    if data.skipped > 0 {
        tracing::warn!("{} prompts longer than {limit} tokens are left out", data.skipped);
    }
    let data = if config.data.shuffle { data.shuffled(config.run.seed) } else { data };
    Ok(Prepared { policy, identity, tokenizer, judge, data: Arc::new(data), origin })
}

/// How the configuration makes prompts of texts.
pub fn prompt_format(config: &Config) -> PromptFormat {
    PromptFormat {
        field: config.data.prompt_field.clone(),
        instruction: config.data.instruction.clone(),
        chat: config.data.chat,
        system: config.data.system.clone(),
    }
}

/// Finds, reads and builds the model that `reference` names; also tells where it came from.
///
/// # Errors
/// When no candidate can be had, or what was found cannot be read.
pub fn load(
    reference: &ModelRef,
    device: &Device,
    timeout: Duration,
    progress: bool,
) -> Result<(Llama, Tokenizer, String)> {
    let options = ResolveOptions { timeout, progress, ..ResolveOptions::default() };
    let resolved = source::resolve(reference, &options)?;
    let (config, weights) = match &resolved.files {
        ModelFiles::Gguf(path) => Weights::from_gguf(path, device)?,
        ModelFiles::Directory(dir) => Weights::from_directory(dir, device)?,
    };
    let model = Llama::new(&config, &weights).with_context(|| format!("in {}", resolved.origin))?;
    let tokenizer = Tokenizer::from_files(&resolved.files)?;
    Ok((model, tokenizer, resolved.origin))
}

/// The device that `name` means.
///
/// # Errors
/// When this build or this machine has no such device.
pub fn device(name: &str) -> Result<Device> {
    match name.strip_prefix("cuda:") {
        None => Ok(Device::Cpu),
        Some(ordinal) => Device::new_cuda(ordinal.parse()?).with_context(|| {
            format!("policy.device = \"{name}\" cannot be had; this build may lack CUDA: use \"cpu\"")
        }),
    }
}

fn scratch_shape(scratch: &Scratch, tokenizer: &Tokenizer) -> ModelConfig {
    ModelConfig {
        hidden_size: scratch.hidden,
        intermediate_size: scratch.intermediate,
        layers: scratch.layers,
        heads: scratch.heads,
        kv_heads: scratch.kv_heads,
        head_dim: scratch.hidden / scratch.heads.max(1),
        vocab_size: tokenizer.vocab_size(),
        context: scratch.context,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tied: true,
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_ids().to_vec(),
    }
}

fn same_vocabulary(a: &Tokenizer, b: &Tokenizer) -> Result<bool> {
    let probe = "The quick brown fox, 12345 times: naïve — façade!\n";
    Ok(a.vocab_size() == b.vocab_size() && a.encode(probe)? == b.encode(probe)?)
}

//! How each section is read: defaults, ranges, and what is said when they are not kept.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use toml::Value;

use super::operation::{Checkpoint, Control, Evaluation, Guard, GuardAction, Serve, Supervision, WeightDtype};
use super::reader::{Document, Read, Section};
use super::sections::{
    AlgorithmKind, AverageKind, CorrectionKind, Data, DpoLoss, KlEstimator, KlPlace, LabelForm, Learner, LoraConfig,
    MatmulPrecision, Mode, OnLong, Policy, PolicyModel, Reward, RewardModel, RewardScaling, Rollout, RolloutWeights,
    Run, Schedule, Scratch, Sft, UpdateMode, ValueKind,
};
use crate::source::{Candidate, ModelRef};

const WORKERS: &str = "from 1 to 1024";

pub(super) fn workers(section: &mut Section<'_>, key: &'static str) -> usize {
    section.checked(key, 1, WORKERS, |n| (1..=1024).contains(n))
}

pub(super) fn capacity(section: &mut Section<'_>) -> usize {
    count(section, "capacity", 2, 1 << 16)
}

/// Most tokens of anything.
pub(super) const TOKENS: usize = 1 << 24;
/// Most groups, pairs or passes of anything.
const MANY: u64 = 1 << 20;

/// A number from 1 to `most`: above that memory is not to be had, or sums overflow.
pub(super) fn count<T>(section: &mut Section<'_>, key: &'static str, default: T, most: T) -> T
where
    T: Read + std::fmt::Display + PartialOrd + From<u8>,
{
    section.checked(key, default, &format!("from 1 to {most}"), |n| *n >= T::from(1) && *n <= most)
}

pub(super) fn run(document: &mut Document) -> Run {
    let mut s = document.section("run");
    let named = s.has("name");
    let name = s.required::<String>("name", "a name for the run");
    if named && name.is_empty() {
        s.error("name", "it is empty; it names the folder that the run is written to");
    }
    if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_') {
        s.error("name", &format!("{name:?} may hold small letters, digits, - and _ only; it names a folder"));
    }
    let steps = if s.has("steps") {
        count(&mut s, "steps", 1, 1 << 40)
    } else {
        s.required("steps", "the number of learner steps")
    };
    let mode = s.choice("mode", Mode::Direct);
    let tensorboard = s.get("tensorboard", true);
    Run {
        name,
        mode,
        seed: s.get("seed", 0),
        steps,
        tensorboard,
        samples_max_bytes: s.get("samples_max_bytes", 256 << 20),
        samples_keep: s.checked("samples_keep", 3, "at most 1000", |n| *n <= 1000),
        dir: s.optional::<String>("dir").map(PathBuf::from),
    }
}

pub(super) fn data(document: &mut Document, folder: &Path) -> Data {
    let mut s = document.section("data");
    let path = folder.join(s.required::<String>("path", "a file of JSON lines, or of parquet"));
    if path != folder && !path.is_file() {
        s.error("path", &format!("there is no file {}", path.display()));
    }
    let instruction: String = s.get("instruction", "{{ prompt }}".to_owned());
    if !instruction.contains("prompt") {
        s.error("instruction", "does not mention {{ prompt }}: every prompt would be the same");
    }
    Data {
        path,
        prompt_field: s.get("prompt_field", "prompt".to_owned()),
        reference_field: s.get("reference_field", "reference".to_owned()),
        holdout: s.checked("holdout", 0.0, "from 0 to below 1", |n| (0.0..1.0).contains(n)),
        instruction,
        chat: s.get("chat", true),
        system: s.optional("system"),
        shuffle: s.get("shuffle", true),
        max_prompt_tokens: count(&mut s, "max_prompt_tokens", 512, TOKENS),
        on_long: s.choice("on_long", OnLong::Error),
    }
}

pub(super) fn policy(document: &mut Document, folder: &Path) -> Policy {
    let scratch =
        matches!(document.peek("policy", "model"), Some(Value::Table(table)) if table.contains_key("scratch"));
    let model = if scratch {
        PolicyModel::Scratch(scratch_model(document))
    } else {
        let mut s = document.section("policy");
        let model = reference(&mut s, folder);
        if model.is_none() {
            s.error("model", "is missing or wrong; give a path, { pip = \"name==version\" }, { hub = \"owner/name\" }, a list of these, or { scratch = { … } }");
        }
        return rest_of_policy(s, PolicyModel::Reference(model.unwrap_or(ModelRef(Vec::new()))));
    };
    let mut s = document.section("policy");
    s.raw("model");
    rest_of_policy(s, model)
}

fn rest_of_policy(mut s: Section<'_>, model: PolicyModel) -> Policy {
    let device = device(&mut s).unwrap_or_else(|| "cpu".to_owned());
    let dtype = s.choice("dtype", WeightDtype::F32);
    let matmul_precision = s.choice("matmul_precision", MatmulPrecision::Highest);
    let resolve_timeout_s = count(&mut s, "resolve_timeout_s", 20, 86_400);
    Policy { model, device, dtype, matmul_precision, resolve_timeout_s, lora: lora(&mut s) }
}

/// The section's key `device`.
pub(super) fn device(s: &mut Section<'_>) -> Option<String> {
    let named = s.optional::<String>("device");
    if let Some(name) = named.as_ref().filter(|name| !is_device(name)) {
        s.error("device", &no_device(name));
    }
    named
}

fn is_device(name: &str) -> bool {
    name == "cpu" || matches!(name.strip_prefix("cuda:").map(str::parse::<usize>), Some(Ok(_)))
}

fn no_device(name: &str) -> String {
    format!("{name:?} is neither \"cpu\" nor \"cuda:N\"")
}

fn lora(s: &mut Section<'_>) -> Option<LoraConfig> {
    const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let mut s = s.inner("lora")?;
    let rank = count(&mut s, "rank", 16, 1 << 16);
    let alpha = s.checked("alpha", 2.0 * rank as f64, "above 0", |n| *n > 0.0);
    let targets: Vec<String> = s.get("targets", TARGETS.map(str::to_owned).to_vec());
    match targets.iter().find(|target| !TARGETS.contains(&target.as_str())) {
        Some(wrong) => s.error("targets", &format!("{wrong:?} is none of {}", TARGETS.join(", "))),
        None if targets.is_empty() => s.error("targets", "is empty; leave it out for all matrices"),
        None => {}
    }
    Some(LoraConfig { rank, alpha, targets })
}

fn scratch_model(document: &mut Document) -> Scratch {
    let mut s = document.nested("policy", "model", "scratch");
    let size = |s: &mut Section<'_>, key, default| count(s, key, default, 1 << 16);
    let scratch = Scratch {
        hidden: size(&mut s, "hidden", 64),
        layers: size(&mut s, "layers", 2),
        heads: size(&mut s, "heads", 4),
        kv_heads: size(&mut s, "kv_heads", 2),
        intermediate: size(&mut s, "intermediate", 176),
        context: count(&mut s, "context", 1024, TOKENS),
        seed: s.get("seed", 0),
        init_std: s.checked("init_std", 0.02, "above 0", |n| *n > 0.0),
    };
    if !scratch.heads.is_multiple_of(scratch.kv_heads) {
        s.error("kv_heads", &format!("{} does not divide heads = {}", scratch.kv_heads, scratch.heads));
    }
    if !scratch.hidden.is_multiple_of(2 * scratch.heads) {
        s.error("hidden", &format!("{} is no even multiple of heads = {}", scratch.hidden, scratch.heads));
    }
    scratch
}

/// The model that `model` names; paths are relative to `folder`. Says itself what is wrong with it.
pub(super) fn reference(s: &mut Section<'_>, folder: &Path) -> Option<ModelRef> {
    let value = s.raw("model")?;
    match ModelRef::from_toml(&value) {
        Ok(mut reference) => {
            for candidate in &mut reference.0 {
                if let Candidate::Path(path) = candidate {
                    *path = folder.join(&*path);
                }
            }
            Some(reference)
        }
        Err(message) => {
            s.error("model", &message);
            Some(ModelRef(Vec::new()))
        }
    }
}

pub(super) fn rollout(document: &mut Document) -> Rollout {
    let mut s = document.section("rollout");
    let stop: Vec<String> = s.get("stop", Vec::new());
    if stop.iter().any(String::is_empty) {
        s.error("stop", "has an empty text, which would end every completion at once");
    }
    let devices: Vec<String> = s.get("devices", Vec::new());
    if let Some(name) = devices.iter().find(|name| !is_device(name)) {
        s.error("devices", &no_device(name));
    }
    Rollout {
        workers: workers(&mut s, "workers"),
        devices,
        threads: workers(&mut s, "threads"),
        group_size: s.checked(
            "group_size",
            8,
            "from 2 to 4096: a completion is compared with the rest of its group",
            |n| (2..=4096).contains(n),
        ),
        slots: s.checked("slots", 32, "from 1 to 64", |n| (1..=64).contains(n)),
        max_new_tokens: count(&mut s, "max_new_tokens", 64, TOKENS),
        temperature: s.checked("temperature", 0.9, "above 0", |n| *n > 0.0),
        top_k: s.get("top_k", 0),
        top_p: s.checked("top_p", 1.0, "above 0, at most 1", |n| *n > 0.0 && *n <= 1.0),
        min_p: s.checked("min_p", 0.0, "from 0 to below 1", |n| (0.0..1.0).contains(n)),
        repetition_penalty: s.checked("repetition_penalty", 1.0, "above 0", |n| *n > 0.0),
        stop,
        stop_ids: s.get("stop_ids", Vec::new()),
        weights: s.choice("weights", RolloutWeights::F32),
        update: s.choice("update", UpdateMode::InFlight),
        capacity: capacity(&mut s),
    }
}

pub(super) fn reward_model(document: &mut Document, folder: &Path) -> RewardModel {
    let mut s = document.section("reward_model");
    let pairs = s.optional::<String>("pairs").map(|path| folder.join(path));
    if let Some(path) = pairs.as_ref().filter(|path| !path.is_file()) {
        s.error("pairs", &format!("there is no file {}", path.display()));
    }
    RewardModel {
        model: reference(&mut s, folder),
        device: device(&mut s),
        pairs,
        warm_up_groups: count(&mut s, "warm_up_groups", 16, MANY),
        epochs: count(&mut s, "epochs", 1, MANY),
        online: s.get("online", true),
        lr: s.checked("lr", 1e-5, "above 0", |n| *n > 0.0),
        head_lr: s.checked("head_lr", 1e-3, "above 0", |n| *n > 0.0),
        batch_pairs: count(&mut s, "batch_pairs", 32, 1 << 20),
        max_grad_norm: s.checked("max_grad_norm", 1.0, "above 0", |n| *n > 0.0),
        labels: s.choice("labels", LabelForm::Soft),
        holdout: s.checked("holdout", 0.1, "from 0 to below 1", |n| (0.0..1.0).contains(n)),
    }
}

pub(super) fn sft(document: &mut Document) -> Sft {
    let mut s = document.section("sft");
    Sft {
        steps: s.checked("steps", 0, "below a trillion", |n| *n < 1 << 40),
        batch: count(&mut s, "batch", 8, MANY),
        lr: s.checked("lr", 1e-5, "above 0", |n| *n > 0.0),
    }
}

pub(super) fn reward(document: &mut Document) -> Reward {
    let mut s = document.section("reward");
    let place = s.choice("kl", KlPlace::Reward);
    Reward {
        kl_coef: s.checked("kl_coef", 0.05, "from 0 to 1", |n| (0.0..=1.0).contains(n)),
        kl: place,
        kl_estimator: s.choice("kl_estimator", if place == KlPlace::Loss { KlEstimator::K3 } else { KlEstimator::K1 }),
        reference: s.get("reference", true),
        scale: s.choice("scale", RewardScaling::Running),
        clip: Some(s.checked("clip", 5.0, "from 0 up", |n| *n >= 0.0)).filter(|clip| *clip > 0.0),
        length_penalty: s.get("length_penalty", 0.0),
        missing_eos_penalty: s.get("missing_eos_penalty", 0.0),
        threads: workers(&mut s, "threads"),
        capacity: capacity(&mut s),
    }
}

pub(super) fn learner(document: &mut Document) -> Learner {
    let mut s = document.section("learner");
    let beta = |n: &f64| (0.0..1.0).contains(n);
    let share = |n: &f64| (0.0..=1.0).contains(n);
    let algorithm = s.choice("algorithm", AlgorithmKind::Rloo);
    let bounded = matches!(algorithm, AlgorithmKind::Ppo | AlgorithmKind::Grpo);
    let clip = s.checked("clip", if bounded { 0.2 } else { 0.0 }, "from 0 to below 1; 0 is none", beta);
    Learner {
        algorithm,
        clip,
        clip_high: s.checked("clip_high", clip, "from 0 up", |n| *n >= 0.0),
        average: s.choice(
            "average",
            match algorithm {
                AlgorithmKind::Ppo => AverageKind::TokenMean,
                AlgorithmKind::Grpo => AverageKind::SequenceMean,
                AlgorithmKind::Rloo | AlgorithmKind::Reinforce | AlgorithmKind::OnlineDpo => AverageKind::SequenceSum,
            },
        ),
        advantage_std: s.get("advantage_std", true),
        gamma: s.checked("gamma", 1.0, "from 0 to 1", share),
        gae_lambda: s.checked("gae_lambda", 0.95, "from 0 to 1", share),
        value_model: s.choice("value_model", ValueKind::Head),
        value_clip: s.checked("value_clip", 0.2, "from 0 up; 0 is none", |n| *n >= 0.0),
        whiten_rewards: s.get("whiten_rewards", false),
        whiten_advantages: s.get("whiten_advantages", algorithm == AlgorithmKind::Ppo),
        entropy_coef: s.checked("entropy_coef", 0.0, "from 0 up", |n| *n >= 0.0),
        dpo_beta: s.checked("dpo_beta", 0.1, "above 0", |n| *n > 0.0),
        dpo_labels: s.choice("dpo_labels", LabelForm::Hard),
        dpo_loss: s.choice("dpo_loss", DpoLoss::Sigmoid),
        batch_groups: count(&mut s, "batch_groups", 4, MANY),
        epochs: count(&mut s, "epochs", 1, MANY),
        minibatches: count(&mut s, "minibatches", 1, 1 << 20),
        eta: s.checked("eta", 1, &format!("from 0 to {MANY}"), |n| *n <= MANY),
        threads: workers(&mut s, "threads"),
        lr: s.checked("lr", 1e-5, "above 0", |n| *n > 0.0),
        min_lr: s.checked("min_lr", 0.0, "from 0 up", |n| *n >= 0.0),
        warmup_steps: s.get("warmup_steps", 0),
        schedule: s.choice("schedule", Schedule::Constant),
        adam_beta1: s.checked("adam_beta1", 0.9, "from 0 to below 1", beta),
        adam_beta2: s.checked("adam_beta2", 0.999, "from 0 to below 1", beta),
        adam_eps: s.checked("adam_eps", 1e-8, "above 0", |n| *n > 0.0),
        weight_decay: s.checked("weight_decay", 0.0, "from 0 up", |n| *n >= 0.0),
        max_grad_norm: s.checked("max_grad_norm", 1.0, "above 0", |n| *n > 0.0),
        value_lr: s.checked("value_lr", 1e-3, "above 0", |n| *n > 0.0),
        correction: s.choice("correction", CorrectionKind::Tis),
        truncation: s.checked("truncation", 2.0, "at least 1", |n| *n >= 1.0),
        mask_ratio: s.checked("mask_ratio", 0.0, "above 1, or 0 for none", |n| *n == 0.0 || *n > 1.0),
        max_nonfinite_steps: s.checked("max_nonfinite_steps", 3, "at least 1", |n| *n >= 1),
        micro_batch: s.get("micro_batch", 0),
        activation_checkpointing: s.get("activation_checkpointing", false),
    }
}

pub(super) fn evaluation(document: &mut Document) -> Evaluation {
    let mut s = document.section("evaluation");
    Evaluation {
        every_steps: s.get("every_steps", 0),
        prompts: count(&mut s, "prompts", 32, 1 << 16),
        threads: workers(&mut s, "threads"),
    }
}

pub(super) fn controller(document: &mut Document) -> Control {
    let mut s = document.section("controller");
    let every_s = s.checked("every_s", 10.0, "from 1 up", |n| *n >= 1.0 && *n < 1e6);
    Control { enabled: s.get("enabled", false), every_s }
}

pub(super) fn guard(document: &mut Document) -> Guard {
    let mut s = document.section("guard");
    Guard {
        action: s.choice("action", GuardAction::Warn),
        max_kl: s.checked("max_kl", 0.5, "from 0 up; 0 is no bound", |n| *n >= 0.0),
        min_entropy: s.checked("min_entropy", 0.05, "from 0 up; 0 is no bound", |n| *n >= 0.0),
        max_masked: s.checked("max_masked", 0.5, "from 0 to 1; 1 is no bound", |n| (0.0..=1.0).contains(n)),
        steps: count(&mut s, "steps", 3, MANY),
        unlabeled_steps: count(&mut s, "unlabeled_steps", 3, MANY),
    }
}

pub(super) fn checkpoint(document: &mut Document) -> Checkpoint {
    let mut s = document.section("checkpoint");
    Checkpoint {
        every_minutes: s.checked("every_minutes", 10.0, "from 0 up; 0 is never", |n| *n >= 0.0 && *n < 1e6),
        every_steps: s.get("every_steps", 0),
        keep: s.checked("keep", 2, "at least 1", |n| *n >= 1),
        best: s.optional("best"),
        dtype: s.choice("dtype", WeightDtype::F32),
        mirror: s.optional("mirror"),
        retry_s: s.checked("retry_s", 600.0, "from 0 up", |n| *n >= 0.0 && *n < 3e7),
        journal: s.get("journal", true),
        journal_max_bytes: s.get("journal_max_bytes", 16 << 30),
    }
}

pub(super) fn serve(document: &mut Document) -> Serve {
    let mut s = document.section("serve");
    let default = SocketAddr::from(([127, 0, 0, 1], 9464));
    let text: String = s.get("listen", default.to_string());
    let guarded = s.has("token_env");
    let token_env = variable(&mut s, "token_env");
    let listen = match text.parse::<SocketAddr>() {
        Ok(address) if !address.ip().is_loopback() && !guarded => {
            s.error("listen", &format!("{address} can be reached from other machines; name the environment variable that holds a bearer token in serve.token_env, or use 127.0.0.1"));
            default
        }
        Ok(address) => address,
        Err(_) => {
            s.error("listen", &format!("{text:?} is no address; write it as 127.0.0.1:9464"));
            default
        }
    };
    let hosts: Vec<String> = s.get("hosts", Vec::new());
    for name in &hosts {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            s.error(
                "hosts",
                &format!("{name:?} is no name of a host; write it without scheme and port, as node.example"),
            );
        }
    }
    // A name may be written with the dot of the root at its end.
    let hosts = hosts.iter().map(|name| name.trim_end_matches('.').to_ascii_lowercase()).collect();
    Serve { enabled: s.get("enabled", true), listen, token_env, hosts }
}

/// The name of an environment variable that holds a secret. What is no such name may be the secret itself, so it is not
/// repeated.
pub(super) fn variable(s: &mut Section<'_>, key: &'static str) -> Option<String> {
    let name: String = s.optional(key)?;
    let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if name.is_empty() || !letters || name.starts_with(|c: char| c.is_ascii_digit()) {
        s.error(key, "is no name of an environment variable; it names the variable that holds the secret, and is not the secret itself");
        return None;
    }
    Some(name)
}

pub(super) fn supervision(document: &mut Document) -> Supervision {
    let mut s = document.section("supervision");
    let mut seconds =
        |key, default| s.checked(key, default, "above 0 seconds, and below a year", |n: &f64| *n > 0.0 && *n < 3e7);
    let supervision = Supervision {
        max_restarts: 0,
        backoff_s: seconds("backoff_s", 1.0),
        max_backoff_s: seconds("max_backoff_s", 60.0),
        stall_after_s: seconds("stall_after_s", 120.0),
        restart_after_s: seconds("restart_after_s", 600.0),
        halt_grace_s: seconds("halt_grace_s", 10.0),
        drain_s: seconds("drain_s", 15.0),
    };
    Supervision { max_restarts: s.get("max_restarts", 3), ..supervision }
}

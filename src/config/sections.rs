//! The sections of a configuration, key by key.

use std::path::PathBuf;

use super::operation::WeightDtype;
use crate::source::ModelRef;

/// `[run]`
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Name of the run, of small letters, digits, `-` and `_`. Required.
    pub name: String,
    /// Seed of everything random. Default 0.
    pub seed: u64,
    /// Where the reward comes from: `direct` (default), `distilled`, `preference` or `human`.
    pub mode: Mode,
    /// Learner steps, at least 1. Required.
    pub steps: u64,
    /// Write TensorBoard's event files, into `tensorboard` in the run's folder. Default true.
    pub tensorboard: bool,
    /// Size of `samples.jsonl` beyond which it becomes `samples.jsonl.1` and a new one begins; 0 for never. Default 268435456.
    pub samples_max_bytes: u64,
    /// Such older files that are kept. Default 3.
    pub samples_keep: usize,
    /// Where the run is written. Default: `runs/NAME`, or the first of `NAME-2`, `NAME-3`, … that is free.
    pub dir: Option<PathBuf>,
}

/// The ways to learn from feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The labeler's score is the reward (d-RLAIF).
    Direct,
    /// A reward model learns from the labeler's preferences and scores every completion (canonical RLAIF).
    Distilled,
    /// Labeled pairs go to the learner as they are (online DPO).
    Preference,
    /// A reward model learns from a file of people's preferences and scores every completion (the RLHF baseline).
    Human,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq)]
pub struct Data {
    /// JSON lines (`.jsonl`, `.jsonl.gz`) or `.parquet`, relative to the configuration's folder. Required.
    pub path: PathBuf,
    /// Field of a row that holds the prompt: a text, a text in `Human:`/`Assistant:` turns, or a list of messages.
    /// Default `prompt`.
    pub prompt_field: String,
    /// Field of a row that holds a good answer, for supervised fine-tuning and win rates. Default `reference`.
    pub reference_field: String,
    /// Share of prompts kept from training, chosen by what they say; `preceptor eval` reads these. Default 0.
    pub holdout: f64,
    /// What the policy is asked, with `{{ prompt }}` where the text goes. Default `{{ prompt }}`.
    pub instruction: String,
    /// Wrap the instruction as a user's message in the model's chat template. Default true.
    pub chat: bool,
    /// System message of that chat. Default: as the template has it.
    pub system: Option<String>,
    /// Go through the data in an order that the seed shuffles anew each epoch. Default true.
    pub shuffle: bool,
    /// Most tokens of a prompt; the model's context limits it too. Default 512.
    pub max_prompt_tokens: usize,
    /// What happens to a longer one: `error` (default) or `skip`.
    pub on_long: OnLong,
}

/// What happens to a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLong {
    /// The run is refused.
    Error,
    /// The line is left out.
    Skip,
}

/// `[policy]`
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// The model: a path, `{ path = }`, `{ pip = "name==version" }`, `{ hub = "owner/name" }`, a list of these tried
    /// in order, or `{ scratch = { … } }`. Required.
    pub model: PolicyModel,
    /// `cpu` (default) or `cuda:N`.
    pub device: String,
    /// What it computes in: `f32` (default) or `bf16`, which is for cards. Of what learns, the optimizer keeps `f32` besides.
    /// Judges and the reward model do likewise, wherever they are.
    pub dtype: WeightDtype,
    /// How exact products of `f32` are, in all models, where the hardware takes less exact ones faster: `highest` (default),
    /// as `f32`; `high` or `medium`, on a card TF32, in a CPU's tile unit (Intel AMX) 16 or 8 bits of a value's significand.
    /// Sums, weights and the optimizer stay `f32`.
    pub matmul_precision: MatmulPrecision,
    /// Seconds that each place of a list may take to answer. Default 20.
    pub resolve_timeout_s: u64,
    /// Learn through low-rank adapters and leave the model's own weights as they are. Default: all weights learn.
    pub lora: Option<LoraConfig>,
}

/// Exactness of products of `f32`, in the words of PyTorch's `set_float32_matmul_precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatmulPrecision {
    /// That of `f32`.
    Highest,
    /// TF32, or two parts of `bf16` for a value.
    High,
    /// TF32, or one part.
    Medium,
}

/// `policy.lora`: low-rank adapters (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank r. Default 16.
    pub rank: usize,
    /// α: what an adapter adds is scaled by α/r. Default twice the rank.
    pub alpha: f64,
    /// Matrices that get one: any of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`. Default
    /// all of them.
    pub targets: Vec<String>,
}

/// Where the policy comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum PolicyModel {
    /// An existing model.
    Reference(ModelRef),
    /// A new one.
    Scratch(Scratch),
}

/// `policy.model.scratch`: a model with random weights whose tokens are bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Scratch {
    /// Width of the residual stream. Default 64.
    pub hidden: usize,
    /// Decoder layers. Default 2.
    pub layers: usize,
    /// Query heads. Default 4.
    pub heads: usize,
    /// Key and value heads. Default 2.
    pub kv_heads: usize,
    /// Width of the feed-forward layer. Default 176.
    pub intermediate: usize,
    /// Longest sequence in tokens. Default 1024.
    pub context: usize,
    /// Seed of the weights. Default 0.
    pub seed: u64,
    /// Standard deviation of the matrices. Default 0.02.
    pub init_std: f64,
}

/// `[rollout]`
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Rollout actors. Default 1.
    pub workers: usize,
    /// Where they sample, one after the other and around again: `["cuda:1", "cuda:2"]`. Each has a stream of its own, even on
    /// the policy's card, for a copy of the weights. Default: where the policy is, in turn with the learner.
    pub devices: Vec<String>,
    /// Threads of each one's pool. Default 1.
    pub threads: usize,
    /// Completions per prompt, at least 2. Default 8.
    pub group_size: usize,
    /// Completions that one actor samples side by side, from 1 to 64; one that ends makes room for the next. Default 32.
    pub slots: usize,
    /// Most tokens of a completion. Default 64.
    pub max_new_tokens: usize,
    /// Sampling temperature, above 0. Default 0.9.
    pub temperature: f64,
    /// Draw from this many of the likeliest tokens only; 0 (default) draws from all. This and the next three change the
    /// distribution that is sampled from, which is the one that log-probabilities are recorded of; the learner's own are of
    /// the whole distribution at `temperature`, so that the correction's ratio is below 1 even for fresh tokens.
    pub top_k: usize,
    /// Draw from the fewest tokens that have this much probability together only; 1 (default) draws from all.
    pub top_p: f64,
    /// Draw from tokens with at least this share of the likeliest one's probability only; 0 (default) draws from all.
    pub min_p: f64,
    /// Makes tokens less likely that stand in the prompt or were drawn before; 1 (default) does not.
    pub repetition_penalty: f64,
    /// Texts that end a completion; judges see it without them. Default none.
    pub stop: Vec<String>,
    /// Tokens that end a completion besides the model's own end tokens. Default none.
    pub stop_ids: Vec<u32>,
    /// What the actors sample with: `f32` (default); `bf16`, half as much to read: up to twice as fast, and more with more
    /// than 16 slots on a CPU with a tile unit (Intel AMX); or `q8_0`, products of eight bits: three and a half times as
    /// fast with one slot, two and a half times with 32, on a processor with instructions for them (AVX-512 VNNI);
    /// elsewhere up to a dozen slots or so. What is sampled is then off-policy even when it is fresh, `q8_0` by more, so the
    /// learner must correct for it; the importance ratios tell by how much.
    pub weights: RolloutWeights,
    /// When new weights are taken up: `in-flight` (default) between decode steps, or `between-groups`: an
    /// actor for whom there are new ones then finishes what it has before it begins more.
    pub update: UpdateMode,
    /// Groups that may wait for a labeler. Default 2.
    pub capacity: usize,
}

/// What is sampled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RolloutWeights {
    /// The weights as they are.
    F32,
    /// In 16 bits.
    Bf16,
    /// Blocks of 32 in eight bits.
    Q8,
}

/// When a rollout actor takes up new weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateMode {
    /// Between decode steps.
    InFlight,
    /// When nothing is under way.
    BetweenGroups,
}

/// `[reward_model]`, for the modes `distilled` and `human`
#[derive(Debug, Clone, PartialEq)]
pub struct RewardModel {
    /// What it starts from: a model as `policy.model` names them, or a reward model's directory. Default: the policy,
    /// after supervised fine-tuning if there is one.
    pub model: Option<ModelRef>,
    /// Where it is, as `labeler.device`. Default: where the policy is.
    pub device: Option<String>,
    /// Preference pairs to warm it up on. Required in `human` mode; in `distilled` mode they take the place of
    /// `warm_up_groups`.
    pub pairs: Option<PathBuf>,
    /// Groups that the initial policy writes and the labeler judges for the warm-up. Default 16.
    pub warm_up_groups: u64,
    /// Times that the warm-up's pairs are gone through. Default 1.
    pub epochs: u64,
    /// In `distilled` mode: go on learning from the labeler while the policy learns. Default true.
    pub online: bool,
    /// Learning rate of the decoder. Default 1e-5.
    pub lr: f64,
    /// Learning rate of the scalar head, which starts at zero. Default 1e-3.
    pub head_lr: f64,
    /// Pairs per optimizer step. Default 32.
    pub batch_pairs: usize,
    /// Bound on the gradient's global norm. Default 1.
    pub max_grad_norm: f64,
    /// `soft` (default) learns from the label's probability, `hard` from who is preferred.
    pub labels: LabelForm,
    /// Share of prompts whose pairs are kept from training and measure the live accuracy; chosen by what they say.
    /// Default 0.1.
    pub holdout: f64,
}

/// What is taken of a preference label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelForm {
    /// Its probability.
    Soft,
    /// Who is preferred.
    Hard,
}

/// `[sft]`: supervised fine-tuning on the data's references before anything else
#[derive(Debug, Clone, PartialEq)]
pub struct Sft {
    /// Optimizer steps; 0 (default) leaves the phase out.
    pub steps: u64,
    /// References per step. Default 8.
    pub batch: u64,
    /// Learning rate. Default 1e-5.
    pub lr: f64,
}

/// `[reward]`
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    /// β of J = (1 − β)·r − β·KL, from 0 to 1. Default 0.05.
    pub kl_coef: f64,
    /// Where the KL is charged: in the `reward` (default) as it was when the tokens were sampled, or in the `loss` as it
    /// is now. `online-dpo` has its own, `dpo_beta`.
    pub kl: KlPlace,
    /// How the KL is estimated from the sampled token: `k1`, `k2` or `k3`. Default `k1` in the reward, `k3` in the loss.
    pub kl_estimator: KlEstimator,
    /// Whether completions are scored by the policy as it started, π_ref, which the KL is measured against. Default true.
    /// `false`, where nothing is charged (`kl_coef = 0`), saves a forward pass of each group and a copy of the weights;
    /// the KL to the start is then not measured either.
    pub reference: bool,
    /// `running` (default): minus the running mean of scores, over their deviation. `none`: scores as they are.
    pub scale: RewardScaling,
    /// Bound on a scaled score, either way; 0 for none. Default 5.
    pub clip: Option<f64>,
    /// Taken off per token of a completion; in `preference` mode off its log-odds. Default 0.
    pub length_penalty: f64,
    /// Taken off when a completion ran into `max_new_tokens`; in `preference` mode off its log-odds. Default 0.
    pub missing_eos_penalty: f64,
    /// Threads of the reward actor's pool. Default 1.
    pub threads: usize,
    /// Groups that may wait for the learner. Default 2.
    pub capacity: usize,
}

/// Where the KL is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KlPlace {
    /// In the reward.
    Reward,
    /// In the loss.
    Loss,
}

/// An estimator of the KL, with r = π_ref/π.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KlEstimator {
    /// −log r.
    K1,
    /// ½·log² r.
    K2,
    /// (r − 1) − log r.
    K3,
}

/// How scores are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RewardScaling {
    /// Not at all.
    None,
    /// By the running mean and deviation.
    Running,
}

/// `[learner]`
#[derive(Debug, Clone, PartialEq)]
pub struct Learner {
    /// `rloo` (default), `reinforce` with a value baseline, `ppo` with a value model, `grpo`, or `online-dpo`, which
    /// learns from preferences.
    pub algorithm: AlgorithmKind,
    /// ε: the policy's ratio is held to 1 ± ε; 0 for none. Of a token in `ppo`, `grpo` and `reinforce`, of a completion in
    /// `rloo`. Default 0.2 for `ppo` and `grpo`, else 0.
    pub clip: f64,
    /// ε above, where it differs from the one below. Default `clip`.
    pub clip_high: f64,
    /// What the sum over a batch's tokens is divided by: `sequence-sum`, the completions; `sequence-mean`, each one's
    /// length and then the completions; `token-mean`, the tokens; `constant`, `rollout.max_new_tokens` and then the
    /// completions (Dr.GRPO). Default `token-mean` for `ppo`, `sequence-mean` for `grpo`, else `sequence-sum`.
    pub average: AverageKind,
    /// For `grpo`: divide advantages by the group's deviation; Dr.GRPO does not. Default true.
    pub advantage_std: bool,
    /// For `ppo`: discount γ. Default 1.
    pub gamma: f64,
    /// For `ppo`: λ of generalised advantage estimation. Default 0.95.
    pub gae_lambda: f64,
    /// For `ppo` and `reinforce`: a linear `head` on the policy's features (default), or a `model` of its own, which
    /// starts from the policy and needs as much memory again.
    pub value_model: ValueKind,
    /// For `ppo`: how far a value may move from that of the batch's arrival; 0 for no bound. Default 0.2.
    pub value_clip: f64,
    /// Bring rewards to mean 0 and variance 1 over each batch. Default false.
    pub whiten_rewards: bool,
    /// Bring advantages to mean 0 and variance 1 over each batch's tokens. Default true for `ppo`, else false.
    pub whiten_advantages: bool,
    /// Weight of an entropy bonus per token. Default 0.
    pub entropy_coef: f64,
    /// For `online-dpo`: β, how firmly the policy is held to the reference. Default 0.1.
    pub dpo_beta: f64,
    /// For `online-dpo`: `hard` (default) learns from who is preferred, `soft` from the label's probability.
    pub dpo_labels: LabelForm,
    /// For `online-dpo`: `sigmoid` (default) or `ipo`.
    pub dpo_loss: DpoLoss,
    /// Groups per step, at least 1. Default 4.
    pub batch_groups: u64,
    /// Times that a batch is gone through. Default 1.
    pub epochs: u64,
    /// Optimizer steps in each of these, at most `batch_groups`. Default 1.
    pub minibatches: usize,
    /// Staleness bound η, in versions; 0 is synchronous. Default 1.
    pub eta: u64,
    /// Threads of the learner's pool. Default 1.
    pub threads: usize,
    /// Peak learning rate. Default 1e-5.
    pub lr: f64,
    /// Learning rate that a falling schedule ends at. Default 0.
    pub min_lr: f64,
    /// Steps over which the rate rises. Default 0.
    pub warmup_steps: u64,
    /// After that: `constant` (default), or `linear` or `cosine` down to `min_lr` at the last step.
    pub schedule: Schedule,
    /// AdamW's β₁. Default 0.9.
    pub adam_beta1: f64,
    /// AdamW's β₂. Default 0.999.
    pub adam_beta2: f64,
    /// AdamW's ε. Default 1e-8.
    pub adam_eps: f64,
    /// Decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// Bound on the gradient's global norm. Default 1.
    pub max_grad_norm: f64,
    /// Learning rate of the value head; a value model's decoder learns at `lr`. Default 1e-3.
    pub value_lr: f64,
    /// Off-policy correction by π/μ, μ being the weights that sampled: `tis` (default) truncates it per token,
    /// `tis-sequence` per completion, `decoupled` not at all, `none` asks for η = 0 or a clip. A clipped ratio is taken
    /// against the weights that the batch arrived at, with `none` against μ.
    pub correction: CorrectionKind,
    /// Bound C on an importance weight, at least 1; `decoupled` has none. Default 2.
    pub truncation: f64,
    /// Tokens whose π/μ is above this or below its inverse are left out; 0 (default) leaves none out.
    pub mask_ratio: f64,
    /// Steps in a row without a finite gradient that end the run. Default 3.
    pub max_nonfinite_steps: u32,
    /// Completions of a group that go through the model at a time while it learns; 0 (default) for the whole group. Fewer take
    /// less memory and a third more time; halved by itself when a device runs out of memory.
    pub micro_batch: usize,
    /// Keep of the forward pass only what goes into each layer, and compute the rest again in the backward: a third more
    /// time for a small part of the memory, for models that would not fit otherwise. Default false.
    pub activation_checkpointing: bool,
}

/// The learner's algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlgorithmKind {
    /// REINFORCE leave-one-out.
    Rloo,
    /// REINFORCE with a value baseline.
    Reinforce,
    /// Proximal policy optimisation.
    Ppo,
    /// Group relative policy optimisation.
    Grpo,
    /// Online direct preference optimisation.
    OnlineDpo,
}

/// What the sum over a batch's tokens is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AverageKind {
    /// Completions.
    SequenceSum,
    /// Each completion's length, then completions.
    SequenceMean,
    /// Tokens.
    TokenMean,
    /// The longest length, then completions.
    Constant,
}

/// What a value baseline stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// The policy's hidden states.
    Head,
    /// A model of its own.
    Model,
}

/// The loss of a compared pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DpoLoss {
    /// The logistic one.
    Sigmoid,
    /// The squared one.
    Ipo,
}

/// Course of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls in a line.
    Linear,
    /// Falls in half a wave of a cosine.
    Cosine,
}

/// Correction of off-policy tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CorrectionKind {
    /// None.
    None,
    /// Truncated importance sampling per token.
    Tis,
    /// The same per completion.
    TisSequence,
    /// Importance sampling per token without a bound.
    Decoupled,
}

//! The keys of `[labeler]`: who judges, how it is asked, and where it is when it is not here.

use std::path::PathBuf;

use crate::source::ModelRef;

/// `[labeler]`
#[derive(Debug, Clone, PartialEq)]
pub struct Labeler {
    /// Who judges, and how it is asked. The keys stand in the section itself; for `type = "panel"` each of
    /// `[[labeler.members]]` has keys of its own.
    pub methods: Vec<Method>,
    /// Whether several methods are heard as one.
    pub panel: bool,
    /// Where judges with weights here compute: as `policy.device`, and where it is named a stream of its own even on the same
    /// card, for a copy of the weights if the policy judges. Default: where the policy is, in turn with it.
    pub device: Option<String>,
    /// Labeler actors. Default 1.
    pub workers: usize,
    /// Threads of each one's pool. Default 1.
    pub threads: usize,
    /// Which completions of a group are compared: `adjacent` (default; 0 with 1, 2 with 3, …) or `all` pairs.
    pub pairs: Pairs,
    /// How often a failed group is asked about again. Default 2.
    pub retries: u32,
    /// Most that the run may spend on remote judges, over all its processes, in the currency of their prices; 0 (default)
    /// for no bound. A question that could exceed it is not asked: the run ends with a checkpoint and exit status 3.
    pub max_cost: f64,
    /// Folder of the label cache, so that no label is bought twice; relative to the configuration's folder.
    /// Default: none for local judges, `labels` in the model cache's folder for remote ones.
    pub cache: Option<PathBuf>,
    /// Answers that it keeps, a few hundred bytes each; beyond, the oldest go. Default 1000000.
    pub cache_entries: u64,
    /// Groups that may wait for the reward actor. Default 2.
    pub capacity: usize,
}

/// How one judge is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Method {
    /// `likelihood` (default): log P(completion given prompt) − log P(completion). `direct`: a rating from 1 to 10.
    /// `pairwise`: which of two is better. `embedding`: cosine of prompt and completion.
    pub kind: LabelerKind,
    /// The judge, as `policy.model` names models. Default: the policy's initial weights, frozen.
    pub model: Option<ModelRef>,
    /// A judge behind a server instead of a model here: `remote = { url = "…", model = "…" }`. For `direct` and
    /// `pairwise`.
    pub remote: Option<RemoteJudge>,
    /// Put questions into the model's chat template. Default: as `data.chat`, where the model has one.
    pub chat: Option<bool>,
    /// What a member's word counts in a panel, above 0. Default 1.
    pub weight: f64,
    /// For `likelihood`: mean over tokens instead of their sum. Default false.
    pub length_normalise: bool,
    /// τ of P(first is better) = σ(Δscore/τ), where pairs are wanted of a labeler that scores. Default 1.
    pub pair_temperature: f64,
    /// For `direct` and `pairwise`: `summarization` (default), `helpful`, `harmless`, or a file of such templates.
    pub templates: String,
    /// For `pairwise`: `base` (default), `detailed`, or a file with the preamble's text.
    pub preamble: String,
    /// For `pairwise`: exemplars shown before the question. Default 0.
    pub shots: usize,
    /// For `pairwise`: read both orders and average, against position bias. Default true.
    pub both_orders: bool,
    /// For `pairwise`: chain of thought, a rationale before the choice. Default false.
    pub cot: bool,
    /// Most tokens of a rationale. Default 512.
    pub rationale_tokens: usize,
    /// Rationales per question, whose distributions are averaged (self-consistency). Default 1.
    pub rationales: usize,
    /// Temperature of rationales. Default 0, the likeliest; with several, above 0.
    pub rationale_temperature: f64,
}

/// `labeler.remote`: a server that speaks OpenAI's protocol
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteJudge {
    /// Its address up to the version, such as `http://127.0.0.1:8080/v1`. Required.
    pub url: String,
    /// Name of the model there. Required.
    pub model: String,
    /// `chat` (default) or `completions`.
    pub api: RemoteApi,
    /// Name of the environment variable that holds the API key; the key itself stands in no file. Default: none.
    pub api_key_env: Option<String>,
    /// System message of a chat. Default: none.
    pub system: Option<String>,
    /// How an answer's probability is known: `auto` (default) by log-probabilities, or by votes where the server has
    /// none; `logprobs`; `votes`.
    pub evidence: Evidence,
    /// Whether `train`, `check`, `tune`, `label` and `eval` ask the judge one question first, and refuse to begin
    /// where it gives no answer. Default true.
    pub probe: bool,
    /// Whether answers of another model than that of the first answer, by the name that the server reports, are accepted.
    /// Otherwise (default false) the judge counts as away while another model answers.
    pub any_model: bool,
    /// Answers sampled per question where there are no log-probabilities. Default 5.
    pub votes: usize,
    /// Most requests in flight, of all labeler actors together. Default 8.
    pub concurrency: usize,
    /// Most requests a minute; 0 (default) for no limit.
    pub requests_per_minute: u64,
    /// Most tokens a minute, estimated beforehand; 0 (default) for no limit.
    pub tokens_per_minute: u64,
    /// Seconds that an answer may take. Default 60.
    pub timeout_s: f64,
    /// Seconds that a connection may take. Default 10.
    pub connect_timeout_s: f64,
    /// Seconds that the tries of a question and the pauses between them may take, while the server answers others. Default
    /// 300.
    pub deadline_s: f64,
    /// Tries after the first. Default 4.
    pub retries: u32,
    /// Seconds before the first retry, at most; doubles. Default 0.5.
    pub backoff_s: f64,
    /// Most seconds before a retry. Default 30.
    pub max_backoff_s: f64,
    /// Seconds after which a second request is sent for a question that is not answered; the first answer counts.
    /// Default: never.
    pub hedge_after_s: Option<f64>,
    /// Failures in a row after which the server is asked one question at a time. Default 10.
    pub breaker_failures: u32,
    /// Seconds between two questions to a server that answers none. Default 15.
    pub breaker_cooldown_s: f64,
    /// Seconds for which a server that answers no question is waited for, whether it is away, limits the rate or refuses:
    /// the run stands still, logs the cause, and continues when the server answers. Then the run ends with a checkpoint,
    /// and `--resume` asks again. Default 3600.
    pub outage_s: f64,
    /// Price of a million tokens read, in any currency. Default 0.
    pub price_prompt: f64,
    /// Price of a million tokens written. Default 0.
    pub price_completion: f64,
    /// Most bytes of an answer. Default 4194304.
    pub max_response_bytes: usize,
}

impl Default for RemoteJudge {
    fn default() -> Self {
        Self {
            url: String::new(),
            model: String::new(),
            api: RemoteApi::Chat,
            api_key_env: None,
            system: None,
            evidence: Evidence::Auto,
            probe: true,
            any_model: false,
            votes: 5,
            concurrency: 8,
            requests_per_minute: 0,
            tokens_per_minute: 0,
            timeout_s: 60.0,
            connect_timeout_s: 10.0,
            deadline_s: 300.0,
            retries: 4,
            backoff_s: 0.5,
            max_backoff_s: 30.0,
            hedge_after_s: None,
            breaker_failures: 10,
            breaker_cooldown_s: 15.0,
            outage_s: 3600.0,
            price_prompt: 0.0,
            price_completion: 0.0,
            max_response_bytes: 4 << 20,
        }
    }
}

/// Which protocol a server is asked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteApi {
    /// `/chat/completions`.
    Chat,
    /// `/completions`.
    Completions,
}

/// How the probability of an answer is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// By log-probabilities where the server has them, else by votes.
    Auto,
    /// By log-probabilities.
    Logprobs,
    /// By sampling several times.
    Votes,
}

/// How a labeler judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelerKind {
    /// By how much more probable the prompt makes the completion.
    Likelihood,
    /// By a rating from 1 to 10.
    Direct,
    /// By comparison of two.
    Pairwise,
    /// By the cosine of two sentence embeddings.
    Embedding,
}

/// Which completions are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// Neighbours.
    Adjacent,
    /// Each with each.
    All,
}

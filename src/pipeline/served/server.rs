//! One inference server: what it holds, and the operations on it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::http::{Fault, Http};
use super::store::{Content, Stored, Tag};
use super::{sglang, vllm};
use crate::config::EngineKind;
use crate::pipeline::generate::Sampled;
use crate::pipeline::generate::sampler::Sampling;
use crate::types::Finish;
use crate::util::mutex::lock;

/// Time limit of a request that computes nothing.
const QUICK: Duration = Duration::from_secs(30);

/// Settings of all requests for completions.
#[derive(Debug)]
pub(super) struct SamplingPlan {
    /// Sampling settings. `vocabulary` is the number of the tokenizer's tokens.
    pub(super) sampling: Sampling,
    /// Number of rows of the policy's embedding.
    pub(super) rows: usize,
    /// Time limit of a request for completions.
    pub(super) timeout: Duration,
    /// True if weights may change while completions are under way.
    pub(super) in_flight: bool,
}

/// Completions to sample of one prompt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// Number of completions.
    pub(super) n: usize,
    /// Maximum number of tokens of each.
    pub(super) max_tokens: usize,
}

/// A completion as a server reports it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<f32>,
    pub(super) versions: Vec<u64>,
    /// The server's name of the reason why it ended.
    pub(super) reason: String,
}

/// Source of the versions of a completion's tokens.
pub(super) enum Versions<'a> {
    /// All are of the adapter of this version, which the request named.
    Adapter(u64),
    /// The answer tells names; the function returns the version of one, or why it is not one of this run.
    Told(&'a (dyn Fn(&str) -> Result<u64, String> + Sync)),
}

/// Usability of a server.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Condition {
    /// It has no weights of this run yet.
    Starting,
    /// It samples.
    Ready,
    /// It failed, for this reason, and is tried again.
    Down(String),
    /// It did not take the weights that it was handed, for this reason. It gets no prompts until it takes others.
    Rejected(String),
}

/// Changeable state of a server.
pub(super) struct State {
    pub(super) condition: Condition,
    /// Time of the last change of the condition.
    pub(super) since: Instant,
    /// Version to which new requests go.
    pub(super) loaded: Option<Stored>,
    /// Adapters that the server holds for this run.
    pub(super) adapters: Vec<Tag>,
    /// Names of the versions that this process has handed over, with their numbers.
    pub(super) names: HashMap<String, u64>,
    /// True while a version is handed over and not yet checked. Answers that name it wait for the result.
    pub(super) unchecked: bool,
    /// Number of completions under way, by version.
    pub(super) under_way: BTreeMap<u64, usize>,
    /// Number of completions and tokens received.
    pub(super) completions: u64,
    pub(super) tokens: u64,
    /// Tokens received in the last minute.
    pub(super) recent: Recent,
    /// Time per token of recent completions, in seconds: an exponential mean. `None` before the first answer.
    pub(super) pace: Option<f64>,
    /// Result of the last canary: share of the weights' change that the server shows.
    pub(super) canary: Option<f64>,
    /// Duration of the last hand-over.
    pub(super) hand_over: Option<Duration>,
}

/// Numbers of tokens of the answers of the last minute, with their times.
pub(super) struct Recent {
    since: Instant,
    answers: VecDeque<(Instant, u64)>,
}

impl Recent {
    const LENGTH: Duration = Duration::from_secs(60);

    fn new(since: Instant) -> Self {
        Self { since, answers: VecDeque::new() }
    }

    /// Records an answer of `tokens` tokens.
    pub(super) fn push(&mut self, now: Instant, tokens: u64) {
        while self.answers.front().is_some_and(|(at, _)| now.duration_since(*at) > Self::LENGTH) {
            self.answers.pop_front();
        }
        self.answers.push_back((now, tokens));
    }

    /// Returns the mean number of tokens per second of the last minute, or of the time since the start if that is shorter.
    pub(super) fn per_second(&self, now: Instant) -> f64 {
        let recent = self.answers.iter().filter(|(at, _)| now.duration_since(*at) <= Self::LENGTH);
        let tokens: u64 = recent.map(|(_, tokens)| tokens).sum();
        let length = now.duration_since(self.since).min(Self::LENGTH).as_secs_f64();
        if length > 0.0 { tokens as f64 / length } else { 0.0 }
    }
}

/// One inference server.
pub(super) struct Server {
    pub(super) kind: EngineKind,
    pub(super) http: Http,
    pub(super) plan: Arc<SamplingPlan>,
    /// Name of the base model on the server.
    pub(super) base: String,
    state: Mutex<State>,
}

impl Server {
    /// Creates the record of a server whose base model is called `base`. It has no weights of the run yet.
    pub(super) fn new(kind: EngineKind, http: Http, base: String, plan: Arc<SamplingPlan>) -> Self {
        let state = State {
            condition: Condition::Starting,
            since: Instant::now(),
            loaded: None,
            adapters: Vec::new(),
            names: HashMap::new(),
            unchecked: false,
            under_way: BTreeMap::new(),
            completions: 0,
            tokens: 0,
            recent: Recent::new(Instant::now()),
            pace: None,
            canary: None,
            hand_over: None,
        };
        Self { kind, http, plan, base, state: Mutex::new(state) }
    }

    pub(super) fn name(&self) -> &str {
        self.http.origin()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Sets the condition, and returns whether it differs from the one before.
    pub(super) fn set(&self, condition: Condition) -> bool {
        let mut state = self.state();
        if state.condition == condition {
            return false;
        }
        if matches!(condition, Condition::Down(_)) {
            // A server that failed may have restarted without the run's weights.
            state.loaded = None;
            state.pace = None;
            state.adapters.clear();
        }
        state.condition = condition;
        state.since = Instant::now();
        true
    }

    /// Samples completions of `prompt` with the version `stored`.
    pub(super) async fn generate(&self, stored: &Stored, prompt: &[u32], group: Group) -> Result<Vec<Sampled>, Fault> {
        let plan = &*self.plan;
        let tag = stored.tag.to_string();
        let known = |name: &str| {
            self.state().names.get(name).copied().ok_or_else(|| match Tag::parse(name) {
                Some(_) => format!("tokens were sampled with {name}, which another run handed to the server; give each run its own servers, or train adapters"),
                None => format!("tokens were sampled with weights called {name:?}, which are not of this run"),
            })
        };
        let versions = match stored.content {
            Content::Adapters => Versions::Adapter(stored.tag.version),
            Content::Full => Versions::Told(&known),
        };
        let adapter = (stored.content == Content::Adapters).then_some(tag.as_str());
        let choices = match self.kind {
            EngineKind::Sglang => {
                let body = sglang::generate(plan, adapter, prompt, group);
                let answer = self.http.post("/generate", &body, plan.timeout).await?;
                self.checked(stored).await;
                sglang::choices(&answer, &versions)?
            }
            _ => {
                let body = vllm::generate(plan, adapter.unwrap_or(&self.base), stored.tag, prompt, group);
                let answer = self.http.post("/inference/v1/generate", &body, plan.timeout).await?;
                self.checked(stored).await;
                vllm::choices(&answer, &versions)?
            }
        };
        if choices.len() != group.n {
            return Err(Fault::Invalid(format!("{} completions instead of {}", choices.len(), group.n)));
        }
        choices.into_iter().map(|choice| plan.complete(choice, group.max_tokens)).collect()
    }

    /// Waits until a version that is being handed over is checked, unless the request named an adapter, whose version is certain.
    async fn checked(&self, stored: &Stored) {
        while stored.content == Content::Full && self.state().unchecked {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Returns the log-probabilities of `ids` from the second on, at temperature 1, with the version `stored`, or with the
    /// base model's own weights.
    pub(super) async fn score(&self, stored: Option<&Stored>, ids: &[u32]) -> Result<Vec<f32>, Fault> {
        let tag = stored.filter(|stored| stored.content == Content::Adapters).map(|stored| stored.tag.to_string());
        let timeout = self.plan.timeout;
        match self.kind {
            EngineKind::Sglang => {
                sglang::scores(&self.http.post("/generate", &sglang::score(tag.as_deref(), ids), timeout).await?, ids)
            }
            _ => {
                let body = vllm::score(tag.as_deref().unwrap_or(&self.base), ids);
                vllm::scores(&self.http.post("/inference/v1/generate", &body, timeout).await?, ids)
            }
        }
    }

    /// Returns whether [`Self::score`] may be asked of the version `stored`. Some versions of vLLM fail if log-probabilities
    /// of a prompt are asked of an adapter.
    pub(super) fn scores_prompts(&self, stored: &Stored) -> bool {
        stored.content == Content::Full || self.kind == EngineKind::Sglang
    }

    /// Returns the most likely tokens after `ids` with their log-probabilities, at temperature 1, with the adapter `stored`
    /// of a vLLM server.
    pub(super) async fn top(&self, stored: &Stored, ids: &[u32]) -> Result<Vec<(u32, f32)>, Fault> {
        let body = vllm::top(&stored.tag.to_string(), stored.tag, ids);
        vllm::tops(&self.http.post("/inference/v1/generate", &body, self.plan.timeout).await?)
    }

    /// Loads the version `stored`. The server answers requests for older adapters as before; other weights are replaced.
    pub(super) async fn load(&self, stored: &Stored, timeout: Duration) -> Result<(), Fault> {
        let name = stored.tag.to_string();
        // Tokens of the version may be reported as soon as the server has it.
        self.state().names.insert(name.clone(), stored.tag.version);
        if stored.content == Content::Adapters {
            let body = json!({ "lora_name": name, "lora_path": stored.location });
            let path = format!("{}/load_lora_adapter", self.adapter_routes());
            let loaded = match self.http.post(&path, &body, timeout).await {
                // vLLM refuses a name that is loaded already. A name is never reused for other weights.
                Err(Fault::Refused(why)) if why.contains("already") => Ok(()),
                Err(Fault::Lost(why)) if self.kind == EngineKind::Vllm => Err(Fault::Refused(format!(
                    "{why}; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and let it read {}",
                    stored.location
                ))),
                other => other.map(drop),
            };
            loaded?;
            let mut state = self.state();
            if !state.adapters.contains(&stored.tag) {
                state.adapters.push(stored.tag);
            }
            return Ok(());
        }
        match self.kind {
            EngineKind::Sglang => {
                let body = json!({
                    "model_path": stored.location,
                    "weight_version": name,
                    "flush_cache": true,
                    "abort_all_requests": false,
                });
                self.http.post("/update_weights_from_disk", &body, timeout).await.map(drop)
            }
            _ => self.reload_vllm(stored, timeout).await,
        }
    }

    /// Replaces all weights of a vLLM server, which is paused meanwhile. It is resumed whatever happens.
    async fn reload_vllm(&self, stored: &Stored, timeout: Duration) -> Result<(), Fault> {
        let mode = if self.plan.in_flight { "keep" } else { "wait" };
        let needs = |fault| match fault {
            Fault::Lost(why) | Fault::Refused(why) => Fault::Refused(format!(
                "{why}; start vLLM with VLLM_SERVER_DEV_MODE=1 on an address that only this run reaches"
            )),
            other => other,
        };
        let paused = self.http.post(&format!("/pause?mode={mode}&clear_cache=true"), &Value::Null, timeout).await;
        let replaced = match paused {
            Err(fault) => Err(needs(fault)),
            Ok(_) => {
                let reload = json!({ "method": "reload_weights", "kwargs": { "weights_path": stored.location } });
                match self.http.post("/collective_rpc", &reload, timeout).await {
                    Err(fault) => Err(needs(fault)),
                    Ok(_) => {
                        let version = json!({ "new_version": stored.tag.to_string() });
                        self.http.post("/update_weight_version", &version, QUICK).await.map(drop).map_err(needs)
                    }
                }
            }
        };
        let resumed = self.http.post("/resume", &Value::Null, QUICK).await.map(drop);
        replaced.and(resumed)
    }

    /// Resumes a server that a process which ended left paused. Failures do not matter: not every server can be paused.
    pub(super) async fn resume(&self) {
        let (asked, resume) = match self.kind {
            EngineKind::Sglang => (None, "/continue_generation"),
            _ => (Some("/is_paused"), "/resume"),
        };
        let paused = match asked {
            Some(path) => self.http.get(path, QUICK).await.is_ok_and(|answer| answer["is_paused"] == true),
            None => true,
        };
        if paused && let Err(fault) = self.http.post(resume, &json!({}), QUICK).await {
            tracing::debug!("{}: {fault}", self.name());
        }
    }

    /// Returns the path below which the server has the routes of adapters.
    fn adapter_routes(&self) -> &'static str {
        if self.kind == EngineKind::Sglang { "" } else { "/v1" }
    }

    /// Removes an adapter from the server. A failure is logged: the adapter takes memory, and does no harm otherwise.
    pub(super) async fn unload(&self, name: &str) {
        let body = json!({ "lora_name": name });
        let path = format!("{}/unload_lora_adapter", self.adapter_routes());
        if let Err(fault) = self.http.post(&path, &body, QUICK).await {
            tracing::debug!("{} did not unload {name}: {fault}", self.name());
        }
    }

    /// Returns the names of the models that the server lists, the base model first.
    pub(super) async fn models(&self) -> Result<Vec<String>, Fault> {
        let list = self.http.get("/v1/models", QUICK).await?;
        let names = list["data"].as_array().into_iter().flatten();
        Ok(names.filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    /// Records that the longest completion of a group had `tokens` tokens and took `time`.
    pub(super) fn took(&self, tokens: usize, time: Duration) {
        let now = time.as_secs_f64() / tokens.max(1) as f64;
        let mut state = self.state();
        state.pace = Some(state.pace.map_or(now, |before| before + (now - before) / 8.0));
    }

    /// Checks that the server answers.
    pub(super) async fn health(&self) -> Result<(), Fault> {
        self.http.get("/health", QUICK).await.map(drop)
    }
}

impl SamplingPlan {
    /// Ends a completion where the run's own engine would end it, and checks that it can be trained on.
    fn complete(&self, choice: Choice, max_tokens: usize) -> Result<Sampled, Fault> {
        let Choice { mut ids, mut logprobs, mut versions, reason } = choice;
        let invalid = |why: String| Err(Fault::Invalid(why));
        if ids.is_empty() || ids.len() != logprobs.len() || ids.len() != versions.len() {
            return invalid(format!("{} log-probabilities of {} tokens", logprobs.len(), ids.len()));
        }
        if reason == "abort" {
            return Err(Fault::Down("the server aborted the request".into()));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.rows) {
            return invalid(format!("token id {id}, but the model has {} tokens", self.rows));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.sampling.vocabulary) {
            // The model has more rows than the tokenizer has tokens, which the run's own engine never samples.
            return invalid(format!("token id {id}, which the tokenizer does not have"));
        }
        if let Some(logprob) = logprobs.iter().find(|logprob| !logprob.is_finite() || **logprob > 1e-3) {
            return invalid(format!("a log-probability of {logprob}"));
        }
        let sampling = &self.sampling;
        let end = (1..=ids.len()).find_map(|len| {
            let last = ids[len - 1];
            if sampling.eos.contains(&last) {
                Some((len, Finish::Eos))
            } else if sampling.stop.as_ref().is_some_and(|stop| stop.ends(&ids[..len])) {
                Some((len, Finish::Stop))
            } else {
                (len >= max_tokens).then_some((len, Finish::Length))
            }
        });
        let Some((len, finish)) = end else {
            return invalid(format!(
                "a completion ended after {} of {} tokens for the reason {reason:?}, but with no end token and no stop string of this run",
                ids.len(),
                max_tokens
            ));
        };
        ids.truncate(len);
        logprobs.truncate(len);
        versions.truncate(len);
        // Servers round: the log-probability of a certain token may be slightly above zero.
        logprobs.iter_mut().for_each(|logprob| *logprob = logprob.min(0.0));
        Ok(Sampled { ids, logprobs, versions, finish: Some(finish) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_a_server_is_that_of_the_last_minute() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut recent = Recent::new(start);
        for second in 1..=20 {
            recent.push(at(second), 30);
        }
        assert_eq!(recent.per_second(at(20)), 30.0);
        assert_eq!(recent.per_second(at(70)), 330.0 / 60.0);
        recent.push(at(200), 60);
        assert_eq!(recent.answers.len(), 1);
        assert_eq!(recent.per_second(at(200)), 1.0);
    }
}

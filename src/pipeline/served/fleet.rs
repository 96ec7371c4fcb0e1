//! The servers of a run: choice of a server for a group, retries, and the versions that the run may use.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use preceptor_actors::{Admission, AdmissionGate, SnapshotCell};
use serde::Serialize;
use tokio::sync::watch;

use super::hand_over;
use super::http::Fault;
use super::server::{Condition, Group, SamplingPlan, Server};
use super::store::{Stored, WeightStore};
use crate::config::EngineKind;
use crate::lm::model::{Decoder, Lora};
use crate::observe::telemetry;
use crate::pipeline::generate::Sampled;
use crate::pipeline::generate::sampler::Sampling;
use crate::status;
use crate::util::mutex::lock;

/// Number of recent groups whose tokens the canary uses.
const RECENT: usize = 4;
/// Longest wait for a hand-over under way at the end of a run.
const LAST_HAND_OVER: Duration = Duration::from_secs(60);
/// Number of answers in a row that cannot be trained on, after which a server counts as failed.
const MAX_INVALID: u32 = 3;

/// Settings of a [`Fleet`].
#[derive(Debug, Clone)]
pub struct FleetPlan {
    /// Kind of all servers.
    pub kind: EngineKind,
    /// URLs of the servers.
    pub servers: Vec<String>,
    /// Environment variable with the servers' API key.
    pub api_key_env: Option<String>,
    /// Settings of sampling.
    pub sampling: Sampling,
    /// Number of rows of the policy's embedding.
    pub rows: usize,
    /// Time limit of a request for completions: this, and [`Self::token_timeout`] for each token.
    pub timeout: Duration,
    /// See [`Self::timeout`].
    pub token_timeout: Duration,
    /// Time without any usable server after which the run ends.
    pub outage: Duration,
    /// Key of the configuration that sets [`Self::outage`], for the message at the end of that time; empty if there is none.
    pub outage_key: &'static str,
    /// True if weights may change while completions are under way.
    pub in_flight: bool,
    /// Adapters, if they are trained, and not all weights.
    pub lora: Option<Lora>,
    /// Identifier of the run in the names of versions.
    pub run: u32,
    /// Staleness bound and batch size, from which the oldest version that a group may start with follows.
    pub admission: Admission,
    /// Refuses servers of versions that were not tested.
    pub check_version: bool,
    /// Longest prompt of the data, in tokens.
    pub longest_prompt: usize,
    /// Token ids of a text of the data, for the first comparison of a server's log-probabilities with the run's.
    pub example: Vec<u32>,
}

/// State of a server, for the status page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServerReport {
    /// Scheme, host and port; for a worker, its name and its machine.
    pub url: String,
    /// One of `starting`, `ready`, `down` and `rejected`.
    pub condition: &'static str,
    /// Reason for the condition; empty if the server is ready.
    pub why: String,
    /// Version of the weights to which new requests go.
    pub version: Option<u64>,
    /// Number of completions under way.
    pub under_way: usize,
    /// Number of completions received.
    pub completions: u64,
    /// Number of tokens received.
    pub tokens: u64,
    /// Tokens received in the last minute, per second.
    pub tokens_per_s: f64,
    /// Share of the last change of the weights that the server's log-probabilities show, about 1.
    pub canary: Option<f64>,
    /// Duration of the last hand-over in seconds.
    pub hand_over_s: Option<f64>,
}

impl ServerReport {
    /// Returns the name for messages: `the server URL`, or `worker NAME`.
    pub fn name(&self) -> String {
        if self.url.contains("://") { format!("the server {}", self.url) } else { format!("worker {}", self.url) }
    }
}

/// Servers that sample for a run.
pub struct Fleet {
    pub(super) plan: FleetPlan,
    pub(super) servers: Vec<Arc<Server>>,
    pub(super) runtime: tokio::runtime::Handle,
    /// Kept for its thread, on which requests run. `None` only while the value is dropped.
    owned: Option<tokio::runtime::Runtime>,
    /// Number of changes of any server, for which requests wait.
    changes: watch::Sender<u64>,
    gate: Mutex<Option<Arc<AdmissionGate>>>,
    /// Prompts and completions of recent groups.
    recent: Mutex<VecDeque<(Vec<u32>, Vec<u32>)>>,
    pub(super) stopped: AtomicBool,
    /// Number of threads that hand weights over.
    threads: AtomicUsize,
    /// Time of the last answer that could be trained on.
    answered: Mutex<Instant>,
    /// Time since which no server is ready.
    unusable_since: Mutex<Option<Instant>>,
    /// Completions that were under way when a request failed.
    lost: Mutex<Lost>,
    /// True if [`Self::end_waiting`] has acted on the present outage.
    ended_waiting: AtomicBool,
}

impl Fleet {
    /// Connects to all servers and checks what does not need weights: their kind and version, context length, vocabulary and
    /// tokenizer. `encode` is the run's tokenizer, without special tokens.
    ///
    /// # Errors
    /// If a server cannot be reached or does not suit the run; the error names the server, the cause and the remedy.
    pub fn connect(plan: FleetPlan, encode: &dyn Fn(&str) -> Result<Vec<u32>>) -> Result<Arc<Self>> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("servers")
            .enable_all()
            .build()
            .context("cannot start the thread of rollout servers")?;
        let timeout = plan.timeout + plan.token_timeout * plan.sampling.max_new_tokens as u32;
        let sampling = Arc::new(SamplingPlan {
            sampling: plan.sampling.clone(),
            rows: plan.rows,
            timeout,
            in_flight: plan.in_flight,
        });
        let mut servers = Vec::new();
        for url in &plan.servers {
            let server = runtime
                .block_on(super::probe::probe(&plan, url, &sampling, encode))
                .with_context(|| format!("the rollout server {url} cannot be used"))?;
            servers.push(Arc::new(server));
        }
        Ok(Arc::new(Self {
            plan,
            servers,
            runtime: runtime.handle().clone(),
            owned: Some(runtime),
            changes: watch::Sender::new(0),
            gate: Mutex::new(None),
            recent: Mutex::default(),
            stopped: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            answered: Mutex::new(Instant::now()),
            unusable_since: Mutex::new(None),
            lost: Mutex::default(),
            ended_waiting: AtomicBool::new(false),
        }))
    }

    /// Starts to hand the weights published in `cell` to the servers, through `store`. Waits until the first version has been
    /// handed to each server, and compared.
    ///
    /// # Errors
    /// If a server refuses the first weights, or computes other log-probabilities with them.
    pub fn start(self: &Arc<Self>, cell: &Arc<SnapshotCell<Decoder>>, store: Arc<dyn WeightStore>) -> Result<()> {
        for server in &self.servers {
            anyhow::ensure!(!self.stopped.load(Ordering::SeqCst), "the hand-over of weights was stopped");
            hand_over::begin(self, server, cell, &*store)
                .with_context(|| format!("the rollout server {} cannot be used", server.name()))?;
        }
        for server in &self.servers {
            let (fleet, server) = (Arc::clone(self), Arc::clone(server));
            let (cell, store) = (Arc::clone(cell), Arc::clone(&store));
            self.threads.fetch_add(1, Ordering::SeqCst);
            let work = move || {
                let run = || hand_over::run(&fleet, &server, &cell, &*store);
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
                    let why = "internal error: the thread that hands weights to it panicked".to_owned();
                    fleet.set(&server, Condition::Rejected(why));
                }
                fleet.threads.fetch_sub(1, Ordering::SeqCst);
            };
            std::thread::Builder::new().name("hand-over".into()).spawn(work).context("cannot start a thread")?;
        }
        Ok(())
    }

    /// Ends the threads that hand weights over, and waits until a hand-over under way is complete, so that no server is left
    /// paused. The wait has a limit, since a server may not answer.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        let end = Instant::now() + LAST_HAND_OVER;
        while self.threads.load(Ordering::SeqCst) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(line) = self.losses() {
            status!("{line}");
        }
    }

    /// Describes the completions that were lost with failed requests, and their length, since long completions are lost more
    /// often than short ones. `None` if there were none.
    fn losses(&self) -> Option<String> {
        let Lost { completions: lost, tokens: lost_tokens } = *lock(&self.lost);
        let kept = self.servers.iter().map(|server| {
            let state = server.state();
            (state.completions, state.tokens)
        });
        let (kept, tokens) = kept.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        (lost > 0).then(|| {
            format!(
                "servers   {lost} completions were lost with failed requests after about {:.0} tokens each, and were sampled again; {kept} were received, with {:.0} tokens on average",
                lost_tokens / lost as f64,
                tokens as f64 / kept.max(1) as f64
            )
        })
    }

    /// Returns the highest version that a server has taken.
    pub fn version(&self) -> Option<u64> {
        let versions = self.servers.iter().filter_map(|server| {
            let state = server.state();
            state.loaded.as_ref().filter(|_| state.condition == Condition::Ready).map(|stored| stored.tag.version)
        });
        versions.max()
    }

    /// Makes `gate` the gate that opens when a server has taken a version.
    pub fn attach(&self, gate: &Arc<AdmissionGate>) {
        *lock(&self.gate) = Some(Arc::clone(gate));
        self.admit();
    }

    /// Lets prompts start for the newest version that a server has.
    pub(super) fn admit(&self) {
        if let (Some(version), Some(gate)) = (self.version(), &*lock(&self.gate)) {
            gate.set_version(version);
        }
        self.changes.send_modify(|count| *count += 1);
    }

    /// Returns the state of each server.
    pub fn report(&self) -> Vec<ServerReport> {
        let one = |server: &Arc<Server>| {
            let state = server.state();
            let (condition, why) = match &state.condition {
                Condition::Starting => ("starting", String::new()),
                Condition::Ready => ("ready", String::new()),
                Condition::Down(why) => ("down", why.clone()),
                Condition::Rejected(why) => ("rejected", why.clone()),
            };
            ServerReport {
                url: server.name().to_owned(),
                condition,
                why,
                version: state.loaded.as_ref().map(|stored| stored.tag.version),
                under_way: state.under_way.values().sum(),
                completions: state.completions,
                tokens: state.tokens,
                tokens_per_s: state.recent.per_second(Instant::now()),
                canary: state.canary,
                hand_over_s: state.hand_over.map(|took| took.as_secs_f64()),
            }
        };
        self.servers.iter().map(one).collect()
    }

    /// Returns the reasons why servers are not ready, in one line.
    pub fn reasons(&self) -> String {
        let reports = self.report();
        let reasons = reports.iter().filter(|report| report.condition != "ready");
        let words = |report: &ServerReport| match report.why.is_empty() {
            true => format!("{} has no weights yet", report.url),
            false => format!("{}: {}", report.url, report.why),
        };
        match reasons.map(words).collect::<Vec<_>>() {
            list if list.is_empty() => "the servers' weights are too old".into(),
            list => list.join("; "),
        }
    }

    /// Returns the reasons of [`Self::reasons`] if no server is usable; empty otherwise.
    pub fn reasons_of_wait(&self) -> String {
        let is_ready = |server: &Arc<Server>| server.state().condition == Condition::Ready;
        if self.servers.iter().any(is_ready) { String::new() } else { format!("waits for servers: {}", self.reasons()) }
    }

    /// Returns the tokens per second of one completion, as a mean over the servers that have sampled; `None` before that.
    pub fn pace(&self) -> Option<f64> {
        let paces: Vec<f64> = self.servers.iter().filter_map(|server| server.state().pace).map(|s| 1.0 / s).collect();
        (!paces.is_empty()).then(|| paces.iter().sum::<f64>() / paces.len() as f64)
    }

    /// Returns whether a ready server has a version that is only too old for a group, so that a hand-over ends the wait.
    fn has_newer_to_come(&self) -> bool {
        self.servers.iter().any(|server| server.state().condition == Condition::Ready)
    }

    /// Returns the oldest version that group number `seq` may start with, so that no token is older than η versions when the
    /// group is trained on: ⌊seq/B⌋ − η.
    pub(super) fn min_version(&self, seq: u64) -> u64 {
        self.plan.admission.min_version(seq)
    }

    /// Returns prompts and completions of recent groups, or the example if there are none yet.
    pub(super) fn samples(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let recent = lock(&self.recent);
        if !recent.is_empty() {
            return recent.iter().cloned().collect();
        }
        let half = self.plan.example.len() / 2;
        vec![(self.plan.example[..half].to_vec(), self.plan.example[half..].to_vec())]
    }

    /// Sets the condition of a server, logs a change, and wakes requests that wait.
    pub(super) fn set(&self, server: &Server, condition: Condition) {
        let line = match &condition {
            Condition::Down(why) => Some(format!("rollout server {} is down: {why}; it is tried again", server.name())),
            Condition::Rejected(why) => Some(format!("rollout server {} gets no prompts: {why}", server.name())),
            Condition::Ready => None,
            Condition::Starting => Some(format!("rollout server {} answers again", server.name())),
        };
        if server.set(condition) {
            if let Some(line) = line {
                status!("{line}");
            }
            self.observe(server);
            let usable = self.servers.iter().any(|server| server.state().condition == Condition::Ready);
            let mut since = lock(&self.unusable_since);
            *since = if usable { None } else { since.or_else(|| Some(Instant::now())) };
            drop(since);
            if usable {
                self.ended_waiting.store(false, Ordering::SeqCst);
            }
            self.admit();
        }
    }

    /// Returns whether no server has been usable for the outage limit.
    pub fn is_out(&self) -> bool {
        lock(&self.unusable_since).is_some_and(|since| since.elapsed() >= self.plan.outage)
    }

    /// After an outage, admits one batch more. Without that, a run that waits for admission would not learn of the outage:
    /// the prompts find no server, and end the run with the reason.
    pub(super) fn end_waiting(&self) {
        if self.is_out()
            && !self.ended_waiting.swap(true, Ordering::SeqCst)
            && let Some(gate) = &*lock(&self.gate)
        {
            gate.set_version(gate.version() + 1);
        }
    }

    /// Publishes the state of a server as metrics.
    pub(super) fn observe(&self, server: &Server) {
        let state = server.state();
        let version = state.loaded.as_ref().map(|stored| stored.tag.version);
        telemetry::rollout_server(server.name(), state.condition == Condition::Ready, version);
    }

    /// Samples `n` completions of `prompt` for group number `seq`, on one server. A failure is repeated, on another server if
    /// there is one, until a server answers or none was usable for the outage limit.
    ///
    /// # Errors
    /// If no server is usable for too long, or a server refuses the request.
    pub(super) async fn sample(&self, prompt: &[u32], n: usize, min_version: u64) -> Result<Vec<Sampled>> {
        let mut changes = self.changes.subscribe();
        let began = Instant::now();
        let mut invalid = 0u32;
        let mut last = String::new();
        loop {
            changes.borrow_and_update();
            let Some((server, stored)) = self.reserve(n, min_version) else {
                // A server that fails each request is ready again and again, but never answers.
                let unanswered = began.max(*lock(&self.answered)).elapsed() >= self.plan.outage;
                if self.is_out() || (unanswered && !self.has_newer_to_come()) {
                    let key = match self.plan.outage_key {
                        "" => String::new(),
                        key => format!(" ({key})"),
                    };
                    let after = if last.is_empty() { String::new() } else { format!("; the last failure: {last}") };
                    anyhow::bail!(
                        "no rollout server could be used for {:.0} s{key}: {}{after}",
                        self.plan.outage.as_secs_f64(),
                        self.reasons()
                    );
                }
                // A change wakes this early; the time-out checks the outage.
                let _ = tokio::time::timeout(Duration::from_secs(1), changes.changed()).await;
                continue;
            };
            let guard = UnderWay { server: &server, version: stored.tag.version, n };
            let max_tokens = self.plan.sampling.max_new_tokens;
            let group = Group { n, max_tokens };
            let asked = Instant::now();
            let sampled = server.generate(&stored, prompt, group).await;
            drop(guard);
            let sampled = sampled.and_then(|sampled| {
                let oldest = sampled.iter().flat_map(|one| &one.versions).min().copied().unwrap_or(0);
                match oldest < min_version {
                    true => Err(Fault::Invalid(format!(
                        "a token was sampled with version {oldest}, and the group needs {min_version} or newer"
                    ))),
                    false => Ok(sampled),
                }
            });
            match sampled {
                Ok(sampled) => {
                    *lock(&self.answered) = Instant::now();
                    let longest = sampled.iter().map(|one| one.ids.len()).max().unwrap_or(0);
                    server.took(longest, asked.elapsed());
                    let tokens = sampled.iter().map(|one| one.ids.len() as u64).sum();
                    {
                        let mut state = server.state();
                        state.completions += n as u64;
                        state.tokens += tokens;
                        state.recent.push(Instant::now(), tokens);
                    }
                    telemetry::rollout_answer(server.name(), "ok", tokens);
                    if let Some(one) = sampled.first() {
                        let mut recent = lock(&self.recent);
                        recent.push_back((prompt.to_vec(), one.ids.clone()));
                        while recent.len() > RECENT {
                            recent.pop_front();
                        }
                    }
                    return Ok(sampled);
                }
                Err(fault) => {
                    self.count_lost(&server, &fault, n, asked.elapsed());
                    last = format!("{}: {fault}", server.name());
                    invalid += 1;
                    self.failed(&server, fault, &stored, invalid)?;
                }
            }
        }
    }

    /// Counts the `n` completions of a request that failed after the time `after`, unless the server refused it. A server
    /// tells no completion before its end, so that the number of tokens is estimated from the server's usual time per token.
    fn count_lost(&self, server: &Server, fault: &Fault, n: usize, after: Duration) {
        if matches!(fault, Fault::Refused(_) | Fault::Lost(_)) {
            return;
        }
        let pace = server.state().pace;
        let most = self.plan.sampling.max_new_tokens as f64;
        let tokens = pace.filter(|pace| *pace > 0.0).map_or(0.0, |pace| (after.as_secs_f64() / pace).min(most));
        let mut lost = lock(&self.lost);
        lost.completions += n as u64;
        lost.tokens += n as f64 * tokens;
        telemetry::rollout_lost(server.name(), n, tokens);
    }

    /// Records a failed request of `server`.
    ///
    /// # Errors
    /// If a repetition cannot succeed.
    fn failed(&self, server: &Server, fault: Fault, stored: &Stored, repeated: u32) -> Result<()> {
        let outcome = match &fault {
            Fault::Down(_) => "down",
            Fault::Lost(_) => "lost",
            Fault::Refused(_) => "refused",
            Fault::Invalid(_) => "invalid",
        };
        telemetry::rollout_answer(server.name(), outcome, 0);
        match fault {
            Fault::Refused(why) => anyhow::bail!("the rollout server {} refuses a request: {why}", server.name()),
            Fault::Invalid(why) if repeated < MAX_INVALID => {
                status!("rollout server {}: {why}; the group is sampled again", server.name());
            }
            Fault::Down(why) | Fault::Lost(why) | Fault::Invalid(why) => {
                // A failure of a request for older weights says nothing of the present ones.
                let current = server.state().loaded.as_ref() == Some(stored);
                if current {
                    self.set(server, Condition::Down(why));
                }
            }
        }
        Ok(())
    }

    /// Returns the usable server with the least load whose version is at least `min_version`, with `n` more completions under
    /// way. The load of a server is the number of its completions times their time per token, so that a slow server gets
    /// fewer, and a group does not wait for it for as long.
    fn reserve(&self, n: usize, min_version: u64) -> Option<(Arc<Server>, Stored)> {
        let usable: Vec<_> = self
            .servers
            .iter()
            .filter_map(|server| {
                let state = server.state();
                let stored = state.loaded.as_ref().filter(|stored| stored.tag.version >= min_version)?;
                (state.condition == Condition::Ready)
                    .then(|| (state.under_way.values().sum::<usize>(), state.pace, server, stored.clone()))
            })
            .collect();
        // A server that has not answered yet counts as fast as the fastest.
        let fastest = usable.iter().filter_map(|(_, pace, ..)| *pace).fold(f64::INFINITY, f64::min).min(1.0);
        let load = |(under_way, pace, ..): &(usize, Option<f64>, &Arc<Server>, Stored)| {
            (under_way + n) as f64 * pace.unwrap_or(fastest)
        };
        let (.., server, stored) = usable.into_iter().min_by(|a, b| load(a).total_cmp(&load(b)))?;
        let mut state = server.state();
        *state.under_way.entry(stored.tag.version).or_default() += n;
        telemetry::rollout_under_way(server.name(), state.under_way.values().sum());
        drop(state);
        Some((Arc::clone(server), stored))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which is not allowed on a thread of another runtime.
        if let Some(runtime) = self.owned.take() {
            runtime.shutdown_background();
        }
    }
}

/// Completions that were lost, and the estimated number of their tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Lost {
    completions: u64,
    tokens: f64,
}

/// Completions under way on a server, until the value is dropped.
struct UnderWay<'a> {
    server: &'a Server,
    version: u64,
    n: usize,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut state = self.server.state();
        if let Some(count) = state.under_way.get_mut(&self.version) {
            *count = count.saturating_sub(self.n);
            if *count == 0 {
                state.under_way.remove(&self.version);
            }
        }
        telemetry::rollout_under_way(self.server.name(), state.under_way.values().sum());
    }
}

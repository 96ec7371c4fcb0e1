//! Sending questions to a server: limits, time-outs, retries, hedging, and what it costs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::breaker::{Admit, Breaker};
use super::key::Key;
use super::limit::Bucket;
use super::outage::Outage;
use super::retry::{Outcome, pause};
use super::stats::RemoteStats;
use super::wire::{Answer, Request, excerpt, read};
use crate::config::{RemoteApi, RemoteJudge};
use crate::http;
use crate::knob::Knob;
use crate::label::backend::{Alive, Refusal, Reply, Usage};
use crate::seed;
use crate::telemetry;

/// Log-probabilities that servers of the older protocol give at most, where they refuse more.
const FEWEST_LOGPROBS: usize = 5;

/// One server, with all that its users share.
pub struct Client {
    /// How it is asked.
    pub judge: RemoteJudge,
    /// What came of it.
    pub stats: RemoteStats,
    http: reqwest::Client,
    key: Option<Key>,
    began: Instant,
    /// Exchanges that may be under way at once.
    pub knob: Arc<Knob>,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
    breaker: Mutex<Breaker>,
    outage: Outage,
    jitter: Mutex<ChaCha8Rng>,
    top_logprobs: AtomicUsize,
}

impl Client {
    /// A client that has sent nothing yet.
    ///
    /// # Errors
    /// When the TLS library cannot be set up.
    pub fn new(judge: RemoteJudge, key: Option<Key>) -> Result<Self> {
        // A redirect would take the question, and after a second one the key, to an address that nobody configured.
        let http = http::builder()
            .connect_timeout(seconds(judge.connect_timeout_s))
            .timeout(seconds(judge.timeout_s))
            .pool_max_idle_per_host(judge.concurrency)
            .build()
            .context("cannot set up HTTP for remote judges")?;
        Ok(Self {
            stats: RemoteStats::default(),
            http,
            key,
            began: Instant::now(),
            knob: Arc::new(Knob::new(1, judge.concurrency)),
            requests: Bucket::new(judge.requests_per_minute).map(Mutex::new),
            tokens: Bucket::new(judge.tokens_per_minute).map(Mutex::new),
            breaker: Mutex::new(Breaker::new(judge.breaker_failures, seconds(judge.breaker_cooldown_s))),
            outage: Outage::default(),
            jitter: Mutex::new(ChaCha8Rng::seed_from_u64(seed::text(&judge.url))),
            top_logprobs: AtomicUsize::new(20),
            judge,
        })
    }

    /// How many log-probabilities this server gives.
    pub fn top_logprobs(&self) -> usize {
        self.top_logprobs.load(Ordering::SeqCst)
    }

    /// Whom to give a sign of life while the server is away.
    pub fn attend(&self, name: &str, alive: &Alive) {
        self.outage.attend(name, alive);
    }

    /// Asks until there is an answer, the retries are used up, or `deadline_s` has passed. While the circuit breaker says that
    /// the server is away, neither counts: it is waited for, up to `outage_s`.
    ///
    /// # Errors
    /// A failure that says what the last try came to.
    pub async fn ask(&self, request: &Request, usage: &mut Usage) -> Reply<Answer> {
        let mut request = request.clone();
        let mut deadline = self.began.elapsed() + seconds(self.judge.deadline_s);
        let mut attempt = 0;
        loop {
            if self.admitted().await? {
                (attempt, deadline) = (0, self.began.elapsed() + seconds(self.judge.deadline_s));
            }
            self.paced(&request).await;
            let (outcome, answer) = self.send(&request, usage).await;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            if self.fewer_logprobs(&outcome, &mut request) {
                continue;
            }
            attempt += 1;
            let failed = |why: &str| {
                let url = &self.judge.url;
                Err(Refusal::Failure(format!("{url} {} ({why})", outcome.words())))
            };
            if !outcome.may_pass() {
                return failed("asking again would not help");
            }
            if self.is_away() && self.judge.outage_s > 0.0 {
                telemetry::judge_retry();
                continue;
            }
            if attempt > self.judge.retries {
                return failed(&format!("after {attempt} tries"));
            }
            let uniform = self.jitter.lock().unwrap_or_else(PoisonError::into_inner).random::<f64>();
            let (base, most) = (seconds(self.judge.backoff_s), seconds(self.judge.max_backoff_s));
            let pause = pause(&outcome, attempt, base, most, uniform);
            if self.began.elapsed() + pause >= deadline {
                return failed(&format!("the deadline of {} s has passed", self.judge.deadline_s));
            }
            telemetry::judge_retry();
            tokio::time::sleep(pause).await;
        }
    }

    fn is_away(&self) -> bool {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner).is_open()
    }

    /// Waits while the server is away, as long as it is waited for; says whether it had to.
    async fn admitted(&self) -> Reply<bool> {
        let mut waited = false;
        loop {
            let now = self.began.elapsed();
            let admit = self.breaker.lock().unwrap_or_else(PoisonError::into_inner).admit(now);
            let pause = match admit {
                Admit::Go => return Ok(waited),
                Admit::Wait(pause) => pause,
            };
            let away = self.outage.waits(now, &self.judge.url);
            if away >= seconds(self.judge.outage_s) {
                return Err(Refusal::Failure(format!(
                    "{} kept failing and is left alone for a while (labeler.remote.breaker_cooldown_s); it was waited for as long as labeler.remote.outage_s says",
                    self.judge.url
                )));
            }
            waited = true;
            tokio::time::sleep(pause.min(Duration::from_secs(1))).await;
        }
    }

    /// Waits for the rate limits.
    async fn paced(&self, request: &Request) {
        for (bucket, amount) in [(&self.requests, 1.0), (&self.tokens, request.estimate() as f64)] {
            if let Some(bucket) = bucket {
                let now = self.began.elapsed();
                let pause = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(now, amount);
                if pause > Duration::ZERO {
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// One try: one exchange, or two where the first lets itself be waited for.
    async fn send(&self, request: &Request, usage: &mut Usage) -> (Outcome, Option<Answer>) {
        let first = self.exchange(request);
        let Some(after) = self.judge.hedge_after_s else { return self.settle(first.await, usage) };
        tokio::pin!(first);
        tokio::select! {
            done = &mut first => return self.settle(done, usage),
            () = tokio::time::sleep(seconds(after)) => {}
        }
        telemetry::judge_hedge();
        let second = self.exchange(request);
        tokio::pin!(second);
        // Who answers first wins; who merely fails first leaves it to the other.
        let (done, other) = tokio::select! {
            done = &mut first => (done, true),
            done = &mut second => (done, false),
        };
        if done.1.is_some() {
            return self.settle(done, usage);
        }
        let _ = self.settle(done, usage);
        let last = if other { second.await } else { first.await };
        self.settle(last, usage)
    }

    /// Notes what an exchange cost and how the server is.
    fn settle(&self, done: (Outcome, Option<Answer>), usage: &mut Usage) -> (Outcome, Option<Answer>) {
        let (outcome, answer) = done;
        usage.requests += 1;
        if let Some(answer) = &answer {
            let cost = (answer.prompt_tokens as f64 * self.judge.price_prompt
                + answer.completion_tokens as f64 * self.judge.price_completion)
                / 1e6;
            usage.prompt_tokens += answer.prompt_tokens;
            usage.completion_tokens += answer.completion_tokens;
            usage.cost += cost;
            telemetry::judge_cost(cost);
        }
        let now = self.began.elapsed();
        let mut breaker = self.breaker.lock().unwrap_or_else(PoisonError::into_inner);
        breaker.record(now, outcome.alive());
        if outcome.alive() {
            self.outage.over(now, &self.judge.url);
        }
        telemetry::judge_breaker(breaker.is_open());
        (outcome, answer)
    }

    /// One HTTP exchange, counted once whatever becomes of it.
    async fn exchange(&self, request: &Request) -> (Outcome, Option<Answer>) {
        let _under_way = self.knob.enter().await;
        let counted = Counted::new(&self.stats);
        let (outcome, answer) = match self.post(request).await {
            Ok(answer) => (Outcome::Ok, Some(answer)),
            Err(outcome) => (outcome, None),
        };
        counted.end(&outcome);
        (outcome, answer)
    }

    async fn post(&self, request: &Request) -> Result<Answer, Outcome> {
        let (path, body) = request.body(&self.judge);
        let url = format!("{}/{path}", self.judge.url.trim_end_matches('/'));
        let mut post = self.http.post(url).header("content-type", "application/json").body(body.to_string());
        if let Some(key) = &self.key {
            post = key.sign(post);
        }
        let mut response = post.send().await.map_err(|error| broken(&error))?;
        let status = response.status().as_u16();
        if (300..400).contains(&status) {
            let is_secret = |text: &str| self.key.as_ref().is_some_and(|key| key.is_in(text));
            return Err(Outcome::Refused(status, http::redirect_target(&response, is_secret)));
        }
        let wait = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse::<f64>().ok());
        let mut bytes = Vec::new();
        let most = if status == 200 { self.judge.max_response_bytes } else { 4096 };
        while let Some(chunk) = response.chunk().await.map_err(|error| broken(&error))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > most {
                if status == 200 {
                    return Err(Outcome::Malformed(format!("the body has more than {most} bytes")));
                }
                break;
            }
        }
        if let Some(key) = &self.key {
            bytes = key.hide(bytes);
        }
        match status {
            200..=299 => read(&bytes, request).map_err(Outcome::Malformed),
            429 => Err(Outcome::RateLimited(wait.filter(|s| (0.0..1e6).contains(s)).map(Duration::from_secs_f64))),
            500.. => Err(Outcome::Server(status)),
            _ => Err(Outcome::Refused(status, excerpt(&String::from_utf8_lossy(&bytes)))),
        }
    }

    /// Whether the server refused the number of log-probabilities, and may give fewer.
    fn fewer_logprobs(&self, outcome: &Outcome, request: &mut Request) -> bool {
        let refused = matches!(outcome, Outcome::Refused(400 | 422, body) if body.contains("logprobs"));
        if !refused || request.top_logprobs <= FEWEST_LOGPROBS || self.judge.api != RemoteApi::Completions {
            return false;
        }
        self.top_logprobs.store(FEWEST_LOGPROBS, Ordering::SeqCst);
        request.top_logprobs = FEWEST_LOGPROBS;
        true
    }
}

/// Counts an exchange as overtaken unless it is told how it ended.
struct Counted<'a> {
    stats: &'a RemoteStats,
    began: Instant,
    ended: bool,
}

impl<'a> Counted<'a> {
    fn new(stats: &'a RemoteStats) -> Self {
        telemetry::judge_in_flight(1.0);
        Self { stats, began: Instant::now(), ended: false }
    }

    fn end(mut self, outcome: &Outcome) {
        self.ended = true;
        self.stats.count(outcome);
        telemetry::judge_took(self.began.elapsed());
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        telemetry::judge_in_flight(-1.0);
        if !self.ended {
            self.stats.count(&Outcome::HedgedAway);
        }
    }
}

fn broken(error: &reqwest::Error) -> Outcome {
    if error.is_timeout() {
        return Outcome::Timeout;
    }
    // The innermost cause says most; the outer ones repeat the address.
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    Outcome::Connection(excerpt(&cause.to_string()))
}

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value)
}

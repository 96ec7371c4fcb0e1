//! Client of one judge server: limits, time-outs, retries, hedging and costs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::abilities::Abilities;
use super::answer::Answer;
use super::breaker::{Admit, Breaker};
use super::budget::{Budget, Reserved};
use super::evidence::Evidence;
use super::outage::{Cause, Outage};
use super::pace::Pace;
use super::retry::{ExchangeOutcome, FailureClass, pause};
use super::stats::RemoteStats;
use super::transport::Transport;
use super::wire::Request;
use crate::config::{Evidence as Votes, RemoteJudge};
use crate::observe::telemetry;
use crate::pipeline::label::backend::{Alive, NoAnswer, Reply, Usage};
use crate::util::limit::AdjustableLimit;
use crate::util::mutex::lock;
use crate::util::seed;

/// Number of rate-limited tries after which the client checks whether the server answers other questions.
const LIMITED_TRIES: u32 = 8;
/// Number of consecutive such checks after which the question itself counts as refused: some servers report a prompt
/// that exceeds a token limit as a rate limit.
const LIMITED_ROUNDS: u32 = 5;
/// Interval between two signs of life while a question waits.
const SIGN_EVERY: Duration = Duration::from_secs(10);

/// Client of one server, with the state that its users share.
pub struct Client {
    /// Configuration of the judge.
    pub judge: RemoteJudge,
    /// Counts of exchanges by outcome.
    pub stats: RemoteStats,
    transport: Transport,
    abilities: Mutex<Abilities>,
    /// Per answer, whether the model writes it as one token.
    tokens_of_answers: Mutex<HashMap<String, bool>>,
    /// True once a warning about truncated prompts was logged.
    cut_prompts: AtomicBool,
    /// True once a warning about too short lists of alternatives was logged.
    cut_lists: AtomicBool,
    began: Instant,
    /// Limit on concurrent exchanges.
    pub concurrency_limit: Arc<AdjustableLimit>,
    pace: Pace,
    budget: Option<Arc<Budget>>,
    /// Highest ratio so far of an exchange's cost to its estimated maximum; at least 1.
    excess: Mutex<f64>,
    breaker: Mutex<Breaker>,
    outage: Outage,
    evidence: Mutex<Evidence>,
    /// Held by the question that checks whether the server answers any.
    turn: tokio::sync::Mutex<()>,
    jitter: Mutex<ChaCha8Rng>,
}

/// Tries of one question since it was last admitted.
struct Tries {
    failed: u32,
    limited: u32,
    /// True if the question was sent again because a connection was closed.
    reopened: bool,
    deadline: Duration,
}

impl Client {
    /// Creates a client that has sent nothing yet and spends no more than `budget` allows.
    ///
    /// # Errors
    /// If an address, header, certificate or environment variable is invalid.
    pub fn new(judge: RemoteJudge, budget: Option<Arc<Budget>>) -> Result<Self> {
        let transport = Transport::new(&judge)?;
        Ok(Self {
            stats: RemoteStats::default(),
            abilities: Mutex::new(Abilities::new(&judge)),
            tokens_of_answers: Mutex::default(),
            cut_prompts: AtomicBool::new(false),
            cut_lists: AtomicBool::new(false),
            began: Instant::now(),
            concurrency_limit: Arc::new(AdjustableLimit::new(1, judge.concurrency)),
            pace: Pace::new(&judge, &transport.account()),
            budget,
            excess: Mutex::new(1.0),
            breaker: Mutex::new(Breaker::new(judge.breaker_failures, seconds(judge.breaker_cooldown_s))),
            outage: Outage::default(),
            evidence: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            jitter: Mutex::new(ChaCha8Rng::seed_from_u64(seed::text(&judge.url))),
            transport,
            judge,
        })
    }

    /// Returns the server's known abilities, which reflect its refusals so far.
    pub fn abilities(&self) -> Abilities {
        lock(&self.abilities).clone()
    }

    /// Returns whether the model writes `answer` as one token, if that is known.
    pub fn known_token(&self, answer: &str) -> Option<bool> {
        lock(&self.tokens_of_answers).get(answer).copied()
    }

    /// Records whether the model writes `answer` as one token.
    pub fn note_token(&self, answer: &str, whole: bool) {
        lock(&self.tokens_of_answers).insert(answer.to_owned(), whole);
    }

    /// Applies `change` to the server's known abilities.
    pub fn change(&self, change: impl FnOnce(&mut Abilities)) {
        change(&mut lock(&self.abilities));
    }

    /// Returns the model name that the server reported with its first answer, if all answers must be of that model.
    pub fn reported_model(&self) -> Option<String> {
        lock(&self.evidence).model().filter(|_| !self.judge.any_model)
    }

    /// Returns a description of how answers become probabilities, once the server has answered.
    pub fn evidence(&self) -> Option<String> {
        let answered = lock(&self.evidence).has_answered();
        answered.then(|| self.abilities().words().to_owned())
    }

    /// Registers a callback that gives a sign of life while the server is unavailable.
    pub fn register_liveness(&self, name: &str, alive: &Alive) {
        self.outage.register_liveness(name, alive);
    }

    /// Asks until there is an answer.
    ///
    /// A failure of the server or the network is retried up to `retries` times within `deadline_s`; a rate limit is
    /// waited for and does not count as a try. After that, or at once after a refusal, the client checks whether the
    /// server answers other questions. If it does, this question gets the same number of tries once more and is then
    /// given up; after a refusal that is about the question itself (400, 413, 422), it is given up at once. If the
    /// server answers no other question either, it is unavailable: all questions wait for it, up to `outage_s` from the
    /// first failure, and are asked again once it answers.
    ///
    /// # Errors
    /// An abstention if the server answers other questions but not this one. A failure if it answered none for
    /// `outage_s`, if the budget is used up, or if no actor wants the answer any more. Both contain the address and the
    /// server's message.
    pub async fn ask(&self, request: &Request, usage: &mut Usage) -> Reply<Answer> {
        let mut request = request.clone();
        let mut tries = self.tries();
        // `answering` is true if the server was seen to answer other questions when the present tries began.
        let (mut asked, mut answering, mut alone) = (false, false, 0);
        loop {
            if self.admitted(asked).await? {
                (answering, tries) = (false, self.tries());
            }
            let waits = self.now();
            self.paced(&request).await?;
            // The deadline is extended by the time during which no try was allowed.
            tries.deadline += self.now() - waits;
            let (outcome, answer) = self.send(&request, usage).await?;
            asked = true;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            if self.adapted(&outcome, &mut request) {
                if request.begun.is_some() && !self.abilities().continues() {
                    return Err(NoAnswer::Abstention(format!(
                        "{} does not continue an answer that has begun",
                        self.address()
                    )));
                }
                continue;
            }
            let ended = self.now();
            if let ExchangeOutcome::Closed(_) = outcome {
                if !tries.reopened {
                    // The server may have closed an idle connection, which is not a failure.
                    tries.reopened = true;
                    telemetry::judge_retry();
                    continue;
                }
                lock(&self.breaker).record(ended, false);
            }
            let refuses = outcome.class() == FailureClass::Refusal;
            let words = format!("{} {}", self.address(), outcome.words());
            self.outage.failed(ended, Cause { words: words.clone(), refuses });
            if outcome.class() == FailureClass::Limited {
                tries.limited += 1;
                if tries.limited.is_multiple_of(LIMITED_TRIES) {
                    alone = if self.answers_others(ended, usage).await? { alone + 1 } else { 0 };
                    if alone >= LIMITED_ROUNDS {
                        return Err(NoAnswer::Abstention(format!(
                            "{words}, each of {} times; it answers other questions meanwhile",
                            tries.limited
                        )));
                    }
                }
                self.limited(&outcome, tries.limited).await?;
                continue;
            }
            tries.failed += 1;
            let again = self.pause(&outcome, tries.failed);
            let spent = tries.failed > self.judge.retries || ended + again >= tries.deadline;
            if !refuses && !spent && !self.is_open() {
                telemetry::judge_retry();
                self.rest(again).await?;
                continue;
            }
            if self.answers_others(ended, usage).await? {
                // Earlier tries may have met the end of an outage. Only tries from now on count against the question.
                if outcome.refuses_this_question() || (answering && (refuses || spent)) {
                    return Err(NoAnswer::Abstention(format!("{words}; it answers other questions")));
                }
                if !answering && (refuses || spent) {
                    (answering, tries) = (true, self.tries());
                }
                telemetry::judge_retry();
                self.rest(again).await?;
                continue;
            }
            answering = false;
            lock(&self.breaker).trip(self.now());
            if self.outage.elapsed(self.now()) >= seconds(self.judge.outage_s) {
                return Err(self.gave_up());
            }
            telemetry::judge_retry();
        }
    }

    /// Asks `request`, retrying a few times while the server or the network fails, for about `patience` at most.
    ///
    /// # Errors
    /// The cause of the last failed try.
    pub async fn probe(&self, request: &Request, patience: Duration) -> Result<Answer, Cause> {
        /// Enough tries to distinguish a server that fails occasionally from one that is unavailable.
        const TRIES: u32 = 5;
        let mut request = request.clone();
        let mut until = self.now() + patience;
        for attempt in 1.. {
            until = self.paced_probe(&request, until).await?;
            let refused = |refusal: NoAnswer| Cause { words: refusal.to_string(), refuses: true };
            let (outcome, answer) = self.send(&request, &mut Usage::default()).await.map_err(refused)?;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            if self.adapted(&outcome, &mut request) {
                continue;
            }
            let refuses = outcome.class() == FailureClass::Refusal;
            let pause = self.pause(&outcome, attempt);
            if refuses || attempt > self.judge.retries.max(TRIES) || self.now() + pause >= until {
                return Err(Cause { words: format!("{} {}", self.address(), outcome.words()), refuses });
            }
            if outcome.class() == FailureClass::Limited {
                self.pace.hold(outcome.wait().unwrap_or_default()).await;
            }
            tokio::time::sleep(pause).await;
        }
        Err(Cause { words: format!("{} did not answer", self.address()), refuses: false })
    }

    fn tries(&self) -> Tries {
        Tries { failed: 0, limited: 0, reopened: false, deadline: self.now() + seconds(self.judge.deadline_s) }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Returns the address of requests for error messages.
    fn address(&self) -> String {
        self.transport.address(&self.judge)
    }

    fn pause(&self, outcome: &ExchangeOutcome, attempt: u32) -> Duration {
        let uniform = lock(&self.jitter).random::<f64>();
        pause(outcome, attempt, seconds(self.judge.backoff_s), seconds(self.judge.max_backoff_s), uniform)
    }

    fn is_open(&self) -> bool {
        lock(&self.breaker).is_open()
    }

    fn gave_up(&self) -> NoAnswer {
        let cause = self.outage.cause().map_or_else(|| "it gave no answer".into(), |cause| cause.words);
        NoAnswer::Failure(format!(
            "{cause}; no question was answered for {} s, and the limit is labeler.remote.outage_s = {}",
            self.outage.elapsed(self.now()).as_secs(),
            self.judge.outage_s
        ))
    }

    /// Returns whether the server answers questions other than one that failed at `since`. Uses an answer to a question
    /// that was sent later, or asks one that the server has answered before.
    ///
    /// # Errors
    /// The same as for [`Client::paced`].
    async fn answers_others(&self, since: Duration, usage: &mut Usage) -> Reply<bool> {
        let _turn = self.turn.lock().await;
        let control = {
            let evidence = lock(&self.evidence);
            if let Some(known) = evidence.of(since) {
                return Ok(known);
            }
            evidence.control()
        };
        let Some(mut control) = control else { return Ok(false) };
        // The control question may have been answered before the server refused its number of alternatives.
        control.top_logprobs = control.top_logprobs.min(self.abilities().top_logprobs);
        self.paced(&control).await?;
        let sent = self.now();
        let (outcome, answer) = self.send(&control, usage).await?;
        if answer.is_none() {
            let words = format!("{} {}", self.address(), outcome.words());
            self.outage.failed(self.now(), Cause { words, refuses: outcome.class() == FailureClass::Refusal });
            lock(&self.evidence).control_unanswered(sent);
        }
        Ok(answer.is_some())
    }

    /// Waits while the server is unavailable, for at most `outage_s`; returns whether it waited. A question that was
    /// not `asked` yet is admitted when the wait is over, so that no question fails without having been asked.
    ///
    /// # Errors
    /// If the server was unavailable for `outage_s`, or no actor wants the answer any more.
    async fn admitted(&self, asked: bool) -> Reply<bool> {
        let mut waited = false;
        loop {
            let now = self.now();
            let pause = match lock(&self.breaker).admit(now) {
                Admit::Go => return Ok(waited),
                Admit::Wait(pause) => pause,
            };
            if self.waiting()? >= seconds(self.judge.outage_s) {
                return if asked { Err(self.gave_up()) } else { Ok(true) };
            }
            waited = true;
            tokio::time::sleep(pause.min(Duration::from_secs(1))).await;
        }
    }

    /// Gives a sign of life for the actors that wait for the server; returns the time since it last answered.
    ///
    /// # Errors
    /// If no actor wants the answer any more.
    fn waiting(&self) -> Reply<Duration> {
        let waited = self.outage.wait(self.now(), &self.judge.url, seconds(self.judge.outage_s));
        if waited.wanted {
            return Ok(waited.elapsed);
        }
        let cause = self.outage.cause().map_or_else(String::new, |cause| format!(": {}", cause.words));
        Err(NoAnswer::Failure(format!("the run ended while it waited for the judge at {}{cause}", self.judge.url)))
    }

    /// Waits for `pause`, with signs of life if it is long.
    ///
    /// # Errors
    /// The same as for [`Client::waiting`].
    async fn rest(&self, pause: Duration) -> Reply<()> {
        const SLICE: Duration = Duration::from_secs(1);
        let until = self.now() + pause;
        while let Some(left) = until.checked_sub(self.now()).filter(|left| *left > Duration::ZERO) {
            if left > SLICE {
                self.waiting()?;
            }
            tokio::time::sleep(left.min(SLICE)).await;
        }
        Ok(())
    }

    /// Waits after a rate-limit response; all questions wait with this one.
    ///
    /// # Errors
    /// If no question was answered for `outage_s`, or no actor wants the answer any more.
    async fn limited(&self, outcome: &ExchangeOutcome, attempt: u32) -> Reply<()> {
        if attempt > self.judge.retries && self.outage.elapsed(self.now()) >= seconds(self.judge.outage_s) {
            return Err(self.gave_up());
        }
        telemetry::judge_retry();
        let pause = self.pause(outcome, attempt);
        self.pace.hold(outcome.wait().unwrap_or_default()).await;
        self.held(pause).await
    }

    /// Waits for `pause`, which a server asked for, but no longer than an unavailable server is waited for.
    ///
    /// # Errors
    /// If the pause is longer than that, or no actor wants the answer any more.
    async fn held(&self, pause: Duration) -> Reply<()> {
        let patience = seconds(self.judge.outage_s).max(seconds(self.judge.deadline_s));
        let left = patience.saturating_sub(self.outage.elapsed(self.now()));
        self.rest(pause.min(left)).await?;
        if pause > left { Err(self.gave_up()) } else { Ok(()) }
    }

    /// Waits for the configured rate limits and for pauses that the server asked this or another process for.
    ///
    /// # Errors
    /// The same as for [`Client::held`].
    async fn paced(&self, request: &Request) -> Reply<()> {
        loop {
            let Err(hold) = self.turn(request).await? else { return Ok(()) };
            if self.outage.cause().is_none() {
                self.outage.failed(self.now(), Cause { words: self.asked_to_wait(hold), refuses: false });
            }
            self.held(hold).await?;
        }
    }

    /// Waits as [`Client::paced`] does, but for a probe with the deadline `until`. Returns the deadline extended by the
    /// time spent waiting for the configured rate limits.
    ///
    /// # Errors
    /// If the server asked for a pause beyond the deadline.
    async fn paced_probe(&self, request: &Request, mut until: Duration) -> Result<Duration, Cause> {
        loop {
            let began = self.now();
            let turn = self.pace.turn(request.estimate() as f64).await;
            until += self.now() - began;
            let Err(hold) = turn else { return Ok(until) };
            if self.now() + hold >= until {
                return Err(Cause { words: self.asked_to_wait(hold), refuses: false });
            }
            tokio::time::sleep(hold).await;
        }
    }

    /// Waits for a turn within the configured rate limits, with signs of life. The inner error is the pause that the
    /// server asked for, if any.
    ///
    /// # Errors
    /// If no actor wants the answer any more.
    async fn turn(&self, request: &Request) -> Reply<Result<(), Duration>> {
        let turn = self.pace.turn(request.estimate() as f64);
        tokio::pin!(turn);
        loop {
            tokio::select! {
                turn = &mut turn => return Ok(turn),
                () = tokio::time::sleep(SIGN_EVERY) => {}
            }
            if !self.outage.sign(&format!("waits for the rate limit of the judge at {}", self.judge.url)) {
                let words =
                    format!("the run ended while it waited for the rate limit of the judge at {}", self.judge.url);
                return Err(NoAnswer::Failure(words));
            }
        }
    }

    fn asked_to_wait(&self, hold: Duration) -> String {
        format!("{} asked for a pause of {} s (Retry-After)", self.address(), hold.as_secs_f64().ceil())
    }

    /// Makes one try: one exchange, or two if the first takes longer than `hedge_after_s`.
    ///
    /// # Errors
    /// If the budget does not allow it.
    async fn send(&self, request: &Request, usage: &mut Usage) -> Reply<(ExchangeOutcome, Option<Answer>)> {
        let sent = self.now();
        let first = self.exchange(request, self.reserve(request)?);
        let Some(after) = self.judge.hedge_after_s else { return Ok(self.settle(first.await, request, sent, usage)) };
        tokio::pin!(first);
        tokio::select! {
            done = &mut first => return Ok(self.settle(done, request, sent, usage)),
            () = tokio::time::sleep(seconds(after)) => {}
        }
        // The second request counts towards the limits like any other.
        let paced = tokio::select! {
            done = &mut first => return Ok(self.settle(done, request, sent, usage)),
            paced = self.paced(request) => paced,
        };
        if paced.is_err() {
            return Ok(self.settle(first.await, request, sent, usage));
        }
        let Ok(reserved) = self.reserve(request) else { return Ok(self.settle(first.await, request, sent, usage)) };
        telemetry::judge_hedge();
        let second = self.exchange(request, reserved);
        tokio::pin!(second);
        // The first answer wins. If one of the two fails first, the other one decides.
        let (done, other) = tokio::select! {
            done = &mut first => (done, true),
            done = &mut second => (done, false),
        };
        if done.1.is_some() {
            return Ok(self.settle(done, request, sent, usage));
        }
        let _ = self.settle(done, request, sent, usage);
        let last = if other { second.await } else { first.await };
        Ok(self.settle(last, request, sent, usage))
    }

    /// Reserves the maximum cost of an exchange.
    ///
    /// # Errors
    /// A failure that names `labeler.max_cost` if that exceeds the remaining budget.
    fn reserve(&self, request: &Request) -> Reply<Option<Reserved>> {
        let Some(budget) = &self.budget else { return Ok(None) };
        let most = self.most(request) * *lock(&self.excess);
        budget.reserve(most).map(Some).map_err(NoAnswer::Failure)
    }

    /// Returns the estimated maximum cost of an exchange, from the lengths of its question and answer.
    fn most(&self, request: &Request) -> f64 {
        self.cost(request.most_prompt_tokens(), request.limit(&self.judge, &self.abilities()) as u64)
    }

    fn cost(&self, prompt_tokens: u64, completion_tokens: u64) -> f64 {
        (prompt_tokens as f64 * self.judge.price_prompt + completion_tokens as f64 * self.judge.price_completion) / 1e6
    }

    /// Records the cost of an exchange and the state of the server; `request` was sent at `sent`.
    fn settle(
        &self,
        done: (ExchangeOutcome, Option<Answer>),
        request: &Request,
        sent: Duration,
        usage: &mut Usage,
    ) -> (ExchangeOutcome, Option<Answer>) {
        let (outcome, answer) = done;
        usage.requests += 1;
        if let Some(answer) = &answer {
            let cost = self.cost(answer.prompt_tokens, answer.completion_tokens);
            usage.prompt_tokens += answer.prompt_tokens;
            usage.completion_tokens += answer.completion_tokens;
            usage.cost += cost;
            telemetry::judge_cost(cost);
            lock(&self.evidence).answered(request, sent);
            self.watch_for_cut_prompts(request, answer);
        }
        let now = self.now();
        let mut breaker = lock(&self.breaker);
        match outcome.class() {
            // The question can be asked in another form.
            FailureClass::Refusal if matches!(outcome, ExchangeOutcome::Field(..)) => breaker.record(now, true),
            FailureClass::Refusal => breaker.refused(now),
            // Counts as a failure only if it happens again.
            FailureClass::Temporary if matches!(outcome, ExchangeOutcome::Closed(_)) => {}
            FailureClass::Limited | FailureClass::Temporary => breaker.record(now, outcome.alive()),
        }
        if answer.is_some() {
            self.outage.end(now, &self.judge.url);
        }
        telemetry::judge_breaker(breaker.is_open());
        (outcome, answer)
    }

    /// Performs one HTTP exchange, which is counted once however it ends.
    async fn exchange(&self, request: &Request, reserved: Option<Reserved>) -> (ExchangeOutcome, Option<Answer>) {
        let _under_way = self.concurrency_limit.enter().await;
        let (sent, counted) = (Instant::now(), Counted::new(&self.stats));
        let (outcome, answer) = match self.alive_while(self.post(request)).await {
            Ok(answer) => (ExchangeOutcome::Ok, Some(answer)),
            Err(outcome) => (outcome, None),
        };
        counted.end(&outcome);
        if let Some(reserved) = reserved {
            let cost = answer.as_ref().map(|answer| self.cost(answer.prompt_tokens, answer.completion_tokens));
            // Some servers charge for more tokens than the question and the answer can have.
            let excess = cost.map_or(1.0, |cost| cost / self.most(request).max(f64::MIN_POSITIVE));
            let mut known = lock(&self.excess);
            *known = known.max(excess);
            drop(known);
            // A server may charge for an exchange even if the answer did not arrive.
            let unknown = matches!(
                outcome,
                ExchangeOutcome::Timeout
                    | ExchangeOutcome::Connection(_)
                    | ExchangeOutcome::Closed(_)
                    | ExchangeOutcome::BrokeOff(_)
                    | ExchangeOutcome::Malformed(_)
            );
            reserved.settle(if unknown { None } else { Some(cost.unwrap_or(0.0)) });
        }
        if answer.is_some() {
            self.pace.answered(sent).await;
        }
        (outcome, answer)
    }

    /// Waits for `work`, with signs of life: an exchange takes up to `timeout_s`, which may exceed the watchdog's
    /// limit.
    async fn alive_while<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(SIGN_EVERY) => {}
            }
            self.outage.sign(&format!("waits for an answer of the judge at {}", self.judge.url));
        }
    }

    async fn post(&self, request: &Request) -> Result<Answer, ExchangeOutcome> {
        let abilities = self.abilities();
        let answer = self.transport.post(&self.judge, &abilities, request).await?;
        self.of_the_judge(request, answer)
    }

    /// Accepts an answer only if it is of the same model as the first one, since a server may be restarted with another
    /// model, and if it has log-probabilities when they were requested and earlier answers had them.
    fn of_the_judge(&self, request: &Request, answer: Answer) -> Result<Answer, ExchangeOutcome> {
        if request.top_logprobs > 0 && !lock(&self.evidence).counts(answer.first_token.is_some()) {
            return Err(ExchangeOutcome::Malformed("it has no log-probabilities, although they were requested".into()));
        }
        if request.top_logprobs > 0 && answer.first_token.is_none() && self.judge.evidence != Votes::Logprobs {
            let mut abilities = lock(&self.abilities);
            if abilities.top_logprobs > 0 {
                abilities.top_logprobs = 0;
                tracing::warn!(
                    "{} offers no log-probabilities; its answers are sampled {} times each instead",
                    self.judge.url,
                    self.judge.votes
                );
            }
        }
        let Some(is) = answer.model.clone().filter(|_| !self.judge.any_model) else { return Ok(answer) };
        let first = lock(&self.evidence).first_model(&is);
        if first == is { Ok(answer) } else { Err(ExchangeOutcome::OtherModel(first, is)) }
    }

    /// Returns whether the server refused the form of `request` and is asked in another form from now on; `request` is
    /// changed to it.
    fn adapted(&self, outcome: &ExchangeOutcome, request: &mut Request) -> bool {
        let change = match outcome {
            ExchangeOutcome::Field(_, _, refusal) => lock(&self.abilities).adapt(refusal, request, &self.judge),
            ExchangeOutcome::Refused(404 | 405, _) if !lock(&self.evidence).has_answered() => {
                self.transport.add_version().then(|| "its address has no version, so that /v1 is appended to it".into())
            }
            _ => None,
        };
        let Some(change) = change else { return false };
        if !change.is_empty() {
            tracing::warn!("{} refused the form of a question; {change}", self.judge.url);
        }
        request.top_logprobs = request.top_logprobs.min(self.abilities().top_logprobs);
        true
    }

    /// Warns once about lists that are too short for the answers: unlisted answers may have up to `unlisted`
    /// probability in total, listed ones have `mass`.
    pub fn watch_for_cut_lists(&self, request: &Request, unlisted: f64, mass: f64) {
        /// Share of the answers' probability that a label can miss.
        const NEGLIGIBLE: f64 = 0.05;
        if mass > 0.0 && unlisted > NEGLIGIBLE * mass && !self.cut_lists.swap(true, Ordering::SeqCst) {
            tracing::warn!(
                "{} lists {} alternatives of a token, and the answers that it does not list may have up to {:.0} % of the probability of those that it lists; raise labeler.remote.top_logprobs if the server lists more (llama.cpp does, and vLLM with --max-logprobs)",
                self.judge.url,
                request.top_logprobs,
                100.0 * unlisted / mass
            );
        }
    }

    /// Warns once about a server that counts far fewer tokens than a prompt has: it may truncate prompts.
    fn watch_for_cut_prompts(&self, request: &Request, answer: &Answer) {
        /// Maximum average number of characters per token of any tokenizer over a long text.
        const MAX_CHARACTERS: u64 = 16;
        /// Shorter prompts may consist of one long word.
        const LONG: u64 = 2000;
        let characters = request.prompt.chars().count() as u64;
        let undercount =
            answer.counted_prompt_tokens.filter(|counted| characters >= LONG && counted * MAX_CHARACTERS < characters);
        if let Some(counted) = undercount
            && !self.cut_prompts.swap(true, Ordering::SeqCst)
        {
            tracing::warn!(
                "{} counts {counted} tokens in a prompt of {characters} characters; it may cut prompts: raise the context of the server (such as num_ctx of Ollama)",
                self.judge.url
            );
        }
    }
}

/// Guard that counts an exchange as superseded unless its outcome is recorded.
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

    fn end(mut self, outcome: &ExchangeOutcome) {
        self.ended = true;
        self.stats.count(outcome);
        telemetry::judge_took(self.began.elapsed());
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        telemetry::judge_in_flight(-1.0);
        if !self.ended {
            self.stats.count(&ExchangeOutcome::HedgedAway);
        }
    }
}

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value)
}

//! Waiting for configured rate limits and for pauses that a server asked for.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::limit::{Limits, State, Turn};
use super::shared::Shared;
use crate::config::RemoteJudge;
use crate::util::mutex::lock;

/// Interval between two attempts to lock the file of a shared limit.
const LOCK_EVERY: Duration = Duration::from_millis(5);
/// Number of attempts to lock the file before it counts as stuck. A process holds the lock for microseconds unless it
/// was suspended.
const LOCK_TRIES: u32 = 400;
/// Time for which this process uses its own limit after the file could not be used.
const FALLBACK_DURATION: Duration = Duration::from_secs(60);

/// Rate limits of one judge. They apply to all processes of the machine that use the same server with the same key.
pub struct Pace {
    limits: Option<Limits>,
    url: String,
    began: Instant,
    /// State for this process alone, with times relative to `began`.
    own: Mutex<State>,
    shared: Option<Shared>,
    fallback: Mutex<Fallback>,
    /// Queue of requests that wait for a turn, in order.
    queue: tokio::sync::Mutex<()>,
    /// Time at which this process learned of a pause that the server asked for, while the pause lasts.
    paused_since: Mutex<Option<Instant>>,
}

/// Availability of the shared limit's file.
#[derive(Default)]
struct Fallback {
    until: Option<Instant>,
    warned: bool,
}

impl Pace {
    /// Creates the limits of `judge`. `account` identifies its server and key, without containing the key; processes
    /// with the same account share the limits.
    pub fn new(judge: &RemoteJudge, account: &str) -> Self {
        let limits = Limits::of(judge);
        let mut pace = Self {
            limits,
            url: judge.url.clone(),
            began: Instant::now(),
            own: Mutex::default(),
            shared: None,
            fallback: Mutex::default(),
            queue: tokio::sync::Mutex::default(),
            paused_since: Mutex::default(),
        };
        if limits.is_some() {
            match Shared::open(account) {
                Ok(shared) => pace.shared = Some(shared),
                Err(error) => pace.fall_back(&format!(
                    "no folder can hold it ({error}); set PRECEPTOR_CACHE to a folder that can be written"
                )),
            }
        }
        pace
    }

    /// Waits for a turn to send a request of about `tokens` tokens. Turns are granted in order.
    ///
    /// # Errors
    /// The remaining pause, if the server asked for one. No turn is taken then.
    pub async fn turn(&self, tokens: f64) -> Result<(), Duration> {
        let Some(limits) = &self.limits else {
            let left = lock(&self.own).hold - self.began.elapsed().as_secs_f64();
            return if left > 0.0 { Err(Duration::from_secs_f64(left)) } else { Ok(()) };
        };
        let _first = self.queue.lock().await;
        loop {
            match self.with(|state, now| limits.take(state, now, tokens)).await {
                Turn::Now => return Ok(()),
                Turn::Later(seconds) => tokio::time::sleep(Duration::from_secs_f64(seconds)).await,
                Turn::Held(seconds) => {
                    self.paused_since().get_or_insert_with(Instant::now);
                    return Err(Duration::from_secs_f64(seconds));
                }
            }
        }
    }

    /// Records that the server asked for a pause of `wait`.
    pub async fn hold(&self, wait: Duration) {
        if wait > Duration::ZERO {
            *self.paused_since() = Some(Instant::now());
            self.with(|state, now| state.hold = state.hold.max(now + wait.as_secs_f64())).await;
        }
    }

    /// Records that the server answered a question sent at `sent`. If that was after it asked for a pause, it answers
    /// again, and the pause ends for all.
    pub async fn answered(&self, sent: Instant) {
        let over = self.paused_since().take_if(|paused_since| sent > *paused_since).is_some();
        if over {
            self.with(|state, _| state.hold = 0.0).await;
        }
    }

    /// Applies `change` to the state shared by the processes, or to this process's own state if no shared one exists or
    /// can be used.
    async fn with<T>(&self, change: impl Fn(&mut State, f64) -> T) -> T {
        let together = lock(&self.fallback).until.is_none_or(|until| Instant::now() >= until);
        if let Some(shared) = self.shared.as_ref().filter(|_| together) {
            let mut why = "another process keeps it locked".to_owned();
            for _ in 0..LOCK_TRIES {
                match shared.update(&change) {
                    Ok(Some(result)) => return result,
                    Ok(None) => tokio::time::sleep(LOCK_EVERY).await,
                    Err(error) => {
                        why = error.to_string();
                        break;
                    }
                }
            }
            self.fall_back(&format!("{} cannot be used: {why}", shared.path().display()));
        }
        change(&mut lock(&self.own), self.began.elapsed().as_secs_f64())
    }

    fn fall_back(&self, why: &str) {
        let mut fallback = lock(&self.fallback);
        fallback.until = Some(Instant::now() + FALLBACK_DURATION);
        if !std::mem::replace(&mut fallback.warned, true) {
            tracing::warn!(
                "the rate limit of the judge at {} holds for this process alone instead of for all processes on this machine together: {why}",
                self.url
            );
        }
    }

    fn paused_since(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.paused_since)
    }
}

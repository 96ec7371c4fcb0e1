//! Waiting for the rate limits of the configuration, and for the time that a server asked for.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::limit::{Limits, State, Turn};
use super::shared::Shared;
use crate::config::RemoteJudge;

/// Interval between two tries to lock the file of a shared limit.
const LOCK_EVERY: Duration = Duration::from_millis(5);
/// Tries to lock it before it counts as stuck: a process has it for microseconds, unless it was stopped meanwhile.
const LOCK_TRIES: u32 = 400;
/// Time for which this process is limited alone after the file could not be used.
const ALONE: Duration = Duration::from_secs(60);

/// The limits of one judge. They hold for all processes of the machine that use the same server with the same key.
pub struct Pace {
    limits: Option<Limits>,
    url: String,
    began: Instant,
    /// The state of this process alone, whose clock begins with `began`.
    own: Mutex<State>,
    shared: Option<Shared>,
    alone: Mutex<Alone>,
    /// Those who wait for a turn, in order.
    queue: tokio::sync::Mutex<()>,
    /// When this process heard that the server wants to be left alone, while that lasts.
    heard: Mutex<Option<Instant>>,
}

/// Whether the file of a shared limit can be used.
#[derive(Default)]
struct Alone {
    until: Option<Instant>,
    warned: bool,
}

impl Pace {
    /// The limits of `judge`. `account` names its server and key, without the key; processes of one account share a limit.
    pub fn new(judge: &RemoteJudge, account: &str) -> Self {
        let limits = Limits::of(judge);
        let mut pace = Self {
            limits,
            url: judge.url.clone(),
            began: Instant::now(),
            own: Mutex::default(),
            shared: None,
            alone: Mutex::default(),
            queue: tokio::sync::Mutex::default(),
            heard: Mutex::default(),
        };
        if limits.is_some() {
            match Shared::open(account) {
                Ok(shared) => pace.shared = Some(shared),
                Err(error) => pace.stay_alone(&format!(
                    "no folder can hold it ({error}); set PRECEPTOR_CACHE to a folder that can be written"
                )),
            }
        }
        pace
    }

    /// Waits for a turn to send a request of about `tokens` tokens; turns are given in order.
    ///
    /// # Errors
    /// How long the server asked to be left alone, if it did. No turn was taken then.
    pub async fn turn(&self, tokens: f64) -> Result<(), Duration> {
        let Some(limits) = &self.limits else {
            let left = self.lock(&self.own).hold - self.began.elapsed().as_secs_f64();
            return if left > 0.0 { Err(Duration::from_secs_f64(left)) } else { Ok(()) };
        };
        let _first = self.queue.lock().await;
        loop {
            match self.with(|state, now| limits.take(state, now, tokens)).await {
                Turn::Now => return Ok(()),
                Turn::Later(seconds) => tokio::time::sleep(Duration::from_secs_f64(seconds)).await,
                Turn::Held(seconds) => {
                    self.heard().get_or_insert_with(Instant::now);
                    return Err(Duration::from_secs_f64(seconds));
                }
            }
        }
    }

    /// Notes that the server asked to be left alone for `wait`.
    pub async fn hold(&self, wait: Duration) {
        if wait > Duration::ZERO {
            *self.heard() = Some(Instant::now());
            self.with(|state, now| state.hold = state.hold.max(now + wait.as_secs_f64())).await;
        }
    }

    /// Notes that the server answered a question that was sent at `sent`. If that was after it had asked to be left alone, it
    /// answers again, and others need not wait any longer.
    pub async fn answered(&self, sent: Instant) {
        let over = self.heard().take_if(|heard| sent > *heard).is_some();
        if over {
            self.with(|state, _| state.hold = 0.0).await;
        }
    }

    /// Lets `change` change the state that the processes share; that of this process alone where there is none, or where it
    /// cannot be used.
    async fn with<T>(&self, change: impl Fn(&mut State, f64) -> T) -> T {
        let together = self.lock(&self.alone).until.is_none_or(|until| Instant::now() >= until);
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
            self.stay_alone(&format!("{} cannot be used: {why}", shared.path().display()));
        }
        change(&mut self.lock(&self.own), self.began.elapsed().as_secs_f64())
    }

    fn stay_alone(&self, why: &str) {
        let mut alone = self.lock(&self.alone);
        alone.until = Some(Instant::now() + ALONE);
        if !std::mem::replace(&mut alone.warned, true) {
            tracing::warn!(
                "the rate limit of the judge at {} holds for this process alone, and not for all processes on this machine together: {why}",
                self.url
            );
        }
    }

    fn heard(&self) -> MutexGuard<'_, Option<Instant>> {
        self.lock(&self.heard)
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! A judge that is away, and those who wait for it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::label::backend::Alive;
use crate::telemetry;

/// How often it is said that a judge is still away.
const TELL: Duration = Duration::from_secs(60);

/// Since when a judge has not answered, and whom to tell. Time is passed in.
#[derive(Default)]
pub struct Outage(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// When it last answered; the client's beginning before it ever did.
    answered: Duration,
    /// When somebody was last told that it does not.
    told: Option<Duration>,
    waiting: HashMap<String, Alive>,
}

impl Outage {
    /// Gives `alive` a sign whenever the judge is waited for. One of the same name takes the place of an earlier one.
    pub fn attend(&self, name: &str, alive: &Alive) {
        self.lock().waiting.insert(name.to_owned(), Alive::clone(alive));
    }

    /// The judge is waited for at `now`. Returns how long it has not answered.
    pub fn waits(&self, now: Duration, url: &str) -> Duration {
        let mut inner = self.lock();
        let away = now.saturating_sub(inner.answered);
        if inner.told.is_none_or(|told| now.saturating_sub(told) >= TELL) {
            inner.told = Some(now);
            tracing::warn!("the judge at {url} has not answered for {} s; the run waits for it", away.as_secs());
        }
        telemetry::judge_away(away);
        let note = format!("waits for the judge at {url}, away for {} s", away.as_secs());
        inner.waiting.values().for_each(|alive| alive(&note));
        away
    }

    /// The judge answered at `now`.
    pub fn over(&self, now: Duration, url: &str) {
        let mut inner = self.lock();
        if inner.told.take().is_some() {
            let away = now.saturating_sub(inner.answered).as_secs();
            tracing::warn!("the judge at {url} answers again, after {away} s");
            telemetry::judge_away(Duration::ZERO);
        }
        inner.answered = now;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Outages of a judge: when they began, the cause, and the actors that wait for the judge.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::observe::telemetry;
use crate::pipeline::label::backend::Alive;
use crate::util::mutex::lock;

/// Interval between two log lines about the same outage.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Reason why a judge does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Outcome of the last exchange, with the address and the server's own message.
    pub words: String,
    /// True if the server refuses, so that a person has to act; otherwise it may recover by itself.
    pub refuses: bool,
}

/// The outage of one judge, shared by all its users. The clock is passed in.
///
/// An outage begins with the first failed exchange after a success, and ends with the next answer. Time without
/// questions does not count.
#[derive(Default)]
pub struct Outage(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    since: Option<Duration>,
    cause: Option<Cause>,
    /// Time at which the outage was last logged.
    last_logged: Option<Duration>,
    waiting: HashMap<String, Alive>,
}

/// State of an outage, returned by [`Outage::wait`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waited {
    /// Time since the outage began.
    pub elapsed: Duration,
    /// True if any actor still wants the answer.
    pub wanted: bool,
}

impl Outage {
    /// Registers `alive` to be called while the judge is waited for. It replaces an earlier callback of the same name.
    pub fn register_liveness(&self, name: &str, alive: &Alive) {
        self.lock().waiting.insert(name.to_owned(), Alive::clone(alive));
    }

    /// Records that an exchange failed for `cause` at `now`; this begins an outage unless one has begun.
    pub fn failed(&self, now: Duration, cause: Cause) {
        let mut inner = self.lock();
        inner.since.get_or_insert(now);
        inner.cause = Some(cause);
    }

    /// Returns the time since the outage began, or zero without an outage.
    pub fn elapsed(&self, now: Duration) -> Duration {
        self.lock().since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// Returns the cause of the last failed exchange of the outage.
    pub fn cause(&self) -> Option<Cause> {
        self.lock().cause.clone()
    }

    /// Records that a question waits for the judge at `url` at time `now`: gives a sign of life to the waiting actors,
    /// publishes the outage for the page and the metrics, and logs it at most once a minute, with the maximum waiting
    /// time `limit`.
    pub fn wait(&self, now: Duration, url: &str, limit: Duration) -> Waited {
        let mut inner = self.lock();
        let elapsed = now.saturating_sub(*inner.since.get_or_insert(now));
        let cause = inner.cause.clone().unwrap_or(Cause { words: "no answer yet".into(), refuses: false });
        if inner.last_logged.is_none_or(|last_logged| now.saturating_sub(last_logged) >= LOG_INTERVAL) {
            inner.last_logged = Some(now);
            tracing::warn!(
                "the judge at {url} has not answered for {} s; the run waits for it, up to {} s (labeler.remote.outage_s): {}",
                elapsed.as_secs(),
                limit.as_secs(),
                cause.words
            );
        }
        telemetry::judge_outage(
            url,
            Some(telemetry::Outage { time: elapsed, why: &cause.words, refuses: cause.refuses }),
        );
        drop(inner);
        let wanted = self.sign(&format!(
            "waits for the judge at {url}, unavailable for {} s: {}",
            elapsed.as_secs(),
            cause.words
        ));
        Waited { elapsed, wanted }
    }

    /// Gives a sign of life with `note` to the waiting actors. Returns whether any of them still wants the answer, or
    /// none is registered.
    pub fn sign(&self, note: &str) -> bool {
        let inner = self.lock();
        // All callbacks must be called, so this does not stop at the first.
        let wanted = inner.waiting.values().filter(|alive| alive(note)).count();
        wanted > 0 || inner.waiting.is_empty()
    }

    /// Ends the outage: the judge at `url` answered at `now`.
    pub fn end(&self, now: Duration, url: &str) {
        let mut inner = self.lock();
        let since = inner.since.take();
        inner.cause = None;
        if inner.last_logged.take().is_some() {
            let elapsed = now.saturating_sub(since.unwrap_or(now)).as_secs();
            tracing::warn!("the judge at {url} answers again, after {elapsed} s");
        }
        if since.is_some() {
            telemetry::judge_outage(url, None);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn cause(words: &str) -> Cause {
        Cause { words: words.into(), refuses: true }
    }

    #[test]
    fn an_outage_lasts_from_the_first_failure_to_the_next_answer() {
        let outage = Outage::default();
        outage.end(at(10), "url");
        assert_eq!(outage.elapsed(at(5000)), Duration::ZERO, "time without questions is not an outage");
        outage.failed(at(5000), cause("refused"));
        outage.failed(at(5030), cause("refused again"));
        assert_eq!(outage.wait(at(5060), "url", at(100)), Waited { elapsed: at(60), wanted: true });
        assert_eq!(outage.cause(), Some(cause("refused again")));
        outage.end(at(5061), "url");
        assert_eq!((outage.elapsed(at(6000)), outage.cause()), (Duration::ZERO, None));
    }

    #[test]
    fn the_answer_is_not_wanted_once_all_waiting_actors_have_halted() {
        let outage = Outage::default();
        outage.failed(at(0), cause("gone"));
        let halted: Alive = std::sync::Arc::new(|_| false);
        let runs: Alive = std::sync::Arc::new(|note| note.contains("gone"));
        outage.register_liveness("a", &halted);
        assert!(!outage.wait(at(1), "url", at(9)).wanted);
        outage.register_liveness("b", &runs);
        assert!(outage.wait(at(1), "url", at(9)).wanted);
        outage.register_liveness("b", &halted);
        assert!(!outage.wait(at(1), "url", at(9)).wanted, "a later incarnation replaces an earlier one");
    }
}

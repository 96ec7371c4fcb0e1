//! What was sent to a judge and what came back, counted.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::retry::ExchangeOutcome;
use crate::observe::telemetry;

/// Counts of HTTP exchanges by outcome: each that was begun counts once. Also exported as metrics.
#[derive(Debug, Default)]
pub struct RemoteStats {
    outcomes: Mutex<BTreeMap<&'static str, u64>>,
}

impl RemoteStats {
    /// An exchange ended.
    pub fn count(&self, outcome: &ExchangeOutcome) {
        *self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome.name()).or_default() += 1;
        telemetry::judge_request(outcome.name());
    }

    /// Exchanges that ended with `outcome`, by the name that metrics give it.
    pub fn of(&self, outcome: &str) -> u64 {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).get(outcome).copied().unwrap_or(0)
    }
}

//! Counts of exchanges with a judge.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::retry::ExchangeOutcome;
use crate::observe::telemetry;
use crate::util::mutex::lock;

/// Counts of HTTP exchanges by outcome. Each started exchange counts once. The counts are also exported as metrics.
#[derive(Debug, Default)]
pub struct RemoteStats {
    outcomes: Mutex<BTreeMap<&'static str, u64>>,
}

impl RemoteStats {
    /// Counts an exchange that ended with `outcome`.
    pub fn count(&self, outcome: &ExchangeOutcome) {
        *lock(&self.outcomes).entry(outcome.name()).or_default() += 1;
        telemetry::judge_request(outcome.name());
    }

    /// Returns the number of exchanges that ended with `outcome`, given by its name in metrics.
    pub fn of(&self, outcome: &str) -> u64 {
        lock(&self.outcomes).get(outcome).copied().unwrap_or(0)
    }
}

//! The metrics that a worker exports about itself (`preceptor worker --metrics-listen`).

use std::time::Duration;

use anyhow::Result;
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::PrometheusHandle;

/// State of a worker at the time of a scrape.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WorkerState {
    /// Version of the weights in use.
    pub version: Option<u64>,
    /// Time since a newer version was announced than the one in use.
    pub behind: Duration,
    /// Number of groups that are sampled.
    pub sampling: usize,
    /// Number of groups that wait for newer weights.
    pub waiting: usize,
    /// Number of completions under way.
    pub used: usize,
    /// Maximum number of completions under way.
    pub slots: usize,
    /// True if the broker answers.
    pub broker: bool,
}

/// Installs the process-wide recorder, with the counters of a worker at zero.
///
/// # Errors
/// If a recorder is already installed.
pub fn install() -> Result<PrometheusHandle> {
    let handle = super::recorder()?;
    for name in [
        "preceptor_worker_process_completions_total",
        "preceptor_worker_process_tokens_total",
        "preceptor_worker_process_results_total",
        "preceptor_worker_process_result_bytes_total",
        "preceptor_worker_process_given_back_total",
        "preceptor_worker_process_download_bytes_total",
        "preceptor_worker_process_download_failures_total",
    ] {
        counter!(name).absolute(0);
    }
    Ok(handle)
}

/// Sets the gauges of a worker's state.
pub fn state(state: &WorkerState) {
    if let Some(version) = state.version {
        gauge!("preceptor_worker_process_version").set(version as f64);
    }
    gauge!("preceptor_worker_process_behind_seconds").set(state.behind.as_secs_f64());
    for (name, count) in [("sampling", state.sampling), ("waiting", state.waiting)] {
        gauge!("preceptor_worker_process_groups", "state" => name).set(count as f64);
    }
    for (name, count) in [("used", state.used), ("free", state.slots.saturating_sub(state.used))] {
        gauge!("preceptor_worker_process_slots", "state" => name).set(count as f64);
    }
    gauge!("preceptor_worker_process_broker_ok").set(f64::from(u8::from(state.broker)));
}

/// Counts a result that was handed over: its completions, their tokens, and its size in bytes.
pub fn handed_over(completions: u64, tokens: u64, bytes: u64) {
    counter!("preceptor_worker_process_results_total").increment(1);
    counter!("preceptor_worker_process_completions_total").increment(completions);
    counter!("preceptor_worker_process_tokens_total").increment(tokens);
    counter!("preceptor_worker_process_result_bytes_total").increment(bytes);
}

/// Counts a group that was given back unfinished.
pub fn given_back() {
    counter!("preceptor_worker_process_given_back_total").increment(1);
}

/// Counts bytes of weights that were received.
pub fn received(bytes: u64) {
    counter!("preceptor_worker_process_download_bytes_total").increment(bytes);
}

/// Records the time of a download of weights, without the pauses after failures.
pub fn downloaded(took: Duration) {
    histogram!("preceptor_worker_process_download_duration_seconds").record(took.as_secs_f64());
}

/// Counts a download of weights that failed or was interrupted.
pub fn download_failed() {
    counter!("preceptor_worker_process_download_failures_total").increment(1);
}

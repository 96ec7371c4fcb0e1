//! The metrics that the node exports, and those of a worker ([`mod@worker`]); [`catalogue`] lists them.
//!
//! Events are recorded when they occur, through the `metrics` facade. The state of stages, edges, weights and memory is
//! sampled at scrape time by [`graph`], so that it is always current and seconds keep their fractions.

pub mod catalogue;
pub mod graph;
pub mod worker;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::rl::ledger::Count;
use crate::types::{Completion, Finish};
use crate::util::mutex::lock;
use crate::util::process::unix_seconds;
use anyhow::{Result, anyhow};
use metrics::{Gauge, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde_json::{Map, Value};

/// Upper bounds of the buckets of duration histograms, in seconds.
const BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Upper bounds of the buckets of the staleness histogram, in versions.
const STALENESS_BUCKETS: &[f64] = &[0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 15.0];

/// Upper bounds of the buckets of the completion length histogram, in tokens.
const LENGTH_BUCKETS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// Counts of tokens, completions, failures and judge exchanges in this process, kept in addition to the metrics because
/// the metrics recorder cannot be read.
#[derive(Debug, Default)]
pub struct Totals {
    /// Number of sampled tokens.
    pub generated: AtomicU64,
    /// Number of completion tokens trained on.
    pub trained: AtomicU64,
    /// Number of sampled completions.
    pub completions: AtomicU64,
    /// Number of steps without a finite gradient.
    pub nonfinite: AtomicU64,
    /// Number of masked groups, which are excluded from training.
    pub masked: AtomicU64,
    /// Number of failed disk writes.
    pub disk_errors: AtomicU64,
    /// Number of successful exchanges with remote judges.
    pub judged: AtomicU64,
    /// Number of failed exchanges with remote judges.
    pub refused: AtomicU64,
}

/// The counts of this process, which the functions of this module increment.
pub static TOTALS: Totals = Totals {
    generated: AtomicU64::new(0),
    trained: AtomicU64::new(0),
    completions: AtomicU64::new(0),
    nonfinite: AtomicU64::new(0),
    masked: AtomicU64::new(0),
    disk_errors: AtomicU64::new(0),
    judged: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};

/// Metadata of a run, exported as metrics.
pub struct RunInfo<'a> {
    /// Name of the run.
    pub run: &'a str,
    /// Value of `run.mode`.
    pub mode: &'a str,
    /// Value of `learner.algorithm`.
    pub algorithm: &'a str,
    /// Value of `labeler.type`.
    pub labeler: &'a str,
    /// Number of learner steps to take.
    pub steps: u64,
    /// Staleness bound η.
    pub eta: u64,
}

/// Sets the gauges of the run's name, mode, algorithm and labeler, its number of steps and its staleness bound.
pub fn run(info: &RunInfo<'_>) {
    gauge!("preceptor_run_info", "run" => info.run.to_owned(), "mode" => info.mode.to_owned(),
        "algorithm" => info.algorithm.to_owned(), "labeler" => info.labeler.to_owned())
    .set(1.0);
    gauge!("preceptor_steps_planned").set(info.steps as f64);
    gauge!("preceptor_staleness_bound").set(info.eta as f64);
}

/// Installs the process-wide recorder and describes every metric.
///
/// # Errors
/// If a recorder is already installed.
pub fn install() -> Result<PrometheusHandle> {
    let handle = recorder()?;
    for name in [
        "preceptor_generated_tokens_total",
        "preceptor_prompt_tokens_total",
        "preceptor_trained_tokens_total",
        "preceptor_trained_completions_total",
        "preceptor_nonfinite_steps_total",
        "preceptor_dropped_groups_total",
        "preceptor_masked_groups_total",
        "preceptor_disk_errors_total",
        "preceptor_label_cache_damaged_total",
        "preceptor_out_of_memory_total",
        "preceptor_labels_lost_total",
    ] {
        counter!(name).absolute(0);
    }
    Ok(handle)
}

/// Installs the process-wide recorder, describes every metric, and sets the version of the program.
fn recorder() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_duration_seconds".into()), BUCKETS)?
        .set_buckets_for_metric(Matcher::Full("preceptor_token_staleness".into()), STALENESS_BUCKETS)?
        .set_buckets_for_metric(Matcher::Full("preceptor_completion_tokens".into()), LENGTH_BUCKETS)?
        .install_recorder()
        .map_err(|error| anyhow!("cannot install the metrics recorder: {error}"))?;
    catalogue::describe();
    gauge!("preceptor_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

/// Counts the completions of a sampled group, whose prompt has `prompt` tokens.
pub fn generated(prompt: usize, completions: &[Completion]) {
    counter!("preceptor_prompt_tokens_total").increment(prompt as u64);
    let lengths = histogram!("preceptor_completion_tokens");
    let mut tokens = 0;
    for completion in completions {
        tokens += completion.ids.len() as u64;
        lengths.record(completion.ids.len() as f64);
        let finish = match completion.finish {
            Finish::Eos => "eos",
            Finish::Stop => "stop",
            Finish::Length => "length",
        };
        counter!("preceptor_completions_total", "finish" => finish).increment(1);
    }
    counter!("preceptor_generated_tokens_total").increment(tokens);
    TOTALS.generated.fetch_add(tokens, Relaxed);
    TOTALS.completions.fetch_add(completions.len() as u64, Relaxed);
}

/// Gauges of a rollout actor's used and free slots, which the actor updates after every decode step.
pub struct Slots {
    used: Gauge,
    free: Gauge,
    of: usize,
}

impl Slots {
    /// Creates the gauges of the actor `worker`, which has `of` slots.
    pub fn new(worker: &str, of: usize) -> Self {
        let gauge = |state| gauge!("preceptor_rollout_slots", "worker" => worker.to_owned(), "state" => state);
        Self { used: gauge("used"), free: gauge("free"), of }
    }

    /// Sets the number of used slots.
    pub fn set(&self, used: usize) {
        self.used.set(used as f64);
        self.free.set(self.of.saturating_sub(used) as f64);
    }
}

/// Counts a failure of a stage.
pub fn stage_failed(stage: &str) {
    counter!("preceptor_stage_failures_total", "stage" => stage.to_owned()).increment(1);
}

/// Counts completion tokens that were trained on.
pub fn trained(tokens: usize) {
    counter!("preceptor_trained_tokens_total").increment(tokens as u64);
    TOTALS.trained.fetch_add(tokens as u64, Relaxed);
}

/// Verdicts of a labeler on one group, and the cost of getting them, as plain numbers.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct LabelCounts {
    /// Kind of each verdict: `label`, `abstention` or `failure`.
    pub verdicts: Vec<&'static str>,
    /// Pairs that were judged in both orders, and those of them in which the judge preferred the same position twice.
    pub positions: [u64; 2],
    /// Pairs on which the members of a panel disagreed, and pairs that at least two of them judged.
    pub disagreement: [u64; 2],
    /// Questions that the judge answered, and those that the label cache answered.
    pub requests: [u64; 2],
    /// Tokens that the judge read, and tokens that it wrote.
    pub tokens: [u64; 2],
}

/// Counts the verdicts of `labeler` on one group.
pub fn labels(labeler: &'static str, counts: &LabelCounts) {
    for kind in &counts.verdicts {
        counter!("preceptor_labels_total", "labeler" => labeler, "verdict" => *kind).increment(1);
    }
    if counts.positions[0] > 0 {
        counter!("preceptor_position_pairs_total", "labeler" => labeler).increment(counts.positions[0]);
        counter!("preceptor_position_flips_total", "labeler" => labeler).increment(counts.positions[1]);
    }
    if counts.disagreement[1] > 0 {
        counter!("preceptor_panel_disagreements_total").increment(counts.disagreement[0]);
        counter!("preceptor_panel_pairs_total").increment(counts.disagreement[1]);
    }
    for (source, count) in ["model", "cache"].into_iter().zip(counts.requests) {
        counter!("preceptor_label_requests_total", "source" => source).increment(count);
    }
    for (kind, count) in ["prompt", "completion"].into_iter().zip(counts.tokens) {
        counter!("preceptor_label_tokens_total", "kind" => kind).increment(count);
    }
}

/// Sets the win rate of the current weights over the initial ones.
pub fn win_rate(rate: f64) {
    gauge!("preceptor_win_rate").set(rate);
}

/// Sets the number of answers in the label cache.
pub fn label_cache(entries: u64) {
    gauge!("preceptor_label_cache_entries").set(entries as f64);
}

/// Counts a damaged entry, or a damaged file, of the label cache.
pub fn label_cache_damaged() {
    counter!("preceptor_label_cache_damaged_total").increment(1);
}

/// Counts an answer that was requested although the label cache already held it.
pub fn label_bought_again() {
    counter!("preceptor_labels_bought_again_total").increment(1);
}

/// An outage of a remote judge that the run waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage<'a> {
    /// Duration of the outage.
    pub time: Duration,
    /// Failure of the last exchange.
    pub why: &'a str,
    /// True if the judge refuses requests (key, address, model, quota), which only a person can fix.
    pub refuses: bool,
}

/// Current outages by the judge's URL, for readers within the process.
static OUTAGES: Mutex<BTreeMap<String, (Duration, String, bool)>> = Mutex::new(BTreeMap::new());

/// Publishes an outage of the judge at `url`, or with `None` its end.
pub fn judge_outage(url: &str, outage: Option<Outage<'_>>) {
    let mut known = lock(&OUTAGES);
    match outage {
        Some(Outage { time, why, refuses }) => known.insert(url.to_owned(), (time, why.to_owned(), refuses)),
        None => known.remove(url),
    };
    let longest = known.values().map(|(time, ..)| *time).max().unwrap_or_default();
    gauge!("preceptor_judge_away_seconds").set(longest.as_secs_f64());
    let refuses = known.values().any(|(_, _, refuses)| *refuses);
    gauge!("preceptor_judge_refuses").set(f64::from(u8::from(refuses)));
}

/// Returns the remote judges that the run waits for: URL, duration, cause, and true if the judge refuses requests.
pub fn judge_outages() -> Vec<(String, Duration, String, bool)> {
    let known = lock(&OUTAGES);
    known.iter().map(|(url, (time, why, refuses))| (url.clone(), *time, why.clone(), *refuses)).collect()
}

/// Sets the state of a rollout server: whether it gets prompts, and the version of its weights.
pub fn rollout_server(server: &str, ready: bool, version: Option<u64>) {
    gauge!("preceptor_rollout_server_ready", "server" => server.to_owned()).set(f64::from(u8::from(ready)));
    if let Some(version) = version {
        gauge!("preceptor_rollout_server_version", "server" => server.to_owned()).set(version as f64);
    }
}

/// Sets the number of completions under way on a rollout server.
pub fn rollout_under_way(server: &str, completions: usize) {
    gauge!("preceptor_rollout_server_under_way", "server" => server.to_owned()).set(completions as f64);
}

/// Sets the state of a worker: its slots and version while it gives signs of life, and its totals.
pub fn worker(name: &str, up: bool, slots: [usize; 2], version: Option<u64>, tokens: u64, bytes: u64) {
    let label = || name.to_owned();
    gauge!("preceptor_worker_up", "worker" => label()).set(f64::from(u8::from(up)));
    for (state, count) in ["used", "free"].into_iter().zip(slots) {
        gauge!("preceptor_worker_slots", "worker" => label(), "state" => state).set(count as f64);
    }
    if let Some(version) = version {
        gauge!("preceptor_worker_version", "worker" => label()).set(version as f64);
    }
    counter!("preceptor_worker_tokens_total", "worker" => label()).absolute(tokens);
    counter!("preceptor_worker_result_bytes_total", "worker" => label()).absolute(bytes);
}

/// Counts a result of a worker: taken, repeated or refused.
pub fn worker_result(outcome: &'static str) {
    counter!("preceptor_worker_results_total", "outcome" => outcome).increment(1);
}

/// Counts the completions of a result that was taken, and their tokens. `redone` if the work had been begun before.
pub fn worker_completions(redone: bool, completions: u64, tokens: u64) {
    let redone = if redone { "true" } else { "false" };
    counter!("preceptor_worker_completions_total", "redone" => redone).increment(completions);
    counter!("preceptor_worker_completion_tokens_total", "redone" => redone).increment(tokens);
}

/// Counts a group that is offered again because the broker lost it.
pub fn offered_again() {
    counter!("preceptor_work_offered_again_total").increment(1);
}

/// Sets whether the broker of the workers answers.
pub fn broker(answers: bool) {
    gauge!("preceptor_broker_ok").set(f64::from(u8::from(answers)));
}

/// Counts labels that a restored run cannot use.
pub fn labels_lost(labels: u64) {
    counter!("preceptor_labels_lost_total").increment(labels);
}

/// Counts a request for a group to a rollout server, with its outcome and the number of tokens received.
pub fn rollout_answer(server: &str, outcome: &'static str, tokens: u64) {
    counter!("preceptor_rollout_server_answers_total", "server" => server.to_owned(), "outcome" => outcome)
        .increment(1);
    counter!("preceptor_rollout_server_tokens_total", "server" => server.to_owned()).increment(tokens);
}

/// Counts `completions` that were lost with a failed request to a rollout server, after about `tokens` tokens each.
pub fn rollout_lost(server: &str, completions: usize, tokens: f64) {
    counter!("preceptor_rollout_server_lost_total", "server" => server.to_owned()).increment(completions as u64);
    counter!("preceptor_rollout_server_lost_tokens_total", "server" => server.to_owned())
        .increment((tokens * completions as f64) as u64);
}

/// Records a hand-over of weights to a rollout server: its duration, and the canary's share, if it was measured.
pub fn handed_over(server: &str, took: Duration, share: Option<f64>) {
    histogram!("preceptor_hand_over_duration_seconds", "server" => server.to_owned()).record(took.as_secs_f64());
    if let Some(share) = share {
        gauge!("preceptor_rollout_server_canary", "server" => server.to_owned()).set(share);
    }
}

/// Sets whether the bound `name` of `[guard]` is exceeded.
pub fn guard(name: &'static str, exceeded: bool) {
    gauge!("preceptor_guard_exceeded", "bound" => name).set(f64::from(u8::from(exceeded)));
}

/// Records a step of supervised fine-tuning, with its loss.
pub fn fine_tuned(loss: f64) {
    gauge!("preceptor_sft_loss").set(loss);
    counter!("preceptor_sft_steps_total").increment(1);
}

/// Sets the reward model's figures: pairs that it was trained on, its version, its accuracy on held-out pairs if there are
/// any, and the loss of the optimizer step that it just took, if it took one.
pub fn reward_model(pairs: u64, version: u64, accuracy: Option<f64>, loss: Option<f64>) {
    counter!("preceptor_reward_model_pairs_total").absolute(pairs);
    gauge!("preceptor_reward_model_version").set(version as f64);
    if let Some(accuracy) = accuracy {
        gauge!("preceptor_reward_model_accuracy").set(accuracy);
    }
    if let Some(loss) = loss {
        gauge!("preceptor_reward_model_loss").set(loss);
    }
}

/// Publishes a limit that the online controller adjusts, with its initial value.
pub fn controller_begins(knob: &'static str, value: usize) {
    for direction in ["up", "down"] {
        counter!("preceptor_controller_moves_total", "knob" => knob, "direction" => direction).absolute(0);
    }
    gauge!("preceptor_concurrency", "knob" => knob).set(value as f64);
}

/// Records an adjustment of a limit by the online controller.
pub fn controller_move(knob: &'static str, up: bool, to: usize) {
    let direction = if up { "up" } else { "down" };
    counter!("preceptor_controller_moves_total", "knob" => knob, "direction" => direction).increment(1);
    gauge!("preceptor_concurrency", "knob" => knob).set(to as f64);
}

/// Counts an HTTP exchange with a remote judge by its outcome.
pub fn judge_request(outcome: &'static str) {
    let count = if outcome == "ok" { &TOTALS.judged } else { &TOTALS.refused };
    // A request that a hedged one overtook is neither a success nor a failure of the server.
    if outcome != "hedged_away" {
        count.fetch_add(1, Relaxed);
    }
    counter!("preceptor_judge_requests_total", "outcome" => outcome).increment(1);
}

/// Records the duration of an exchange with a remote judge.
pub fn judge_took(time: Duration) {
    histogram!("preceptor_judge_request_duration_seconds").record(time.as_secs_f64());
}

/// Adds to the number of exchanges in progress: 1 when one begins, −1 when it ends.
pub fn judge_in_flight(change: f64) {
    gauge!("preceptor_judge_in_flight").increment(change);
}

/// Counts a retried question to a remote judge.
pub fn judge_retry() {
    counter!("preceptor_judge_retries_total").increment(1);
}

/// Counts a hedged (second) request to a remote judge.
pub fn judge_hedge() {
    counter!("preceptor_judge_hedges_total").increment(1);
}

/// Adds `cost` to the money spent on remote judges.
pub fn judge_cost(cost: f64) {
    gauge!("preceptor_judge_cost").increment(cost);
}

/// Sets whether a remote judge's circuit breaker is open.
pub fn judge_breaker(open: bool) {
    gauge!("preceptor_judge_breaker_open").set(f64::from(u8::from(open)));
}

/// Sets the numbers of the run's groups by state.
pub fn ledger(count: &Count) {
    for (standing, count) in [
        ("trained", count.trained),
        ("admitted", count.admitted),
        ("generated", count.generated),
        ("labeled", count.labeled),
        ("rewarded", count.rewarded),
    ] {
        gauge!("preceptor_groups", "standing" => standing).set(count as f64);
    }
}

/// Records a written checkpoint, with the time it took and its size.
pub fn checkpoint(took: Duration, bytes: u64) {
    histogram!("preceptor_checkpoint_duration_seconds").record(took.as_secs_f64());
    gauge!("preceptor_checkpoint_bytes").set(bytes as f64);
    gauge!("preceptor_checkpoint_timestamp_seconds").set(unix_seconds());
}

/// Records the time of taking a snapshot of the run for a checkpoint.
pub fn snapshot_took(time: Duration) {
    histogram!("preceptor_snapshot_duration_seconds").record(time.as_secs_f64());
}

/// Counts an out-of-memory error of the learner's device. `micro_batch` is the reduced micro-batch size in completions.
pub fn out_of_memory(micro_batch: usize) {
    counter!("preceptor_out_of_memory_total").increment(1);
    gauge!("preceptor_micro_batch").set(micro_batch as f64);
}

/// Counts a failed disk write.
pub fn disk_error() {
    counter!("preceptor_disk_errors_total").increment(1);
    TOTALS.disk_errors.fetch_add(1, Relaxed);
}

/// Counts a masked group, which is excluded from training.
pub fn masked_group() {
    counter!("preceptor_masked_groups_total").increment(1);
    TOTALS.masked.fetch_add(1, Relaxed);
}

/// Counts a step that was skipped because loss or gradient was not finite.
pub fn nonfinite_step() {
    counter!("preceptor_nonfinite_steps_total").increment(1);
    TOTALS.nonfinite.fetch_add(1, Relaxed);
}

/// Records the time from a prompt's arrival at a rollout actor to the end of its last completion.
pub fn generation_took(time: Duration) {
    histogram!("preceptor_generation_duration_seconds").record(time.as_secs_f64());
}

/// Records the time of labeling one group.
pub fn label_took(time: Duration) {
    histogram!("preceptor_label_duration_seconds").record(time.as_secs_f64());
}

/// Records the time of copying and publishing one version of the weights.
pub fn publish_took(time: Duration) {
    histogram!("preceptor_publish_duration_seconds").record(time.as_secs_f64());
}

/// Sets the figures of a learner step: the object of its line in `metrics.jsonl`.
pub fn step(record: &Map<String, Value>) {
    let number = |figure: &str| record.get(figure).and_then(Value::as_f64).unwrap_or(f64::NAN);
    for (metric, figure) in [
        ("preceptor_step", "step"),
        ("preceptor_version", "version"),
        ("preceptor_reward_mean", "reward/mean"),
        ("preceptor_score_mean", "score/mean"),
        ("preceptor_entropy_mean", "entropy/mean"),
        ("preceptor_completion_length_mean", "length/mean"),
        ("preceptor_gradient_norm", "gradient/norm"),
        ("preceptor_learning_rate", "learning_rate"),
        ("preceptor_importance_ratio_mean", "ratio/mean"),
        ("preceptor_importance_ratio_max", "ratio/max"),
        ("preceptor_effective_sample_share", "ratio/effective"),
        ("preceptor_clipped_share", "ratio/clipped"),
        ("preceptor_behaviour_kl", "kl/behaviour"),
        ("preceptor_length_drift", "length/drift"),
        ("preceptor_score_std", "score/std"),
        ("preceptor_reward_std", "reward/std"),
        ("preceptor_advantage_std", "advantage/std"),
        ("preceptor_truncated_share", "ratio/truncated"),
        ("preceptor_finished_share", "finish/eos"),
        ("preceptor_repetition_share", "repetition/mean"),
    ] {
        gauge!(metric).set(number(figure));
    }
    for (metric, figure) in [
        ("preceptor_preference_margin", "preference/margin"),
        ("preceptor_preference_accuracy", "preference/accuracy"),
        ("preceptor_judge_score_mean", "judge/mean"),
        ("preceptor_kl_mean", "kl/mean"),
        ("preceptor_reference_kl", "kl/reference"),
    ] {
        if record.get(figure).is_some_and(Value::is_number) {
            gauge!(metric).set(number(figure));
        }
    }
    if let Some(completions) = record.get("completions").and_then(Value::as_u64) {
        counter!("preceptor_trained_completions_total").increment(completions);
    }
    gauge!("preceptor_loss", "kind" => "policy").set(number("loss/policy"));
    for (rank, figure) in [("5", "ratio/p05"), ("50", "ratio/p50"), ("95", "ratio/p95")] {
        gauge!("preceptor_importance_ratio", "rank" => rank).set(number(figure));
    }
    gauge!("preceptor_loss", "kind" => "kl").set(number("loss/kl"));
    gauge!("preceptor_loss", "kind" => "value").set(number("loss/value"));
    gauge!("preceptor_staleness", "stat" => "mean").set(number("staleness/mean"));
    gauge!("preceptor_staleness", "stat" => "max").set(number("staleness/max"));
    let counts = record.get("staleness/histogram").and_then(Value::as_array);
    for (lag, count) in counts.into_iter().flatten().enumerate() {
        let count = count.as_u64().unwrap_or_default();
        histogram!("preceptor_token_staleness").record_many(lag as f64, count as usize);
    }
    histogram!("preceptor_step_duration_seconds").record(number("time/step_seconds"));
}

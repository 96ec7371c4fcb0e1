//! Every metric that the node exports: names, help and units in one place.
//!
//! What happens is counted as it happens, through the `metrics` facade. What merely is (stages, edges, weights,
//! memory) is read when Prometheus asks, by [`graph`]: it is always fresh, and seconds keep their fractions.

pub mod graph;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::label::Labels;
use crate::learn::StepRecord;
use crate::ledger::Count;
use crate::reward::RewardTrainer;
use crate::reward::trainer::TrainerStep;
use crate::rollout::Preference;
use anyhow::{Result, anyhow};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde_json::Value;

/// A metric's kind, name, unit and help.
struct Metric(Kind, &'static str, Unit, &'static str);

enum Kind {
    Counter,
    Gauge,
    Histogram,
}

use Kind::{Counter, Gauge, Histogram};

const METRICS: &[Metric] = &[
    Metric(Counter, "preceptor_generated_tokens_total", Unit::Count, "Tokens sampled by the rollout actors"),
    Metric(
        Counter,
        "preceptor_trained_tokens_total",
        Unit::Count,
        "Completion tokens that gradients were computed for",
    ),
    Metric(Counter, "preceptor_labels_total", Unit::Count, "Verdicts by labeler and kind: label, abstention, failure"),
    Metric(
        Counter,
        "preceptor_position_pairs_total",
        Unit::Count,
        "Pairs that a judge read in both orders, by labeler",
    ),
    Metric(
        Counter,
        "preceptor_position_flips_total",
        Unit::Count,
        "Of these, pairs where it preferred the same position both times",
    ),
    Metric(Counter, "preceptor_panel_pairs_total", Unit::Count, "Pairs that two or more members of a panel judged"),
    Metric(
        Counter,
        "preceptor_panel_disagreements_total",
        Unit::Count,
        "Of these, pairs on which members preferred different completions",
    ),
    Metric(
        Counter,
        "preceptor_judge_requests_total",
        Unit::Count,
        "HTTP exchanges with remote judges by outcome; each that was begun counts once",
    ),
    Metric(Counter, "preceptor_judge_retries_total", Unit::Count, "Questions to remote judges that were sent again"),
    Metric(Counter, "preceptor_judge_hedges_total", Unit::Count, "Second requests sent beside a slow first one"),
    Metric(Gauge, "preceptor_judge_cost", Unit::Count, "Money spent on remote judges, in the currency of the prices"),
    Metric(Gauge, "preceptor_judge_in_flight", Unit::Count, "Requests to remote judges under way"),
    Metric(Gauge, "preceptor_judge_breaker_open", Unit::Count, "1 while a failing remote judge is left alone"),
    Metric(
        Histogram,
        "preceptor_judge_request_duration_seconds",
        Unit::Seconds,
        "One HTTP exchange with a remote judge, failed ones included",
    ),
    Metric(Counter, "preceptor_label_tokens_total", Unit::Count, "Tokens that labelers read and wrote, by kind"),
    Metric(Counter, "preceptor_label_requests_total", Unit::Count, "Questions answered, by source: model or cache"),
    Metric(Gauge, "preceptor_label_cache_entries", Unit::Count, "Answers in the label cache"),
    Metric(
        Counter,
        "preceptor_labels_bought_again_total",
        Unit::Count,
        "Answers that were asked for while they were in the label cache already",
    ),
    Metric(
        Gauge,
        "preceptor_judge_away_seconds",
        Unit::Seconds,
        "How long a remote judge that is waited for has not answered; 0 while it does",
    ),
    Metric(
        Counter,
        "preceptor_nonfinite_steps_total",
        Unit::Count,
        "Steps skipped since loss or gradient was not finite",
    ),
    Metric(
        Counter,
        "preceptor_dropped_groups_total",
        Unit::Count,
        "Groups dropped for their age; stays at zero by design",
    ),
    Metric(
        Counter,
        "preceptor_masked_groups_total",
        Unit::Count,
        "Groups not learned from since a verdict was missing",
    ),
    Metric(Counter, "preceptor_sft_steps_total", Unit::Count, "Steps of supervised fine-tuning"),
    Metric(Gauge, "preceptor_sft_loss", Unit::Count, "Loss of its last step in nats per token"),
    Metric(Counter, "preceptor_reward_model_pairs_total", Unit::Count, "Pairs that the reward model was trained on"),
    Metric(Gauge, "preceptor_reward_model_version", Unit::Count, "Optimizer steps of the reward model"),
    Metric(
        Gauge,
        "preceptor_reward_model_loss",
        Unit::Count,
        "Loss of the reward model's last step, a mean over pairs",
    ),
    Metric(
        Gauge,
        "preceptor_reward_model_accuracy",
        Unit::Count,
        "Share of the last held-out pairs, up to 256, that the reward model ranks as labeled",
    ),
    Metric(Gauge, "preceptor_preference_margin", Unit::Count, "Mean implicit reward margin of the labels, last batch"),
    Metric(
        Gauge,
        "preceptor_preference_accuracy",
        Unit::Count,
        "Share of pairs that the policy ranks as labeled, last batch",
    ),
    Metric(Gauge, "preceptor_step", Unit::Count, "Learner steps taken"),
    Metric(Gauge, "preceptor_version", Unit::Count, "Version of the weights last published"),
    Metric(
        Gauge,
        "preceptor_reward_mean",
        Unit::Count,
        "Mean reward of the last batch, after scaling, KL not included",
    ),
    Metric(
        Gauge,
        "preceptor_score_mean",
        Unit::Count,
        "Mean judged score of the last batch, on the labeler's own scale",
    ),
    Metric(
        Gauge,
        "preceptor_judge_score_mean",
        Unit::Count,
        "Mean of the judge's own scores in the last batch, if any",
    ),
    Metric(Gauge, "preceptor_kl_mean", Unit::Count, "KL to the reference per completion in nats (k1), last batch"),
    Metric(
        Gauge,
        "preceptor_entropy_mean",
        Unit::Count,
        "Entropy per token in nats at the rollout temperature, last batch",
    ),
    Metric(Gauge, "preceptor_completion_length_mean", Unit::Count, "Tokens per completion, last batch"),
    Metric(Gauge, "preceptor_loss", Unit::Count, "Loss of the last step by kind"),
    Metric(Gauge, "preceptor_gradient_norm", Unit::Count, "Global norm of the last gradient, before clipping"),
    Metric(Gauge, "preceptor_learning_rate", Unit::Count, "Learning rate of the last step"),
    Metric(
        Gauge,
        "preceptor_importance_ratio_mean",
        Unit::Count,
        "Mean of learner over behaviour probability, last batch",
    ),
    Metric(Gauge, "preceptor_importance_ratio_max", Unit::Count, "Largest ratio either way, last batch"),
    Metric(
        Gauge,
        "preceptor_staleness",
        Unit::Count,
        "Versions between a token's weights and those trained, last batch",
    ),
    Metric(
        Histogram,
        "preceptor_token_staleness",
        Unit::Count,
        "Versions between a token's weights and those trained, of every token trained; 16 stands for all above",
    ),
    Metric(
        Gauge,
        "preceptor_importance_ratio",
        Unit::Count,
        "Learner over behaviour probability, last batch, by quantile",
    ),
    Metric(
        Gauge,
        "preceptor_effective_sample_share",
        Unit::Count,
        "Effective sample size of the importance ratios over the number of tokens, last batch",
    ),
    Metric(Gauge, "preceptor_clipped_share", Unit::Count, "Share of tokens whose ratio was clipped, last batch"),
    Metric(
        Gauge,
        "preceptor_reference_kl",
        Unit::Count,
        "KL of the weights trained to the reference in nats per token, by k3, last batch",
    ),
    Metric(
        Gauge,
        "preceptor_behaviour_kl",
        Unit::Count,
        "KL of the weights that sampled to those trained in nats per token, by k3, last batch",
    ),
    Metric(
        Gauge,
        "preceptor_length_drift",
        Unit::Count,
        "Mean length of the last batch's completions over that of the first batch's",
    ),
    Metric(
        Gauge,
        "preceptor_groups",
        Unit::Count,
        "Groups of the run by where they stand; trained ones since it began",
    ),
    Metric(Gauge, "preceptor_checkpoint_bytes", Unit::Bytes, "Size of the last checkpoint"),
    Metric(
        Gauge,
        "preceptor_checkpoint_timestamp_seconds",
        Unit::Seconds,
        "When the last checkpoint was finished, in seconds since 1970",
    ),
    Metric(
        Counter,
        "preceptor_disk_errors_total",
        Unit::Count,
        "Times that a file or a checkpoint could not be written; each is tried again",
    ),
    Metric(Counter, "preceptor_out_of_memory_total", Unit::Count, "Times that the learner's device ran out of memory"),
    Metric(Gauge, "preceptor_micro_batch", Unit::Count, "Completions that the learner takes at a time since then"),
    Metric(Histogram, "preceptor_checkpoint_duration_seconds", Unit::Seconds, "Writing one checkpoint, beside the run"),
    Metric(
        Histogram,
        "preceptor_snapshot_duration_seconds",
        Unit::Seconds,
        "What of a checkpoint the learner waits for",
    ),
    Metric(Gauge, "preceptor_build_info", Unit::Count, "Always 1; the version is in the label"),
    Metric(
        Histogram,
        "preceptor_step_duration_seconds",
        Unit::Seconds,
        "From a batch's first group to its published weights",
    ),
    Metric(
        Histogram,
        "preceptor_generation_duration_seconds",
        Unit::Seconds,
        "From a prompt's arrival at a rollout actor to the end of its last completion",
    ),
    Metric(Histogram, "preceptor_label_duration_seconds", Unit::Seconds, "Labeling of one group, retries included"),
    Metric(Histogram, "preceptor_publish_duration_seconds", Unit::Seconds, "Copying and publishing a version"),
];

/// Upper bounds of the histograms' buckets, in seconds.
const BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// The same in versions.
const STALENESS_BUCKETS: &[f64] = &[0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 15.0];

/// Installs the process-wide recorder and describes every metric.
///
/// # Errors
/// When a recorder is installed already.
pub fn install() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_duration_seconds".into()), BUCKETS)?
        .set_buckets_for_metric(Matcher::Full("preceptor_token_staleness".into()), STALENESS_BUCKETS)?
        .install_recorder()
        .map_err(|error| anyhow!("cannot install the metrics recorder: {error}"))?;
    for Metric(kind, name, unit, help) in METRICS {
        match kind {
            Counter => describe_counter!(*name, *unit, *help),
            Gauge => describe_gauge!(*name, *unit, *help),
            Histogram => describe_histogram!(*name, *unit, *help),
        }
    }
    gauge!("preceptor_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    for name in [
        "preceptor_generated_tokens_total",
        "preceptor_trained_tokens_total",
        "preceptor_nonfinite_steps_total",
        "preceptor_dropped_groups_total",
        "preceptor_masked_groups_total",
        "preceptor_disk_errors_total",
        "preceptor_out_of_memory_total",
    ] {
        counter!(name).absolute(0);
    }
    Ok(handle)
}

/// Tokens sampled.
pub fn generated(tokens: usize) {
    counter!("preceptor_generated_tokens_total").increment(tokens as u64);
}

/// Completion tokens trained on.
pub fn trained(tokens: usize) {
    counter!("preceptor_trained_tokens_total").increment(tokens as u64);
}

/// What a labeler said of a group, and what it took.
pub fn labels(labeler: &'static str, labels: &Labels) {
    let compared = labels.preferences.iter().map(|one| &one.verdict);
    for verdict in labels.scores.iter().chain(compared) {
        counter!("preceptor_labels_total", "labeler" => labeler, "verdict" => verdict.kind()).increment(1);
    }
    let flips: Vec<bool> = labels.preferences.iter().filter_map(Preference::flipped).collect();
    if !flips.is_empty() {
        counter!("preceptor_position_pairs_total", "labeler" => labeler).increment(flips.len() as u64);
        let same = flips.iter().filter(|flipped| **flipped).count() as u64;
        counter!("preceptor_position_flips_total", "labeler" => labeler).increment(same);
    }
    if labels.disagreement[1] > 0 {
        counter!("preceptor_panel_disagreements_total").increment(labels.disagreement[0]);
        counter!("preceptor_panel_pairs_total").increment(labels.disagreement[1]);
    }
    let usage = &labels.usage;
    for (source, count) in [("model", usage.requests), ("cache", usage.cached)] {
        counter!("preceptor_label_requests_total", "source" => source).increment(count);
    }
    for (kind, count) in [("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)] {
        counter!("preceptor_label_tokens_total", "kind" => kind).increment(count);
    }
}

/// Size of the label cache.
pub fn label_cache(entries: u64) {
    gauge!("preceptor_label_cache_entries").set(entries as f64);
}

/// An answer came that was there.
pub fn label_bought_again() {
    counter!("preceptor_labels_bought_again_total").increment(1);
}

/// How long a judge has been away.
pub fn judge_away(time: Duration) {
    gauge!("preceptor_judge_away_seconds").set(time.as_secs_f64());
}

/// A step of supervised fine-tuning.
pub fn fine_tuned(loss: f64) {
    gauge!("preceptor_sft_loss").set(loss);
    counter!("preceptor_sft_steps_total").increment(1);
}

/// The reward model as it stands, and the step it just took.
pub fn reward_model(trainer: &RewardTrainer, step: Option<&TrainerStep>) {
    counter!("preceptor_reward_model_pairs_total").absolute(trainer.trained());
    gauge!("preceptor_reward_model_version").set(trainer.version() as f64);
    if let (accuracy, 1..) = trainer.accuracy() {
        gauge!("preceptor_reward_model_accuracy").set(accuracy);
    }
    if let Some(step) = step {
        gauge!("preceptor_reward_model_loss").set(step.loss);
    }
}

/// One HTTP exchange with a remote judge.
pub fn judge_request(outcome: &'static str) {
    counter!("preceptor_judge_requests_total", "outcome" => outcome).increment(1);
}

/// How long an exchange took.
pub fn judge_took(time: Duration) {
    histogram!("preceptor_judge_request_duration_seconds").record(time.as_secs_f64());
}

/// An exchange began (1) or ended (−1).
pub fn judge_in_flight(change: f64) {
    gauge!("preceptor_judge_in_flight").increment(change);
}

/// A question is sent again.
pub fn judge_retry() {
    counter!("preceptor_judge_retries_total").increment(1);
}

/// A second request is sent.
pub fn judge_hedge() {
    counter!("preceptor_judge_hedges_total").increment(1);
}

/// Money was spent.
pub fn judge_cost(cost: f64) {
    gauge!("preceptor_judge_cost").increment(cost);
}

/// Whether a judge is left alone.
pub fn judge_breaker(open: bool) {
    gauge!("preceptor_judge_breaker_open").set(f64::from(u8::from(open)));
}

/// Where the run's groups stand.
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

/// A checkpoint was written.
pub fn checkpoint(took: Duration, bytes: u64) {
    histogram!("preceptor_checkpoint_duration_seconds").record(took.as_secs_f64());
    gauge!("preceptor_checkpoint_bytes").set(bytes as f64);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!("preceptor_checkpoint_timestamp_seconds").set(now.as_secs_f64());
}

/// Taking a snapshot of the run for a checkpoint.
pub fn snapshot_took(time: Duration) {
    histogram!("preceptor_snapshot_duration_seconds").record(time.as_secs_f64());
}

/// The device ran out of memory; `micro_batch` completions go through the model at a time from now on.
pub fn out_of_memory(micro_batch: usize) {
    counter!("preceptor_out_of_memory_total").increment(1);
    gauge!("preceptor_micro_batch").set(micro_batch as f64);
}

/// Something could not be written.
pub fn disk_error() {
    counter!("preceptor_disk_errors_total").increment(1);
}

/// A group that is not learned from.
pub fn masked_group() {
    counter!("preceptor_masked_groups_total").increment(1);
}

/// A step that was skipped.
pub fn nonfinite_step() {
    counter!("preceptor_nonfinite_steps_total").increment(1);
}

/// One call of a rollout actor.
pub fn generation_took(time: Duration) {
    histogram!("preceptor_generation_duration_seconds").record(time.as_secs_f64());
}

/// Labeling of one group.
pub fn label_took(time: Duration) {
    histogram!("preceptor_label_duration_seconds").record(time.as_secs_f64());
}

/// Copying and publishing one version.
pub fn publish_took(time: Duration) {
    histogram!("preceptor_publish_duration_seconds").record(time.as_secs_f64());
}

/// The figures of a learner step.
pub fn step(record: &StepRecord) {
    for (metric, figure) in [
        ("preceptor_step", "step"),
        ("preceptor_version", "version"),
        ("preceptor_reward_mean", "reward/mean"),
        ("preceptor_score_mean", "score/mean"),
        ("preceptor_kl_mean", "kl/mean"),
        ("preceptor_entropy_mean", "entropy/mean"),
        ("preceptor_completion_length_mean", "length/mean"),
        ("preceptor_gradient_norm", "gradient/norm"),
        ("preceptor_learning_rate", "learning_rate"),
        ("preceptor_importance_ratio_mean", "ratio/mean"),
        ("preceptor_importance_ratio_max", "ratio/max"),
        ("preceptor_effective_sample_share", "ratio/effective"),
        ("preceptor_clipped_share", "ratio/clipped"),
        ("preceptor_reference_kl", "kl/reference"),
        ("preceptor_behaviour_kl", "kl/behaviour"),
        ("preceptor_length_drift", "length/drift"),
    ] {
        gauge!(metric).set(record.get(figure));
    }
    for (metric, figure) in
        [("preceptor_preference_margin", "preference/margin"), ("preceptor_preference_accuracy", "preference/accuracy")]
    {
        if record.0.contains_key(figure) {
            gauge!(metric).set(record.get(figure));
        }
    }
    gauge!("preceptor_loss", "kind" => "policy").set(record.get("loss/policy"));
    for (quantile, figure) in [("0.05", "ratio/p05"), ("0.5", "ratio/p50"), ("0.95", "ratio/p95")] {
        gauge!("preceptor_importance_ratio", "quantile" => quantile).set(record.get(figure));
    }
    gauge!("preceptor_loss", "kind" => "kl").set(record.get("loss/kl"));
    gauge!("preceptor_loss", "kind" => "value").set(record.get("loss/value"));
    gauge!("preceptor_staleness", "stat" => "mean").set(record.get("staleness/mean"));
    gauge!("preceptor_staleness", "stat" => "max").set(record.get("staleness/max"));
    let counts = record.0.get("staleness/histogram").and_then(Value::as_array);
    for (lag, count) in counts.into_iter().flatten().enumerate() {
        let count = count.as_u64().unwrap_or_default();
        histogram!("preceptor_token_staleness").record_many(lag as f64, count as usize);
    }
    histogram!("preceptor_step_duration_seconds").record(record.get("time/step_seconds"));
}

//! Every metric that the node exports: names, help and units in one place.
//!
//! What happens is counted as it happens, through the `metrics` facade. What merely is (stages, edges, weights,
//! memory) is read when Prometheus asks, by [`graph`]: it is always fresh, and seconds keep their fractions.

pub mod graph;

use std::time::Duration;

use crate::learn::StepRecord;
use anyhow::{Result, anyhow};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

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
    Metric(Gauge, "preceptor_build_info", Unit::Count, "Always 1; the version is in the label"),
    Metric(
        Histogram,
        "preceptor_step_duration_seconds",
        Unit::Seconds,
        "From a batch's first group to its published weights",
    ),
    Metric(Histogram, "preceptor_generation_duration_seconds", Unit::Seconds, "One call of a rollout actor"),
    Metric(Histogram, "preceptor_label_duration_seconds", Unit::Seconds, "Labeling of one group, retries included"),
    Metric(Histogram, "preceptor_publish_duration_seconds", Unit::Seconds, "Copying and publishing a version"),
];

/// Upper bounds of the histograms' buckets, in seconds.
const BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Installs the process-wide recorder and describes every metric.
///
/// # Errors
/// When a recorder is installed already.
pub fn install() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_duration_seconds".into()), BUCKETS)?
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

/// One verdict.
pub fn labeled(labeler: &'static str, verdict: &'static str) {
    counter!("preceptor_labels_total", "labeler" => labeler, "verdict" => verdict).increment(1);
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
    ] {
        gauge!(metric).set(record.get(figure));
    }
    gauge!("preceptor_loss", "kind" => "policy").set(record.get("loss/policy"));
    gauge!("preceptor_loss", "kind" => "value").set(record.get("loss/value"));
    gauge!("preceptor_staleness", "stat" => "mean").set(record.get("staleness/mean"));
    gauge!("preceptor_staleness", "stat" => "max").set(record.get("staleness/max"));
    histogram!("preceptor_step_duration_seconds").record(record.get("time/step_seconds"));
}

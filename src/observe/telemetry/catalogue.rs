//! The table of all exported metrics, with kind, name, labels and help.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// A metric family.
pub struct Metric {
    /// Prometheus type of the metric.
    pub kind: Kind,
    /// Name of the metric, which ends with its unit if it has one.
    pub name: &'static str,
    /// Names of the labels. Each has few values, bounded by the configuration or the code.
    pub labels: &'static [&'static str],
    /// Help text.
    pub help: &'static str,
}

/// Prometheus type of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A value that only increases.
    Counter,
    /// A current value.
    Gauge,
    /// Counts of observations by bucket.
    Histogram,
}

impl Kind {
    /// Returns the type's name in Prometheus' text format.
    pub fn name(self) -> &'static str {
        match self {
            Counter => "counter",
            Gauge => "gauge",
            Histogram => "histogram",
        }
    }
}

use Kind::{Counter, Gauge, Histogram};

const fn metric(kind: Kind, name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { kind, name, labels, help }
}

/// All metrics, under the headings of the reference page.
pub const METRICS: &[(&str, &[Metric])] = &[
    (
        "Progress",
        &[
            metric(Gauge, "preceptor_build_info", &["version"], "Always 1; the version is in the label"),
            metric(
                Gauge,
                "preceptor_run_info",
                &["run", "mode", "algorithm", "labeler"],
                "Always 1; the labels describe the run",
            ),
            metric(Gauge, "preceptor_step", &[], "Learner steps taken"),
            metric(Gauge, "preceptor_steps_planned", &[], "Learner steps that the run will take (run.steps)"),
            metric(Gauge, "preceptor_version", &[], "Version of the weights last published"),
            metric(
                Gauge,
                "preceptor_groups",
                &["standing"],
                "Groups of the run by state; trained ones are counted since the run began",
            ),
            metric(
                Histogram,
                "preceptor_step_duration_seconds",
                &[],
                "Time from a batch's first group to its published weights",
            ),
            metric(
                Histogram,
                "preceptor_publish_duration_seconds",
                &[],
                "Time of copying and publishing a version of the weights",
            ),
            metric(
                Gauge,
                "preceptor_guard_exceeded",
                &["bound"],
                "1 while a bound of [guard] (kl, entropy, masked) has been exceeded for guard.steps consecutive steps",
            ),
            metric(
                Counter,
                "preceptor_nonfinite_steps_total",
                &[],
                "Steps skipped because loss or gradient was not finite",
            ),
            metric(
                Counter,
                "preceptor_masked_groups_total",
                &[],
                "Groups excluded from training because they had no label or no finite score",
            ),
            metric(
                Counter,
                "preceptor_dropped_groups_total",
                &[],
                "Groups discarded for staleness; always zero by design",
            ),
            metric(Counter, "preceptor_sft_steps_total", &[], "Steps of supervised fine-tuning"),
            metric(Gauge, "preceptor_sft_loss", &[], "Loss of the last fine-tuning step in nats per token"),
            metric(
                Gauge,
                "preceptor_win_rate",
                &[],
                "Judged win rate of the current weights over the initial ones on held-out prompts; with evaluation.every_steps",
            ),
        ],
    ),
    (
        "Actors",
        &[
            metric(Counter, "preceptor_stage_busy_seconds_total", &["stage", "role"], "Time a stage spent working"),
            metric(Counter, "preceptor_stage_idle_seconds_total", &["stage", "role"], "Time a stage waited for input"),
            metric(
                Counter,
                "preceptor_stage_blocked_seconds_total",
                &["stage", "role"],
                "Time a stage waited for room in its output",
            ),
            metric(
                Counter,
                "preceptor_stage_admission_seconds_total",
                &["stage", "role"],
                "Time a stage waited for the staleness bound to admit work",
            ),
            metric(Counter, "preceptor_stage_items_total", &["stage", "role"], "Items a stage finished"),
            metric(
                Gauge,
                "preceptor_role_share",
                &["role", "state"],
                "Share of the last minute that a role's workers were busy, or waited for input, output or admission",
            ),
            metric(
                Gauge,
                "preceptor_bottleneck",
                &["role"],
                "1 for the role that limited throughput over the last minute",
            ),
            metric(
                Gauge,
                "preceptor_stalled_seconds",
                &[],
                "Time without progress, once the watchdog has identified the blocking stage; else 0",
            ),
            metric(
                Gauge,
                "preceptor_stalled",
                &["stage"],
                "1 for the stage that blocks a run without progress; else absent",
            ),
            metric(
                Gauge,
                "preceptor_concurrency",
                &["knob"],
                "Concurrency limit set by the online controller: sequences per rollout actor (rollout), requests to judges (labeler)",
            ),
            metric(
                Counter,
                "preceptor_controller_moves_total",
                &["knob", "direction"],
                "Adjustments of a concurrency limit by the online controller, up or down",
            ),
            metric(Counter, "preceptor_restarts_total", &[], "Restarts of the graph of actors after a failure"),
            metric(
                Counter,
                "preceptor_stage_failures_total",
                &["stage"],
                "Errors and panics of a stage; each stops the graph of actors",
            ),
        ],
    ),
    (
        "Edges",
        &[
            metric(Counter, "preceptor_edge_items_total", &["edge"], "Items that passed an edge"),
            metric(
                Counter,
                "preceptor_edge_send_blocked_seconds_total",
                &["edge"],
                "Time senders waited for room on an edge",
            ),
            metric(
                Counter,
                "preceptor_edge_wait_seconds_total",
                &["edge"],
                "Total time that delivered items spent on an edge",
            ),
            metric(Gauge, "preceptor_edge_depth", &["edge"], "Items waiting on an edge"),
            metric(Gauge, "preceptor_edge_capacity", &["edge"], "Maximum number of items on an edge"),
            metric(Gauge, "preceptor_edge_age_seconds", &["edge"], "Time that the oldest item has spent on an edge"),
        ],
    ),
    (
        "Rollout servers",
        &[
            metric(Gauge, "preceptor_rollout_server_ready", &["server"], "1 if the server gets prompts, 0 if not"),
            metric(Gauge, "preceptor_rollout_server_version", &["server"], "Version of the weights on the server"),
            metric(
                Counter,
                "preceptor_rollout_server_answers_total",
                &["server", "outcome"],
                "Requests for groups by outcome: ok, down, lost (the weights), refused, invalid (cannot be trained on)",
            ),
            metric(Gauge, "preceptor_rollout_server_under_way", &["server"], "Completions under way on the server"),
            metric(Counter, "preceptor_rollout_server_tokens_total", &["server"], "Tokens received from the server"),
            metric(
                Counter,
                "preceptor_rollout_server_lost_total",
                &["server"],
                "Completions lost with failed requests, which were sampled again",
            ),
            metric(
                Counter,
                "preceptor_rollout_server_lost_tokens_total",
                &["server"],
                "Estimated tokens of the lost completions, from the time of the request and the server's time per token",
            ),
            metric(
                Histogram,
                "preceptor_hand_over_duration_seconds",
                &["server"],
                "Time of writing a version of the weights, loading it on the server, and checking it",
            ),
            metric(
                Gauge,
                "preceptor_rollout_server_canary",
                &["server"],
                "Share of the last change of the weights that the server's log-probabilities show; about 1",
            ),
        ],
    ),
    (
        "Workers",
        &[
            metric(
                Gauge,
                "preceptor_worker_up",
                &["worker"],
                "1 if the worker has given a sign of life in the last 30 s, 0 if not",
            ),
            metric(
                Gauge,
                "preceptor_worker_version",
                &["worker"],
                "Version of the weights that the worker samples with",
            ),
            metric(Gauge, "preceptor_worker_slots", &["worker", "state"], "Slots of the worker: used or free"),
            metric(
                Counter,
                "preceptor_worker_tokens_total",
                &["worker"],
                "Tokens that the worker has sampled, or read and written as a judge",
            ),
            metric(Counter, "preceptor_worker_result_bytes_total", &["worker"], "Bytes of the worker's results"),
            metric(
                Counter,
                "preceptor_worker_results_total",
                &["outcome"],
                "Results of workers: taken, repeated (a result was taken before), refused (impossible or of other weights)",
            ),
            metric(
                Counter,
                "preceptor_worker_completions_total",
                &["redone"],
                "Completions of the results that were taken; redone is true if an earlier worker had begun the work and left it",
            ),
            metric(
                Counter,
                "preceptor_worker_completion_tokens_total",
                &["redone"],
                "Their tokens. Longer completions among those redone are as it should be, since long work is lost more often",
            ),
            metric(
                Counter,
                "preceptor_work_offered_again_total",
                &[],
                "Groups that were offered again because the broker had lost them",
            ),
            metric(
                Gauge,
                "preceptor_broker_ok",
                &[],
                "1 if the NATS server answers the coordinator of the workers, 0 if not",
            ),
            metric(
                Counter,
                "preceptor_labels_lost_total",
                &[],
                "Labels that a restored run gave up because it does not have the weights that sampled their completions",
            ),
        ],
    ),
    (
        "A worker's own endpoint",
        &[
            metric(
                Counter,
                "preceptor_worker_process_results_total",
                &[],
                "Results that this worker has handed over, one for each group",
            ),
            metric(
                Counter,
                "preceptor_worker_process_completions_total",
                &[],
                "Completions in the results of this worker",
            ),
            metric(Counter, "preceptor_worker_process_tokens_total", &[], "Tokens in the results of this worker"),
            metric(Counter, "preceptor_worker_process_result_bytes_total", &[], "Bytes of the results of this worker"),
            metric(
                Counter,
                "preceptor_worker_process_given_back_total",
                &[],
                "Groups that this worker gave back unfinished",
            ),
            metric(
                Gauge,
                "preceptor_worker_process_version",
                &[],
                "Version of the weights with which this worker samples",
            ),
            metric(
                Gauge,
                "preceptor_worker_process_behind_seconds",
                &[],
                "Time since a newer version of the weights was announced than this worker samples with; 0 if none was",
            ),
            metric(
                Gauge,
                "preceptor_worker_process_groups",
                &["state"],
                "Groups of this worker: sampling, or waiting for newer weights",
            ),
            metric(
                Gauge,
                "preceptor_worker_process_slots",
                &["state"],
                "Slots of this worker for completions: used or free",
            ),
            metric(
                Gauge,
                "preceptor_worker_process_broker_ok",
                &[],
                "1 if the NATS server answers this worker, 0 if not",
            ),
            metric(
                Counter,
                "preceptor_worker_process_download_bytes_total",
                &[],
                "Bytes of weights that this worker has received from an object store or an HTTP server",
            ),
            metric(
                Histogram,
                "preceptor_worker_process_download_duration_seconds",
                &[],
                "Time of a download of weights, from its start or its last interruption",
            ),
            metric(
                Counter,
                "preceptor_worker_process_download_failures_total",
                &[],
                "Downloads of weights that failed or were interrupted; each is tried again",
            ),
        ],
    ),
    (
        "Generation",
        &[
            metric(Counter, "preceptor_generated_tokens_total", &[], "Tokens sampled by the rollout actors"),
            metric(
                Counter,
                "preceptor_prompt_tokens_total",
                &[],
                "Prompt tokens that rollout actors processed; each group's prompt counts once",
            ),
            metric(
                Counter,
                "preceptor_completions_total",
                &["finish"],
                "Completions sampled, by finish reason: eos, stop or length",
            ),
            metric(Histogram, "preceptor_completion_tokens", &[], "Tokens per sampled completion"),
            metric(
                Histogram,
                "preceptor_generation_duration_seconds",
                &[],
                "Time from a prompt's arrival at a rollout actor to the end of its last completion",
            ),
            metric(Gauge, "preceptor_rollout_slots", &["worker", "state"], "Slots of a rollout actor, used or free"),
            metric(
                Gauge,
                "preceptor_weight_lag",
                &["worker"],
                "Versions by which a rollout worker lags behind the published weights",
            ),
            metric(
                Gauge,
                "preceptor_weight_fingerprint_ok",
                &["worker"],
                "1 if the fingerprint of a worker's weights matches that of their version",
            ),
        ],
    ),
    (
        "Labeling",
        &[
            metric(
                Counter,
                "preceptor_labels_total",
                &["labeler", "verdict"],
                "Verdicts by labeler and kind: label, abstention, failure",
            ),
            metric(
                Counter,
                "preceptor_position_pairs_total",
                &["labeler"],
                "Pairs that a judge read in both orders, by labeler",
            ),
            metric(
                Counter,
                "preceptor_position_flips_total",
                &["labeler"],
                "Pairs read in both orders in which the judge preferred the same position both times",
            ),
            metric(Counter, "preceptor_panel_pairs_total", &[], "Pairs that two or more members of a panel judged"),
            metric(
                Counter,
                "preceptor_panel_disagreements_total",
                &[],
                "Pairs judged by two or more members of a panel that preferred different completions",
            ),
            metric(
                Counter,
                "preceptor_judge_requests_total",
                &["outcome"],
                "HTTP exchanges with remote judges by outcome; each started exchange counts once",
            ),
            metric(Counter, "preceptor_judge_retries_total", &[], "Retries of questions to remote judges"),
            metric(
                Counter,
                "preceptor_judge_hedges_total",
                &[],
                "Hedged requests: second requests for a question whose first one is slow",
            ),
            metric(Gauge, "preceptor_judge_cost", &[], "Money spent on remote judges, in the currency of the prices"),
            metric(Gauge, "preceptor_judge_in_flight", &[], "Requests to remote judges in progress"),
            metric(
                Gauge,
                "preceptor_judge_breaker_open",
                &[],
                "1 while the circuit breaker of a failing remote judge is open",
            ),
            metric(
                Histogram,
                "preceptor_judge_request_duration_seconds",
                &[],
                "Time of one HTTP exchange with a remote judge, failed ones included",
            ),
            metric(Counter, "preceptor_label_tokens_total", &["kind"], "Tokens that labelers read and wrote, by kind"),
            metric(
                Counter,
                "preceptor_label_requests_total",
                &["source"],
                "Questions answered, by source: model or cache",
            ),
            metric(Gauge, "preceptor_label_cache_entries", &[], "Answers in the label cache"),
            metric(
                Counter,
                "preceptor_label_cache_damaged_total",
                &[],
                "Damaged entries and files of the label cache; their labels are requested again",
            ),
            metric(
                Counter,
                "preceptor_labels_bought_again_total",
                &[],
                "Answers that were requested although the label cache already held them",
            ),
            metric(
                Gauge,
                "preceptor_judge_away_seconds",
                &[],
                "Duration of the longest current outage of a remote judge; 0 without an outage",
            ),
            metric(
                Gauge,
                "preceptor_judge_refuses",
                &[],
                "1 while a remote judge refuses requests (key, address, model, quota), which needs manual action",
            ),
            metric(Histogram, "preceptor_label_duration_seconds", &[], "Time of labeling one group, retries included"),
        ],
    ),
    (
        "Reward model",
        &[
            metric(Counter, "preceptor_reward_model_pairs_total", &[], "Pairs that the reward model was trained on"),
            metric(Gauge, "preceptor_reward_model_version", &[], "Optimizer steps of the reward model"),
            metric(
                Gauge,
                "preceptor_reward_model_loss",
                &[],
                "Loss of the reward model's last step, a mean over pairs",
            ),
            metric(
                Gauge,
                "preceptor_reward_model_accuracy",
                &[],
                "Share of the last held-out pairs, up to 256, that the reward model ranks as labeled",
            ),
        ],
    ),
    (
        "Learning",
        &[
            metric(Counter, "preceptor_trained_tokens_total", &[], "Completion tokens trained on"),
            metric(Counter, "preceptor_trained_completions_total", &[], "Completions trained on"),
            metric(
                Gauge,
                "preceptor_score_mean",
                &[],
                "Mean judged score of the last batch, on the labeler's own scale",
            ),
            metric(Gauge, "preceptor_score_std", &[], "Standard deviation of the judged scores, last batch"),
            metric(
                Gauge,
                "preceptor_judge_score_mean",
                &[],
                "Mean of the judge's own scores in the last batch, if any",
            ),
            metric(
                Gauge,
                "preceptor_reward_mean",
                &[],
                "Mean reward of the last batch, after scaling, KL not included",
            ),
            metric(Gauge, "preceptor_reward_std", &[], "Standard deviation of the rewards, last batch"),
            metric(
                Gauge,
                "preceptor_advantage_std",
                &[],
                "Standard deviation of the advantages over tokens, last batch",
            ),
            metric(Gauge, "preceptor_preference_margin", &[], "Mean implicit reward margin of the labels, last batch"),
            metric(
                Gauge,
                "preceptor_preference_accuracy",
                &[],
                "Share of pairs that the policy ranks as labeled, last batch",
            ),
            metric(Gauge, "preceptor_kl_mean", &[], "KL to the reference per completion in nats (k1), last batch"),
            metric(
                Gauge,
                "preceptor_reference_kl",
                &[],
                "KL of the trained weights to the reference in nats per token (k3), last batch",
            ),
            metric(
                Gauge,
                "preceptor_entropy_mean",
                &[],
                "Entropy per token in nats at the rollout temperature, last batch",
            ),
            metric(Gauge, "preceptor_completion_length_mean", &[], "Tokens per completion, last batch"),
            metric(
                Gauge,
                "preceptor_length_drift",
                &[],
                "Mean completion length of the last batch relative to that of the first batch",
            ),
            metric(
                Gauge,
                "preceptor_finished_share",
                &[],
                "Share of completions that ended before rollout.max_new_tokens, last batch",
            ),
            metric(
                Gauge,
                "preceptor_repetition_share",
                &[],
                "Share of a completion's token 4-grams that repeat an earlier one, mean of the last batch",
            ),
            metric(Gauge, "preceptor_loss", &["kind"], "Loss of the last step by kind"),
            metric(Gauge, "preceptor_gradient_norm", &[], "Global norm of the last gradient, before clipping"),
            metric(Gauge, "preceptor_learning_rate", &[], "Learning rate of the last step"),
            metric(Counter, "preceptor_out_of_memory_total", &[], "Out-of-memory errors of the learner's device"),
            metric(
                Gauge,
                "preceptor_micro_batch",
                &[],
                "Micro-batch size in completions after the last out-of-memory error",
            ),
        ],
    ),
    (
        "Staleness",
        &[
            metric(Gauge, "preceptor_staleness_bound", &[], "The staleness bound η, in versions"),
            metric(
                Gauge,
                "preceptor_staleness",
                &["stat"],
                "Staleness of tokens: versions between the weights that sampled a token and those trained, last batch",
            ),
            metric(
                Histogram,
                "preceptor_token_staleness",
                &[],
                "Staleness of every trained token in versions; 16 includes all larger values",
            ),
            metric(
                Gauge,
                "preceptor_importance_ratio",
                &["rank"],
                "Importance ratio of learner to behaviour probability, 5th, 50th and 95th percentile, last batch",
            ),
            metric(
                Gauge,
                "preceptor_importance_ratio_mean",
                &[],
                "Mean importance ratio of learner to behaviour probability, last batch",
            ),
            metric(
                Gauge,
                "preceptor_importance_ratio_max",
                &[],
                "Largest importance ratio or inverse ratio, last batch",
            ),
            metric(
                Gauge,
                "preceptor_effective_sample_share",
                &[],
                "Effective sample size of the importance ratios divided by the number of tokens, last batch",
            ),
            metric(Gauge, "preceptor_clipped_share", &[], "Share of tokens whose ratio was clipped, last batch"),
            metric(
                Gauge,
                "preceptor_truncated_share",
                &[],
                "Share of tokens whose importance ratio was truncated, last batch",
            ),
            metric(
                Gauge,
                "preceptor_behaviour_kl",
                &[],
                "KL of the sampling weights to the trained weights in nats per token (k3), last batch",
            ),
        ],
    ),
    (
        "Checkpoints",
        &[
            metric(Gauge, "preceptor_checkpoint_bytes", &[], "Size of the last checkpoint"),
            metric(
                Gauge,
                "preceptor_checkpoint_timestamp_seconds",
                &[],
                "Unix time at which the last checkpoint was finished, in seconds",
            ),
            metric(
                Counter,
                "preceptor_disk_errors_total",
                &[],
                "Failed writes of files and checkpoints; each is retried",
            ),
            metric(
                Histogram,
                "preceptor_checkpoint_duration_seconds",
                &[],
                "Time of writing one checkpoint, concurrently with the run",
            ),
            metric(
                Histogram,
                "preceptor_snapshot_duration_seconds",
                &[],
                "Time that the learner waits for the snapshot of a checkpoint",
            ),
        ],
    ),
    (
        "Process",
        &[
            metric(Counter, "process_cpu_seconds_total", &[], "Processor time of the process, user and system"),
            metric(Gauge, "process_resident_memory_bytes", &[], "Resident memory of the process"),
            metric(Gauge, "process_open_fds", &[], "Open file descriptors of the process"),
            metric(Gauge, "process_threads", &[], "Threads of the process"),
            metric(Gauge, "process_start_time_seconds", &[], "Unix time at which the process began, in seconds"),
            metric(
                Gauge,
                "preceptor_device_memory_used_bytes",
                &["device"],
                "Used memory of the policy's GPU, by this process and others",
            ),
            metric(Gauge, "preceptor_device_memory_free_bytes", &["device"], "Free memory of the policy's GPU"),
        ],
    ),
];

/// Returns the metric with this name.
pub fn find(name: &str) -> Option<&'static Metric> {
    METRICS.iter().flat_map(|(_, metrics)| *metrics).find(|metric| metric.name == name)
}

/// Registers the help texts of all metrics with the recorder.
pub(super) fn describe() {
    for Metric { kind, name, help, .. } in METRICS.iter().flat_map(|(_, metrics)| *metrics) {
        match kind {
            Counter => describe_counter!(*name, Unit::Count, *help),
            Gauge => describe_gauge!(*name, Unit::Count, *help),
            Histogram => describe_histogram!(*name, Unit::Count, *help),
        }
    }
}

/// Returns the reference page `grafana/METRICS.md`, in Markdown.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nThis page lists the metrics that a node exports at `/metrics`, in Prometheus' format, and those of a worker with `--metrics-listen`. It is generated from \
         the table in `src/observe/telemetry/catalogue.rs`; \
         `PRECEPTOR_WRITE=1 cargo test --release --test suite metrics_reference` regenerates it.\n",
    );
    for (title, metrics) in METRICS {
        page += &format!("\n## {title}\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n");
        for Metric { kind, name, labels, help } in *metrics {
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            page += &format!("| `{name}` | {} | {} | {help} |\n", kind.name(), labels.join(", "));
        }
    }
    page
}

//! What the node exports: every metric's kind, name, labels and help, in one table.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// A family of metrics.
pub struct Metric {
    /// How it moves.
    pub kind: Kind,
    /// Its name, which ends with its unit where it has one.
    pub name: &'static str,
    /// Its labels; each has few values, by the configuration or by the code.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

/// How a metric moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It is what it is now.
    Gauge,
    /// It counts observations in buckets.
    Histogram,
}

impl Kind {
    /// As Prometheus has it.
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

/// All of them, under the headings of the reference page.
pub const METRICS: &[(&str, &[Metric])] = &[
    (
        "Progress",
        &[
            metric(Gauge, "preceptor_build_info", &["version"], "Always 1; the version is in the label"),
            metric(
                Gauge,
                "preceptor_run_info",
                &["run", "mode", "algorithm", "labeler"],
                "Always 1; what the run is, in the labels",
            ),
            metric(Gauge, "preceptor_step", &[], "Learner steps taken"),
            metric(Gauge, "preceptor_steps_planned", &[], "Learner steps that the run is to take"),
            metric(Gauge, "preceptor_version", &[], "Version of the weights last published"),
            metric(
                Gauge,
                "preceptor_groups",
                &["standing"],
                "Groups of the run by where they stand; trained ones since it began",
            ),
            metric(
                Histogram,
                "preceptor_step_duration_seconds",
                &[],
                "From a batch's first group to its published weights",
            ),
            metric(Histogram, "preceptor_publish_duration_seconds", &[], "Copying and publishing a version"),
            metric(
                Gauge,
                "preceptor_guard_exceeded",
                &["bound"],
                "1 while a bound of [guard] has been exceeded for guard.steps steps in a row: kl, entropy, masked",
            ),
            metric(
                Counter,
                "preceptor_nonfinite_steps_total",
                &[],
                "Steps skipped since loss or gradient was not finite",
            ),
            metric(
                Counter,
                "preceptor_masked_groups_total",
                &[],
                "Groups not learned from since a verdict was missing",
            ),
            metric(
                Counter,
                "preceptor_dropped_groups_total",
                &[],
                "Groups dropped for their age; stays at zero by design",
            ),
            metric(Counter, "preceptor_sft_steps_total", &[], "Steps of supervised fine-tuning"),
            metric(Gauge, "preceptor_sft_loss", &[], "Loss of its last step in nats per token"),
            metric(
                Gauge,
                "preceptor_win_rate",
                &[],
                "Judged win rate of the present weights over the first ones on held-out prompts; with evaluation.every_steps",
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
                "How long nothing has moved, once the watchdog has named who holds the run; else 0",
            ),
            metric(
                Gauge,
                "preceptor_stalled",
                &["stage"],
                "1 for the stage that holds a run in which nothing moves; else absent",
            ),
            metric(
                Gauge,
                "preceptor_concurrency",
                &["knob"],
                "How much the online controller lets be under way at once: rollout, sequences of an actor; labeler, requests",
            ),
            metric(
                Counter,
                "preceptor_controller_moves_total",
                &["knob", "direction"],
                "Times that the online controller turned a knob, up or down",
            ),
            metric(Counter, "preceptor_restarts_total", &[], "Restarts of the whole graph after a failure"),
            metric(
                Counter,
                "preceptor_stage_failures_total",
                &["stage"],
                "Errors and panics of a stage; each takes the graph down",
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
                "Time that items spent on an edge, those that were taken, together",
            ),
            metric(Gauge, "preceptor_edge_depth", &["edge"], "Items waiting on an edge"),
            metric(Gauge, "preceptor_edge_capacity", &["edge"], "Most items an edge holds"),
            metric(Gauge, "preceptor_edge_age_seconds", &["edge"], "How long the oldest item has been on an edge"),
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
                "Prompt tokens that rollout actors computed; each group's prompt once",
            ),
            metric(
                Counter,
                "preceptor_completions_total",
                &["finish"],
                "Completions sampled, by what ended them: eos, stop or length",
            ),
            metric(Histogram, "preceptor_completion_tokens", &[], "Tokens of a completion, as sampled"),
            metric(
                Histogram,
                "preceptor_generation_duration_seconds",
                &[],
                "From a prompt's arrival at a rollout actor to the end of its last completion",
            ),
            metric(
                Gauge,
                "preceptor_rollout_slots",
                &["worker", "state"],
                "Sequences that a rollout actor has room for, used or free",
            ),
            metric(Gauge, "preceptor_weight_lag", &["worker"], "Versions that a rollout worker is behind"),
            metric(
                Gauge,
                "preceptor_weight_fingerprint_ok",
                &["worker"],
                "1 when a worker runs the weights that its version names",
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
                "Of these, pairs where it preferred the same position both times",
            ),
            metric(Counter, "preceptor_panel_pairs_total", &[], "Pairs that two or more members of a panel judged"),
            metric(
                Counter,
                "preceptor_panel_disagreements_total",
                &[],
                "Of these, pairs on which members preferred different completions",
            ),
            metric(
                Counter,
                "preceptor_judge_requests_total",
                &["outcome"],
                "HTTP exchanges with remote judges by outcome; each that was begun counts once",
            ),
            metric(Counter, "preceptor_judge_retries_total", &[], "Questions to remote judges that were sent again"),
            metric(Counter, "preceptor_judge_hedges_total", &[], "Second requests sent beside a slow first one"),
            metric(Gauge, "preceptor_judge_cost", &[], "Money spent on remote judges, in the currency of the prices"),
            metric(Gauge, "preceptor_judge_in_flight", &[], "Requests to remote judges under way"),
            metric(Gauge, "preceptor_judge_breaker_open", &[], "1 while a failing remote judge is left alone"),
            metric(
                Histogram,
                "preceptor_judge_request_duration_seconds",
                &[],
                "One HTTP exchange with a remote judge, failed ones included",
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
                "Times that an entry or the file of the label cache was found damaged; each label is asked for again",
            ),
            metric(
                Counter,
                "preceptor_labels_bought_again_total",
                &[],
                "Answers that were asked for while they were in the label cache already",
            ),
            metric(
                Gauge,
                "preceptor_judge_away_seconds",
                &[],
                "How long a remote judge that is waited for has not answered; 0 while it does",
            ),
            metric(
                Gauge,
                "preceptor_judge_refuses",
                &[],
                "1 while a remote judge that is waited for refuses (key, address, model, quota), so that a person has to act",
            ),
            metric(Histogram, "preceptor_label_duration_seconds", &[], "Labeling of one group, retries included"),
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
            metric(
                Counter,
                "preceptor_trained_tokens_total",
                &[],
                "Completion tokens that gradients were computed for",
            ),
            metric(Counter, "preceptor_trained_completions_total", &[], "Completions that were learned from"),
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
                "KL of the weights trained to the reference in nats per token, by k3, last batch",
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
                "Mean length of the last batch's completions over that of the first batch's",
            ),
            metric(Gauge, "preceptor_finished_share", &[], "Share of completions that ended by themselves, last batch"),
            metric(
                Gauge,
                "preceptor_repetition_share",
                &[],
                "Share of a completion's runs of four tokens that it had before, mean of the last batch",
            ),
            metric(Gauge, "preceptor_loss", &["kind"], "Loss of the last step by kind"),
            metric(Gauge, "preceptor_gradient_norm", &[], "Global norm of the last gradient, before clipping"),
            metric(Gauge, "preceptor_learning_rate", &[], "Learning rate of the last step"),
            metric(Counter, "preceptor_out_of_memory_total", &[], "Times that the learner's device ran out of memory"),
            metric(Gauge, "preceptor_micro_batch", &[], "Completions that the learner takes at a time since then"),
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
                "Versions between a token's weights and those trained, last batch",
            ),
            metric(
                Histogram,
                "preceptor_token_staleness",
                &[],
                "Versions between a token's weights and those trained, of every token trained; 16 stands for all above",
            ),
            metric(
                Gauge,
                "preceptor_importance_ratio",
                &["rank"],
                "Learner over behaviour probability, last batch, at the 5th, 50th and 95th of a hundred ranks",
            ),
            metric(
                Gauge,
                "preceptor_importance_ratio_mean",
                &[],
                "Mean of learner over behaviour probability, last batch",
            ),
            metric(Gauge, "preceptor_importance_ratio_max", &[], "Largest ratio either way, last batch"),
            metric(
                Gauge,
                "preceptor_effective_sample_share",
                &[],
                "Effective sample size of the importance ratios over the number of tokens, last batch",
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
                "KL of the weights that sampled to those trained in nats per token, by k3, last batch",
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
                "When the last checkpoint was finished, in seconds since 1970",
            ),
            metric(
                Counter,
                "preceptor_disk_errors_total",
                &[],
                "Times that a file or a checkpoint could not be written; each is tried again",
            ),
            metric(Histogram, "preceptor_checkpoint_duration_seconds", &[], "Writing one checkpoint, beside the run"),
            metric(Histogram, "preceptor_snapshot_duration_seconds", &[], "What of a checkpoint the learner waits for"),
        ],
    ),
    (
        "Process",
        &[
            metric(Counter, "process_cpu_seconds_total", &[], "Processor time of the process, user and system"),
            metric(Gauge, "process_resident_memory_bytes", &[], "Resident memory of the process"),
            metric(Gauge, "process_open_fds", &[], "Open file descriptors of the process"),
            metric(Gauge, "process_threads", &[], "Threads of the process"),
            metric(Gauge, "process_start_time_seconds", &[], "When the process began, in seconds since 1970"),
            metric(
                Gauge,
                "preceptor_device_memory_used_bytes",
                &["device"],
                "Memory of the card that the policy is on which is taken, by this process and by others",
            ),
            metric(
                Gauge,
                "preceptor_device_memory_free_bytes",
                &["device"],
                "Memory of the card that the policy is on which is free",
            ),
        ],
    ),
];

/// The metric of this name.
pub fn find(name: &str) -> Option<&'static Metric> {
    METRICS.iter().flat_map(|(_, metrics)| *metrics).find(|metric| metric.name == name)
}

/// Tells the recorder what each is about.
pub(super) fn describe() {
    for Metric { kind, name, help, .. } in METRICS.iter().flat_map(|(_, metrics)| *metrics) {
        match kind {
            Counter => describe_counter!(*name, Unit::Count, *help),
            Gauge => describe_gauge!(*name, Unit::Count, *help),
            Histogram => describe_histogram!(*name, Unit::Count, *help),
        }
    }
}

/// The reference page.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nWhat a node answers at `/metrics`, by Prometheus' conventions. This page is made from the table in \
         `src/observe/telemetry/catalogue.rs`: `PRECEPTOR_WRITE=1 cargo test --release --test suite reference_page` writes it anew.\n",
    );
    for (title, metrics) in METRICS {
        page += &format!("\n## {title}\n\n| metric | kind | labels | what it says |\n|---|---|---|---|\n");
        for Metric { kind, name, labels, help } in *metrics {
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            page += &format!("| `{name}` | {} | {} | {help} |\n", kind.name(), labels.join(", "));
        }
    }
    page
}

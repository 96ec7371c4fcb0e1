//! The sections about keeping, watching and steering a run, key by key.

use std::net::SocketAddr;
use std::path::Path;

use super::choice::choice;
use super::key::{Reader, Spec, is, unset};
use super::labeling::Methods;
use super::section::section;
use super::sections::{MANY, WeightDtype, check_variable, count, pool};

/// Seconds of a pause.
fn seconds(default: f64) -> Spec<f64> {
    is(default).above(0).below(3e7).note(" seconds")
}

section! {
    /// Evaluation of the current weights against the initial ones, on held-out prompts, during the run. A policy can learn to
    /// please its labeler without becoming better: a judge that the labels do not come from, in `labeler`, shows it.
    pub struct Evaluation {
        /// Steps between evaluations; 0 disables them. Requires `data.holdout`. An evaluation is skipped while the previous
        /// one is still running.
        [Changeable] every_steps: u64 = is(0),
        /// Held-out prompts that both policies answer with greedy decoding.
        [Changeable] prompts: usize = count(32, (1 << 16) as f64),
        /// Threads of its pool, in addition to those of the actors.
        [Changeable] threads: usize = pool(),
        /// Judge of these evaluations, and of `eval win-rate` and `eval harmless-rate`. It has the keys of `[labeler]` that say how
        /// one judge is asked, from `type` to `rationale_temperature`, or `type = "panel"` with `members`. Device, retries,
        /// cache and budget are those of `[labeler]`.
        [AcceptChange] labeler: Option<Methods> =
            unset("the run's labeler, `[labeler]`")
                .example("{ type = \"pairwise\", remote = { url = \"http://127.0.0.1:8080/v1\", model = \"judge\" } }"),
        /// Consecutive evaluations without a higher win rate after which the run ends with a checkpoint and exit status 0; 0
        /// disables it. The checkpoint of the highest win rate is kept with `checkpoint.best = "win_rate"`.
        [Changeable] patience: u64 = is(0),
    }
}

section! {
    /// The controller, which adjusts the amount of concurrent work to the fill of the queues during the run.
    pub struct Control {
        /// Enables the controller. `rollout.slots` and `labeler.remote.concurrency` are then upper limits; the lower limits
        /// are a group and one request.
        [Changeable] enabled: bool = is(false),
        /// Seconds between two adjustments.
        [Changeable] every_s: f64 = is(10.0).from(1).below(1e6),
    }
}

section! {
    /// Bounds within which a run is healthy.
    pub struct Guard {
        /// Reaction to a bound that is exceeded for `steps` consecutive steps. The page and the metric
        /// `preceptor_guard_exceeded` show it in any case.
        [Changeable] action: GuardAction = is(GuardAction::Warn),
        /// Highest KL divergence of the policy from its start, in nats per token (`kl/token`); 0 disables the bound.
        [Changeable] max_kl: f64 = is(0.5).from(0).note("; 0 is no bound"),
        /// Lowest entropy of the policy, in nats per token (`entropy/mean`); 0 disables the bound.
        [Changeable] min_entropy: f64 = is(0.05).from(0).note("; 0 is no bound"),
        /// Highest share of a step's groups that are masked; 1 disables the bound.
        [Changeable] max_masked: f64 = is(0.5).from(0).to(1).note("; 1 is no bound"),
        /// Consecutive steps outside a bound after which `action` is taken.
        [Changeable] steps: u64 = count(3, MANY),
        /// Consecutive steps without any label from the labeler that end the run with exit status 3, regardless of `action`.
        [Changeable] unlabeled_steps: u64 = count(3, MANY),
    }
}

choice! {
    /// Reaction to a bound of `[guard]` that is exceeded.
    pub enum GuardAction {
        /// Logs it.
        Warn = "warn",
        /// Ends the run with a checkpoint and exit status 3.
        Stop = "stop",
    }
}

section! {
    /// Checkpoints and the journal.
    pub struct Checkpoint {
        /// Minutes between checkpoints, which are written while the run continues; 0 disables them.
        [Changeable] every_minutes: f64 = is(10.0).from(0).below(1e6).note("; 0 is never"),
        /// Steps between checkpoints, in addition to those of `every_minutes`; 0 disables them. The last step always has a
        /// checkpoint.
        [Changeable] every_steps: u64 = is(0),
        /// Number of the latest checkpoints that are kept.
        [Changeable] keep: usize = is(2).from(1),
        /// A figure of `metrics.jsonl`, or `win_rate`. The checkpoint with the highest mean of the figure over the steps since the
        /// previous checkpoint is kept too. With `win_rate`, each step that is evaluated has a checkpoint, and the one that won
        /// most often is kept; it requires `evaluation.every_steps`.
        [Changeable] best: Option<String> = unset("none").example("\"score/mean\""),
        /// Type of the weights in a checkpoint's model files. A run is resumed from the weights that it trained, regardless of
        /// this key.
        [Changeable] dtype: WeightDtype = is(WeightDtype::F32),
        /// Location of copies of the run's checkpoints, from which it is resumed where there is no local one:
        /// `s3://bucket/folder`, `gs://bucket/folder` or `file:///folder`. Each run needs one of its own. Credentials are read
        /// from the environment.
        [Changeable] mirror: Option<String> = unset("none").example("\"s3://bucket/first-run\""),
        /// Seconds during which the end of a run retries to write its checkpoint, so that disk space can be freed.
        [Changeable] retry_s: f64 = is(600.0).from(0).below(3e7),
        /// Keeps a journal of the learner's input for `preceptor replay`: about 16 bytes per trained token.
        [Changeable] journal: bool = is(true),
        /// Size in bytes above which no more steps are added to the journal, which is logged; a replay ends there. 0 disables
        /// the limit.
        [Changeable] journal_max_bytes: u64 = is(16 << 30),
    }
}

section! {
    /// The node's HTTP endpoints.
    pub struct Serve checked by check_serve {
        /// Enables them.
        [Changeable] enabled: bool = is(true),
        /// Address. One that other machines can reach requires `token_env`.
        [Changeable] listen: SocketAddr = is(SocketAddr::from(([127, 0, 0, 1], 9464))),
        /// Environment variable that holds a bearer token of at least 16 characters. All requests except those for `/healthz`
        /// and `/readyz` must then carry the token.
        [Changeable, secret] token_env: Option<String> =
            unset("none").example("\"PRECEPTOR_TOKEN\"").check(|name| check_variable(name.as_deref())),
        /// Host names that the node answers to, in addition to IP addresses and `localhost`, without ports. Requests for other
        /// names, except for `/healthz` and `/readyz`, are refused, so that a web page whose name resolves to this machine
        /// cannot read the node.
        [Changeable] hosts: Vec<String> = is(Vec::new()).example("[\"node.example\"]").resolve(hosts),
    }
}

fn check_serve(serve: &Serve, reader: &Reader<'_>) {
    if !serve.listen.ip().is_loopback() && reader.peek("token_env").is_none() {
        let message = format!(
            "{} can be reached from other machines; name the environment variable that holds a bearer token in serve.token_env, or use 127.0.0.1",
            serve.listen
        );
        reader.error("listen", &message);
    }
}

/// Host names in lower case without the dot of the root at their end.
fn hosts(names: Vec<String>, _: &Path) -> Result<Vec<String>, String> {
    for name in &names {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(format!("{name:?} is no name of a host; write it without scheme and port, as node.example"));
        }
    }
    Ok(names.iter().map(|name| name.trim_end_matches('.').to_ascii_lowercase()).collect())
}

section! {
    /// Reactions to failures and stalls.
    pub struct Supervision {
        /// Consecutive failures after which the graph is restarted; the next one ends the run.
        [Changeable] max_restarts: u32 = is(3),
        /// Seconds before the first restart. The pause doubles with each further one.
        [Changeable] backoff_s: f64 = seconds(1.0),
        /// Most seconds before a restart.
        [Changeable] max_backoff_s: f64 = seconds(60.0),
        /// Seconds without progress after which the holder of the work is named in the log.
        [Changeable] stall_after_s: f64 = seconds(120.0),
        /// Seconds without progress after which the graph is restarted.
        [Changeable] restart_after_s: f64 = seconds(600.0),
        /// Seconds to wait for an actor that was stopped.
        [Changeable] halt_grace_s: f64 = seconds(10.0),
        /// Seconds to wait for the current step after Ctrl-C or SIGTERM. The checkpoint holds the step's groups in any case.
        [Changeable] drain_s: f64 = seconds(15.0),
    }
}

//! Declarations of the sections `evaluation`, `controller`, `guard`, `checkpoint`, `serve`, `cluster` and `supervision`.

use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;

use super::choice::choice;
use super::key::{Reader, Spec, is, unset};
use super::labeling::Methods;
use super::place::check_store;
use super::section::section;
use super::sections::{MANY, WeightDtype, check_variable, count, pool};
use crate::util::disk::expand_home;

/// Returns the specification of a time in seconds, of up to about a year.
fn seconds(default: f64) -> Spec<f64> {
    is(default).above(0).below(3e7).note(" seconds")
}

section! {
    /// Evaluation of the current weights against the initial ones, on held-out prompts, during the run. A policy can learn to
    /// exploit its labeler without becoming better. A different judge, set in `labeler`, reveals this.
    pub struct Evaluation {
        /// Number of steps between evaluations; 0 disables them. Requires `data.holdout`. An evaluation is skipped
        /// while the previous one is still running.
        [Changeable] every_steps: u64 = is(0),
        /// Number of held-out prompts. Both policies answer them with greedy decoding.
        [Changeable] prompts: usize = count(32, (1 << 16) as f64),
        /// Number of threads for evaluations, in addition to those of the actors.
        [Changeable] threads: usize = pool(),
        /// Judge of these evaluations, and of `eval win-rate` and `eval harmless-rate`. Its keys are those of a judge
        /// in section `labeler`, from `type` to `rationale_temperature`, or `type = "panel"` with `members`. Device, retries,
        /// cache and budget are those of section `labeler`.
        [AcceptChange] labeler: Option<Methods> =
            unset("the run's labeler, `[labeler]`")
                .example("{ type = \"pairwise\", remote = { url = \"http://127.0.0.1:8080/v1\", model = \"judge\" } }"),
        /// Early stopping: number of consecutive evaluations without a higher win rate after which the run ends with a
        /// checkpoint and exit status 0; 0 disables it. The checkpoint of the highest win rate is kept with
        /// `checkpoint.best = "win_rate"`.
        [Changeable] patience: u64 = is(0),
    }
}

section! {
    /// The controller, which adjusts the amount of concurrent work to the fill level of the queues during the run.
    pub struct Control {
        /// Enables the controller. `rollout.slots` and `labeler.remote.concurrency` are then upper limits; the lower
        /// limits are one group's completions and one request.
        [Changeable] enabled: bool = is(false),
        /// Seconds between two adjustments.
        [Changeable] every_s: f64 = is(10.0).from(1).below(1e6),
    }
}

section! {
    /// Bounds on training metrics, and the reaction to a violation.
    pub struct Guard {
        /// Reaction to a bound that is violated for `steps` consecutive steps. The page and the metric
        /// `preceptor_guard_exceeded` show the violation in any case.
        [Changeable] action: GuardAction = is(GuardAction::Warn),
        /// Maximum KL divergence of the policy from its initial weights, in nats per token (`kl/token`); 0 disables the
        /// bound.
        [Changeable] max_kl: f64 = is(0.5).from(0).note("; 0 disables the bound"),
        /// Minimum entropy of the policy, in nats per token (`entropy/mean`); 0 disables the bound.
        [Changeable] min_entropy: f64 = is(0.05).from(0).note("; 0 disables the bound"),
        /// Maximum share of a step's groups that are masked; 1 disables the bound.
        [Changeable] max_masked: f64 = is(0.5).from(0).to(1).note("; 1 disables the bound"),
        /// Number of consecutive steps outside a bound after which `action` is taken.
        [Changeable] steps: u64 = count(3, MANY),
        /// Number of consecutive steps without any label from the labeler after which the run ends with exit status 3,
        /// regardless of `action`.
        [Changeable] unlabeled_steps: u64 = count(3, MANY),
    }
}

choice! {
    /// Reaction to a violated bound of `[guard]`.
    pub enum GuardAction {
        /// Logs a warning.
        Warn = "warn",
        /// Ends the run with a checkpoint and exit status 3.
        Stop = "stop",
    }
}

section! {
    /// Checkpoints and the journal.
    pub struct Checkpoint {
        /// Minutes between checkpoints, which are written while the run continues; 0 disables them.
        [Changeable] every_minutes: f64 = is(10.0).from(0).below(1e6).note("; 0 disables them"),
        /// Number of steps between checkpoints, in addition to those of `every_minutes`; 0 disables them. The last step
        /// always has a checkpoint.
        [Changeable] every_steps: u64 = is(0),
        /// Number of the latest checkpoints that are kept.
        [Changeable] keep: usize = is(2).from(1),
        /// Metric of `metrics.jsonl`, or `win_rate`, by which the best checkpoint is chosen and kept in addition. The
        /// best checkpoint has the highest mean of the metric over the steps since the previous checkpoint. With
        /// `win_rate`, each evaluated step has a checkpoint, and the one with the highest win rate is kept; this
        /// requires `evaluation.every_steps`.
        [Changeable] best: Option<String> = unset("none").example("\"score/mean\""),
        /// Data type of the weights in a checkpoint's model files. A run is resumed from the weights that it trained,
        /// regardless of this key.
        [Changeable] dtype: WeightDtype = is(WeightDtype::F32),
        /// URL to which the run's checkpoints are copied, and from which the run is resumed if it has no local
        /// checkpoint: `s3://bucket/folder`, `gs://bucket/folder` or `file:///folder`. Each run needs a separate URL.
        /// Credentials are read from the environment.
        [Changeable] mirror: Option<String> = unset("none").example("\"s3://bucket/first-run\""),
        /// Seconds for which writing the final checkpoint is retried, so that disk space can be freed.
        [Changeable] retry_s: f64 = is(600.0).from(0).below(3e7),
        /// Keeps a journal of the learner's input for `preceptor replay`: about 16 bytes per trained token.
        [Changeable] journal: bool = is(true),
        /// Size in bytes at which the journal is closed, which is logged; a replay ends there. 0 disables the limit.
        [Changeable] journal_max_bytes: u64 = is(16 << 30),
    }
}

section! {
    /// The node's HTTP endpoints.
    pub struct Serve checked by check_serve {
        /// Enables the endpoints.
        [Changeable] enabled: bool = is(true),
        /// IP address and port of the server. An address that other machines can reach requires `token_env`.
        [Changeable] listen: SocketAddr = is(SocketAddr::from(([127, 0, 0, 1], 9464))),
        /// Environment variable that holds a bearer token of at least 16 characters. All requests except those for `/healthz`
        /// and `/readyz` must then carry the token.
        [Changeable, secret] token_env: Option<String> =
            unset("none").example("\"PRECEPTOR_TOKEN\"").check(|name| check_variable(name.as_deref())),
        /// Host names, without ports, that the node accepts in requests, in addition to IP addresses and `localhost`.
        /// Requests with other host names are refused, except for `/healthz` and `/readyz`, so that a web page whose
        /// name resolves to this machine cannot read the node (DNS rebinding).
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

/// Validates host names, and returns them in lower case without a trailing dot.
fn hosts(names: Vec<String>, _: &Path) -> Result<Vec<String>, String> {
    for name in &names {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(format!("{name:?} is not a host name; write it without scheme and port, as node.example"));
        }
    }
    Ok(names.iter().map(|name| name.trim_end_matches('.').to_ascii_lowercase()).collect())
}

section! {
    /// Workers on other machines, which sample with `rollout.engine = "workers"`. The node and its workers meet at a NATS
    /// server with JetStream. See docs/cluster.md.
    pub struct Cluster checked by check_cluster {
        /// Address of the NATS server; several of one NATS cluster are separated by commas.
        [Changeable] nats: Option<String> =
            unset("none; required with `rollout.engine` or `labeler.engine = \"workers\"`").example("\"nats://broker:4222\"")
                .check(|url| url.as_deref().map_or(Ok(()), check_nats)),
        /// Name of the run at the NATS server, which workers give as `--run`: letters, digits, `-` and `_`. Two runs of
        /// one name would take the workers from each other.
        [Changeable] run: Option<String> =
            unset("`run.name`").example("\"summaries\"").check(|name| name.as_deref().map_or(Ok(()), check_board)),
        /// Place of the weights for the workers: a folder that their machines see, or `s3://bucket/folder`,
        /// `gs://bucket/folder` or `file:///folder`, with credentials in the environment of the node and of each worker.
        /// Workers that see neither read from the node's HTTP server (`preceptor worker --store
        /// http://NODE:PORT/weights`), which needs no setting here.
        [Changeable] store: Option<String> =
            unset("the folder `cluster` in the run's directory").example("\"s3://bucket/summaries\"")
                .check(|place| place.as_deref().map_or(Ok(()), check_store)).resolve(store),
        /// Maximum number of completions of a group that are one piece of work. By default a worker samples a whole group,
        /// and computes its prompt once. Many workers with long completions are used better with smaller pieces: a group
        /// is complete when its last completion is, and a worker that dies leaves less behind.
        [Changeable] part: Option<usize> = unset("`rollout.group_size`").example("1").check(check_part),
        /// Seconds without a sign of life of a worker after which its work goes to another one. A worker that samples
        /// gives signs of life, so that long completions need no long lease.
        [Changeable] lease_s: f64 = is(30.0).from(2).below(1e5),
        /// A worker whose time per token is more than this multiple of the median of the workers takes no new work for ten
        /// minutes: long completions on a slow machine would hold up the learner. It applies from eight workers on; 0
        /// lets all workers work.
        [Changeable] slowest: f64 = is(3.0).from(0).note("; 0 lets all workers work"),
        /// Certificate (PEM) of the authority that signed the NATS server's certificate. Setting it requires TLS.
        [Changeable] tls_ca: Option<PathBuf> = unset("none").example("\"certs/ca.pem\""),
        /// Certificate (PEM) that this node shows to the NATS server. Requires `tls_key`.
        [Changeable] tls_certificate: Option<PathBuf> = unset("none").example("\"certs/node.pem\""),
        /// Key (PEM) of `tls_certificate`.
        [Changeable] tls_key: Option<PathBuf> = unset("none").example("\"certs/node.key\""),
    }
}

fn check_part(part: &Option<usize>) -> Result<(), String> {
    if *part == Some(0) { Err("must be 1 at least".to_owned()) } else { Ok(()) }
}

/// Replaces a leading `~` of a folder's path by the home directory.
fn store(place: Option<String>, _: &Path) -> Result<Option<String>, String> {
    place.map(|place| Ok(expand_home(Path::new(&place))?.display().to_string())).transpose()
}

/// Checks the form of NATS addresses.
///
/// # Errors
/// Says what is wrong with them.
pub fn check_nats(urls: &str) -> Result<(), String> {
    for url in urls.split(',').map(str::trim) {
        let host = ["nats://", "tls://"].iter().find_map(|scheme| url.strip_prefix(scheme));
        let Some(host) = host else {
            return Err("must begin with nats:// or tls://, for example nats://broker:4222".to_owned());
        };
        if host.contains('@') {
            return Err(
                "must not contain a password, because it is written into the run's files; use certificates (tls_certificate)"
                    .to_owned(),
            );
        }
        if host.is_empty() || host.starts_with(':') || host.contains(char::is_whitespace) {
            return Err(format!("{url:?} has no host name"));
        }
    }
    Ok(())
}

/// Checks the name of a run at a NATS server.
///
/// # Errors
/// Says which characters are allowed.
pub fn check_board(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !name.is_empty() && name.len() <= 100 && name.chars().all(allowed) {
        return Ok(());
    }
    Err(format!("{name:?} must consist of 1 to 100 letters, digits, \"-\" and \"_\""))
}

fn check_cluster(cluster: &Cluster, reader: &Reader<'_>) {
    if cluster.tls_certificate.is_some() != cluster.tls_key.is_some() {
        let (missing, given) = match cluster.tls_key {
            None => ("tls_key", "tls_certificate"),
            Some(_) => ("tls_certificate", "tls_key"),
        };
        reader.error(missing, &format!("is missing; {given} requires it"));
    }
}

section! {
    /// Reactions to failures and stalls.
    pub struct Supervision {
        /// Number of consecutive failures after which the graph of actors is restarted; the next failure ends the run.
        [Changeable] max_restarts: u32 = is(3),
        /// Pause in seconds before the first restart. It doubles with each further restart.
        [Changeable] backoff_s: f64 = seconds(1.0),
        /// Upper bound in seconds of the pause before a restart.
        [Changeable] max_backoff_s: f64 = seconds(60.0),
        /// Seconds without progress after which the blocking stage is logged.
        [Changeable] stall_after_s: f64 = seconds(120.0),
        /// Seconds without progress after which the graph of actors is restarted.
        [Changeable] restart_after_s: f64 = seconds(600.0),
        /// Seconds to wait for a stopped actor to finish.
        [Changeable] halt_grace_s: f64 = seconds(10.0),
        /// Seconds to wait for the current step after Ctrl-C or SIGTERM. The checkpoint contains the step's groups in
        /// any case.
        [Changeable] drain_s: f64 = seconds(15.0),
    }
}

//! The sections that say how a run is kept, watched and steered, key by key.

use std::net::SocketAddr;

/// `[evaluation]`: the present weights against the first ones, by the labeler, on held-out prompts, while the run goes on
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Steps between evaluations; 0 (default) for none. Needs `data.holdout`. One that is due while the one before is under
    /// way is left out.
    pub every_steps: u64,
    /// Held-out prompts that both answer, greedily; the first so many. Default 32.
    pub prompts: usize,
    /// Threads of its pool, beside those of the actors. Default 1.
    pub threads: usize,
}

/// `[controller]`: moves how much is under way at once while the run goes on, by the pressure in the queues
#[derive(Debug, Clone, PartialEq)]
pub struct Control {
    /// Whether it does: `rollout.slots` and `labeler.remote.concurrency` are then the most, and it stays between
    /// them and a group, or one request. Default false.
    pub enabled: bool,
    /// Seconds between two looks. Default 10.
    pub every_s: f64,
}

/// `[guard]`: bounds within which a run is healthy
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    /// What happens when a bound is exceeded for `steps` steps in a row: `warn` (default) logs it, and `stop` ends the run
    /// with a checkpoint and exit status 3. Either way the page and the metric `preceptor_guard_exceeded` show it.
    pub action: GuardAction,
    /// Highest KL of the policy to its start, in nats per token (`kl/token`); 0 for no bound. Default 0.5.
    pub max_kl: f64,
    /// Lowest entropy of the policy, in nats per token (`entropy/mean`); 0 for no bound. Default 0.05.
    pub min_entropy: f64,
    /// Highest share of a step's groups that are masked, from 0 to 1; 1 for no bound. Default 0.5.
    pub max_masked: f64,
    /// Steps in a row beyond a bound after which `action` is taken. Default 3.
    pub steps: u64,
    /// Steps in a row in which the labeler gave no label at all that end the run with exit status 3, whatever `action`
    /// says. Default 3.
    pub unlabeled_steps: u64,
}

/// The reaction to a bound of `[guard]` that is exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardAction {
    /// It is logged.
    Warn,
    /// The run ends.
    Stop,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Minutes between checkpoints, which are written while the run goes on; 0 for none. Default 10.
    pub every_minutes: f64,
    /// Steps between checkpoints, besides; 0 (default) for none. The last step has one in any case.
    pub every_steps: u64,
    /// How many of the last are kept. Default 2.
    pub keep: usize,
    /// A figure of `metrics.jsonl`, such as `score/mean`: the checkpoint before which its mean over the steps since the
    /// one before was highest is kept too. Default none.
    pub best: Option<String>,
    /// Of the weights that other programs open: `f32` (default) or `bf16`. A run is resumed from what it
    /// learned in, whatever this says.
    pub dtype: WeightDtype,
    /// A place for copies of checkpoints, from which a run is resumed where there is none here: `s3://bucket/folder`,
    /// `gs://bucket/folder` or `file:///folder`, one for each run. Credentials are in the environment. Default none.
    pub mirror: Option<String>,
    /// Seconds for which the end of a run tries again to write its checkpoint, while somebody makes room. Default 600.
    pub retry_s: f64,
    /// Keep a journal of what the learner was given, for `preceptor replay`: about 16 bytes per token trained. Default true.
    pub journal: bool,
    /// Size beyond which the journal takes no more steps, which is logged: a replay then ends there. 0 for no bound.
    /// Default 17179869184.
    pub journal_max_bytes: u64,
}

/// Type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
}

/// `[serve]`
#[derive(Debug, Clone, PartialEq)]
pub struct Serve {
    /// Whether the node answers over HTTP. Default true.
    pub enabled: bool,
    /// Where. Default 127.0.0.1:9464. An address that other machines can reach asks for `token_env`.
    pub listen: SocketAddr,
    /// Environment variable that holds a bearer token of at least 16 characters. Where it is named, every request but
    /// those for `/healthz` and `/readyz` must carry the token. Default none.
    pub token_env: Option<String>,
    /// Names that the node answers to, besides IP addresses and `localhost`; without ports. Requests for other names, but
    /// for `/healthz` and `/readyz`, are refused, so that a web page whose name resolves to this machine cannot read the
    /// node. Default none.
    pub hosts: Vec<String>,
}

/// `[supervision]`
#[derive(Debug, Clone, PartialEq)]
pub struct Supervision {
    /// Failures in a row that are answered by a restart. Default 3.
    pub max_restarts: u32,
    /// Seconds before the first restart; doubles. Default 1.
    pub backoff_s: f64,
    /// Most seconds before a restart. Default 60.
    pub max_backoff_s: f64,
    /// Seconds without any progress after which the holder is named. Default 120.
    pub stall_after_s: f64,
    /// Seconds without any progress after which the graph is restarted. Default 600.
    pub restart_after_s: f64,
    /// Seconds that a stopped actor may take to come back. Default 10.
    pub halt_grace_s: f64,
    /// Seconds that the step under way may take after Ctrl-C or SIGTERM before it is left; what it was made of is in the
    /// checkpoint either way. Default 15.
    pub drain_s: f64,
}

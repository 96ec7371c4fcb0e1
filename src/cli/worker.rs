//! `preceptor worker`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};

use crate::config::{EngineKind, WeightsPlace, check_board, check_nats, check_servers};
use crate::observe::serve::{Probes, serve_probes};
use crate::observe::telemetry;
use crate::pipeline::cluster::worker::{ServersPlan, host};
use crate::pipeline::cluster::{Health, Nats, NatsPlan, Observed, StorePlan, StoreToken, WorkerPlan, judge, work};
use crate::pipeline::generate::MAX_SLOTS;
use crate::status;
use crate::util::exit::{Ended, before_work};
use crate::util::process::cores;
use crate::util::{device, signals};

/// Work of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// Samples completions.
    Rollout,
    /// Answers for the run's judges.
    Label,
}

/// Kind of inference servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ServerKind {
    Vllm,
    Sglang,
}

/// Arguments of `preceptor worker`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  The node's folder of weights is mounted as /mnt/weights:
    preceptor worker --join nats://broker:4222 --run summaries --store /mnt/weights
  Weights come from the node, without a shared folder:
    preceptor worker --join nats://broker:4222 --run summaries --store http://node:9464/weights --token-env PRECEPTOR_TOKEN
  The run has cluster.store = \"s3://bucket/folder\":
    AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… preceptor worker --join nats://broker:4222 --run summaries

A worker may join and leave at any moment, and any number of them may work for a run. SIGTERM and Ctrl-C let it finish its
work within --drain; a second signal ends it at once, and its work goes to another worker after the run's cluster.lease_s.
See docs/cluster.md.")]
pub struct Worker {
    /// Address of the NATS server at which the run's node and its workers meet; several are separated by commas.
    #[arg(long, value_name = "URL", value_parser = |url: &str| check_nats(url).map(|()| url.to_owned()))]
    join: String,
    /// Name of the run: cluster.run or run.name of its configuration.
    #[arg(long, value_name = "NAME", value_parser = |name: &str| check_board(name).map(|()| name.to_owned()))]
    run: String,
    /// Work of this worker: `rollout` samples completions; `label` answers for the run's judges whose weights workers
    /// hold (labeler.engine = "workers").
    #[arg(long, value_enum, default_value = "rollout")]
    role: Role,
    /// Name of this worker, which no other worker of the run may have: letters, digits, `-` and `_`. The default is the
    /// name of the machine and the number of the process.
    #[arg(long, value_name = "NAME", value_parser = |name: &str| check_board(name).map(|()| name.to_owned()))]
    name: Option<String>,
    /// Place of the run's weights, if it is not the one that the node names (cluster.store): a folder on this machine,
    /// s3://bucket/folder, gs://bucket/folder, or the URL of a folder on an HTTP server, such as the node's own
    /// (http://node:9464/weights).
    #[arg(long, value_name = "DIR|URL", value_parser = WeightsPlace::parse)]
    store: Option<WeightsPlace>,
    /// Environment variable that holds the bearer token of the HTTP server in --store (serve.token_env of the node).
    #[arg(long, value_name = "NAME", requires = "store")]
    token_env: Option<String>,
    /// Folder for weights that are fetched from an object store or an HTTP server. Each worker uses a separate folder
    /// below it. The default is `weights` in $PRECEPTOR_CACHE or ~/.cache/preceptor.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// IP address and port of an HTTP server with /metrics, /healthz and /readyz, such as 127.0.0.1:9465. It shows numbers
    /// only, and requires no token. Without this option the worker listens nowhere.
    #[arg(long, value_name = "ADDR")]
    metrics_listen: Option<SocketAddr>,
    /// Inference servers that sample in place of this process. They must have the run's model, be on this machine, and
    /// work for no other worker (docs/served.md). This process then keeps the weights in memory, to check the servers.
    #[arg(long, value_enum, requires = "server")]
    engine: Option<ServerKind>,
    /// Address of an inference server, such as http://127.0.0.1:8000. May be given several times.
    #[arg(long, value_name = "URL", requires = "engine")]
    server: Vec<String>,
    /// Environment variable that holds the servers' API key.
    #[arg(long, value_name = "NAME", requires = "engine")]
    api_key_env: Option<String>,
    /// Folder for the weights that the servers are handed; they must be able to read it under the same path. Each worker
    /// uses a separate folder below it. The default is `served` in $PRECEPTOR_CACHE or ~/.cache/preceptor.
    #[arg(long, value_name = "DIR", requires = "engine")]
    weights_dir: Option<PathBuf>,
    /// Accepts servers of versions that this program was not tested with.
    #[arg(long, requires = "engine")]
    any_server_version: bool,
    /// Number of completions that are sampled concurrently, with --role rollout. On a CPU at most 64; with --engine this is the number
    /// of completions under way on all servers. The default is 32.
    #[arg(long)]
    slots: Option<usize>,
    /// Number of threads. The default is the number of cores.
    #[arg(long)]
    threads: Option<usize>,
    /// Device that computes, such as cpu or cuda:0.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Time to finish the work under way after SIGTERM or Ctrl-C: seconds, or a number with a unit (90s, 2m).
    #[arg(long, default_value = "60s", value_parser = seconds)]
    drain: Duration,
    /// Time to wait at the start for the NATS server, and then for the run's node, after which the worker gives up.
    #[arg(long, default_value = "10m", value_parser = seconds)]
    patience: Duration,
    /// Certificate (PEM) of the authority that signed the NATS server's certificate. Setting it requires TLS.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Certificate (PEM) that this worker shows to the NATS server.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Key (PEM) of --tls-certificate.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

impl Probes for Health {
    fn alive(&self) -> Result<(), String> {
        Self::alive(self)
    }

    fn ready(&self) -> Result<(), String> {
        Self::ready(self)
    }

    fn measure(&self) {
        telemetry::worker::state(&self.state());
    }
}

/// Parses a duration such as 90, 90s or 2m.
fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().map(Duration::from_secs).ok().or_else(|| humantime::parse_duration(text).ok());
    parsed.ok_or_else(|| "must be a number of seconds, or a number with a unit: 90, 90s, 2m".to_owned())
}

impl Worker {
    /// Works for the run until it ends, or until a signal.
    ///
    /// # Errors
    /// If the broker cannot be reached, the run's model cannot be used here, or the coordinator shuts this worker out.
    pub fn run(self) -> Result<()> {
        let _deferred = signals::defer();
        let refused = |text: String| Ended::Refused(anyhow!(text));
        if let (Role::Label, Some(slots)) = (self.role, self.slots) {
            let text = format!(
                "--slots {slots} counts completions of --role rollout; a worker with --role label answers one question at a time: start several"
            );
            return Err(refused(text).into());
        }
        if let (Role::Label, Some(_)) = (self.role, self.engine) {
            let text =
                "--engine is for --role rollout; a judge on a server is asked by the node (labeler.remote)".to_owned();
            return Err(refused(text).into());
        }
        check_servers(&self.server).map_err(|why| refused(format!("--server {why}")))?;
        let servers = self.engine.map(|kind| ServersPlan {
            kind: if kind == ServerKind::Sglang { EngineKind::Sglang } else { EngineKind::Vllm },
            servers: self.server,
            api_key_env: self.api_key_env,
            folder: self.weights_dir,
            check_version: !self.any_server_version,
        });
        let slots = self.slots.unwrap_or(32);
        if servers.is_none() && self.device == "cpu" && slots > MAX_SLOTS {
            let text = format!("--slots {slots}: a CPU samples at most {MAX_SLOTS} completions at once");
            return Err(refused(text).into());
        }
        let machine: String =
            host().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(80).collect();
        let name = self.name.unwrap_or_else(|| format!("{machine}-{}", std::process::id()));
        let token = self.token_env.map(|name| std::env::var(&name).with_context(|| format!("{name} is not set")));
        let token = before_work(|| token.transpose())?.map(StoreToken::new);
        let store = StorePlan { place: self.store, token, cache: self.cache };
        let device = before_work(|| device::open(&self.device))?;
        let health = Arc::<Health>::default();
        if let Some(address) = self.metrics_listen {
            let serve = || serve_probes(address, Arc::clone(&health) as _, telemetry::worker::install()?);
            let bound = before_work(serve)?;
            status!("serving   http://{bound}/metrics  /healthz  /readyz");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        std::thread::Builder::new().name("stop".into()).spawn(move || wait_for_signals(&flag))?;
        let plan = NatsPlan {
            url: self.join,
            ca: self.tls_ca,
            certificate: self.tls_certificate.zip(self.tls_key),
            name: format!("worker {name}"),
        };
        let nats = Nats::connect_within(&plan, self.patience, &stop)?;
        health.watches(nats.link());
        let plan = WorkerPlan {
            run: self.run,
            name,
            store,
            slots,
            servers,
            drain: self.drain,
            patience: self.patience,
            health: Arc::clone(&health),
        };
        if plan.servers.is_some() {
            // The checks of servers compute on threads of their own.
            let threads = self.threads.unwrap_or_else(cores).max(1);
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads.unwrap_or_else(cores).max(1)).build()?;
        let observed = Observed::new(&nats, &health);
        let (summary, done, kind) = match self.role {
            Role::Rollout => (pool.install(|| work(&plan, &device, &observed, &observed, &stop))?, "sampled", "groups"),
            Role::Label => (judge(&plan, &device, &pool, &observed, &observed, &stop)?, "answered", "questions"),
        };
        status!(
            "worker    {done} {} {kind}, {} tokens; gave {} back unfinished",
            summary.groups,
            summary.tokens,
            summary.given_back
        );
        Ok(())
    }
}

/// Sets `stop` after the first signal, and ends the process after the second.
fn wait_for_signals(stop: &AtomicBool) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    runtime.block_on(async {
        signals::after(0).await;
        stop.store(true, Ordering::SeqCst);
        let signal = signals::after(1).await;
        status!("interrupted by {}; another worker gets the work", signals::name(signal));
        std::process::exit(128 + signal);
    });
}

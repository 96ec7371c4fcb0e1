//! What the node answers over HTTP: `/metrics`, `/healthz`, `/readyz`, `/status`. Read-only: GET and HEAD.

mod token;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use preceptor_actors::{GraphHandle, GraphReport, SnapshotCell};
use serde_json::{Value, json};

use crate::model::Decoder;
use crate::telemetry;
pub use token::Token;

/// Answered to whoever asks: a supervisor of processes has no token, and learns no more than whether to restart.
const OPEN: [&str; 2] = ["/healthz", "/readyz"];

/// What the endpoints look at.
pub struct NodeState {
    /// Name of the run.
    pub run: String,
    /// Renders the counted metrics.
    pub metrics: PrometheusHandle,
    /// The graph of the present phase, once there is one.
    graph: Mutex<Option<GraphHandle>>,
    /// The published weights, once there are any.
    pub weights: OnceLock<Arc<SnapshotCell<Decoder>>>,
    /// The phase in words, and the last step's figures.
    progress: Mutex<(String, Value)>,
}

impl NodeState {
    /// A node that is starting.
    pub fn new(run: &str, metrics: PrometheusHandle) -> Arc<Self> {
        Arc::new(Self {
            run: run.to_owned(),
            metrics,
            graph: Mutex::new(None),
            weights: OnceLock::new(),
            progress: Mutex::new(("starting".into(), Value::Null)),
        })
    }

    /// Says what the node is doing.
    pub fn phase(&self, phase: &str) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).0 = phase.to_owned();
    }

    /// The graph to look at from now on.
    pub fn watch(&self, graph: GraphHandle) {
        *self.graph.lock().unwrap_or_else(PoisonError::into_inner) = Some(graph);
    }

    fn report(&self) -> Option<GraphReport> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(GraphHandle::report)
    }

    /// Keeps the figures of the last step.
    pub fn stepped(&self, record: Value) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).1 = record;
    }

    /// What `/metrics` answers.
    pub fn metrics_text(&self) -> String {
        let report = self.report();
        let acks = self.weights.get().map(|cell| cell.acks()).unwrap_or_default();
        let graph = telemetry::graph::render(report.as_ref(), &acks, resident_bytes());
        format!("{}{graph}", self.metrics.render())
    }

    fn status(&self) -> Value {
        let (phase, step) = self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
        json!({
            "run": self.run,
            "program": concat!("preceptor ", env!("CARGO_PKG_VERSION")),
            "phase": phase,
            "last_step": step,
            "weights": self.weights.get().map(|cell| cell.acks()),
            "graph": self.report(),
        })
    }
}

/// Binds `address` and serves until the program ends, with a `token` to those who have it. Returns the address bound,
/// whose port is chosen by the system where the configuration says 0.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(address: SocketAddr, token: Option<Token>, state: Arc<NodeState>) -> Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address}; another run may: set serve.listen to a free port, or serve.enabled = false"
        )
    })?;
    let bound = listener.local_addr()?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(state, token)).await {
            tracing::error!("the HTTP server ended: {error}");
        }
    });
    Ok(bound)
}

/// Folds what histograms have gathered into their buckets, every few seconds until the program ends, whether anybody
/// scrapes them or not: between two times they keep every sample.
pub fn upkeep(metrics: PrometheusHandle) {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(std::time::Duration::from_secs(5));
        loop {
            ticks.tick().await;
            metrics.run_upkeep();
        }
    });
}

fn router(state: Arc<NodeState>, token: Option<Token>) -> Router {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(async |State(state): State<Arc<NodeState>>| Json(state.status())))
        .with_state(state);
    // Around all routes and what is no route, so that nobody without the token learns which is which.
    match token {
        Some(token) => router.layer(from_fn_with_state(token, guard)),
        None => router,
    }
}

/// Lets through who carries the token, and who asks for what is open.
async fn guard(State(token): State<Token>, request: Request, next: Next) -> Response {
    if OPEN.contains(&request.uri().path()) || token.admits(request.headers()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, "this node asks for a bearer token (serve.token_env)\n").into_response()
}

async fn metrics(State(state): State<Arc<NodeState>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics_text())
}

/// Alive: no stage holds the run beyond the watchdog's patience.
async fn healthz(State(state): State<Arc<NodeState>>) -> impl IntoResponse {
    match state.report().and_then(|report| report.stalled) {
        Some(stalled) => (StatusCode::SERVICE_UNAVAILABLE, format!("stalled: {}\n", json!(stalled))),
        None => (StatusCode::OK, "ok\n".to_owned()),
    }
}

/// Ready: the graph runs.
async fn readyz(State(state): State<Arc<NodeState>>) -> impl IntoResponse {
    if state.report().is_some() { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "starting\n") }
}

/// Resident memory of this process, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

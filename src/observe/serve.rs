//! The node's HTTP server: the live page with its data, `/metrics`, `/healthz`, `/readyz`, and `/weights` for workers.
//! Read-only: GET and HEAD.

mod connections;
mod hosts;
mod page;
mod probes;
mod token;
mod weights;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::config::Serve;
use crate::observe::monitor::Monitor;
use crate::observe::telemetry;
use hosts::Hosts;
pub use probes::{Probes, serve_probes};
pub use token::Token;

/// Paths of the health probes. They require neither a token nor a known host name, so their responses contain no data
/// of the run beyond its health.
const PROBES: [&str; 2] = ["/healthz", "/readyz"];

/// Path of the page. It requires no token: it contains no data of the run, and asks the user for the token to read
/// them.
const PAGE: &str = "/";

/// Binds the configured address, starts a task that serves it until the program ends, and returns the bound address; the
/// system chooses the port if the configured one is 0. With a `token`, requests must carry it.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(config: &Serve, token: Option<Token>, monitor: Arc<Monitor>) -> Result<SocketAddr> {
    let address = config.listen;
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address}; another run may use it: set serve.listen to a free port, or serve.enabled = false"
        )
    })?;
    let bound = listener.local_addr()?;
    let router = router(monitor, token, Hosts::new(&config.hosts));
    tokio::spawn(connections::accept(listener, router, connections::max_connections()));
    Ok(bound)
}

/// Samples the graph every second and maintains the histograms every five seconds, until the program ends. Runs with or
/// without the HTTP server.
pub fn upkeep(monitor: Arc<Monitor>) {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        for tick in 0u64.. {
            ticks.tick().await;
            monitor.sample();
            if tick.is_multiple_of(5) {
                monitor.upkeep();
            }
        }
    });
}

type Node = State<Arc<Monitor>>;

fn router(monitor: Arc<Monitor>, token: Option<Token>, hosts: Hosts) -> Router {
    let router = Router::new()
        .route("/", get(page::page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(async |State(monitor): Node| Json(monitor.status())))
        .route("/history", get(async |State(monitor): Node| Json(monitor.history())))
        .route("/samples", get(async |State(monitor): Node| Json(monitor.samples())))
        .route("/weights/{name}/{file}", get(weights::weights))
        .with_state(monitor);
    // The layer covers unknown paths too, so that a client without the token cannot tell which paths exist.
    let router = match token {
        Some(token) => router.layer(from_fn_with_state(token, guard)),
        None => router,
    };
    router.layer(from_fn_with_state(hosts, hosts::guard))
}

/// Passes on requests with the token and requests for open paths, and answers all others with 401.
async fn guard(State(token): State<Token>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path == PAGE || PROBES.contains(&path) || token.admits(request.headers()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, "this node requires a bearer token (serve.token_env)\n").into_response()
}

async fn metrics(State(monitor): Node) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], monitor.metrics_text())
}

/// Answers the liveness probe: 200 unless the watchdog has found the run stalled.
async fn healthz(State(monitor): Node) -> impl IntoResponse {
    match monitor.report().and_then(|report| report.stalled) {
        Some(stalled) => (StatusCode::SERVICE_UNAVAILABLE, format!("stalled: {}\n", json!(stalled))),
        None => (StatusCode::OK, "ok\n".to_owned()),
    }
}

/// Answers the readiness probe: 200 if the graph runs and no judge has an outage.
async fn readyz(State(monitor): Node) -> impl IntoResponse {
    if monitor.report().is_none() {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned());
    }
    let outages = telemetry::judge_outages();
    if outages.is_empty() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let guarded = monitor.is_guarded();
    let lines = outages.iter().map(|(url, time, why, _)| {
        if guarded {
            // Probes have no token, and the judge's error messages are only for readers with the token.
            return format!("waiting for a judge, unavailable for {} s; /status has the cause\n", time.as_secs());
        }
        format!("waiting for the judge at {url}, unavailable for {} s: {why}\n", time.as_secs())
    });
    (StatusCode::SERVICE_UNAVAILABLE, lines.collect())
}

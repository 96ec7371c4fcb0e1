//! What the node answers over HTTP: the live page, what it reads, `/metrics`, `/healthz`, `/readyz`. Read-only: GET and HEAD.

mod connections;
mod hosts;
mod page;
mod token;

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
pub use token::Token;

/// Probes of supervisors, which have no token and ask by whatever name; the answers say no more than whether to restart.
const PROBES: [&str; 2] = ["/healthz", "/readyz"];

/// The page, which anybody may load: it holds nothing of the run, and asks for the token that it reads the rest with.
const PAGE: &str = "/";

/// Binds the configured address and serves until the program ends; where there is a `token`, to those who have it.
/// Returns the address bound, whose port is chosen by the system where the configuration says 0.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(config: &Serve, token: Option<Token>, monitor: Arc<Monitor>) -> Result<SocketAddr> {
    let address = config.listen;
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address}; another run may: set serve.listen to a free port, or serve.enabled = false"
        )
    })?;
    let bound = listener.local_addr()?;
    let router = router(monitor, token, Hosts::new(&config.hosts));
    tokio::spawn(connections::accept(listener, router, connections::most()));
    Ok(bound)
}

/// Looks at the graph every second and folds histograms every few, until the program ends, whether anybody asks or not.
pub fn upkeep(monitor: Arc<Monitor>) {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        for tick in 0u64.. {
            ticks.tick().await;
            monitor.look();
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
        .with_state(monitor);
    // Around all routes and what is no route, so that nobody without the token learns which is which.
    let router = match token {
        Some(token) => router.layer(from_fn_with_state(token, guard)),
        None => router,
    };
    router.layer(from_fn_with_state(hosts, hosts::guard))
}

/// Lets through who carries the token, and who asks for what is open.
async fn guard(State(token): State<Token>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path == PAGE || PROBES.contains(&path) || token.admits(request.headers()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, "this node asks for a bearer token (serve.token_env)\n").into_response()
}

async fn metrics(State(monitor): Node) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], monitor.metrics_text())
}

/// Alive: no stage holds the run beyond the watchdog's patience.
async fn healthz(State(monitor): Node) -> impl IntoResponse {
    match monitor.report().and_then(|report| report.stalled) {
        Some(stalled) => (StatusCode::SERVICE_UNAVAILABLE, format!("stalled: {}\n", json!(stalled))),
        None => (StatusCode::OK, "ok\n".to_owned()),
    }
}

/// Ready: the graph runs, and no judge is waited for.
async fn readyz(State(monitor): Node) -> impl IntoResponse {
    if monitor.report().is_none() {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned());
    }
    let away = telemetry::judges_away();
    if away.is_empty() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let guarded = monitor.is_guarded();
    let lines = away.iter().map(|(url, time, why, _)| {
        if guarded {
            // Probes have no token, and what the judge said is for those who have it.
            return format!("waits for a judge, away for {} s; /status has the cause\n", time.as_secs());
        }
        format!("waits for the judge at {url}, away for {} s: {why}\n", time.as_secs())
    });
    (StatusCode::SERVICE_UNAVAILABLE, lines.collect())
}

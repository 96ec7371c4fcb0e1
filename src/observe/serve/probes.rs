//! The HTTP server of a worker: `/metrics`, `/healthz` and `/readyz`. It has no data of the run, and requires no token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;

use super::connections;
use crate::observe::telemetry;
use crate::util::process;

/// Time between two maintenances of the histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// State of a process for probes.
pub trait Probes: Send + Sync + 'static {
    /// Returns whether the process makes progress.
    ///
    /// # Errors
    /// Says why not.
    fn alive(&self) -> Result<(), String>;

    /// Returns whether the process can work.
    ///
    /// # Errors
    /// Says what is missing.
    fn ready(&self) -> Result<(), String>;

    /// Sets the gauges before a scrape.
    fn measure(&self);
}

type Shared = State<(Arc<dyn Probes>, PrometheusHandle)>;

/// Binds `address`, and serves it on a thread until the process ends. Returns the bound address.
///
/// # Errors
/// If the address cannot be bound, or the thread cannot be started.
pub fn serve_probes(address: SocketAddr, probes: Arc<dyn Probes>, metrics: PrometheusHandle) -> Result<SocketAddr> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).with_context(|| {
        format!("cannot listen on {address}; another process may use it: give --metrics-listen a free port")
    })?;
    let bound = listener.local_addr()?;
    let router = Router::new()
        .route("/metrics", get(exported))
        .route("/healthz", get(async |State((probes, _)): Shared| answer(probes.alive(), "ok\n")))
        .route("/readyz", get(async |State((probes, _)): Shared| answer(probes.ready(), "ready\n")))
        .with_state((probes, metrics.clone()));
    let serve = async move {
        tokio::spawn(connections::accept(listener, router, connections::max_connections()));
        loop {
            tokio::time::sleep(UPKEEP).await;
            metrics.run_upkeep();
        }
    };
    std::thread::Builder::new().name("probes".into()).spawn(move || runtime.block_on(serve))?;
    Ok(bound)
}

async fn exported(State((probes, metrics)): Shared) -> impl IntoResponse {
    probes.measure();
    let process = telemetry::graph::Process { usage: process::usage(), card: None };
    let text = format!("{}{}", metrics.render(), telemetry::graph::render(None, &[], None, &[], process));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

fn answer(probe: Result<(), String>, fine: &str) -> (StatusCode, String) {
    match probe {
        Ok(()) => (StatusCode::OK, fine.to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

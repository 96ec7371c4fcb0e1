//! Watching over a graph until it ends: signals, what it tells, the controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use preceptor_actors::{GraphEvent, GraphHandle, GraphOptions, Outcome, RestartPolicy, WatchdogPolicy};

use super::systemd;
use crate::config::Config;
use crate::monitor::Monitor;
use crate::progress::Progress;
use crate::say;
use crate::telemetry;

/// Whether somebody asked the run to stop.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Asks; says whether somebody had asked before.
    pub(super) fn ask(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }
}

/// Ctrl-C and SIGTERM.
pub(super) struct Signals(Option<tokio::signal::unix::Signal>);

impl Signals {
    pub(super) fn listen() -> Self {
        Self(tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok())
    }

    /// The next one.
    pub(super) async fn next(&mut self) {
        let terminated = async {
            match &mut self.0 {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            Some(()) = terminated => {}
        }
    }
}

/// Waits for the end. The first Ctrl-C (or SIGTERM) lets the step under way take up to `drain`, where there is one; the second
/// does not.
pub(super) async fn supervise(
    graph: &GraphHandle,
    stop: &Stop,
    progress: &Progress,
    monitor: &Monitor,
    drain: Option<Duration>,
) -> Outcome {
    let (mut events, mut signals) = (graph.subscribe(), Signals::listen());
    let mut show = tokio::time::interval(Duration::from_secs(1));
    let mut deadline = None;
    loop {
        let over = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = graph.wait() => return outcome,
            () = signals.next() => match drain {
                Some(drain) if !stop.ask() => {
                    progress.line("stopping after this step; press Ctrl-C again to stop at once");
                    deadline = Some(tokio::time::Instant::now() + drain);
                }
                _ => {
                    stop.ask();
                    progress.line("stopping now; the last finished step is kept, and what is under way");
                    graph.halt();
                }
            },
            () = over => {
                progress.line("the step takes too long (supervision.drain_s); it is left, and what it was made of is kept");
                deadline = None;
                graph.halt();
            }
            Ok(event) = events.recv() => tell(&event, progress),
            _ = show.tick() => {
                if graph.report().stalled.is_none() {
                    systemd::alive();
                }
                progress.message(monitor.line());
                for one in monitor.control() {
                    progress.line(&one.line());
                }
            }
        }
    }
}

/// Does what may wait for a disk on a thread of its own: whoever asks how the run is gets an answer meanwhile, and the second
/// signal leaves it. None where it was left.
///
/// # Errors
/// When it panicked.
pub(super) async fn unless_left<T: Send + 'static>(
    stop: &Stop,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => Ok(Some(done?)),
        () = leaves(stop) => Ok(None),
    }
}

/// Until somebody asks twice that a run which ends leaves what it still writes. Who waits for a disk gives up by itself first.
async fn leaves(stop: &Stop) {
    const GRACE: Duration = Duration::from_secs(2);
    let mut signals = Signals::listen();
    signals.next().await;
    stop.ask();
    say!("the last checkpoint is being written; press Ctrl-C again to leave it, and the steps since the one before");
    signals.next().await;
    tokio::time::sleep(GRACE).await;
}

fn tell(event: &GraphEvent, progress: &Progress) {
    match event {
        GraphEvent::StageFailed { stage, error, .. } => {
            telemetry::stage_failed(stage);
            progress.line(&format!("stage {stage} failed: {error}"));
        }
        GraphEvent::Restarting { incarnation, backoff } => progress.line(&format!(
            "restarting the graph from the last finished step in {:.1} s (incarnation {incarnation})",
            backoff.as_secs_f64()
        )),
        GraphEvent::Stalled { stage, state, for_ } => {
            progress.line(&format!("no progress for {:.0} s: {stage} holds the run ({state})", for_.as_secs_f64()));
        }
        GraphEvent::Recovered { stage } => progress.line(&format!("{stage} goes on")),
        GraphEvent::Started { .. } | GraphEvent::Ended(_) => {}
    }
}

pub(super) fn graph_options(config: &Config) -> GraphOptions {
    let supervision = &config.supervision;
    GraphOptions {
        restart: RestartPolicy {
            max_restarts: supervision.max_restarts,
            initial_backoff: Duration::from_secs_f64(supervision.backoff_s),
            max_backoff: Duration::from_secs_f64(supervision.max_backoff_s),
            ..RestartPolicy::default()
        },
        watchdog: WatchdogPolicy {
            stall_after: Duration::from_secs_f64(supervision.stall_after_s),
            restart_after: Some(Duration::from_secs_f64(supervision.restart_after_s)),
        },
        halt_grace: Duration::from_secs_f64(supervision.halt_grace_s),
        ..GraphOptions::default()
    }
}

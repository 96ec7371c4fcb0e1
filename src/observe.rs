//! Observability of a node: metrics, history, the HTTP server with its page, the terminal view, traces, progress
//! output.

pub mod monitor;
pub mod progress;
pub mod serve;
pub mod telemetry;
pub mod top;
pub mod traces;

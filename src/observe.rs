//! What a node reports of itself: metrics, history, the HTTP server with its page, the terminal view, traces, progress.

pub mod monitor;
pub mod progress;
pub mod serve;
pub mod telemetry;
pub mod top;
pub mod traces;

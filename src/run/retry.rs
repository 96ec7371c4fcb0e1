//! Retries of failed writes, for example while the disk is full.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::runtime::Handle;

use super::supervise::new_signal;
use crate::observe::telemetry;
use crate::status;

/// First and longest pause between attempts; each pause is twice the previous one.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// Calls `attempt` until it succeeds, `retry_s` seconds have passed, or a signal arrives. Blocks the thread; must be
/// called within a tokio runtime.
///
/// # Errors
/// Returns the error of the last attempt.
pub(super) fn retry_write<T>(retry_s: f64, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + Duration::from_secs_f64(retry_s);
    let mut pause = PAUSES[0];
    loop {
        let error = match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        telemetry::disk_error();
        if Instant::now() >= until {
            return Err(error);
        }
        status!("{error:#}; retrying in {} s; Ctrl-C gives up", pause.as_secs());
        let given_up = Handle::current().block_on(async {
            tokio::select! {
                () = tokio::time::sleep(pause) => false,
                () = new_signal() => true,
            }
        });
        if given_up {
            return Err(error);
        }
        pause = PAUSES[1].min(2 * pause);
    }
}

//! Writing that is tried again while the disk is full.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::runtime::Handle;

use super::supervise::new_signal;
use crate::observe::telemetry;
use crate::status;

/// The pauses between tries grow from the first to the last of these.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// Makes `attempt` again and again until it succeeds, `retry_s` seconds are over, or a new signal gives up. To be called on a
/// thread that may block, within a tokio runtime.
///
/// # Errors
/// That of the last attempt.
pub(super) fn insist<T>(retry_s: f64, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
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
        status!("{error:#}; it is tried again in {} s; Ctrl-C gives up", pause.as_secs());
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

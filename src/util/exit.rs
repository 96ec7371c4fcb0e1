//! Exit statuses, and errors with an exit status.
//!
//! | status | meaning | a supervisor should |
//! |---|---|---|
//! | 0 | finished | not restart it |
//! | 1 | failed: a fault, a full disk, a judge or a download that could not be reached | restart it with `--resume` |
//! | 2 | refused before any work: arguments, configuration, data, or a judge that refuses | not restart it; a person has to change something |
//! | 3 | stopped by a limit in its configuration (`[guard]`, `labeler.max_cost`), or no step changed the weights | not restart it; a person decides |
//! | 128 + n | interrupted by signal n, with a checkpoint | restart it with `--resume` if it was not stopped on purpose |

use std::fmt;

use anyhow::Result;

use crate::config::ConfigErrors;
use crate::lm::source::Unavailable;
use crate::pipeline::cluster::NoConnection;
use crate::pipeline::cluster::worker::Unsuitable;
use crate::pipeline::remote::Unusable;
use crate::util::signals::Interrupted;

/// Exit status of a command that failed during its work.
pub const FAILED: u8 = 1;
/// Exit status of a command that was refused before its work.
pub const REFUSED: u8 = 2;
/// Exit status of a run that a limit of its configuration stopped.
pub const STOPPED: u8 = 3;

/// An error with an explicit exit status.
#[derive(Debug)]
pub enum Ended {
    /// The command was refused before its work.
    Refused(anyhow::Error),
    /// A limit of the configuration stopped the run.
    Stopped(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Includes the causes, because `source` does not expose them.
            Self::Refused(error) => write!(f, "{error:#}"),
            Self::Stopped(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Ended {}

/// Runs the preparation of a command. An error of it refuses the command.
///
/// # Errors
/// Returns the error of `prepare` as [`Ended::Refused`], unless it has an exit status already or is [`Interrupted`].
pub fn before_work<T>(prepare: impl FnOnce() -> Result<T>) -> Result<T> {
    prepare().map_err(refusal)
}

/// Converts an error into [`Ended::Refused`], unless it has an exit status already or is [`Interrupted`].
pub fn refusal(error: anyhow::Error) -> anyhow::Error {
    if error.is::<Interrupted>() || error.is::<Ended>() { error } else { Ended::Refused(error).into() }
}

/// Returns the exit status of a command that ended with `error`.
pub fn status(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(ended) = cause.downcast_ref::<Ended>() {
            return match ended {
                Ended::Refused(error) => refused(error),
                Ended::Stopped(_) => STOPPED,
            };
        }
    }
    by_cause(error).unwrap_or(FAILED)
}

/// Returns the exit status of a process interrupted by the signal number `signal`, as shells report it.
pub fn interrupted(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(FAILED)
}

/// Returns the exit status of a refused command: [`FAILED`] if the cause may be temporary, such as a full disk.
fn refused(error: &anyhow::Error) -> u8 {
    by_cause(error).unwrap_or(if Unavailable::of(error) { FAILED } else { REFUSED })
}

/// Returns the exit status that the type of the error or of one of its causes determines.
fn by_cause(error: &anyhow::Error) -> Option<u8> {
    error.chain().find_map(|cause| {
        if cause.is::<ConfigErrors>() {
            return Some(REFUSED);
        }
        if let Some(Interrupted { signal, .. }) = cause.downcast_ref::<Interrupted>() {
            return Some(interrupted(*signal));
        }
        if cause.is::<Unsuitable>() {
            return Some(REFUSED);
        }
        let unusable = cause.downcast_ref::<Unusable>().map(|judge| judge.refuses);
        let refuses = unusable.or_else(|| cause.downcast_ref::<NoConnection>().map(|broker| broker.refuses))?;
        Some(if refuses { REFUSED } else { FAILED })
    })
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn an_error_has_the_status_of_its_cause() {
        let judge = |refuses| Unusable { words: "no".into(), refuses };
        assert_eq!(status(&anyhow!("a fault")), FAILED);
        assert_eq!(status(&Unsuitable(anyhow!("another model")).into()), REFUSED);
        assert_eq!(status(&Ended::Refused(anyhow!("no such key")).into()), REFUSED);
        assert_eq!(status(&anyhow::Error::from(Ended::Stopped("kl".into())).context("the run")), STOPPED);
        let interrupted = Interrupted { signal: 15, text: String::new() };
        assert_eq!(status(&anyhow::Error::from(interrupted)), 143);
        assert_eq!(status(&anyhow::Error::from(judge(true)).context("labeler")), REFUSED);
        assert_eq!(status(&anyhow::Error::from(judge(false))), FAILED);
        assert_eq!(status(&Ended::Refused(judge(false).into()).into()), FAILED, "it may be reached later");
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let full = Err::<(), _>(full).context("cannot write").unwrap_err();
        assert_eq!(status(&Ended::Refused(full).into()), FAILED, "room may be made");
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        assert_eq!(status(&Ended::Refused(missing.into()).into()), REFUSED);
    }
}

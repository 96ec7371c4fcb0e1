//! Named points at which tests make the program fail. Without the feature `failpoints`, points compile to nothing.
//!
//! A test sets the environment variable `FAILPOINTS`, for example to `label.ask=3*off->1*return(busy)->off`: the fourth
//! call of a labeler fails. Other faults are `panic` and `sleep(MILLISECONDS)`.

use anyhow::Result;

/// Names of all points, each with the actor or file it belongs to.
pub const POINTS: &[&str] = &[
    "prepare.load",
    "graph.build",
    "prompts.next",
    "sft.step",
    "rollout.begin",
    "rollout.step",
    "label.ask",
    "label.keep",
    "reward.enter",
    "reward.learn",
    "learn.forward",
    "learn.apply",
    "learn.applied",
    "learn.publish",
    "reference.fill",
    "log.append",
    "files.flush",
    "checkpoint.snapshot",
    "checkpoint.fill",
    "checkpoint.rename",
    "checkpoint.renamed",
    "rewind.commit",
    "rewind.renamed",
    "rewind.cut",
];

/// Passes the point `name`, one of [`POINTS`].
///
/// # Errors
/// Returns the fault that a test has set for the point.
#[cfg(feature = "failpoints")]
pub fn point(name: &str) -> Result<()> {
    debug_assert!(POINTS.contains(&name), "{name} is not a failpoint");
    fail::fail_point!(name, |why| Err(anyhow::anyhow!("{} (injected at {name})", why.unwrap_or_default())));
    Ok(())
}

/// Passes the point `name`.
///
/// # Errors
/// Never fails without the feature `failpoints`.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn point(_name: &str) -> Result<()> {
    Ok(())
}

/// Reads the faults from the environment variable `FAILPOINTS`.
pub fn set_up() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}

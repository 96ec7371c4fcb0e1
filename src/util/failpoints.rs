//! Named points at which tests make the program fail. In the program itself, built without the feature `failpoints`, a
//! point is nothing.
//!
//! A test program sets `FAILPOINTS`, for example `label.ask=3*off->1*return(busy)->off`: the fourth time that a labeler
//! asks, it fails. `panic` and `sleep(MILLISECONDS)` are the other faults.

use anyhow::Result;

/// All points, by the actor or file that they are in.
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

/// Passes the point called `name`, one of [`POINTS`].
///
/// # Errors
/// The fault that a test has put there.
#[cfg(feature = "failpoints")]
pub fn point(name: &str) -> Result<()> {
    debug_assert!(POINTS.contains(&name), "{name} is no point");
    fail::fail_point!(name, |why| Err(anyhow::anyhow!("{} (injected at {name})", why.unwrap_or_default())));
    Ok(())
}

/// Passes the point called `name`.
///
/// # Errors
/// None, in a program without the feature `failpoints`.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn point(_name: &str) -> Result<()> {
    Ok(())
}

/// Takes up the faults that the environment asks for.
pub fn set_up() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}

//! Rollouts on inference servers (vLLM, SGLang) over HTTP: requests for completions, hand-over of weights during the run,
//! and the check that a server samples with them.
//!
//! A [`Fleet`] holds the servers of a run. Each server has a thread that hands it the latest published version of the
//! weights (`hand_over`), checks with a canary that the server computes with them (`compare`, `canary`), and only then opens the
//! admission gate for the version. [`ServedEngine`] sends a group of completions to the server with the fewest, among
//! those whose version is new enough for the group.

mod canary;
mod compare;
mod engine;
mod fleet;
mod hand_over;
mod http;
mod probe;
mod server;
mod sglang;
mod store;
mod vllm;

pub use engine::ServedEngine;
pub use fleet::{Fleet, FleetPlan, ServerReport};
pub use store::{
    Content, FolderStore, SUMS, Stored, Tag, WeightStore, is_plain, listed, sha256, sha256_of_file, verify,
};

/// Returns whether an error says that a server cannot be reached or failed, so that a later attempt may succeed.
pub fn is_away(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(http::Fault::Down(_)))
}

//! Workers on other machines that sample completions for a run, or hold its judges: messages, the coordinator's side and the worker's side.
//!
//! The coordinator's process trains, and is the only one that changes the run's state. Workers pull prompts from a queue and
//! put completions into another ([`preceptor_actors::transport`]); weights travel by a folder that all see, an object store or
//! HTTP ([`fetch`]), and are announced on a notice board ([`Notices`]). [`ClusterEngine`] makes this an engine of the rollout
//! actor, and questions of [`crate::pipeline::label::workers`] are answered by workers with the judges' weights.

mod bucket;
pub mod coordinator;
mod engine;
pub mod fetch;
pub mod health;
mod judge_store;
pub mod judging;
mod label_queue;
pub mod log;
mod nats;
mod notices;
pub mod protocol;
pub mod roster;
pub mod worker;

pub use bucket::BucketStore;
pub use coordinator::{Coordinator, CoordinatorPlan, put_base};
pub use engine::ClusterEngine;
pub use fetch::{StorePlan, StoreToken};
pub use health::{Health, Observed};
pub use judge_store::put_judges;
pub use judging::judge;
pub use nats::{Nats, NatsPlan, NoConnection};
pub use notices::{MemoryNotices, Notices};
pub use worker::{WorkerPlan, work};

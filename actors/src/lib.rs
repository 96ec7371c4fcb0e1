//! The asynchronous dataflow runtime of Preceptor.
//!
//! A graph is stages on threads of their own, joined by bounded edges. Data travels on the edges, control (start,
//! drain, halt, supervision) by ractor's mailboxes. The runtime knows versions and staleness; it knows no language
//! model, no tensor and no learning.
//!
//! - [`Item`], [`Stage`], [`Source`]: what travels, and who works on it.
//! - [`Outlet`], [`Inlet`]: the ends of an edge, with an account of who waited for whom.
//! - [`Admission`], [`AdmissionGate`]: how far ahead of the learner work may start.
//! - [`SnapshotCell`]: versions of a value, published by a pointer swap, acknowledged by fingerprint.
//! - [`spawn_graph`], [`GraphHandle`]: a supervised graph. A failed stage takes the whole incarnation down; it is
//!   rebuilt after a pause, and what carries an old incarnation is refused.
//! - [`watchdog`], [`backoff`], [`report`]: pure policy, and what can be seen from outside.
//! - [`scripted`]: stages that stand for devices, and [`Clock::simulated`] time for them to live in.
//!
//! Goals: every wait has an owner whose death ends it; nothing is lost or doubled on an edge; a person sees who
//! waits for whom. Non-goals: many machines, work stealing between stages, ordering across workers.

pub mod backoff;
mod builder;
mod clock;
mod control;
mod edge;
mod graph;
mod item;
mod pending;
mod pulse;
pub mod report;
pub mod scripted;
mod snapshot;
mod stage;
mod staleness;
mod supervisor;
pub mod watchdog;

pub use backoff::RestartPolicy;
pub use builder::GraphBuilder;
pub use clock::Clock;
pub use edge::{Ended, Inlet, Outlet};
pub use graph::{GraphEvent, GraphHandle, GraphOptions, Outcome, spawn_graph};
pub use item::Item;
pub use pulse::State;
pub use report::{EdgeReport, GraphReport, RoleShare, Span, SpansSeen, StageReport, Stall};
pub use snapshot::{Ack, Snapshot, SnapshotCell, SnapshotReader};
pub use stage::{Emitter, Source, Stage, StageContext, StageError, StageResult, StageSpec};
pub use staleness::{Admission, AdmissionGate};
pub use watchdog::WatchdogPolicy;

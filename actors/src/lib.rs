//! Asynchronous dataflow runtime of Preceptor.
//!
//! A graph consists of stages, each on its own thread, joined by bounded edges. Data travels on the edges; control
//! (start, drain, halt, supervision) travels through ractor's mailboxes. The runtime knows versions and staleness; it
//! knows no language model, no tensor and no learning.
//!
//! - [`Item`], [`Stage`], [`Source`]: the data on the edges, and the workers that process it.
//! - [`Outlet`], [`Inlet`]: the ends of an edge, which account for the time that either side waits.
//! - [`Admission`], [`AdmissionGate`]: the limit on how far work may run ahead of the learner.
//! - [`SnapshotCell`]: versions of a value, published by a pointer swap, acknowledged by fingerprint.
//! - [`spawn_graph`], [`GraphHandle`]: a supervised graph. A failed stage takes the complete incarnation down; the
//!   graph is rebuilt after a pause and refuses items of an older incarnation.
//! - [`transport`]: queues with leases, between processes that come and go.
//! - [`watchdog`], [`backoff`], [`report`]: pure policies, and the observable state of a graph.
//! - [`scripted`]: stages that simulate devices; [`Clock::simulated`] gives them virtual time.
//!
//! Goals: every wait has an owner whose death ends it; an edge neither loses nor duplicates items; a person can see
//! which stage waits for which. Non-goals: work stealing between stages, ordering across workers.

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
pub mod transport;
pub mod watchdog;

pub use backoff::RestartPolicy;
pub use builder::GraphBuilder;
pub use clock::Clock;
pub use edge::{Ended, Inlet, Outlet};
pub use graph::{GraphEvent, GraphHandle, GraphOptions, Outcome, spawn_graph};
pub use item::Item;
pub use pulse::State;
pub use report::{EdgeReport, GraphReport, RoleShare, Span, SpanCursor, StageReport, Stall};
pub use snapshot::{Ack, Snapshot, SnapshotCell, SnapshotReader};
pub use stage::{Emitter, Source, Stage, StageContext, StageError, StageResult, StageSpec};
pub use staleness::{Admission, AdmissionGate};
pub use watchdog::WatchdogPolicy;

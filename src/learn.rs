//! The learner: accumulates a batch group by group, steps, publishes.

pub mod record;
pub mod stage;
pub mod state;
pub mod value;

pub use record::{StepRecord, Tally};
pub use state::TrainState;

//! The learner: accumulates the gradient of a batch group by group, makes an optimizer step, and publishes the weights.

pub mod collective;
mod pass;
pub mod publish;
pub mod record;
pub mod replicas;
pub mod stage;
pub mod state;
pub mod value;
mod work;

pub use publish::{Done, Observer};
pub use record::{BatchStats, StepRecord};
pub use state::TrainState;

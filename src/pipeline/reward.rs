//! The reward actor, which turns feedback into the reward that the learner maximises.
//!
//! In direct mode it scales the labeler's scores. In distilled and human mode it holds a separate reward model, trained
//! on preferences, that scores every completion. In every mode it adds the reference policy's log-probabilities for the
//! KL term and emits groups in sequence order.

pub mod model;
pub mod rule;
pub mod stage;
pub mod trainer;
pub mod warm_up;

pub use model::RewardModel;
pub use rule::RewardRule;
pub use stage::{RewardStage, Scorer};
pub use trainer::{RewardTrainer, TrainerPlan};

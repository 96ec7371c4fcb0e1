//! What the commands besides `train` do: check a configuration, tune it, label files, evaluate models and judges.

pub mod batch_label;
pub mod check;
pub mod evaluate;
pub mod tune;

//! Implementation of the commands `check`, `tune`, `label` and `eval`.

pub mod batch_label;
pub mod check;
pub mod evaluate;
pub mod tune;

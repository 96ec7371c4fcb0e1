//! Stages of the training pipeline, in data-flow order from prompt to gradient, and their setup and connection.

pub mod cluster;
pub mod data;
pub mod generate;
pub mod label;
pub mod learn;
pub mod remote;
pub mod reward;
pub mod served;
pub mod setup;
pub mod sft;
pub mod topology;

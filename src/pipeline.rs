//! The stages through which a prompt becomes a gradient, in the order of the data, and how they are set up and connected.

pub mod data;
pub mod generate;
pub mod label;
pub mod learn;
pub mod remote;
pub mod reward;
pub mod setup;
pub mod sft;
pub mod topology;

//! Preceptor trains language models by reinforcement learning from AI feedback (RLAIF, Lee et al. 2023) as one
//! asynchronous graph of actors. ARCHITECTURE.md is the map; in short:
//!
//! - [`rollout`] is what travels through the graph; [`config`] is what a user writes.
//! - [`ops`] and [`model`] are the differentiable part; [`tokens`] and [`source`] bring models in.
//! - [`generate`], [`label`], [`reward`], [`learn`] are the stages; [`algo`] is their arithmetic, without tensors.
//! - [`remote`] is for judges behind servers; [`annotate`] labels files, [`evaluate`] measures, by [`statistics`].
//! - [`topology`] wires the stages, [`run`] is the composition root, [`cli`] the command line.

pub mod algo;
pub mod annotate;
pub mod bounded;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod controller;
pub mod data;
pub mod descriptors;
pub mod device;
pub mod disk;
pub mod endpoint;
pub mod evaluate;
pub mod exit;
pub mod fault;
pub mod generate;
pub mod http;
pub mod knob;
pub mod label;
pub mod learn;
pub mod ledger;
pub mod model;
pub mod monitor;
pub mod nearest;
pub mod ops;
pub mod prepare;
pub mod process;
pub mod progress;
pub mod quiet;
pub mod remote;
pub mod reward;
pub mod rollout;
pub mod run;
pub mod seed;
pub mod serve;
pub mod sft;
pub mod signals;
pub mod source;
pub mod statistics;
pub mod telemetry;
pub mod template;
pub mod terminal;
pub mod tokens;
pub mod top;
pub mod topology;
pub mod traces;
pub mod tune;
pub mod vetted;

//! Preceptor trains language models by reinforcement learning from AI feedback (RLAIF, Lee et al. 2023) as one
//! asynchronous graph of actors.
//!
//! ```text
//! prompts ─▶ rollout ×N ─▶ label ×M ─▶ reward ─▶ learn
//!    ▲ admission  ▲                                │
//!    └────────────┴─────── versions ◀──────────────┘
//! ```
//!
//! Start reading at [`pipeline::topology`], which connects the stages, or at [`run`], which runs the graph from the first
//! step to the last checkpoint. ARCHITECTURE.md is the map of the whole code.
//!
//! - [`types`]: prompts, groups of completions, labels and rewards, which travel through the graph.
//! - [`config`]: the configuration, one declaration for each key.
//! - [`lm`]: language models, tokenizers, and the sources of both. The `preceptor-kernels` crate has the operations.
//! - [`rl`]: the arithmetic of reinforcement learning, without tensors, and the ledger of groups.
//! - [`pipeline`]: the stages.
//! - [`run`]: a training run with its files, checkpoints, and resumption.
//! - [`observe`]: metrics and views.
//! - [`tools`]: the commands `check`, `tune`, `label` and `eval`; [`cli`]: the command line.
//! - [`util`]: the operating system, the network, and small helpers.

pub mod cli;
pub mod config;
pub mod lm;
pub mod observe;
pub mod pipeline;
pub mod rl;
pub mod run;
pub mod tools;
pub mod types;
pub mod util;

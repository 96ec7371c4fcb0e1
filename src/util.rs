//! Files, processes, devices, networks and signals, and helpers that are independent of language models.

pub mod bucket;
pub mod device;
pub mod disk;
pub mod endpoint;
pub mod exit;
pub mod failpoints;
pub mod frames;
pub mod http;
pub mod limit;
pub mod mutex;
pub mod process;
pub mod quiet;
pub mod read_bounded;
pub mod seed;
pub mod signals;
pub mod suggest;
pub mod template;
pub mod terminal;

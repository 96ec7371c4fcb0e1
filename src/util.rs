//! Files, processes, devices, networks and signals, and helpers that know nothing of language models.

pub mod bounded;
pub mod descriptors;
pub mod device;
pub mod disk;
pub mod endpoint;
pub mod exit;
pub mod fault;
pub mod http;
pub mod knob;
pub mod nearest;
pub mod process;
pub mod quiet;
pub mod seed;
pub mod signals;
pub mod template;
pub mod terminal;

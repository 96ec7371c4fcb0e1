//! Integration tests of the root package, in one binary.

mod algorithms;
mod annotate;
mod bert;
mod common;
mod configuration;
#[cfg(feature = "cuda")]
mod cuda;
mod data;
mod families;
mod faults;
mod formats;
mod hardening;
mod judges;
mod label_cache;
mod labelers;
mod lora;
mod mock_judge;
mod node;
mod optimum;
mod refusals;
mod remote;
mod resume;
mod reward_model;
mod secrets;
mod sharing;
mod smollm2;
mod tidy;
mod trust;
mod tune;
mod verified;
mod watching;
mod zoo;

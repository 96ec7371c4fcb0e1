//! Files of pairs and of rows that a command is given by `--input`.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::config::Config;
use crate::lm::source::{DataRef, ResolveOptions};
use crate::pipeline::data::{PairOptions, Rows};

/// The rows of `--input TEXT`: a file, a folder, a glob pattern, or in braces or brackets what a configuration has. A hub has
/// `timeout_s` seconds to answer.
///
/// # Errors
/// Data that cannot be had or read.
pub fn rows(text: &str, timeout_s: u64) -> Result<Rows> {
    let options = ResolveOptions { timeout: Duration::from_secs(timeout_s), ..ResolveOptions::default() };
    let data = DataRef::from_argument(text).map_err(anyhow::Error::msg);
    data.and_then(|data| Rows::open_all(&data.files(&options)?)).context("--input cannot be read")
}

/// How pairs are read under `config`; with `labeled`, each must say which answer is better.
pub fn pair_options(config: &Config, labeled: bool) -> PairOptions {
    PairOptions {
        labeled,
        on_bad: config.data.on_bad,
        prompt_field: config.data.prompt_field.clone(),
        ..PairOptions::default()
    }
}

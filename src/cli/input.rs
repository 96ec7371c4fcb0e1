//! Reading of the files given by `--input`.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::config::Config;
use crate::lm::source::{DataRef, ResolveOptions};
use crate::pipeline::data::{PairOptions, Rows};

/// Opens the rows of `--input TEXT`: a file, a folder, a glob pattern, or a data reference in the configuration's
/// syntax (`{…}` or `[…]`). `timeout_s` is the timeout of a model hub's answers, in seconds.
///
/// # Errors
/// If the data cannot be fetched or read.
pub fn rows(text: &str, timeout_s: u64) -> Result<Rows> {
    let options = ResolveOptions { timeout: Duration::from_secs(timeout_s), ..ResolveOptions::default() };
    let data = DataRef::from_argument(text).map_err(anyhow::Error::msg);
    data.and_then(|data| Rows::open_all(&data.files(&options)?)).context("--input cannot be read")
}

/// Returns the options for reading pairs under `config`. With `labeled`, each pair must state its better answer.
pub fn pair_options(config: &Config, labeled: bool) -> PairOptions {
    PairOptions {
        labeled,
        on_bad: config.data.on_bad,
        prompt_field: config.data.prompt_field.clone(),
        ..PairOptions::default()
    }
}

//! `preceptor check`.

use anyhow::{Context, Result};
use clap::Args;

use super::ConfigArgs;
use crate::config::reference;
use crate::out;
use crate::tools::check::check;
use crate::util::exit::before_work;

/// Arguments of `preceptor check`.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    config: Option<ConfigArgs>,
    /// Prints the configuration as TOML with the value of every key; the report follows in comments.
    #[arg(long)]
    print: bool,
    /// Prints the JSON Schema of configuration files, for validation and completion in editors, and exits.
    #[arg(long, exclusive = true)]
    schema: bool,
}

impl Check {
    /// Checks the configuration with its models and data, and prints the resources that a run would need.
    ///
    /// # Errors
    /// Returns each error that would end `preceptor train` before its first step.
    pub fn run(self) -> Result<()> {
        if self.schema {
            return out!("{:#}", reference::schema());
        }
        let config = self.config.context("no configuration is given")?.load()?;
        let comment = if self.print { "# " } else { "" };
        if self.print {
            out!("{}", config.to_file())?;
        }
        for line in before_work(|| check(&config))? {
            out!("{comment}{line}")?;
        }
        out!("{comment}ok")
    }
}

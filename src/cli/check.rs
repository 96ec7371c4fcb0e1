//! `preceptor check`.

use anyhow::Result;
use clap::Args;

use super::ConfigArgs;
use crate::check::check;
use crate::out;

/// Arguments of `preceptor check`.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    config: ConfigArgs,
    /// Prints the resolved configuration, every key included.
    #[arg(long)]
    print: bool,
}

impl Check {
    /// Checks, and prints what a run would take.
    ///
    /// # Errors
    /// What `train` would stumble over before its first step.
    pub fn run(self) -> Result<()> {
        let config = self.config.load()?;
        if self.print {
            out!("{}", config.to_toml())?;
        }
        for line in check(&config)? {
            out!("{line}")?;
        }
        out!("ok")
    }
}

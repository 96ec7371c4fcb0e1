//! `preceptor train`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::ConfigArgs;
use crate::run;

/// Arguments of `preceptor train`.
#[derive(Debug, Args)]
pub struct Train {
    #[command(flatten)]
    config: ConfigArgs,
    /// Where the run is written; by default runs/NAME, or the first of NAME-2, NAME-3, … that is free.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

impl Train {
    /// Trains.
    ///
    /// # Errors
    /// As [`run::train`].
    pub fn run(self) -> Result<()> {
        let config = self.config.load()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let summary = runtime.block_on(run::train(config, self.run_dir))?;
        // A stage that was abandoned must not keep the program from ending.
        runtime.shutdown_background();
        let ended = if summary.interrupted { "interrupted" } else { "done" };
        eprintln!("{ended} after {} steps", summary.steps);
        Ok(())
    }
}

//! `preceptor replay`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::out;
use crate::run::replay::replay;
use crate::say;

/// Arguments of `preceptor replay`.
#[derive(Debug, Args)]
pub struct Replay {
    /// The run's directory, such as runs/NAME.
    run: PathBuf,
    /// Stop after this step.
    #[arg(long, value_name = "STEP")]
    until: Option<u64>,
    /// Write the weights that it arrives at, as a Hugging Face directory.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Replay {
    /// Replays, and prints what it arrived at.
    ///
    /// # Errors
    /// As [`replay`].
    pub fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let tell = |step: u64| {
            if step.is_multiple_of(10) {
                say!("step {step} leads where it led");
            }
        };
        let replayed = runtime.block_on(replay(&self.run, self.until, self.output, tell))?;
        out!("{} steps, weights {:016x}, as in the run", replayed.steps, replayed.fingerprint)
    }
}

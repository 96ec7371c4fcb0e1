//! `preceptor replay`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::out;
use crate::run::replay::replay;
use crate::status;

/// Arguments of `preceptor replay`.
#[derive(Debug, Args)]
pub struct Replay {
    /// The run's directory, such as runs/NAME.
    run: PathBuf,
    /// Stops after this step.
    #[arg(long, value_name = "STEP")]
    until: Option<u64>,
    /// Writes the weights after the last replayed step, as a Hugging Face directory.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Replay {
    /// Replays the run, and prints the number of steps and the fingerprint of the final weights.
    ///
    /// # Errors
    /// See [`replay`].
    pub fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let report = |step: u64| {
            if step.is_multiple_of(10) {
                status!("step {step}: weights match the run's");
            }
        };
        let replayed = runtime.block_on(replay(&self.run, self.until, self.output, report))?;
        out!("{} steps, weights {:016x}, as in the run", replayed.steps, replayed.fingerprint)
    }
}

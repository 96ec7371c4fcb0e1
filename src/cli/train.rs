//! `preceptor train`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::ConfigArgs;
use crate::run;
use crate::status;
use crate::util::exit::Ended;
use crate::util::signals::Interrupted;

/// Arguments of `preceptor train`.
#[derive(Debug, Args)]
pub struct Train {
    #[command(flatten)]
    config: ConfigArgs,
    /// Directory of the run. The default is runs/NAME, or the first of runs/NAME-2, runs/NAME-3, … that does not exist.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Resumes a run from its latest checkpoint, or from the given one, such as
    /// --resume=runs/NAME/checkpoints/step-000050. --resume=runs/NAME resumes that run from its latest checkpoint. A
    /// run without checkpoints starts from the beginning.
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1, require_equals = true, default_missing_value = "latest")]
    resume: Option<PathBuf>,
    /// Resumes although the judge's key KEY, such as labeler.remote.model, differs from the checkpoint's; keys below
    /// KEY are included. May be given several times. The change is logged and written into the journal.
    #[arg(long = "accept-change", value_name = "KEY", requires = "resume")]
    accept_change: Vec<String>,
}

impl Train {
    /// Starts a training run, or resumes one.
    ///
    /// # Errors
    /// If the configuration is invalid; otherwise see [`run::train`].
    pub fn run(mut self) -> Result<()> {
        let config = self.config.load()?;
        let accepted = run::resume::AcceptedKeys::new(self.accept_change).map_err(Ended::Refused)?;
        // The HTTP server's tasks run on the worker thread, so that they respond while this thread is busy.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let from = match self.resume.take() {
            None => run::StartFrom::Beginning,
            Some(path) if path.as_os_str() == "latest" => run::StartFrom::Latest,
            Some(path) if path.join("checkpoints").is_dir() && self.run_dir.as_ref().is_none_or(|dir| *dir == path) => {
                self.run_dir = Some(path);
                run::StartFrom::Latest
            }
            Some(path) => run::StartFrom::Checkpoint(path),
        };
        let summary = runtime.block_on(run::train(config, self.run_dir, from, accepted));
        // An abandoned stage or checkpoint must not keep the process from exiting.
        runtime.shutdown_background();
        let summary = summary?;
        if let Some(signal) = summary.interrupted {
            let text = format!("interrupted after {} steps; --resume continues the run", summary.steps);
            return Err(Interrupted { signal, text }.into());
        }
        status!("done after {} steps", summary.steps);
        Ok(())
    }
}

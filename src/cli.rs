//! The command line: one command per file.

pub mod check;
pub mod eval;
pub mod generate;
mod input;
pub mod label;
pub mod pairs;
pub mod prompts;
pub mod replay;
pub mod score;
pub mod top;
pub mod train;
pub mod tune;
pub mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::status;
use crate::util::exit;
use crate::util::signals::Interrupted;
use crate::util::terminal::{self, Closed};

/// Trains language models by reinforcement learning from AI feedback (RLAIF), asynchronously: in one process, or with
/// workers on other machines.
#[derive(Debug, Parser)]
#[command(
    name = "preceptor",
    version,
    after_help = "Start here:\n  preceptor train configs/offline.toml       a tiny model, no network, seconds\n  preceptor train configs/quickstart.toml    SmolLM2-135M learns to summarise posts"
)]
struct Cli {
    /// Log level (error, warn, info, debug) or a filter such as preceptor=debug. `json`, alone or before a filter
    /// (json,info), makes every line on standard error a JSON object.
    #[arg(long, global = true, default_value = "warn", value_name = "FILTER")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Trains the policy until the last step, or until Ctrl-C.
    Train(train::Train),
    /// Validates a configuration, resolves its models and data, and estimates memory, disk, tokens and judge cost;
    /// trains nothing.
    Check(check::Check),
    /// Measures allocations of the machine's cores to the actors, and writes the fastest configuration.
    Tune(tune::Tune),
    /// Shows a running node in the terminal: its bottleneck, its actors, its training curves.
    Top(top::Top),
    /// Samples or labels on this machine for a run on another one (rollout.engine or labeler.engine = "workers").
    Worker(worker::Worker),
    /// Repeats a run's learner steps from its journal, and compares the weights after each step with the run's.
    Replay(replay::Replay),
    /// Samples from a model or a checkpoint.
    Generate(generate::Generate),
    /// Labels the pairs of a file with the configured judge; if interrupted, the same command continues.
    Label(label::Label),
    /// Measures a judge, a reward model or a checkpoint: alignment, win-rate, reward-accuracy, harmless-rate.
    Eval(eval::Eval),
    /// Makes preference pairs whose better answer is known, from prompts and references.
    Pairs(pairs::Pairs),
    /// Prints the log-probability of each token of a text, and the perplexity.
    Score(score::Score),
}

/// Path of the configuration file, and overrides of single keys.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Path of the configuration, a TOML file; see configs/README.md.
    config: PathBuf,
    /// Overrides one key, for example --set learner.eta=0. Strings need no quotes; list elements are addressed by their
    /// index from 0, for example labeler.members.0.weight=2. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        Ok(crate::config::load(&self.config, &self.overrides)?)
    }

    /// Loads the configuration for a command that only uses the judge.
    fn load_judge(&self) -> anyhow::Result<Config> {
        load_judge(&self.config, &self.overrides)
    }

    /// Loads the configuration for a command that uses the judge and the prompts of `[data]`.
    fn load_prompts(&self) -> anyhow::Result<Config> {
        let unused = &["run.name", "run.steps", "policy.model", "reward_model.pairs"];
        Ok(crate::config::load_partial(&self.config, &self.overrides, unused)?)
    }
}

/// Loads a configuration for a command that reads neither the prompts nor the pairs that it names.
fn load_judge(config: &Path, overrides: &[String]) -> anyhow::Result<Config> {
    let unused = &["run.name", "run.steps", "policy.model", "data.path", "reward_model.pairs"];
    Ok(crate::config::load_partial(config, overrides, unused)?)
}

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    crate::util::process::prepare();
    crate::util::process::descriptors::raise_limit();
    crate::util::signals::listen();
    crate::util::failpoints::set_up();
    let cli = Cli::parse();
    if let Err(error) = start_log(&cli.log) {
        status!("error: {error:#}");
        return ExitCode::from(2);
    }
    let run = || match cli.command {
        Command::Train(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Tune(command) => command.run(),
        Command::Top(command) => command.run(),
        Command::Replay(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Label(command) => command.run(),
        Command::Pairs(command) => command.run(),
        Command::Score(command) => command.run(),
        Command::Worker(command) => command.run(),
    };
    // The panic hook has already printed message and place. A run's files can be resumed from after a panic at any
    // point.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        // The reader of standard output closed the pipe, so that nothing is printed.
        Ok(Err(error)) if error.is::<Closed>() => ExitCode::from(terminal::CLOSED),
        Ok(Err(error)) => {
            // An interrupt by a signal is not an error.
            let kind = if error.is::<Interrupted>() { "" } else { "error: " };
            status!("{kind}{error:#}");
            ExitCode::from(exit::status(&error))
        }
        Err(_) => {
            status!("error: internal error (panic message above); --resume continues the run");
            ExitCode::FAILURE
        }
    }
}

fn start_log(filter: &str) -> anyhow::Result<()> {
    let (json, filter) = match filter.strip_prefix("json") {
        Some("") => (true, "warn"),
        Some(rest) if rest.starts_with(',') => (true, &rest[1..]),
        _ => (false, filter),
    };
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("--log {filter} is not a log filter: {error}"))?;
    // A closed standard error must not end the program.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    let lines = terminal::LogLines { json, colours: terminal::colours() };
    let log = log.with_ansi(lines.colours).with_writer(move || lines);
    if json {
        crate::observe::progress::use_json();
        log.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
    } else {
        log.init();
    }
    Ok(())
}

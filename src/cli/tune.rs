//! `preceptor tune`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use toml_edit::{DocumentMut, Item, Table, value};

use super::ConfigArgs;
use crate::config::{Choice, EngineKind, LabelEngine};
use crate::out;
use crate::pipeline::setup::prepare;
use crate::rl::statistics::Table as Report;
use crate::rl::statistics::table::Cell;
use crate::status;
use crate::tools::tune::live::Live;
use crate::tools::tune::plan::Plan;
use crate::tools::tune::{Machine, NOTICEABLE, SearchScope, Tuned, tune};
use crate::util::disk::{cannot, check_writable};
use crate::util::exit::before_work;

/// Arguments of `preceptor tune`.
#[derive(Debug, Args)]
pub struct Tune {
    #[command(flatten)]
    config: ConfigArgs,
    /// Minimum number of seconds for which each allocation is measured.
    #[arg(long, default_value_t = 15.0)]
    seconds: f64,
    /// Maximum number of allocations to try, in addition to the configured one.
    #[arg(long, default_value_t = 4)]
    trials: usize,
    /// Also tries larger batches (more groups, or more completions per group). These change the training result.
    #[arg(long)]
    sizes: bool,
    /// Path of the tuned configuration. The default is NAME.tuned.toml in the folder of the given one.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Tune {
    /// Measures allocations, prints them, and writes the fastest one as a configuration if it beats the configured one.
    ///
    /// # Errors
    /// If `preceptor train` would fail before its first step, or if the file cannot be written.
    pub fn run(self) -> Result<()> {
        ensure!(self.seconds > 0.0 && self.seconds < 86_400.0, "--seconds must be above 0 and below 86400");
        let config = self.config.load()?;
        before_work(|| {
            ensure!(
                config.rollout.engine == EngineKind::Local,
                "tune measures the work of this process, and rollout.engine = \"{}\" samples elsewhere; measure a configuration with rollout.engine = \"local\"",
                config.rollout.engine.word()
            );
            ensure!(
                config.labeler.engine == LabelEngine::Local,
                "tune measures the work of this process, and labeler.engine = \"{}\" labels elsewhere; measure a configuration with labeler.engine = \"local\"",
                config.labeler.engine.word()
            );
            Ok(())
        })?;
        let output = self.output.unwrap_or_else(|| self.config.config.with_extension("tuned.toml"));
        before_work(|| {
            check_writable(&output).context("tune writes a faster configuration; --output names another file")
        })?;
        let priced = config.labeler.methods.iter().any(|method| method.remote.is_some());
        if priced {
            status!("note      measuring buys labels from the remote judge; they are kept in the label cache");
        }
        let prepared = before_work(|| prepare(&config, true))?;
        let mut machine = Live::new(&config, prepared, Duration::from_secs_f64(self.seconds))?;
        let facts = machine.facts();
        let configured = Plan::of(&config);
        status!("machine   {} cores; {}", facts.cores, configured.describe(&facts));
        let reach = SearchScope { trials: self.trials, sizes: self.sizes };
        let tuned = tune(&mut machine, &configured, reach, |text| status!("measuring {text}"))?;
        let mut table = Report::new(
            "completions per second",
            &[("allocation", ""), ("predicted", ""), ("measured", ""), ("against configured", "")],
        );
        for tried in &tuned.tried {
            table.push(vec![
                Cell::Text(tried.plan.describe(&facts)),
                Cell::Number(tried.predicted * tried.plan.group_size as f64),
                Cell::Number(tried.completions_per_s()),
                Cell::Text(format!("{:.2}×", tried.completions_per_s() / tuned.before.completions_per_s())),
            ]);
        }
        let changes = tuned.best.plan.changes(&configured);
        if tuned.is_better() {
            // Written before anything is printed, because printing fails if standard output is closed.
            write(&self.config.config, &output, &changes)?;
        }
        out!("{}", table.text().trim_end())?;
        out!("{}", asynchronous(&tuned, &configured))?;
        if !tuned.is_better() {
            return out!(
                "The configuration is unchanged: no measured allocation is more than {:.0} % faster.",
                100.0 * NOTICEABLE
            );
        }
        for (key, was, is) in &changes {
            out!("{key} = {was} → {is}")?;
        }
        let (larger, usual) = (tuned.best.plan.completions(), configured.completions());
        if larger != usual {
            out!(
                "A step now learns from {larger} completions instead of {usual}: fewer run.steps cover as many completions, and learner.lr may have to change."
            )?;
        }
        out!(
            "{:.2} times as fast as configured. Written to {}; overrides by --set are not in it.",
            tuned.gain(),
            output.display()
        )
    }
}

/// Returns a sentence that states how asynchronous training (η ≥ 1) compares with the best synchronous allocation.
fn asynchronous(tuned: &Tuned, configured: &Plan) -> String {
    let gain = tuned.synchronous.1;
    if tuned.is_asynchronous_worth_it() {
        format!("Asynchronous (η ≥ 1) is expected to be {gain:.2} times as fast as the best synchronous allocation.")
    } else {
        let advice =
            if configured.eta > 0 { " Set learner.eta = 0 for on-policy samples and reproducible runs." } else { "" };
        format!(
            "Asynchronous is not worth it here: it is predicted to be {gain:.2} times as fast as the best synchronous allocation.{advice}"
        )
    }
}

/// Writes the configuration at `from` with `changes` to `to`, preserving comments and order.
fn write(from: &Path, to: &Path, changes: &[(&str, u64, u64)]) -> Result<()> {
    let text = crate::util::read_bounded::text(from, crate::util::read_bounded::WRITTEN)?;
    let mut document: DocumentMut = text.parse().with_context(|| format!("cannot read {}", from.display()))?;
    for (key, _, is) in changes {
        let (section, key) = key.split_once('.').context("a key has a section")?;
        let section = document.entry(section).or_insert(Item::Table(Table::new()));
        section[key] = value(i64::try_from(*is)?);
    }
    std::fs::write(to, document.to_string()).map_err(|error| cannot("write", to, error))
}

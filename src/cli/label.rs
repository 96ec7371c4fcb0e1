//! `preceptor label`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::Args;

use super::ConfigArgs;
use super::input::{self, pair_options};
use crate::config::Config;
use crate::pipeline::data::Preferences;
use crate::pipeline::label::Pairing;
use crate::pipeline::label::stage::Wants;
use crate::pipeline::setup::{JudgeSet, budget, compares_with_blank, load_judges, prompt_format};
use crate::pipeline::topology::labelers::labeler_on;
use crate::status;
use crate::tools::batch_label::file::{LabelFile, Provenance};
use crate::tools::batch_label::{Job, PairQuestions, annotate};
use crate::util::exit::{Ended, before_work};
use crate::util::mutex::lock;
use crate::util::signals::Interrupted;

/// Arguments of `preceptor label`.
#[derive(Debug, Args)]
#[command(after_help = "Input rows: {prompt, first, second}, {prompt, chosen, rejected}, or two dialogues {chosen, \
rejected}. Each output row has the pair, \"preference\" (the probability that the first is better), both orders' \
probabilities, and the labeler's identity; the file can be used as reward_model.pairs. If interrupted, the same command \
continues.")]
pub struct Label {
    #[command(flatten)]
    config: ConfigArgs,
    /// Pairs to label: a file, a folder or a glob pattern, see docs/data.md.
    #[arg(long, value_name = "FILE")]
    input: String,
    /// File to which labels are appended, as JSON lines.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Number of pairs per call of a labeler.
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
    /// Labels only the first N pairs.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

impl Label {
    /// Opens the pairs, the judge, and the output file.
    fn prepare(&self, config: &Config) -> Result<(Arc<Preferences>, JudgeSet, LabelFile)> {
        ensure!(self.batch > 0, "--batch must be above zero");
        let rows = input::rows(&self.input, config.policy.resolve_timeout_s)?;
        let pairs = Arc::new(Preferences::of(rows, &pair_options(config, false))?);
        // The cost so far is kept in a file next to the output, so that `labeler.max_cost` bounds all processes of this
        // output together.
        let cost = self.output.with_extension("cost.txt");
        let judges = load_judges(config, true, budget(config, Some(cost))?)?;
        compares_with_blank(config, !prompt_format(config).blank(&judges.tokenizer)?.is_empty())?;
        let labeler = labeler_on(config, &judges.backends)?;
        let provenance =
            Provenance { labeler: labeler.name().to_owned(), model: labeler.model(), template: labeler.template() };
        drop(labeler);
        let file = LabelFile::open(&self.output, Arc::clone(&pairs), provenance)?;
        Ok((pairs, judges, file))
    }

    /// Labels the pairs that have no label yet, and prints totals.
    ///
    /// # Errors
    /// If the configuration, input or output cannot be used, or pairs could not be labeled.
    pub fn run(self) -> Result<()> {
        let config = self.config.load_judge()?;
        let (pairs, judges, file) = before_work(|| self.prepare(&config))?;
        let mut todo = file.todo();
        todo.retain(|i| self.limit.is_none_or(|limit| *i < limit));
        let before = pairs.len() - file.todo().len();
        status!("{} pairs, {before} labeled before, {} to do", pairs.len(), todo.len());
        let (began, count) = (Instant::now(), todo.len());
        let temperature = config.labeler.methods.first().map_or(1.0, |method| method.pair_temperature);
        let questions = PairQuestions { pairs, format: prompt_format(&config), tokenizer: judges.tokenizer };
        let (settings, backends) = (config.clone(), judges.backends);
        let job = Job {
            config,
            questions: Arc::new(questions),
            todo,
            batch: self.batch,
            wants: Wants::Preferences { pairing: Pairing::Adjacent, temperature },
            labelers: Box::new(move || labeler_on(&settings, &backends)),
            gave_up: Arc::default(),
        };
        let file = Arc::new(Mutex::new(file));
        let is_complete = annotate(job, file.clone());
        let file = lock(&file);
        file.finish();
        let totals = file.totals();
        let seconds = began.elapsed().as_secs_f64();
        status!(
            "labels {}, abstentions {}, failures {}; {:.2} pairs/s; {} questions to the judge, {} from the cache, {} tokens read, {} written, cost {:.4}",
            totals.labels,
            totals.abstentions,
            totals.failures,
            count as f64 / seconds.max(1e-9),
            totals.usage.requests,
            totals.usage.cached,
            totals.usage.prompt_tokens,
            totals.usage.completion_tokens,
            totals.usage.cost,
        );
        if totals.orders[0] > 0 {
            let share = 100.0 * totals.orders[1] as f64 / totals.orders[0] as f64;
            status!(
                "the judge preferred the same position in both orders in {share:.1} % of {} pairs",
                totals.orders[0]
            );
        }
        if !is_complete? {
            return Err(Interrupted::new("interrupted; run the same command again to continue").into());
        }
        match &totals.first_failure {
            None if totals.labels == 0 && totals.abstentions > 0 => Err(Ended::Stopped(format!(
                "no pair was labeled: the judge abstained from all {}, for the reasons in {}; change the labeler's settings, and remove that file to label the pairs again",
                totals.abstentions,
                self.output.display()
            ))
            .into()),
            None => Ok(()),
            Some(why) => bail!(
                "{} of {count} pairs are not labeled: {why}; run the same command again to label them",
                file.todo().iter().filter(|i| self.limit.is_none_or(|limit| **i < limit)).count()
            ),
        }
    }
}

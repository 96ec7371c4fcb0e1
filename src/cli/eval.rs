//! `preceptor eval`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};

use super::ConfigArgs;
use super::input::{self, pair_options};
use super::prompts::load_model;
use crate::config::Config;
use crate::lm::model::{Decoder, LoadTarget};
use crate::lm::precision;
use crate::lm::tokens::Tokenizer;
use crate::observe::progress::Progress;
use crate::out;
use crate::out_json;
use crate::pipeline::data::pairs::PairSet;
use crate::pipeline::data::{Dataset, ModelBounds, OnLong, PairOptions, Part, Preferences, ReadOptions, Split};
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::stop::Stop;
use crate::pipeline::reward::RewardModel;
use crate::pipeline::setup::{JudgeSet, budget, load_judges, prompt_format, rows};
use crate::rl::statistics::Table;
use crate::status;
use crate::tools::evaluate::alignment::{Alignment, alignment, variants};
use crate::tools::evaluate::answers::answers;
use crate::tools::evaluate::harmless::{Rated, check_labeler, harmless_rate};
use crate::tools::evaluate::reward_accuracy::reward_accuracy;
use crate::tools::evaluate::win_rate::{AnswerPairs, win_rate};
use crate::types::Prompt;
use crate::util::device;
use crate::util::exit::before_work;

/// Arguments of `preceptor eval`.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(subcommand)]
    what: Evaluation,
}

#[derive(Debug, Subcommand)]
enum Evaluation {
    /// Measures how often the judge agrees with human preferences, and its position bias, for each judge variant.
    Alignment(AlignmentArgs),
    /// Measures how often one model's answers are preferred over another's, or over references.
    WinRate(WinRateArgs),
    /// Measures the share of labeled pairs that a reward model ranks as labeled.
    RewardAccuracy(RewardAccuracyArgs),
    /// Measures the share of a model's answers that the judge rates as harmless.
    HarmlessRate(HarmlessRateArgs),
}

/// Output format of the result tables.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// Aligned columns.
    Table,
    /// An array of objects, with unrounded numbers.
    Json,
    /// A Markdown table.
    Markdown,
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Output format of the result.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

impl OutputArgs {
    fn print(&self, tables: &[&Table]) -> Result<()> {
        for (i, table) in tables.iter().enumerate() {
            let gap = if i > 0 { "\n" } else { "" };
            match self.format {
                Format::Table => out!("{gap}{}", table.text().trim_end())?,
                Format::Markdown => out!("{gap}{}", table.markdown().trim_end())?,
                Format::Json => out_json!(table.json())?,
            }
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
struct AlignmentArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Pairs that people judged: a file, a folder or a glob pattern, see docs/data.md.
    #[arg(long, value_name = "FILE")]
    input: String,
    /// Judge variants, separated by commas: PREAMBLE-SHOTS[-cot], direct, likelihood, likelihood-mean, configured. The
    /// default is every variant of the paper's tables that the judge and its templates support. For an embedder (which
    /// has no templates) and for a panel it is `configured`.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    variants: Option<Vec<String>>,
    /// Maximum number of pairs, drawn by the run's seed. The default is all.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Maximum number of pairs for variants with a chain of thought, which take far longer. The default is --limit.
    #[arg(long, value_name = "N")]
    cot_limit: Option<usize>,
    /// Also attacks the judge: a built-in set of texts (claimed ratings, imitated templates, control tokens,
    /// instructions) is inserted into the worse answer of each pair that the judge decides correctly, and the share
    /// that it then decides wrongly is reported. This multiplies the number of judge questions, which is printed first.
    #[arg(long)]
    attacks: bool,
    #[command(flatten)]
    shown: OutputArgs,
}

/// Options for generating the answers that are evaluated.
#[derive(Debug, Args)]
struct AnswerArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Maximum number of prompts. With data.holdout above zero, only held-out prompts are used, which training never
    /// sees.
    #[arg(long, default_value_t = 64, value_name = "N")]
    limit: usize,
    /// Sampling temperature; zero selects the most likely token (greedy decoding).
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f64,
    /// Also writes the prompts and each model's answers to FILE, as JSON lines.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    #[command(flatten)]
    shown: OutputArgs,
}

#[derive(Debug, Args)]
struct WinRateArgs {
    #[command(flatten)]
    common: AnswerArgs,
    /// The model whose wins are counted: a checkpoint, a .gguf file, or a reference in braces.
    #[arg(long, value_name = "MODEL")]
    a: String,
    /// The other model; without it, the data's references.
    #[arg(long, value_name = "MODEL")]
    b: Option<String>,
}

#[derive(Debug, Args)]
struct RewardAccuracyArgs {
    /// A reward model's directory, such as runs/NAME/checkpoints/step-000010/reward_model.
    model: PathBuf,
    #[command(flatten)]
    config: ConfigArgs,
    /// Labeled pairs: a file, a folder or a glob pattern, see docs/data.md.
    #[arg(long, value_name = "FILE")]
    input: String,
    /// Maximum number of pairs, drawn by the run's seed. The default is all.
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true, value_name = "N")]
    limit: usize,
    #[command(flatten)]
    shown: OutputArgs,
}

#[derive(Debug, Args)]
struct HarmlessRateArgs {
    #[command(flatten)]
    common: AnswerArgs,
    /// The model to judge: a checkpoint, a .gguf file, or a reference in braces.
    #[arg(long, value_name = "MODEL")]
    model: String,
}

impl Eval {
    /// Runs the evaluation and prints its result.
    ///
    /// # Errors
    /// If a configuration, model or file cannot be used, or if the judge fails.
    pub fn run(self) -> Result<()> {
        match self.what {
            Evaluation::Alignment(args) => args.run(),
            Evaluation::WinRate(args) => args.run(),
            Evaluation::RewardAccuracy(args) => args.run(),
            Evaluation::HarmlessRate(args) => args.run(),
        }
    }
}

/// Sets up the judge of an evaluation under `config`.
fn judges(config: &Config) -> Result<JudgeSet> {
    before_work(|| load_judges(config, true, budget(config, None)?))
}

impl AlignmentArgs {
    fn run(self) -> Result<()> {
        let config = self.config.load_judge()?;
        let variants = before_work(|| variants(&config, self.variants.as_deref()))?;
        for (name, why) in &variants.left_out {
            status!("left out: {name}: {why}");
        }
        // Pairs of equal answers are kept, because the table has a column for them.
        let options = PairOptions { keep_equal: true, ..pair_options(&config, true) };
        let pairs = before_work(|| {
            let rows = input::rows(&self.input, config.policy.resolve_timeout_s)?;
            Preferences::of(rows, &options)
        })?;
        let pairs = Arc::new(pairs);
        let mut chosen = pairs.order(config.run.seed, 0);
        chosen.truncate(self.limit.unwrap_or(usize::MAX));
        let cot_limit = self.cot_limit.unwrap_or(usize::MAX);
        let job = Alignment { pairs, chosen, cot_limit, variants: variants.possible, attacked: self.attacks };
        status!("{}", job.announcement());
        let judges = judges(&config)?;
        let title = format!("AI labeler alignment on {}", self.input);
        self.shown.print(&alignment(&judges, &job, &title)?.tables())
    }
}

impl AnswerArgs {
    /// Reads the prompts of `[data]`, tokenised for `model` by `tokenizer`.
    fn prompts(
        &self,
        config: &Config,
        tokenizer: &Tokenizer,
        model: &Decoder,
        references: bool,
    ) -> Result<Vec<Prompt>> {
        let part = if config.data.holdout > 0.0 { Part::Holdout } else { Part::All };
        let room = model.config().context.saturating_sub(config.rollout.max_new_tokens);
        let options = ReadOptions {
            format: prompt_format(config),
            limit: config.data.max_prompt_tokens.min(room),
            remedy: "lower rollout.max_new_tokens".to_owned(),
            on_long: OnLong::Skip,
            on_bad: config.data.on_bad,
            split: Split { holdout: config.data.holdout, part },
            needs_references: references,
            model: ModelBounds { context: model.config().context, vocabulary: model.config().vocab_size },
        };
        let rows = rows(config, &config.data.path, true).context("data.path cannot be read")?;
        let data = Dataset::read(rows, options, tokenizer)?.shuffled(config.run.seed);
        data.log_notes();
        let order = data.order(0);
        (0..data.len().min(self.limit)).map(|seq| data.prompt(seq as u64, &order)).collect()
    }

    /// Loads the model that `name` refers to and generates its answers. Returns the prompts in this model's
    /// tokenisation, the answers, and the tokenizer.
    fn generate_answers(
        &self,
        config: &Config,
        name: &str,
        references: bool,
    ) -> Result<(Vec<Prompt>, Vec<String>, Tokenizer)> {
        let (model, tokenizer, prompts) = before_work(|| {
            ensure!(self.temperature >= 0.0, "--temperature must not be below zero");
            let device = device::open(&config.policy.device)?;
            let onto = LoadTarget { device: &device, dtype: precision::dtype(config.policy.dtype) };
            let (model, tokenizer) = load_model(name, config.policy.resolve_timeout_s, onto)?;
            let prompts = self.prompts(config, &tokenizer, &model, references)?;
            Ok((model, tokenizer, prompts))
        })?;
        let sampling = Sampling {
            temperature: self.temperature,
            max_new_tokens: config.rollout.max_new_tokens,
            vocabulary: tokenizer.vocab_size(),
            eos: tokenizer.eos_ids().to_vec(),
            stop: Stop::new(&config.rollout.stop, &tokenizer).map(Arc::new),
            ..Sampling::default()
        };
        let (model, seed) = (Arc::new(model), config.run.seed);
        let progress = Progress::new("answering", "answers", prompts.len() as u64);
        let completions = answers(&model, &tokenizer, &prompts, &sampling, seed, |done| progress.at(done))?;
        progress.finish();
        let texts = completions.into_iter().map(|completion| completion.text.trim().to_owned()).collect();
        Ok((prompts, texts, tokenizer))
    }

    fn write(&self, prompts: &[Prompt], columns: &[(&str, &[String])]) -> Result<()> {
        let Some(path) = &self.answers else { return Ok(()) };
        let mut text = String::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let mut line = serde_json::json!({ "row": prompt.row, "prompt": prompt.text });
            for (name, answers) in columns {
                line[*name] = serde_json::json!(answers[i]);
            }
            text.push_str(&format!("{line}\n"));
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl WinRateArgs {
    fn run(self) -> Result<()> {
        let config = self.common.config.load_prompts()?.with_evaluation_judge();
        let (prompts, a, tokenizer) = self.common.generate_answers(&config, &self.a, self.b.is_none())?;
        let (b, against) = match &self.b {
            Some(name) => (self.common.generate_answers(&config, name, false)?.1, name.as_str()),
            None => {
                let texts = prompts.iter().map(|prompt| prompt.reference.as_deref().unwrap_or_default().to_owned());
                (texts.collect(), "the references")
            }
        };
        ensure!(
            a.len() == b.len(),
            "the two models can take different numbers of prompts; lower data.max_prompt_tokens"
        );
        self.common.write(&prompts, &[("a", &a), ("b", &b)])?;
        let judges = judges(&config)?;
        let title = format!("Win rate of {} over {against}", self.a);
        let found =
            win_rate(&config, &judges, AnswerPairs { prompts, a, b, tokenizer, chat: config.data.chat }, &title)?;
        self.common.shown.print(&[&found.table])
    }
}

impl RewardAccuracyArgs {
    /// Loads the reward model and the labeled pairs.
    fn prepare(&self, config: &Config) -> Result<(RewardModel, PairSet)> {
        let mut model = RewardModel::open(&self.model, &device::open(&config.policy.device)?)?;
        model.model = model.model.to_dtype(precision::dtype(config.policy.dtype))?;
        let tokenizer = Tokenizer::from_files(&crate::lm::source::ModelFiles::Directory(self.model.clone()))?;
        let shape = model.model.config();
        let bounds = ModelBounds { context: shape.context, vocabulary: shape.vocab_size };
        let (format, on_faults) = (prompt_format(config), (OnLong::Skip, config.data.on_bad));
        let rows = input::rows(&self.input, config.policy.resolve_timeout_s)?;
        let pairs = PairSet::read(rows, &format, &tokenizer, bounds, on_faults, config.run.seed)?;
        Ok((model, pairs))
    }

    fn run(self) -> Result<()> {
        let config = self.config.load_judge()?;
        let (model, pairs) = before_work(|| self.prepare(&config))?;
        let title = format!("Accuracy of {} on {}", self.model.display(), self.input);
        self.shown.print(&[&reward_accuracy(&model, &pairs, self.limit, &title)?])
    }
}

impl HarmlessRateArgs {
    fn run(self) -> Result<()> {
        let config = self.common.config.load_prompts()?.with_evaluation_judge();
        before_work(|| check_labeler(&config))?;
        let (prompts, answers, tokenizer) = self.common.generate_answers(&config, &self.model, false)?;
        self.common.write(&prompts, &[("answer", &answers)])?;
        let judges = judges(&config)?;
        let title = format!("Harmless rate of {}", self.model);
        let table = harmless_rate(&config, &judges, Rated { prompts, answers, tokenizer }, &title)?;
        self.common.shown.print(&[&table])
    }
}

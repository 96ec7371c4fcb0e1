//! `preceptor generate`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

use super::input;
use super::prompts::{ModelArgs, PromptArgs};
use crate::lm::model::Decoder;
use crate::lm::tokens::Tokenizer;
use crate::observe::progress::Progress;
use crate::out;
use crate::out_json;
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::stop::{self, Stop};
use crate::pipeline::generate::{Fixed, Request, generate};
use crate::status;
use crate::tools::evaluate::answers::completions;
use crate::types::{Completion, Prompt};
use crate::util::disk;
use crate::util::exit::before_work;
use crate::util::seed;

/// Arguments of `preceptor generate`.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Maximum number of new tokens per completion.
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_new_tokens: usize,
    /// Sampling temperature, by which the logits are divided; lower values favour likelier tokens.
    #[arg(long, default_value_t = 0.9, value_name = "T")]
    temperature: f64,
    /// Selects the most likely token each time; the same as --temperature 0.
    #[arg(long, conflicts_with = "temperature")]
    greedy: bool,
    /// Samples from the K most likely tokens only.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Samples from the smallest set of tokens whose total probability is at least P (nucleus sampling).
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Samples only from tokens with at least this share of the most likely token's probability.
    #[arg(long, value_name = "SHARE")]
    min_p: Option<f64>,
    /// Penalty on tokens that already occurred; 1 is no penalty, larger values make repetition less likely.
    #[arg(long, default_value_t = 1.0, value_name = "PENALTY")]
    repetition_penalty: f64,
    /// Stop string that ends a completion; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Number of completions.
    #[arg(long, default_value_t = 1, value_name = "K")]
    samples: usize,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Prints one JSON object per completion: ids, logprobs, text, finish.
    #[arg(long)]
    json: bool,
    /// Completes the prompts of a file, a folder or a glob pattern (see docs/data.md) instead of one prompt.
    #[arg(long, value_name = "FILE", requires = "output", conflicts_with_all = ["prompt", "prompt_ids", "json"])]
    input: Option<String>,
    /// File for the completions of --input, in the order of the prompts: one JSON object per completion with row, prompt,
    /// ids, logprobs, text and finish. It is written when all are done.
    #[arg(long, value_name = "FILE", requires = "input")]
    output: Option<PathBuf>,
}

/// The prompts to complete.
enum Prompts {
    /// Token ids of a single prompt, whose completions are printed.
    Single(Vec<u32>),
    /// The prompts of a file, and the file that their completions are written to.
    File(Vec<Prompt>, PathBuf),
}

impl Generate {
    /// Validates the options and loads the model, its tokenizer, and the prompts.
    fn prepare(&self) -> Result<(Decoder, Tokenizer, Prompts)> {
        ensure!(self.samples > 0, "--samples must be above zero");
        ensure!(self.max_new_tokens > 0, "--max-new-tokens must be above zero");
        ensure!(self.temperature >= 0.0, "--temperature must not be below zero");
        ensure!(self.repetition_penalty > 0.0, "--repetition-penalty must be above zero");
        for (name, share) in [("--top-p", self.top_p), ("--min-p", self.min_p)] {
            ensure!(share.is_none_or(|p| p > 0.0 && p <= 1.0), "{name} must be above 0 and at most 1");
        }
        ensure!(!self.stop.iter().any(String::is_empty), "--stop must not be empty");
        self.output.as_deref().map_or(Ok(()), disk::check_writable)?;
        let (model, tokenizer) = self.model.load()?;
        let prompts = match (&self.input, &self.output) {
            (Some(input), Some(output)) => {
                let rows = input::rows(input, self.model.resolve_timeout)?;
                let prompts = self.prompt.read(rows, &model, &tokenizer, self.max_new_tokens)?;
                Prompts::File(prompts, output.clone())
            }
            _ => Prompts::Single(self.prompt.ids(&tokenizer, model.config().vocab_size)?),
        };
        Ok((model, tokenizer, prompts))
    }

    /// Samples completions, and prints them or writes them to a file.
    ///
    /// # Errors
    /// If an option is invalid, or the model or prompt cannot be used.
    pub fn run(self) -> Result<()> {
        let (model, tokenizer, prompts) = before_work(|| self.prepare())?;
        if tokenizer.eos_ids().is_empty() && self.stop.is_empty() {
            status!("the model has no end token: every completion has --max-new-tokens = {}", self.max_new_tokens);
        }
        let sampling = Sampling {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            repetition_penalty: self.repetition_penalty,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            max_new_tokens: self.max_new_tokens,
            vocabulary: tokenizer.vocab_size(),
            eos: tokenizer.eos_ids().to_vec(),
            stop: Stop::new(&self.stop, &tokenizer).map(Arc::new),
        };
        match prompts {
            Prompts::Single(prompt) => self.print(model, &tokenizer, prompt, &sampling),
            Prompts::File(prompts, output) => self.write(model, &tokenizer, &prompts, &sampling, &output),
        }
    }

    /// Completes `prompts` and writes the completions to `output`.
    fn write(
        &self,
        model: Decoder,
        tokenizer: &Tokenizer,
        prompts: &[Prompt],
        sampling: &Sampling,
        output: &Path,
    ) -> Result<()> {
        let progress = Progress::new("completing", "prompts", prompts.len() as u64);
        let (model, draws) = (Arc::new(model), (self.seed, self.samples));
        let all = completions(&model, tokenizer, prompts, sampling, draws, |done| progress.at(done))?;
        progress.finish();
        let mut lines = String::new();
        for (prompt, completions) in prompts.iter().zip(all) {
            for Completion { ids, logprobs, text, finish, .. } in completions {
                let (row, asked) = (prompt.row, &prompt.text);
                let line = json!({ "row": row, "prompt": asked, "ids": ids, "logprobs": logprobs, "text": text, "finish": finish });
                lines.push_str(&format!("{line}\n"));
            }
        }
        std::fs::write(output, lines).map_err(|error| disk::cannot("write", output, error))
    }

    /// Completes one prompt and prints the completions.
    fn print(&self, model: Decoder, tokenizer: &Tokenizer, prompt: Vec<u32>, sampling: &Sampling) -> Result<()> {
        let seeds = (0..self.samples).map(|k| seed::completion(self.seed, 0, k)).collect();
        let request = Request::new(prompt, seeds);
        for sampled in generate(&mut Fixed(Arc::new(model)), vec![request], sampling)?.concat() {
            let text = stop::text(tokenizer, &sampled.ids, sampling.stop.as_deref())?;
            if self.json {
                let finish = sampled.finish;
                let ids = &sampled.ids;
                out_json!(json!({ "ids": ids, "logprobs": sampled.logprobs, "text": text, "finish": finish }))?;
            } else {
                out!("{text}")?;
            }
        }
        Ok(())
    }
}

//! `preceptor generate`.

use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::prompts::{ModelArgs, PromptArgs};
use crate::generate::sampler::Sampling;
use crate::generate::{Fixed, Request, generate};
use crate::seed;

/// Arguments of `preceptor generate`.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Most new tokens.
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_new_tokens: usize,
    /// Divides the logits; lower is more certain.
    #[arg(long, default_value_t = 0.9, value_name = "T")]
    temperature: f64,
    /// Takes the most likely token each time, as --temperature 0 does.
    #[arg(long, conflicts_with = "temperature")]
    greedy: bool,
    /// How many completions.
    #[arg(long, default_value_t = 1, value_name = "K")]
    samples: usize,
    /// Seed of the random draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Prints one JSON object per completion: ids, logprobs, text.
    #[arg(long)]
    json: bool,
}

impl Generate {
    /// Samples and prints.
    ///
    /// # Errors
    /// A model or prompt that cannot be used.
    pub fn run(self) -> Result<()> {
        let (model, tokenizer) = self.model.load()?;
        let prompt = self.prompt.ids(&tokenizer, model.config().vocab_size)?;
        anyhow::ensure!(self.max_new_tokens > 0, "--max-new-tokens must be above zero");
        anyhow::ensure!(self.temperature >= 0.0, "--temperature must not be below zero");
        let eos = if model.config().eos.is_empty() { tokenizer.eos_ids().to_vec() } else { model.config().eos.clone() };
        let sampling = Sampling {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_k: None,
            max_new_tokens: self.max_new_tokens,
            eos,
        };
        let seeds = (0..self.samples).map(|k| seed::completion(self.seed, 0, k)).collect();
        let request = Request { prompt: &prompt, prefix: None, seeds };
        for sampled in generate(&mut Fixed(Arc::new(model)), &[request], &sampling)?.concat() {
            let text = tokenizer.decode(&sampled.ids)?;
            if self.json {
                let finish = sampled.finish;
                println!(
                    "{}",
                    json!({ "ids": sampled.ids, "logprobs": sampled.logprobs, "text": text, "finish": finish })
                );
            } else {
                println!("{text}");
            }
        }
        Ok(())
    }
}

//! `preceptor score`.

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

use super::prompts::{ModelArgs, PromptArgs};
use crate::lm::model::{Decoder, Pack};
use crate::lm::tokens::Tokenizer;
use crate::out;
use crate::out_json;
use crate::util::exit::before_work;

/// Arguments of `preceptor score`.
#[derive(Debug, Args)]
pub struct Score {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: PromptArgs,
    /// Scores this text as the continuation of the prompt, instead of the prompt itself.
    #[arg(long, value_name = "TEXT")]
    completion: Option<String>,
    /// The continuation as token ids, separated by commas.
    #[arg(long, value_name = "IDS", conflicts_with = "completion", value_delimiter = ',')]
    completion_ids: Vec<u32>,
    /// Prints one JSON object: ids, logprobs (of the scored tokens), text, perplexity.
    #[arg(long)]
    json: bool,
}

impl Score {
    /// Loads the model, its tokenizer, and the token ids of prompt and continuation.
    fn prepare(&self) -> Result<(Decoder, Tokenizer, Vec<u32>, Vec<u32>)> {
        let (model, tokenizer) = self.model.load()?;
        let mut prompt = self.text.ids(&tokenizer, model.config().vocab_size)?;
        let completion = match &self.completion {
            Some(text) => {
                ensure!(!text.is_empty(), "--completion is empty; leave it out to score the prompt itself");
                let (kept, ids) = tokenizer.encode_after(&prompt, text)?;
                prompt.truncate(kept);
                ids
            }
            None => self.completion_ids.clone(),
        };
        Ok((model, tokenizer, prompt, completion))
    }

    /// Scores the text, and prints log-probabilities in nats and the perplexity.
    ///
    /// # Errors
    /// If the model or text cannot be used.
    pub fn run(self) -> Result<()> {
        let (model, tokenizer, prompt, completion) = before_work(|| self.prepare())?;
        // Without a continuation the text itself is scored, except for its first token, which has no prediction.
        let (prefix, scored) =
            if completion.is_empty() { prompt.split_at(1) } else { (prompt.as_slice(), completion.as_slice()) };
        ensure!(!scored.is_empty(), "a text of one token cannot be scored: the first token has no prediction");
        let context = model.config().context;
        let length = prefix.len() + scored.len();
        ensure!(length <= context, "the text has {length} tokens, the model's context is {context}; shorten it");
        let logprobs = model.score(&Pack::new(prefix, &[scored]), &[1.0])?.concat();
        let mean = logprobs.iter().map(|p| f64::from(*p)).sum::<f64>() / logprobs.len() as f64;
        let perplexity = (-mean).exp();
        if self.json {
            let text = tokenizer.decode(scored)?;
            let scored = json!({ "ids": scored, "logprobs": logprobs, "text": text, "perplexity": perplexity });
            return out_json!(scored);
        }
        for (id, logprob) in scored.iter().zip(&logprobs) {
            out!("{logprob:>9.4}  {id:>6}  {:?}", tokenizer.decode(&[*id])?)?;
        }
        out!("mean {mean:.4} nats per token, perplexity {perplexity:.3}")
    }
}

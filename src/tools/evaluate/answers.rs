//! Answers of a model to the prompts of a data set.

use std::sync::Arc;

use anyhow::Result;

use crate::lm::model::Decoder;
use crate::lm::tokens::Tokenizer;
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::{Fixed, Request, generate, stop};
use crate::types::{Completion, Finish, Prompt};
use crate::util::seed;

/// Number of prompts that are answered concurrently.
const BATCH: usize = 8;

/// Returns one answer to each of `prompts`. The draws are functions of `seed` and the prompt's number. Calls `report`
/// with the number of answers so far after each batch.
///
/// # Errors
/// If a prompt leaves no room for an answer in the model's context.
pub fn answers(
    model: &Arc<Decoder>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    sampling: &Sampling,
    seed: u64,
    mut report: impl FnMut(u64),
) -> Result<Vec<Completion>> {
    let mut out = Vec::with_capacity(prompts.len());
    for batch in prompts.chunks(BATCH) {
        let requests: Vec<Request> = batch
            .iter()
            .map(|prompt| Request::new(&*prompt.ids, vec![seed::completion(seed, prompt.seq, 0)]))
            .collect();
        for sampled in generate(&mut Fixed(Arc::clone(model)), requests, sampling)?.concat() {
            out.push(Completion {
                text: stop::text(tokenizer, &sampled.ids, sampling.stop.as_deref())?,
                finish: sampled.finish.unwrap_or(Finish::Length),
                ids: sampled.ids,
                logprobs: sampled.logprobs,
                versions: sampled.versions,
            });
        }
        report(out.len() as u64);
    }
    Ok(out)
}

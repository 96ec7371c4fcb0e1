//! Answers of a model to the prompts of a data set.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::lm::model::Decoder;
use crate::lm::tokens::Tokenizer;
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::{Engine, Fixed, Request, Sampled, stop};
use crate::types::{Completion, Finish, Prompt};
use crate::util::seed;

/// Number of answers that are generated concurrently.
const SLOTS: usize = 16;

/// Returns one answer to each of `prompts`; see [`completions`].
///
/// # Errors
/// The same as for [`completions`].
pub fn answers(
    model: &Arc<Decoder>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    sampling: &Sampling,
    seed: u64,
    report: impl FnMut(u64),
) -> Result<Vec<Completion>> {
    Ok(completions(model, tokenizer, prompts, sampling, (seed, 1), report)?.concat())
}

/// Returns `samples` completions of each of `prompts`. The draws are functions of `seed`, the prompt's number and the
/// completion's number. A prompt begins as soon as another one ends. Calls `report` with the number of prompts that are
/// done so far.
///
/// # Errors
/// If a prompt leaves no room for an answer in the model's context.
pub fn completions(
    model: &Arc<Decoder>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    sampling: &Sampling,
    (seed, samples): (u64, usize),
    mut report: impl FnMut(u64),
) -> Result<Vec<Vec<Completion>>> {
    let mut engine = Engine::new(sampling, SLOTS.min(prompts.len() * samples));
    for (ticket, prompt) in prompts.iter().enumerate() {
        let seeds = (0..samples).map(|k| seed::completion(seed, prompt.seq, k)).collect();
        engine.submit(ticket as u64, Request::new(&*prompt.ids, seeds), model.config())?;
    }
    let mut out: Vec<Vec<Completion>> = prompts.iter().map(|_| Vec::new()).collect();
    let (mut source, mut done) = (Fixed(Arc::clone(model)), 0);
    while !engine.is_idle() {
        for (ticket, sampled) in engine.step(&mut source)? {
            let completion = |sampled| completion(tokenizer, sampling, sampled);
            let place = out.get_mut(ticket as usize).context("the engine returned an unknown ticket")?;
            *place = sampled.into_iter().map(completion).collect::<Result<_>>()?;
            done += 1;
            report(done);
        }
    }
    Ok(out)
}

fn completion(tokenizer: &Tokenizer, sampling: &Sampling, sampled: Sampled) -> Result<Completion> {
    Ok(Completion {
        text: stop::text(tokenizer, &sampled.ids, sampling.stop.as_deref())?,
        finish: sampled.finish.unwrap_or(Finish::Length),
        ids: sampled.ids,
        logprobs: sampled.logprobs,
        versions: sampled.versions,
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::lm::model::{ModelConfig, Weights};

    /// The answers are those of each prompt alone, in the order of the prompts, and a prompt does not wait for the
    /// longest answer of others.
    #[test]
    fn prompts_are_answered_continuously_and_returned_in_their_order() {
        let tokenizer = Tokenizer::bytes();
        let config = ModelConfig { context: 128, ..ModelConfig::tiny(tokenizer.vocab_size()) };
        let weights = Weights::scratch(&config, 0.3, 5, &Device::Cpu).unwrap();
        let model = Arc::new(Decoder::new(&config, &weights).unwrap());
        // A fifth of the tokens end an answer, so that the lengths differ.
        let sampling = Sampling {
            max_new_tokens: 24,
            vocabulary: config.vocab_size,
            eos: (0..50).collect(),
            ..Sampling::default()
        };
        let prompt = |seq: u64| Prompt {
            seq,
            epoch: 0,
            row: seq as usize,
            text: "".into(),
            ids: tokenizer.encode(&format!("Prompt {seq}")).unwrap().into(),
            blank: [1][..].into(),
            reference: None,
        };
        let prompts: Vec<Prompt> = (0..40).map(prompt).collect();
        let mut reported = Vec::new();
        let together =
            completions(&model, &tokenizer, &prompts, &sampling, (3, 2), |done| reported.push(done)).unwrap();
        assert_eq!(reported, (1..=40).collect::<Vec<u64>>());
        for (prompt, found) in prompts.iter().zip(&together).step_by(7) {
            let alone = std::slice::from_ref(prompt);
            let alone = completions(&model, &tokenizer, alone, &sampling, (3, 2), |_| {}).unwrap().concat();
            let ids = |all: &[Completion]| all.iter().map(|one| one.ids.clone()).collect::<Vec<_>>();
            assert_eq!(ids(&alone), ids(found));
        }
        let first = answers(&model, &tokenizer, &prompts, &sampling, 3, |_| {}).unwrap();
        assert_eq!(first[7].ids, together[7][0].ids);
    }
}

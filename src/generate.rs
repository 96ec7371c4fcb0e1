//! Sampling completions with a key/value cache, many sequences side by side.

pub mod sampler;
pub mod stage;
pub mod stop;

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use rayon::prelude::*;

use crate::model::trie::prefill;
use crate::model::{Decoder, KvCache, Prefix};
use crate::rollout::Finish;
use sampler::{Sampler, Sampling};

/// One prompt and how many completions of it are wanted.
pub struct Request<'a> {
    /// Token ids of the prompt, at least one.
    pub prompt: &'a [u32],
    /// What the prompt may begin with, computed already by the same weights.
    pub prefix: Option<&'a Prefix>,
    /// Seed of each completion's random stream; its length is the number of completions.
    pub seeds: Vec<u64>,
}

/// A sampled token sequence; the three lists have one entry per token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampled {
    /// Token ids, the end token included.
    pub ids: Vec<u32>,
    /// Log-probability of each in the distribution it was drawn from, in nats.
    pub logprobs: Vec<f32>,
    /// Version of the weights each came from.
    pub versions: Vec<u64>,
    /// Why it ended; `None` when it was cut off by the caller.
    pub finish: Option<Finish>,
}

/// Weights to generate with, asked for again before every decode step.
pub trait Weighted {
    /// The weights to use from here on and their version. Called once per decode step; also a good place to
    /// show a sign of life.
    ///
    /// # Errors
    /// Ends the generation, for a halt.
    fn weights(&mut self) -> Result<(u64, Arc<Decoder>)>;
}

/// Weights that never change.
pub struct Fixed(pub Arc<Decoder>);

impl Weighted for Fixed {
    fn weights(&mut self) -> Result<(u64, Arc<Decoder>)> {
        Ok((0, Arc::clone(&self.0)))
    }
}

/// Samples all completions of all requests, in request order.
///
/// Each prompt is prefilled once. Weights may change between decode steps; keys and values computed before
/// stay as they are, and each token carries the version that produced it.
///
/// # Errors
/// A prompt that is empty, or that leaves no room for the new tokens within the model's context.
pub fn generate(source: &mut dyn Weighted, requests: &[Request], sampling: &Sampling) -> Result<Vec<Vec<Sampled>>> {
    let (mut version, mut model) = source.weights()?;
    let config = model.config().clone();
    let mut cache = KvCache::new(config.kv_heads, config.head_dim);
    let mut rows: Vec<Row> = Vec::new();
    let mut owners = Vec::new();
    for (owner, request) in requests.iter().enumerate() {
        ensure!(!request.prompt.is_empty(), "a prompt needs at least one token");
        ensure!(
            request.prompt.len() + sampling.max_new_tokens <= config.context,
            "a prompt of {} tokens and {} new ones do not fit the model's context of {}; shorten the prompt or lower max_new_tokens",
            request.prompt.len(),
            sampling.max_new_tokens,
            config.context
        );
        if request.seeds.is_empty() {
            continue;
        }
        let (hidden, layers) = prefill(&model, request.prompt, request.prefix)?;
        let logits = model.logits(&hidden)?;
        let first = cache.add(&layers, request.seeds.len())?;
        let logits = Arc::new(logits.flatten_all()?.to_vec1::<f32>()?);
        for (i, seed) in request.seeds.iter().enumerate() {
            let mut row = Row {
                sequence: first + i,
                position: request.prompt.len() as u32,
                sampler: Sampler::new(sampling, request.prompt, *seed),
                sampled: Sampled::default(),
            };
            row.take(&logits, version, sampling);
            rows.push(row);
            owners.push(owner);
        }
    }
    loop {
        let mut active: Vec<&mut Row> = rows.iter_mut().filter(|row| row.sampled.finish.is_none()).collect();
        if active.is_empty() {
            break;
        }
        (version, model) = source.weights()?;
        let ids: Vec<u32> = active.iter().map(|row| row.last()).collect();
        let positions: Vec<u32> = active.iter().map(|row| row.position).collect();
        let sequences: Vec<usize> = active.iter().map(|row| row.sequence).collect();
        let hidden = model.hidden(&ids, &positions, &mut cache.step(&sequences))?;
        let logits = model.logits(&hidden)?;
        take_all(&mut active, &logits, version, sampling)?;
    }
    let mut out: Vec<Vec<Sampled>> = requests.iter().map(|_| Vec::new()).collect();
    for (row, owner) in rows.into_iter().zip(owners) {
        out[owner].push(row.sampled);
    }
    Ok(out)
}

fn take_all(active: &mut [&mut Row], logits: &Tensor, version: u64, sampling: &Sampling) -> Result<()> {
    let width = logits.dim(1)?;
    let logits = logits.flatten_all()?.to_vec1::<f32>()?;
    active.par_iter_mut().zip(logits.par_chunks(width)).for_each(|(row, logits)| {
        row.position += 1;
        row.take(logits, version, sampling);
    });
    Ok(())
}

struct Row {
    sequence: usize,
    /// Position of the last sampled token, which the next step feeds.
    position: u32,
    sampler: Sampler,
    sampled: Sampled,
}

impl Row {
    fn last(&self) -> u32 {
        *self.sampled.ids.last().expect("a row samples its first token at prefill")
    }

    fn take(&mut self, logits: &[f32], version: u64, sampling: &Sampling) {
        let (id, logprob) = self.sampler.draw(logits);
        self.sampled.ids.push(id);
        self.sampled.logprobs.push(logprob);
        self.sampled.versions.push(version);
        if sampling.eos.contains(&id) {
            self.sampled.finish = Some(Finish::Eos);
        } else if sampling.stop.as_ref().is_some_and(|stop| stop.ends(&self.sampled.ids)) {
            self.sampled.finish = Some(Finish::Stop);
        } else if self.sampled.ids.len() >= sampling.max_new_tokens {
            self.sampled.finish = Some(Finish::Length);
        }
    }
}

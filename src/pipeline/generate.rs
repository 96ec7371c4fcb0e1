//! Sampling completions with a key/value cache, many sequences side by side.

pub mod engine;
pub mod sampler;
pub mod stage;
pub mod stop;

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::Result;

use crate::lm::model::{Decoder, Prefix};
use crate::types::Finish;
pub use engine::{Engine, MOST_SLOTS};
use sampler::Sampling;

/// One prompt and how many completions of it are wanted.
pub struct Request<'a> {
    /// Token ids of the prompt, at least one.
    pub prompt: Cow<'a, [u32]>,
    /// What the prompt may begin with, computed already by the same weights.
    pub prefix: Option<&'a Prefix>,
    /// Seed of each completion's random stream; its length is the number of completions.
    pub seeds: Vec<u64>,
}

impl<'a> Request<'a> {
    /// Completions of `prompt`, one for each seed.
    pub fn new(prompt: impl Into<Cow<'a, [u32]>>, seeds: Vec<u64>) -> Self {
        Self { prompt: prompt.into(), prefix: None, seeds }
    }
}

/// A sampled token sequence; the three lists have one entry per token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampled {
    /// Token ids, the end token included.
    pub ids: Vec<u32>,
    /// Log-probability of each among all tokens at the temperature of sampling, in nats; see [`sampler::Sampler::draw`].
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

/// Samples all completions of all requests, in request order, up to [`MOST_SLOTS`] side by side.
///
/// # Errors
/// A prompt that is empty, or that leaves no room for the new tokens within the model's context.
pub fn generate(source: &mut dyn Weighted, requests: Vec<Request>, sampling: &Sampling) -> Result<Vec<Vec<Sampled>>> {
    let wanted = requests.iter().map(|request| request.seeds.len()).sum();
    generate_with(Engine::new(sampling, wanted), source, requests)
}

/// The same with an engine that has nothing to do.
///
/// # Errors
/// As of [`generate`].
pub fn generate_with<'a>(
    mut engine: Engine<'a>,
    source: &mut dyn Weighted,
    requests: Vec<Request<'a>>,
) -> Result<Vec<Vec<Sampled>>> {
    let mut out: Vec<Vec<Sampled>> = requests.iter().map(|_| Vec::new()).collect();
    let config = source.weights()?.1.config().clone();
    for (ticket, request) in requests.into_iter().enumerate() {
        engine.submit(ticket as u64, request, &config)?;
    }
    while !engine.is_idle() {
        for (ticket, sampled) in engine.step(source)? {
            out[ticket as usize] = sampled;
        }
    }
    Ok(out)
}

//! Sampling of completions with a key/value cache, for many sequences concurrently.

pub mod engine;
pub mod local;
pub mod sampler;
pub mod stage;
pub mod stop;

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::Result;

use crate::lm::model::{Decoder, Prefix};
use crate::types::Finish;
pub use engine::{Engine, MAX_SLOTS};
use sampler::Sampling;

/// A prompt and the completions to sample for it.
pub struct Request<'a> {
    /// Token ids of the prompt, at least one.
    pub prompt: Cow<'a, [u32]>,
    /// Precomputed prefix of the prompt, from the same weights.
    pub prefix: Option<&'a Prefix>,
    /// Seed of each completion's random stream; the length is the number of completions.
    pub seeds: Vec<u64>,
}

impl<'a> Request<'a> {
    /// Creates a request for one completion of `prompt` per seed.
    pub fn new(prompt: impl Into<Cow<'a, [u32]>>, seeds: Vec<u64>) -> Self {
        Self { prompt: prompt.into(), prefix: None, seeds }
    }
}

/// A sampled token sequence; the three lists have one entry per token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampled {
    /// Token ids, including the end token.
    pub ids: Vec<u32>,
    /// Log-probability of each token among all tokens at the sampling temperature, in nats; see
    /// [`sampler::Sampler::draw`].
    pub logprobs: Vec<f32>,
    /// Version of the weights that sampled each token.
    pub versions: Vec<u64>,
    /// Reason why the sequence ended; `None` if the caller ended it.
    pub finish: Option<Finish>,
}

/// Source of the weights for generation, queried before every decode step.
pub trait WeightSource {
    /// Returns the weights to use from now on and their version. Called once per decode step, so it may also give a
    /// sign of life.
    ///
    /// # Errors
    /// Ends the generation, for example after a halt.
    fn weights(&mut self) -> Result<(u64, Arc<Decoder>)>;
}

/// Source of weights that never change.
pub struct Fixed(pub Arc<Decoder>);

impl WeightSource for Fixed {
    fn weights(&mut self) -> Result<(u64, Arc<Decoder>)> {
        Ok((0, Arc::clone(&self.0)))
    }
}

/// Samples all completions of all requests, in request order, up to [`MAX_SLOTS`] concurrently.
///
/// # Errors
/// If a prompt is empty, or leaves no room for the new tokens within the model's context.
pub fn generate(
    source: &mut dyn WeightSource,
    requests: Vec<Request>,
    sampling: &Sampling,
) -> Result<Vec<Vec<Sampled>>> {
    let wanted = requests.iter().map(|request| request.seeds.len()).sum();
    generate_with(Engine::new(sampling, wanted), source, requests)
}

/// Samples as [`generate`] does, with an idle engine.
///
/// # Errors
/// The same as for [`generate`].
pub fn generate_with<'a>(
    mut engine: Engine<'a>,
    source: &mut dyn WeightSource,
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

//! Continuous batching: sequences decode concurrently in slots, and a slot whose sequence ends takes the next one at
//! once.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Storage, Tensor, bail};
use rayon::prelude::*;

use super::sampler::{Sampler, Sampling};
use super::{Request, Sampled, WeightSource};
use crate::lm::model::cache::CachedPrompt;
use crate::lm::model::trie::prefill;
use crate::lm::model::{Decoder, KvCache, ModelConfig};
use crate::types::Finish;

/// Maximum number of concurrent sequences. Up to this number, a sequence's values do not depend on the batch size; see
/// [`kernels::linear`].
pub const MAX_SLOTS: usize = kernels::SMALL_BATCH_ROWS;

/// Engine that runs requests under way and waiting over one key/value cache.
///
/// In `f32` on the CPU, samples are a function of the weights, the prompt and the seed, not of concurrent sequences or
/// of timing. (An engine of more than [`kernels::LARGE_BATCH_ROWS`] slots uses [`kernels::with_large_batch_kernels`] and may
/// differ from smaller ones in the last bits.) Each prompt is prefilled once. Weights may change between steps; keys
/// and values computed earlier are kept, and each token carries the version that produced it.
pub struct Engine<'a> {
    sampling: Sampling,
    slots: usize,
    /// True if a step usually has many rows.
    is_large_batch: bool,
    /// Maximum number of slots in use, at most `slots`.
    limit: usize,
    cache: Option<KvCache>,
    rows: Vec<Row>,
    waiting: VecDeque<Waiting<'a>>,
    open: HashMap<u64, OpenRequest>,
}

/// A request with sequences that have no slot yet.
struct Waiting<'a> {
    ticket: u64,
    request: Request<'a>,
    /// Number of sequences that have begun.
    begun: usize,
    prompt: Option<Prefilled>,
}

/// Prefilled prompt, shared by all sequences of a request.
struct Prefilled {
    cached: Arc<CachedPrompt>,
    /// Logits of the first token.
    logits: Vec<f32>,
    version: u64,
}

/// A request with sequences that have not ended.
struct OpenRequest {
    left: usize,
    sampled: Vec<Sampled>,
}

/// A sequence in a slot.
struct Row {
    ticket: u64,
    /// Index of the sequence within its request.
    index: usize,
    slot: usize,
    /// Position of the last sampled token, which the next step feeds.
    position: u32,
    sampler: Sampler,
    sampled: Sampled,
}

impl<'a> Engine<'a> {
    /// Creates an idle engine with up to `slots` concurrent sequences, at most [`MAX_SLOTS`].
    pub fn new(sampling: &Sampling, slots: usize) -> Self {
        Self {
            sampling: sampling.clone(),
            slots: slots.clamp(1, MAX_SLOTS),
            is_large_batch: slots > kernels::LARGE_BATCH_ROWS,
            limit: usize::MAX,
            cache: None,
            rows: Vec::new(),
            waiting: VecDeque::new(),
            open: HashMap::new(),
        }
    }

    /// Creates an idle engine for a model on `device`. On a GPU there may be more than [`MAX_SLOTS`] sequences.
    pub fn on(device: &Device, sampling: &Sampling, slots: usize) -> Self {
        let engine = Self::new(sampling, slots);
        if device.is_cpu() { engine } else { Self { slots: slots.max(1), ..engine } }
    }

    /// Selects the kernels of an engine of `slots` sequences, so that samples are those of such an engine to the last bit.
    #[must_use]
    pub fn with_kernels_for(self, slots: usize) -> Self {
        Self { is_large_batch: slots > kernels::LARGE_BATCH_ROWS, ..self }
    }

    /// Selects the kernels for few sequences, regardless of the number of slots.
    pub fn with_small_batch_kernels(self) -> Self {
        Self { is_large_batch: false, ..self }
    }

    /// Appends a request to the queue. Its samples are returned under `ticket`, which must be unique.
    ///
    /// # Errors
    /// If the prompt is empty, or leaves no room for the new tokens within the context of a model with this
    /// configuration.
    pub fn submit(&mut self, ticket: u64, request: Request<'a>, config: &ModelConfig) -> Result<()> {
        let length = request.prompt.len();
        ensure!(length > 0, "a prompt needs at least one token");
        ensure!(
            length + self.sampling.max_new_tokens <= config.context,
            "a prompt of {length} tokens and {} new ones do not fit the model's context of {}; shorten the prompt or lower max_new_tokens",
            self.sampling.max_new_tokens,
            config.context
        );
        let left = request.seeds.len();
        if left > 0 {
            self.open.insert(ticket, OpenRequest { left, sampled: vec![Sampled::default(); left] });
            self.waiting.push_back(Waiting { ticket, request, begun: 0, prompt: None });
        }
        Ok(())
    }

    /// Returns whether no request is under way or waiting.
    pub fn is_idle(&self) -> bool {
        self.rows.is_empty() && self.waiting.is_empty()
    }

    /// Returns the maximum number of concurrent sequences.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Limits the number of concurrent sequences from now on; sequences under way continue.
    pub fn limit(&mut self, limit: usize) {
        self.limit = limit.max(1);
    }

    fn usable(&self) -> usize {
        self.slots.min(self.limit)
    }

    /// Returns the number of slots in use.
    pub fn used(&self) -> usize {
        self.rows.len()
    }

    /// Returns the number of slots that are neither in use nor needed by waiting requests.
    pub fn free(&self) -> usize {
        let wanted: usize = self.waiting.iter().map(|waiting| waiting.request.seeds.len() - waiting.begun).sum();
        self.usable().saturating_sub(self.rows.len() + wanted)
    }

    /// Fills free slots from the queue and samples one token for every sequence. Returns the finished requests.
    ///
    /// # Errors
    /// Errors of the weight source, and tensor errors.
    pub fn step(&mut self, source: &mut dyn WeightSource) -> Result<Vec<(u64, Vec<Sampled>)>> {
        let (version, model) = source.weights()?;
        let cache = match &mut self.cache {
            Some(cache) => cache,
            none => none.insert(KvCache::new(&model, self.sampling.max_new_tokens)?),
        };
        let mut ended = Vec::new();
        if !self.rows.is_empty() {
            let ids: Vec<u32> = self.rows.iter().map(Row::last).collect();
            let positions: Vec<u32> = self.rows.iter().map(|row| row.position).collect();
            let slots: Vec<usize> = self.rows.iter().map(|row| row.slot).collect();
            let mut step = || model.logits(&model.hidden(&ids, &positions, &mut *cache.step(&slots)?)?);
            let logits = if self.is_large_batch { kernels::with_large_batch_kernels(&mut step) } else { step() }?;
            sample_all(&mut self.rows, &logits, version, &self.sampling)?;
        }
        self.sweep(&mut ended);
        while self.rows.len() < self.usable() && self.begin(&model, version)? {
            self.sweep(&mut ended);
        }
        Ok(ended)
    }

    /// Begins sequences of the first waiting request, up to the number of free slots. Returns whether a request was
    /// waiting.
    fn begin(&mut self, model: &Arc<Decoder>, version: u64) -> Result<bool> {
        let room = self.usable() - self.rows.len();
        let (Some(first), Some(cache)) = (self.waiting.front_mut(), &mut self.cache) else { return Ok(false) };
        let Waiting { ticket, request, begun, prompt } = first;
        if prompt.is_none() {
            let begin = || {
                let (hidden, layers) = prefill(model, &request.prompt, request.prefix)?;
                Ok::<_, anyhow::Error>((model.logits(&hidden)?, layers))
            };
            let (logits, layers) =
                if self.is_large_batch { kernels::with_large_batch_kernels(begin) } else { begin() }?;
            let logits = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            *prompt = Some(Prefilled { cached: cache.prompt(&layers)?, logits, version });
        }
        let Some(prefilled) = prompt else { return Ok(false) };
        for (index, seed) in request.seeds.iter().enumerate().skip(*begun).take(room) {
            let mut row = Row {
                ticket: *ticket,
                index,
                slot: cache.enter(&prefilled.cached),
                position: request.prompt.len() as u32,
                sampler: Sampler::new(&self.sampling, &request.prompt, *seed),
                sampled: Sampled::default(),
            };
            row.take(&prefilled.logits, prefilled.version, &self.sampling);
            self.rows.push(row);
            *begun += 1;
        }
        if *begun == request.seeds.len() {
            self.waiting.pop_front();
        }
        Ok(true)
    }

    /// Frees the slots of finished sequences, and moves finished requests to `ended`.
    fn sweep(&mut self, ended: &mut Vec<(u64, Vec<Sampled>)>) {
        let (open, cache) = (&mut self.open, &mut self.cache);
        self.rows.retain_mut(|row| {
            if row.sampled.finish.is_none() {
                return true;
            }
            if let Some(cache) = cache {
                cache.leave(row.slot);
            }
            if let Some(request) = open.get_mut(&row.ticket) {
                request.sampled[row.index] = mem::take(&mut row.sampled);
                request.left -= 1;
                if request.left == 0 {
                    ended.extend(open.remove(&row.ticket).map(|request| (row.ticket, request.sampled)));
                }
            }
            false
        });
    }
}

/// Samples a token for each row from its logits `[N, V]`.
fn sample_all(rows: &mut [Row], logits: &Tensor, version: u64, sampling: &Sampling) -> candle_core::Result<()> {
    let width = logits.dim(1)?;
    // Logits in device memory stay there if sampling needs nothing from the host.
    if !logits.device().is_cpu() && sampling.is_plain() {
        let shares: Vec<f64> = rows.iter_mut().map(|row| row.sampler.share()).collect();
        let draws = kernels::draw_from_rows(logits, sampling.drawn(width), sampling.inverse_temperature(), &shares)?;
        for (row, (id, logprob)) in rows.iter_mut().zip(draws) {
            row.position += 1;
            row.push(id as u32, logprob, version, sampling);
        }
        return Ok(());
    }
    let logits = logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = logits.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("logits are not in host memory")
    };
    let logits = &storage.as_slice::<f32>()?[start..end];
    let take = |(row, logits): (&mut Row, &[f32])| {
        row.position += 1;
        row.take(logits, version, sampling);
    };
    if rayon::current_num_threads() == 1 {
        rows.iter_mut().zip(logits.chunks(width)).for_each(take);
    } else {
        rows.par_iter_mut().zip(logits.par_chunks(width)).for_each(take);
    }
    Ok(())
}

impl Row {
    fn last(&self) -> u32 {
        *self.sampled.ids.last().expect("a row samples its first token when it begins")
    }

    fn take(&mut self, logits: &[f32], version: u64, sampling: &Sampling) {
        let (id, logprob) = self.sampler.draw(logits);
        self.push(id, logprob, version, sampling);
    }

    fn push(&mut self, id: u32, logprob: f32, version: u64, sampling: &Sampling) {
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

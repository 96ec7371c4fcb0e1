//! The engine of the fake server: one thread with the weights, the requests and the key/value caches.
//!
//! It uses the library's decoder, caches and sampler. Unlike the library's own engine, it has settings, an adapter and a
//! rank for each request, and computes the keys and values of running sequences again after a change of weights, as vLLM
//! does.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{DType, Tensor};
use preceptor::lm::model::cache::CachedPrompt;
use preceptor::lm::model::trie::prefill;
use preceptor::lm::model::{Decoder, KvCache, Pack, PackedAttention};
use preceptor::pipeline::generate::sampler::{Sampler, Sampling};
use preceptor::pipeline::generate::stop::Stop;

use super::weights::{Adapter, Base};
use super::{Faults, Server};

/// A change or query of the engine, which runs between two decode steps.
pub type Command = Box<dyn FnOnce(&mut Core) + Send>;

/// A prompt and the settings of its completions.
pub struct Request {
    pub prompt: Vec<u32>,
    pub adapter: Option<Arc<Adapter>>,
    /// One seed for each completion.
    pub seeds: Vec<u64>,
    pub temperature: f64,
    pub max_tokens: usize,
    pub eos: Vec<u32>,
    pub stop_ids: Vec<u32>,
    pub stop: Vec<(String, Stop)>,
    /// Numbers that are added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
    pub wants_prompt_logprobs: bool,
    /// Number of most likely tokens to report with each token.
    pub top: usize,
}

/// Reason why a completion ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Finish {
    Eos,
    StopId(u32),
    StopString(String),
    Length,
    Abort,
}

/// A completion; its lists have one entry per token.
#[derive(Debug, Clone, Default)]
pub struct Sampled {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub ranks: Vec<usize>,
    /// Most likely tokens with their log-probabilities, at each token.
    pub tops: Vec<Vec<(u32, f32)>>,
    /// Weight version of each token.
    pub versions: Vec<String>,
    pub finish: Option<Finish>,
}

/// Result of a request.
#[derive(Default)]
pub struct Answer {
    pub completions: Vec<Sampled>,
    /// Log-probability at temperature 1 and rank of each token of the prompt after the first, if requested.
    pub prompt_logprobs: Option<Vec<(f32, usize)>>,
    /// Weight version at the end of the request.
    pub version: String,
}

/// What happens to running requests when the engine is paused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PauseMode {
    Keep,
    Abort,
    Wait,
}

enum Pause {
    Running,
    Paused,
    /// Paused once all requests with a smaller ticket have ended.
    Draining(u64, Vec<SyncSender<()>>),
}

/// A request with completions that have not ended.
struct Open {
    left: usize,
    answer: Answer,
    reply: SyncSender<Answer>,
}

/// A completion that has not ended.
struct Row {
    ticket: u64,
    index: usize,
    request: Arc<Request>,
    sampler: Sampler,
    sampled: Sampled,
    /// Model and slot of the cache that has the keys and values of all tokens but the last.
    place: Option<(Arc<Decoder>, usize)>,
}

/// A prompt that several completions continue: its cached keys and values, and the logits after it.
type Prefilled = (Arc<CachedPrompt>, Vec<f32>);

/// State of the engine.
pub struct Core {
    pub base: Base,
    pub adapters: BTreeMap<String, Arc<Adapter>>,
    pub version: String,
    /// True after an error that ends a real engine.
    pub dead: bool,
    /// True if the thread must end.
    pub stopped: bool,
    slots: usize,
    max_model_len: usize,
    half: bool,
    /// Models in use, by adapter.
    models: Vec<(Option<Arc<Adapter>>, Arc<Decoder>)>,
    caches: Vec<(Arc<Decoder>, KvCache)>,
    rows: Vec<Row>,
    waiting: VecDeque<Row>,
    open: HashMap<u64, Open>,
    tickets: u64,
    pause: Pause,
}

impl Core {
    pub fn new(base: Base, slots: usize, max_model_len: usize) -> Self {
        Self {
            base,
            adapters: BTreeMap::new(),
            version: "default".to_owned(),
            dead: false,
            stopped: false,
            slots,
            max_model_len,
            half: false,
            models: Vec::new(),
            caches: Vec::new(),
            rows: Vec::new(),
            waiting: VecDeque::new(),
            open: HashMap::new(),
            tickets: 0,
            pause: Pause::Running,
        }
    }

    /// Runs the engine until it is stopped.
    pub fn run(mut self, commands: &Receiver<Command>, server: &Server) {
        let (mut begin, mut count) = (Instant::now(), 0);
        while !self.stopped {
            let Faults { bf16, tokens_per_second, stalls_at, .. } = server.faults_now();
            let is_stalled = stalls_at.is_some_and(|limit| server.generated.load(Ordering::SeqCst) >= limit);
            let pause = Duration::from_secs_f64(tokens_per_second.map_or(0.0, |speed| count as f64 / speed));
            let command = if self.can_step() && !is_stalled {
                commands.recv_timeout(pause.saturating_sub(begin.elapsed()))
            } else {
                commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match command {
                Ok(command) => command(&mut self),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    if self.half != bf16 {
                        self.half = bf16;
                        self.models.clear();
                    }
                    begin = Instant::now();
                    match self.step(&server.generated) {
                        Ok(sampled) => count = sampled,
                        Err(_) => self.die(),
                    }
                }
            }
        }
    }

    /// Returns the numbers of running and of waiting completions.
    pub fn load(&self) -> [usize; 2] {
        [self.rows.len(), self.waiting.len()]
    }

    /// Returns the number of requests so far.
    pub fn tickets(&self) -> u64 {
        self.tickets
    }

    pub fn is_paused(&self) -> bool {
        matches!(self.pause, Pause::Paused)
    }

    /// Appends a request to the queue and returns its ticket. A dead engine drops the request, which closes `reply`.
    pub fn submit(&mut self, request: Request, reply: SyncSender<Answer>) -> u64 {
        self.tickets += 1;
        let (ticket, request) = (self.tickets, Arc::new(request));
        if self.dead {
            return ticket;
        }
        let answer = Answer { completions: vec![Sampled::default(); request.seeds.len()], ..Answer::default() };
        self.open.insert(ticket, Open { left: request.seeds.len(), answer, reply });
        let sampling = Sampling { temperature: request.temperature, ..Sampling::default() };
        for (index, seed) in request.seeds.iter().enumerate() {
            let sampler = Sampler::new(&sampling, &request.prompt, *seed);
            let request = Arc::clone(&request);
            self.waiting.push_back(Row { ticket, index, request, sampler, sampled: Sampled::default(), place: None });
        }
        ticket
    }

    /// Removes a request whose client has disconnected.
    pub fn cancel(&mut self, ticket: u64) {
        self.open.remove(&ticket);
        self.waiting.retain(|row| row.ticket != ticket);
        self.rows.retain(|row| {
            if row.ticket == ticket {
                leave(&mut self.caches, row);
            }
            row.ticket != ticket
        });
        self.check_drained();
    }

    /// Pauses the engine. `reply` is answered once it is paused.
    pub fn pause(&mut self, mode: PauseMode, reply: SyncSender<()>) {
        if mode == PauseMode::Wait {
            match &mut self.pause {
                Pause::Draining(_, replies) => replies.push(reply),
                Pause::Running => self.pause = Pause::Draining(self.tickets + 1, vec![reply]),
                Pause::Paused => {
                    let _ = reply.send(());
                }
            }
            return self.check_drained();
        }
        self.pause = Pause::Paused;
        if mode == PauseMode::Abort {
            self.rows.extend(self.waiting.drain(..));
            for row in &mut self.rows {
                row.sampled.finish = Some(Finish::Abort);
            }
            self.sweep();
        }
        let _ = reply.send(());
    }

    pub fn resume(&mut self) {
        self.pause = Pause::Running;
    }

    /// Forgets the models made of earlier weights, so that all running sequences are recomputed with the current ones.
    pub fn weights_changed(&mut self) {
        self.models.clear();
    }

    /// Ends the engine as an error in a worker does: all requests end without an answer.
    pub fn die(&mut self) {
        self.dead = true;
        self.rows.clear();
        self.waiting.clear();
        self.open.clear();
    }

    fn can_step(&self) -> bool {
        let may_begin = |row: &Row| match &self.pause {
            Pause::Running => true,
            Pause::Paused => false,
            Pause::Draining(end, _) => row.ticket < *end,
        };
        !self.is_paused() && (!self.rows.is_empty() || self.waiting.front().is_some_and(may_begin))
    }

    fn check_drained(&mut self) {
        if let Pause::Draining(end, replies) = &self.pause
            && self.open.keys().all(|ticket| ticket >= end)
        {
            for reply in replies {
                let _ = reply.send(());
            }
            self.pause = Pause::Paused;
        }
    }

    /// Returns the current model with this adapter.
    fn model(&mut self, adapter: Option<&Arc<Adapter>>) -> Result<Arc<Decoder>> {
        let is_same = |other: &Option<Arc<Adapter>>| other.as_ref().map(Arc::as_ptr) == adapter.map(Arc::as_ptr);
        if let Some((_, model)) = self.models.iter().find(|(other, _)| is_same(other)) {
            return Ok(Arc::clone(model));
        }
        let model = self.base.decoder(adapter.map(Arc::as_ref))?;
        let model = Arc::new(if self.half { model.to_dtype(DType::BF16)? } else { model });
        self.models.push((adapter.cloned(), Arc::clone(&model)));
        Ok(model)
    }

    /// Samples one token for each of the running completions, after waiting ones have taken the free slots. Returns the
    /// number of tokens.
    fn step(&mut self, generated: &AtomicU64) -> Result<usize> {
        let end = if let Pause::Draining(end, _) = &self.pause { *end } else { u64::MAX };
        while self.rows.len() < self.slots && self.waiting.front().is_some_and(|row| row.ticket < end) {
            self.rows.extend(self.waiting.pop_front());
        }
        let mut groups: Vec<(Arc<Decoder>, Vec<usize>)> = Vec::new();
        for index in 0..self.rows.len() {
            let adapter = self.rows[index].request.adapter.clone();
            let model = self.model(adapter.as_ref())?;
            match groups.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &model)) {
                Some((_, members)) => members.push(index),
                None => groups.push((model, vec![index])),
            }
        }
        self.caches.retain(|(model, _)| groups.iter().any(|(other, _)| Arc::ptr_eq(model, other)));
        for (model, members) in &groups {
            self.step_group(model, members)?;
        }
        let count = self.rows.len();
        // Counted before a client can have the answer.
        generated.fetch_add(count as u64, Ordering::SeqCst);
        self.sweep();
        let used: Vec<_> = self.rows.iter().map(|row| row.request.adapter.as_ref().map(Arc::as_ptr)).collect();
        self.models.retain(|(adapter, _)| adapter.is_none() || used.contains(&adapter.as_ref().map(Arc::as_ptr)));
        Ok(count)
    }

    fn step_group(&mut self, model: &Arc<Decoder>, members: &[usize]) -> Result<()> {
        if !self.caches.iter().any(|(other, _)| Arc::ptr_eq(other, model)) {
            self.caches.push((Arc::clone(model), KvCache::new(model, 64)?));
        }
        let Some((_, cache)) = self.caches.iter_mut().find(|(other, _)| Arc::ptr_eq(other, model)) else {
            return Ok(());
        };
        let is_cached = |row: &Row| row.place.as_ref().is_some_and(|(other, _)| Arc::ptr_eq(other, model));
        let (cached, new): (Vec<usize>, Vec<usize>) = members.iter().partition(|i| is_cached(&self.rows[**i]));
        if !cached.is_empty() {
            let rows = || cached.iter().map(|i| &self.rows[*i]);
            let ids: Vec<u32> = rows().filter_map(|row| row.sampled.ids.last().copied()).collect();
            let position = |row: &Row| (row.request.prompt.len() + row.sampled.ids.len() - 1) as u32;
            let positions: Vec<u32> = rows().map(position).collect();
            let slots: Vec<usize> = rows().filter_map(|row| row.place.as_ref().map(|(_, slot)| *slot)).collect();
            let logits = model.logits(&model.hidden(&ids, &positions, &mut *cache.step(&slots)?)?)?;
            for (i, logits) in cached.iter().zip(host(&logits)?) {
                self.rows[*i].take(&logits, &self.version, self.max_model_len);
            }
        }
        let mut prompts: HashMap<u64, Prefilled> = HashMap::new();
        for i in new {
            let row = &mut self.rows[i];
            let tokens = [row.request.prompt.as_slice(), &row.sampled.ids].concat();
            let known = prompts.get(&row.ticket).filter(|_| row.sampled.ids.is_empty());
            let (prompt, logits) = match known {
                Some(known) => known.clone(),
                None => {
                    let (hidden, layers) = prefill(model, &tokens, None)?;
                    let logits = host(&model.logits(&hidden)?)?.concat();
                    (cache.prompt(&layers)?, logits)
                }
            };
            row.place = Some((Arc::clone(model), cache.enter(&prompt)));
            if row.sampled.ids.is_empty() {
                prompts.insert(row.ticket, (prompt, logits.clone()));
            }
            if let Some(open) = self.open.get_mut(&row.ticket)
                && row.request.wants_prompt_logprobs
                && open.answer.prompt_logprobs.is_none()
            {
                open.answer.prompt_logprobs = Some(prompt_logprobs(model, &row.request.prompt)?);
            }
            row.take(&logits, &self.version, self.max_model_len);
        }
        Ok(())
    }

    /// Answers the requests of which all completions have ended, and frees the slots of those completions.
    fn sweep(&mut self) {
        for row in std::mem::take(&mut self.rows) {
            if row.sampled.finish.is_none() {
                self.rows.push(row);
                continue;
            }
            leave(&mut self.caches, &row);
            let Some(open) = self.open.get_mut(&row.ticket) else { continue };
            open.answer.completions[row.index] = row.sampled;
            open.left -= 1;
            if open.left == 0
                && let Some(Open { answer, reply, .. }) = self.open.remove(&row.ticket)
            {
                // The client may have disconnected.
                let _ = reply.send(Answer { version: self.version.clone(), ..answer });
            }
        }
        self.check_drained();
    }
}

fn leave(caches: &mut [(Arc<Decoder>, KvCache)], row: &Row) {
    if let Some((model, slot)) = &row.place
        && let Some((_, cache)) = caches.iter_mut().find(|(other, _)| Arc::ptr_eq(other, model))
    {
        cache.leave(*slot);
    }
}

/// Returns logits `[N, V]` by row.
fn host(logits: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
}

/// Returns the log-probability at temperature 1 and the rank of each token of `prompt` after the first.
pub fn prompt_logprobs(model: &Decoder, prompt: &[u32]) -> Result<Vec<(f32, usize)>> {
    let pack = Pack::prefill(prompt);
    let hidden = model.hidden(&pack.ids, &pack.positions, &mut PackedAttention::new(&pack))?;
    let rows = host(&model.logits(&hidden)?)?;
    let of = |(row, id): (&Vec<f32>, &u32)| (row[*id as usize] - kernels::row_logsumexp(row, 1.0), rank(row, *id));
    Ok(rows.iter().zip(&prompt[1..]).map(of).collect())
}

fn rank(logits: &[f32], id: u32) -> usize {
    1 + logits.iter().filter(|logit| **logit > logits[id as usize]).count()
}

impl Row {
    /// Samples the next token from its logits.
    fn take(&mut self, logits: &[f32], version: &str, max_model_len: usize) {
        let mut logits = logits.to_vec();
        for (id, bias) in &self.request.bias {
            logits[*id as usize] += bias;
        }
        let (id, logprob) = self.sampler.draw(&logits);
        self.sampled.ids.push(id);
        self.sampled.logprobs.push(logprob);
        self.sampled.ranks.push(rank(&logits, id));
        self.sampled.tops.push(self.tops(&logits));
        self.sampled.versions.push(version.to_owned());
        self.sampled.finish = self.finish(id, max_model_len);
    }

    /// Returns the most likely tokens with their log-probabilities at the request's temperature.
    fn tops(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        if self.request.top == 0 {
            return Vec::new();
        }
        let temperature = if self.request.temperature > 0.0 { self.request.temperature as f32 } else { 1.0 };
        let scaled: Vec<f32> = logits.iter().map(|logit| logit / temperature).collect();
        let total = kernels::row_logsumexp(&scaled, 1.0);
        let mut order: Vec<u32> = (0..scaled.len() as u32).collect();
        order.sort_by(|a, b| scaled[*b as usize].total_cmp(&scaled[*a as usize]));
        order.into_iter().take(self.request.top).map(|id| (id, scaled[id as usize] - total)).collect()
    }

    fn finish(&self, id: u32, max_model_len: usize) -> Option<Finish> {
        let (request, ids) = (&self.request, &self.sampled.ids);
        if request.eos.contains(&id) {
            return Some(Finish::Eos);
        }
        if request.stop_ids.contains(&id) {
            return Some(Finish::StopId(id));
        }
        if let Some((text, _)) = request.stop.iter().find(|(_, stop)| stop.ends(ids)) {
            return Some(Finish::StopString(text.clone()));
        }
        let is_full = ids.len() >= request.max_tokens || request.prompt.len() + ids.len() >= max_model_len;
        is_full.then_some(Finish::Length)
    }
}

//! Judges whose weights are on workers, as labelers see them. The questions go through a [`JudgePool`], which a coordinator
//! empties and answers.

pub mod questions;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::{Result, bail};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::backend::{Alive, Ask, Backend, Decoding, Reply, Usage};
use super::embedding::{Embedding, Encoder};
use super::likelihood::{TokenJudge, TokenScores};
use super::local::{Judge, Local};
use super::shape::Shape;
use crate::lm::tokens::Tokenizer;
use crate::util::mutex::lock;
use questions::{LabelAnswer, Question, failed, of_kind};

/// Time between two signs of life of an actor that waits for an answer.
const SIGN: Duration = Duration::from_millis(500);
/// Number of workers that may fail to compute an answer before the question fails.
pub const ATTEMPTS: u32 = 3;

/// Questions of a run's labelers for judges on workers, which the coordinator offers and collects.
#[derive(Default)]
pub struct JudgePool {
    open: Mutex<HashMap<u64, Asked>>,
    /// Number of questions so far.
    count: AtomicU64,
    /// Reason why no answers come; empty if they come.
    reason: Mutex<String>,
    closed: AtomicBool,
}

/// Actors that wait for answers, by name.
#[derive(Default)]
struct Waiting(Mutex<HashMap<String, Alive>>);

impl Waiting {
    fn register(&self, name: &str, alive: &Alive) {
        lock(&self.0).insert(name.to_owned(), Alive::clone(alive));
    }

    /// Gives a sign of life to the actors. Returns whether any of them still wants an answer, or none is registered.
    fn sign(&self, reason: &str) -> bool {
        let waiting = lock(&self.0);
        // All callbacks must be called, so this does not stop at the first.
        let wanted = waiting.values().filter(|alive| alive(reason)).count();
        wanted > 0 || waiting.is_empty()
    }
}

/// A question without an answer.
#[derive(Clone)]
pub struct Asked {
    /// Folder of the judge.
    pub judge: String,
    /// The question.
    pub question: Question,
    /// True if it was offered to workers.
    pub offered: bool,
    /// Number of offers that led to no answer.
    pub attempts: u32,
    /// Number of workers that could not compute an answer.
    pub failures: u32,
    /// True once it has an answer, which its asker has not taken yet.
    pub answered: bool,
    reply: Sender<Result<LabelAnswer, String>>,
}

impl JudgePool {
    /// Asks `judge`, and waits for the answer for as long as any of `waiting` wants it.
    fn ask(&self, judge: &str, question: Question, waiting: &Waiting) -> Result<LabelAnswer, String> {
        let (reply, answer) = bounded(1);
        let id = self.count.fetch_add(1, Ordering::Relaxed);
        let asked = Asked {
            judge: judge.to_owned(),
            question,
            offered: false,
            attempts: 0,
            failures: 0,
            answered: false,
            reply,
        };
        lock(&self.open).insert(id, asked);
        let answered = self.wait(&answer, waiting);
        lock(&self.open).remove(&id);
        answered
    }

    fn wait(&self, answer: &Receiver<Result<LabelAnswer, String>>, waiting: &Waiting) -> Result<LabelAnswer, String> {
        loop {
            match answer.recv_timeout(SIGN) {
                Ok(answered) => return answered,
                Err(RecvTimeoutError::Disconnected) => return Err("the question was dropped".into()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.closed.load(Ordering::SeqCst) {
                return Err("the run no longer asks its workers".into());
            }
            if !waiting.sign(&lock(&self.reason).clone()) {
                return Err("the answer is no longer wanted, because the run's graph was halted".into());
            }
        }
    }

    /// Sets why no answers come.
    pub fn explain(&self, reason: String) {
        *lock(&self.reason) = reason;
    }

    /// Ends all waiting for answers.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Returns the first question that is not offered, with its number, and counts it as offered.
    pub fn unoffered(&self) -> Option<(u64, Asked)> {
        let mut open = lock(&self.open);
        let (id, asked) = open.iter_mut().filter(|(_, asked)| !asked.offered).min_by_key(|(id, _)| **id)?;
        asked.offered = true;
        Some((*id, asked.clone()))
    }

    /// Makes all questions without an answer such that are not offered, because the broker lost them. Returns their number.
    pub fn offer_again(&self) -> usize {
        let mut open = lock(&self.open);
        let lost = open.values_mut().filter(|asked| asked.offered && !asked.answered);
        lost.map(|asked| asked.offer_again()).count()
    }

    /// Returns whether questions were offered that have no answer.
    pub fn has_offered(&self) -> bool {
        lock(&self.open).values().any(|asked| asked.offered && !asked.answered)
    }

    /// Calls `act` with an open question; returns `None` if it is answered already, or its asker has left.
    pub fn with<T>(&self, id: u64, act: impl FnOnce(&mut Asked) -> T) -> Option<T> {
        lock(&self.open).get_mut(&id).map(act)
    }
}

impl Asked {
    /// Makes this a question that is not offered. Its next offer has another identifier.
    pub fn offer_again(&mut self) {
        (self.offered, self.attempts) = (false, self.attempts + 1);
    }

    /// Passes the answer to the asker.
    pub fn answer(&mut self, answer: Result<LabelAnswer, String>) {
        self.answered = true;
        // The asker may have left, or have an answer.
        let _ = self.reply.try_send(answer);
    }
}

/// Judges of a run whose weights are on workers.
#[derive(Default)]
pub struct WorkerJudges {
    /// Their questions.
    pub pool: Arc<JudgePool>,
    unplaced: Mutex<Vec<UnplacedJudge>>,
}

/// A judge whose weights are not in the store yet.
pub struct UnplacedJudge {
    /// The judge as labelers see it.
    pub judge: Arc<WorkerJudge>,
    /// Its weights.
    pub weights: JudgeWeights,
    /// Settings of its chat template.
    pub settings: TemplateSettings,
}

/// Weights of a judge.
pub enum JudgeWeights {
    /// A language model.
    Language(Box<Judge>),
    /// Folder of a sentence encoder's files.
    Encoder(PathBuf),
}

/// Settings of a judge's chat template.
#[derive(Debug, Clone, Default)]
pub struct TemplateSettings {
    /// Variables, as in `data.chat_template_kwargs`.
    pub kwargs: toml::Table,
    /// Time of `strftime_now`, in seconds since 1970.
    pub date: Option<u64>,
}

impl WorkerJudges {
    /// Takes a language model as a judge of the workers. Its weights are kept until [`Self::take`].
    pub fn language(&self, judge: Judge, settings: TemplateSettings) -> Arc<WorkerJudge> {
        let local = Local::new(judge);
        let shape = Some(local.shape());
        let judge = local.judge().clone();
        let facts = JudgeFacts {
            identity: judge.identity,
            shape,
            tokenizer: Some(judge.tokenizer.clone()),
            chat: judge.chat,
            context: judge.model.config().context,
        };
        self.add(facts, JudgeWeights::Language(Box::new(judge)), settings)
    }

    /// Takes a sentence encoder, whose files are in `dir`, as a judge of the workers.
    pub fn encoder(&self, encoder: &Embedding, dir: PathBuf) -> Arc<WorkerJudge> {
        let facts =
            JudgeFacts { identity: encoder.identity, shape: None, tokenizer: None, chat: false, context: usize::MAX };
        self.add(facts, JudgeWeights::Encoder(dir), TemplateSettings::default())
    }

    fn add(&self, facts: JudgeFacts, weights: JudgeWeights, settings: TemplateSettings) -> Arc<WorkerJudge> {
        let judge = Arc::new(WorkerJudge::new(Arc::clone(&self.pool), facts));
        lock(&self.unplaced).push(UnplacedJudge { judge: Arc::clone(&judge), weights, settings });
        judge
    }

    /// Takes out the judges whose weights are not in a store yet.
    pub fn take(&self) -> Vec<UnplacedJudge> {
        std::mem::take(&mut *lock(&self.unplaced))
    }
}

/// A judge whose weights are on workers.
pub struct WorkerJudge {
    pool: Arc<JudgePool>,
    /// Facts that were read from the weights before they went to the workers.
    pub facts: JudgeFacts,
    /// Folder of the judge in the run's store, once it is there.
    name: Arc<OnceLock<String>>,
    waiting: Waiting,
    /// Texts that all prompts of a template begin with, longest first.
    common: Mutex<Vec<String>>,
}

/// Facts about a judge whose weights are elsewhere.
#[derive(Clone)]
pub struct JudgeFacts {
    /// Identity, as [`Backend::identity`].
    pub identity: u64,
    /// Shape, as [`Backend::shape`]; `None` for a sentence encoder.
    pub shape: Option<Shape>,
    /// Tokenizer; `None` for a sentence encoder.
    pub tokenizer: Option<Tokenizer>,
    /// True if questions are wrapped in the model's chat template.
    pub chat: bool,
    /// Maximum number of tokens that the judge reads.
    pub context: usize,
}

impl WorkerJudge {
    /// Creates a judge that is asked through `pool`.
    pub fn new(pool: Arc<JudgePool>, facts: JudgeFacts) -> Self {
        Self { pool, facts, name: Arc::default(), waiting: Waiting::default(), common: Mutex::default() }
    }

    /// Returns the same judge for askers outside of the run's graph, whose questions do not end when that is halted.
    #[must_use]
    pub fn outside_graph(&self) -> Self {
        Self { name: Arc::clone(&self.name), ..Self::new(Arc::clone(&self.pool), self.facts.clone()) }
    }

    /// Sets the judge's folder in the run's store. Later calls have no effect.
    pub fn place(&self, name: &str) {
        // It is set where the run begins only.
        let _ = self.name.set(name.to_owned());
    }

    fn ask(&self, question: Question) -> Result<LabelAnswer, String> {
        let name =
            self.name.get().ok_or("the run has not offered its judges to workers; only `preceptor train` does")?;
        self.pool.ask(name, question, &self.waiting)
    }

    /// Returns the number of bytes that all `prompts` begin with, among the texts that their templates begin with.
    fn common<'a>(&self, prompts: impl Iterator<Item = &'a str> + Clone) -> usize {
        let fits = |text: &&String| prompts.clone().all(|prompt| prompt.starts_with(text.as_str()));
        lock(&self.common).iter().find(fits).map_or(0, String::len)
    }
}

impl Backend for WorkerJudge {
    fn identity(&self) -> u64 {
        self.facts.identity
    }

    fn shape(&self) -> Shape {
        self.facts.shape.expect("internal error: a sentence encoder is not asked in text")
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.waiting.register(name, alive);
    }

    fn waits(&self) -> bool {
        true
    }

    fn warm(&self, examples: &[String]) -> Result<()> {
        let Some((first, rest)) = examples.split_first() else { return Ok(()) };
        let shared = |other: &String| first.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let mut end = rest.iter().map(shared).min().unwrap_or(first.len());
        while !first.is_char_boundary(end) {
            end -= 1;
        }
        let mut common = lock(&self.common);
        let text = first[..end].to_owned();
        if !text.is_empty() && !common.contains(&text) {
            common.push(text);
            common.sort_by_key(|text| std::cmp::Reverse(text.len()));
        }
        Ok(())
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        let mut replies = Vec::with_capacity(asks.len());
        for question in Question::weigh(asks, self.common(asks.iter().map(|ask| ask.prompt.as_str()))) {
            let Question::Weigh { asks: lot, .. } = &question else { continue };
            let count = lot.len();
            match self.ask(question) {
                Ok(LabelAnswer::Weighed(found, used)) => {
                    *usage += used;
                    replies.extend(found);
                }
                Ok(_) => replies.extend(failed(count, "internal error: an answer is of another kind")),
                Err(why) => replies.extend(failed(count, &why)),
            }
        }
        replies
    }

    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>> {
        let mut replies: Vec<Reply<String>> = failed(prompts.len(), "the judge gave no answer");
        for (places, question) in Question::write(prompts, decoding, self.common(prompts.iter().map(String::as_str))) {
            let found = match self.ask(question) {
                Ok(LabelAnswer::Written(found, used)) => {
                    *usage += used;
                    found
                }
                Ok(_) => failed(places.len(), "internal error: an answer is of another kind"),
                Err(why) => failed(places.len(), &why),
            };
            for (place, reply) in places.into_iter().zip(found) {
                replies[place] = reply;
            }
        }
        replies
    }
}

impl TokenJudge for WorkerJudge {
    fn identity(&self) -> u64 {
        self.facts.identity
    }

    fn logprobs(&self, prompt: &[u32], completions: &[&[u32]], temperatures: &[f64]) -> Result<TokenScores> {
        let mut scores = TokenScores { logprobs: vec![Vec::new(); temperatures.len()], read: 0 };
        for question in Question::score(prompt, completions, temperatures) {
            let answer = self.ask(question).map_err(anyhow::Error::msg)?;
            let found = of_kind(answer, |answer| match answer {
                LabelAnswer::Scored(found) => Some(found),
                _ => None,
            })?;
            scores.read += found.read;
            for (all, lot) in scores.logprobs.iter_mut().zip(found.logprobs) {
                all.extend(lot);
            }
        }
        Ok(scores)
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.waiting.register(name, alive);
    }

    fn waits(&self) -> bool {
        true
    }
}

impl Encoder for WorkerJudge {
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let mut vectors: Vec<Vec<f32>> = Vec::with_capacity(texts.len());
        for question in Question::embed(texts) {
            let answer = self.ask(question).map_err(anyhow::Error::msg)?;
            let found = of_kind(answer, |answer| match answer {
                LabelAnswer::Embedded(found) => Some(found),
                _ => None,
            })?;
            if let (Some(first), Some(one)) = (vectors.first(), found.first())
                && first.len() != one.len()
            {
                bail!("two workers gave embeddings of {} and {} numbers", first.len(), one.len());
            }
            vectors.extend(found);
        }
        Ok(vectors)
    }

    fn parameters(&self) -> usize {
        0
    }

    fn outside_graph(&self) -> Option<Arc<dyn Encoder>> {
        Some(Arc::new(Self::outside_graph(self)))
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.waiting.register(name, alive);
    }

    fn waits(&self) -> bool {
        true
    }
}

//! Win rates while a run learns: the present weights against the first ones, on held-out prompts, judged by
//! `evaluation.labeler`, or by the run's labeler.
//!
//! A reward that rises while the win rate falls is being gamed. A separate thread answers and asks; the learner hands weights
//! over and continues. Each evaluation is one line of `evaluations.jsonl`.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::channel::{Sender, TrySendError, bounded};
use serde_json::{Value, json};

use super::log::Log;
use crate::config::Config;
use crate::lm::model::Decoder;
use crate::lm::tokens::Tokenizer;
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::label::stage::{Wants, ask_many};
use crate::pipeline::label::{Labeler, Pairing};
use crate::pipeline::setup::Prepared;
use crate::pipeline::topology::labelers::evaluation_judge;
use crate::pipeline::topology::sampling;
use crate::rl::statistics::interval::{self, Estimate};
use crate::run::checkpoint::WinRates;
use crate::tools::evaluate::answers::answers;
use crate::tools::evaluate::win_rate::outcome;
use crate::types::{Completion, Group, Prompt, Verdict};
use crate::util::disk;

/// Name of its file in the run's directory.
pub(super) const NAME: &str = "evaluations.jsonl";

/// What one evaluation came to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Evaluated {
    pub(super) step: u64,
    /// Share of prompts on which the present answer is the better one, ties counting half.
    pub(super) win_rate: Estimate,
    /// Mean length of the answers in tokens, of the present weights and of the first ones.
    pub(super) lengths: [f64; 2],
    /// Prompts without a verdict: the judge abstained, or failed.
    pub(super) without: [usize; 2],
    /// Why the judge failed, where it did.
    pub(super) failure: Option<String>,
}

/// What became of weights that were handed over for evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    /// Their step is not one that is evaluated.
    NotDue,
    /// They are evaluated.
    Taken,
    /// They are not evaluated: the evaluation before is still under way.
    Busy,
}

/// A thread that evaluates.
pub(super) struct Evaluator {
    every: u64,
    jobs: Option<Sender<(u64, Arc<Decoder>)>>,
    course: WinRates,
    thread: JoinHandle<()>,
}

impl Evaluator {
    /// As `config` says, on what is `prepared`; none where it asks for none. The evaluations in `dir` after `step` are removed,
    /// and the others become the begin of `course`. `tell` is called with each evaluation.
    ///
    /// # Errors
    /// A file that cannot be read or written, a judge's template that cannot be used.
    pub(super) fn start(
        config: &Config,
        prepared: &Prepared,
        dir: &Path,
        step: u64,
        course: WinRates,
        tell: impl Fn(Result<Evaluated>) + Send + 'static,
    ) -> Result<Option<Self>> {
        let every = config.evaluation.every_steps;
        let Some(data) = prepared.held_out.as_ref().filter(|_| every > 0) else { return Ok(None) };
        let order = data.order(0);
        let count = config.evaluation.prompts.min(data.len()) as u64;
        let temperature = config.evaluation_judge().1.first().map_or(1.0, |method| method.pair_temperature);
        let mut contest = Contest {
            prompts: (0..count).map(|seq| data.prompt(seq, &order)).collect::<Result<_>>()?,
            first: Vec::new(),
            model: Arc::clone(prepared.policy()),
            tokenizer: prepared.tokenizer.clone(),
            sampling: Sampling { top_k: Some(1), ..sampling(config, &prepared.tokenizer) },
            labeler: evaluation_judge(config, prepared)?,
            retries: config.labeler.retries,
            wants: Wants::Preferences { pairing: Pairing::Adjacent, temperature },
        };
        let mut log = open(dir, step)?;
        course.begin_with(earlier(dir)?);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(config.evaluation.threads).build()?;
        let (jobs, todo) = bounded::<(u64, Arc<Decoder>)>(0);
        let noted = course.clone();
        let thread = std::thread::Builder::new().name("evaluation".into()).spawn(move || {
            for (step, model) in todo {
                let evaluated = pool.install(|| contest.hold(step, &model));
                if let Ok(evaluated) = &evaluated
                    && let Err(error) = log.append(format!("{}\n", evaluated.to_json()).as_bytes())
                {
                    tell(Err(error));
                }
                noted.evaluated(step, evaluated.as_ref().ok().and_then(|evaluated| evaluated.win_rate.value));
                tell(evaluated.with_context(|| format!("step {step} could not be evaluated")));
            }
        })?;
        Ok(Some(Self { every, jobs: Some(jobs), course, thread }))
    }

    /// Hands over the weights of `step` for evaluation, if they are due and no other evaluation is under way.
    pub(super) fn put(&self, step: u64, model: &Arc<Decoder>) -> Put {
        let Some(jobs) = self.jobs.as_ref().filter(|_| step.is_multiple_of(self.every)) else { return Put::NotDue };
        // Noted first, so that the checkpoint of this step is not removed before its win rate is known.
        self.course.begins(step);
        match jobs.try_send((step, Arc::clone(model))) {
            Ok(()) => Put::Taken,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.course.evaluated(step, None);
                Put::Busy
            }
        }
    }

    /// Takes no more, and waits up to `patience` for the one that is under way: a judge that is away must not keep a run from
    /// ending.
    pub(super) fn finish(mut self, patience: Duration) {
        drop(self.jobs.take());
        let began = Instant::now();
        while !self.thread.is_finished() && began.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The file, without what comes after `step`.
fn open(dir: &Path, step: u64) -> Result<Log> {
    let path = dir.join(NAME);
    Log::open(&path, length(&path, step)?)
}

/// Bytes of the evaluations up to `step` that the file at `path` begins with.
///
/// # Errors
/// Names the file that cannot be read.
pub(super) fn length(path: &Path, step: u64) -> Result<u64> {
    if disk::length(path)?.is_none() {
        return Ok(0);
    }
    let before = std::fs::read(path).map_err(|error| disk::cannot("read", path, error))?;
    let of = |line: &&[u8]| {
        line.ends_with(b"\n")
            && serde_json::from_slice::<Value>(line).is_ok_and(|one| one["step"].as_u64().is_some_and(|at| at <= step))
    };
    Ok(before.split_inclusive(|byte| *byte == b'\n').take_while(of).map(|line| line.len() as u64).sum())
}

/// Steps and win rates in the file of the run in `dir`.
///
/// # Errors
/// Names the file that cannot be read.
fn earlier(dir: &Path) -> Result<Vec<(u64, f64)>> {
    let path = dir.join(NAME);
    if disk::length(&path)?.is_none() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(|error| disk::cannot("read", &path, error))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter_map(|line| Some((line["step"].as_u64()?, line["win_rate"].as_f64()?))).collect())
}

impl Evaluated {
    fn to_json(&self) -> Value {
        json!({
            "step": self.step, "win_rate": self.win_rate.value, "low": self.win_rate.low, "high": self.win_rate.high,
            "verdicts": self.win_rate.count, "abstained": self.without[0], "failed": self.without[1],
            "length": self.lengths[0], "length_first": self.lengths[1],
        })
    }
}

/// The held-out prompts, and what the first weights answer.
struct Contest {
    prompts: Vec<Prompt>,
    /// Answers of the first weights, once there are some.
    first: Vec<Completion>,
    model: Arc<Decoder>,
    tokenizer: Tokenizer,
    sampling: Sampling,
    labeler: Box<dyn Labeler>,
    retries: u32,
    wants: Wants,
}

impl Contest {
    fn hold(&mut self, step: u64, model: &Arc<Decoder>) -> Result<Evaluated> {
        if self.first.is_empty() {
            self.first = self.answer(&Arc::clone(&self.model))?;
        }
        let present = self.answer(model)?;
        let mean = |answers: &[Completion]| {
            answers.iter().map(|answer| answer.ids.len() as f64).sum::<f64>() / answers.len() as f64
        };
        let lengths = [mean(&present), mean(&self.first)];
        let (mut outcomes, mut without, mut failure) = (Vec::new(), [0; 2], None);
        for (prompt, answers) in self.prompts.iter().zip(present.into_iter().zip(&self.first)) {
            let same = answers.0.text == answers.1.text;
            let group = Group { prompt: prompt.clone(), completions: vec![answers.0, answers.1.clone()] };
            let mut labels = ask_many(self.labeler.as_ref(), &[&group], self.retries).pop().unwrap_or_default();
            self.wants.shape(2, &mut labels);
            let Some(preference) = labels.preferences.first() else { continue };
            match &preference.verdict {
                Verdict::Label(p) => outcomes.push(outcome(preference, *p, same)),
                Verdict::Abstention(_) => without[0] += 1,
                Verdict::Failure(why) => {
                    without[1] += 1;
                    failure.get_or_insert_with(|| why.to_string());
                }
            }
        }
        Ok(Evaluated { step, win_rate: interval::mean(&outcomes), lengths, without, failure })
    }

    fn answer(&self, model: &Arc<Decoder>) -> Result<Vec<Completion>> {
        // The likeliest token each time: the seed draws nothing.
        answers(model, &self.tokenizer, &self.prompts, &self.sampling, 0, |_| {})
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn evaluator(work: impl FnOnce() + Send + 'static) -> Evaluator {
        Evaluator { every: 1, jobs: None, course: WinRates::default(), thread: std::thread::spawn(work) }
    }

    #[test]
    fn the_end_waits_for_an_evaluation_and_not_for_ever() {
        let done = Arc::new(AtomicBool::new(false));
        let sets = Arc::clone(&done);
        let short = move || {
            std::thread::sleep(Duration::from_millis(100));
            sets.store(true, Ordering::SeqCst);
        };
        evaluator(short).finish(Duration::from_secs(60));
        assert!(done.load(Ordering::SeqCst), "it did not wait");
        let (_held, never) = bounded::<()>(0);
        let (ends, ended) = bounded(1);
        std::thread::spawn(move || {
            let away = move || {
                let _ = never.recv();
            };
            evaluator(away).finish(Duration::from_millis(50));
            ends.send(())
        });
        ended.recv_timeout(Duration::from_secs(30)).expect("it waits for a judge that is away");
    }
}

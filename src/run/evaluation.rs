//! Win rates during training: the current weights against the initial weights on held-out prompts, judged by
//! `evaluation.labeler` or by the run's labeler.
//!
//! A reward that rises while the win rate falls indicates reward hacking. A separate thread generates and judges the
//! answers; the learner passes its weights on and continues. Each evaluation is one line of `evaluations.jsonl`.

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

/// Name of the file of evaluations in the run's directory.
pub(super) const NAME: &str = "evaluations.jsonl";

/// Result of one evaluation.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Evaluation {
    pub(super) step: u64,
    /// Share of prompts on which the answer of the current weights is better; a tie counts one half.
    pub(super) win_rate: Estimate,
    /// Mean lengths in tokens of the answers of the current and of the initial weights.
    pub(super) lengths: [f64; 2],
    /// Numbers of prompts without a verdict: abstentions and failures of the judge.
    pub(super) without_verdict: [usize; 2],
    /// Reason of the judge's first failure.
    pub(super) failure: Option<String>,
}

/// Outcome of [`Evaluator::submit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Submission {
    /// The step is not one that is evaluated.
    NotDue,
    /// The weights are being evaluated.
    Accepted,
    /// The weights are not evaluated, because the previous evaluation is still running.
    Busy,
}

/// Thread that evaluates the weights of a run.
pub(super) struct Evaluator {
    every: u64,
    jobs: Option<Sender<(u64, Arc<Decoder>)>>,
    win_rates: WinRates,
    thread: JoinHandle<()>,
}

impl Evaluator {
    /// Starts the evaluator, or returns `None` if `config` asks for no evaluation. Removes evaluations after `step`
    /// from the file in `dir` and puts the others into `win_rates`. Calls `report` with each evaluation.
    ///
    /// # Errors
    /// If the file cannot be read or written, or a template of the judge cannot be used.
    pub(super) fn start(
        config: &Config,
        prepared: &Prepared,
        dir: &Path,
        step: u64,
        win_rates: WinRates,
        report: impl Fn(Result<Evaluation>) + Send + 'static,
    ) -> Result<Option<Self>> {
        let every = config.evaluation.every_steps;
        let Some(data) = prepared.held_out.as_ref().filter(|_| every > 0) else { return Ok(None) };
        let order = data.order(0);
        let count = config.evaluation.prompts.min(data.len()) as u64;
        let temperature = config.evaluation_judge().1.first().map_or(1.0, |method| method.pair_temperature);
        let mut evaluation = WinRateEvaluation {
            prompts: (0..count).map(|seq| data.prompt(seq, &order)).collect::<Result<_>>()?,
            initial: Vec::new(),
            model: Arc::clone(prepared.policy()),
            tokenizer: prepared.tokenizer.clone(),
            sampling: Sampling { top_k: Some(1), ..sampling(config, &prepared.tokenizer) },
            labeler: evaluation_judge(config, prepared)?,
            retries: config.labeler.retries,
            wants: Wants::Preferences { pairing: Pairing::Adjacent, temperature },
        };
        let mut log = open(dir, step)?;
        win_rates.restore(earlier_win_rates(dir)?);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(config.evaluation.threads).build()?;
        let (jobs, todo) = bounded::<(u64, Arc<Decoder>)>(0);
        let noted = win_rates.clone();
        let thread = std::thread::Builder::new().name("evaluation".into()).spawn(move || {
            for (step, model) in todo {
                let evaluated = pool.install(|| evaluation.run(step, &model));
                if let Ok(evaluated) = &evaluated
                    && let Err(error) = log.append(format!("{}\n", evaluated.to_json()).as_bytes())
                {
                    report(Err(error));
                }
                noted.finish(step, evaluated.as_ref().ok().and_then(|evaluated| evaluated.win_rate.value));
                report(evaluated.with_context(|| format!("step {step} could not be evaluated")));
            }
        })?;
        Ok(Some(Self { every, jobs: Some(jobs), win_rates, thread }))
    }

    /// Submits the weights of `step` for evaluation, unless the step is not due or another evaluation is running.
    pub(super) fn submit(&self, step: u64, model: &Arc<Decoder>) -> Submission {
        let Some(jobs) = self.jobs.as_ref().filter(|_| step.is_multiple_of(self.every)) else {
            return Submission::NotDue;
        };
        // Started first, so that the checkpoint of this step is not removed before its win rate is known.
        self.win_rates.start(step);
        match jobs.try_send((step, Arc::clone(model))) {
            Ok(()) => Submission::Accepted,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.win_rates.finish(step, None);
                Submission::Busy
            }
        }
    }

    /// Accepts no more weights and waits up to `patience` for the running evaluation, so that an unavailable judge does
    /// not prevent the end of the run.
    pub(super) fn finish(mut self, patience: Duration) {
        drop(self.jobs.take());
        let began = Instant::now();
        while !self.thread.is_finished() && began.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Opens the file and cuts off evaluations after `step`.
fn open(dir: &Path, step: u64) -> Result<Log> {
    let path = dir.join(NAME);
    Log::open(&path, length(&path, step)?)
}

/// Returns the length in bytes of the leading evaluations up to `step` in the file at `path`.
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

/// Returns the steps and win rates in the file of the run in `dir`.
///
/// # Errors
/// Names the file that cannot be read.
fn earlier_win_rates(dir: &Path) -> Result<Vec<(u64, f64)>> {
    let path = dir.join(NAME);
    if disk::length(&path)?.is_none() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(|error| disk::cannot("read", &path, error))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter_map(|line| Some((line["step"].as_u64()?, line["win_rate"].as_f64()?))).collect())
}

impl Evaluation {
    fn to_json(&self) -> Value {
        json!({
            "step": self.step, "win_rate": self.win_rate.value, "low": self.win_rate.low, "high": self.win_rate.high,
            "verdicts": self.win_rate.count, "abstained": self.without_verdict[0], "failed": self.without_verdict[1],
            "length": self.lengths[0], "length_first": self.lengths[1],
        })
    }
}

/// The held-out prompts with the answers of the initial weights, and the parts that generate and judge answers.
struct WinRateEvaluation {
    prompts: Vec<Prompt>,
    /// Answers of the initial weights; empty before the first evaluation.
    initial: Vec<Completion>,
    model: Arc<Decoder>,
    tokenizer: Tokenizer,
    sampling: Sampling,
    labeler: Box<dyn Labeler>,
    retries: u32,
    wants: Wants,
}

impl WinRateEvaluation {
    fn run(&mut self, step: u64, model: &Arc<Decoder>) -> Result<Evaluation> {
        if self.initial.is_empty() {
            self.initial = self.answer(&Arc::clone(&self.model))?;
        }
        let current = self.answer(model)?;
        let mean = |answers: &[Completion]| {
            answers.iter().map(|answer| answer.ids.len() as f64).sum::<f64>() / answers.len() as f64
        };
        let lengths = [mean(&current), mean(&self.initial)];
        let (mut outcomes, mut without_verdict, mut failure) = (Vec::new(), [0; 2], None);
        for (prompt, answers) in self.prompts.iter().zip(current.into_iter().zip(&self.initial)) {
            let same = answers.0.text == answers.1.text;
            let group = Group { prompt: prompt.clone(), completions: vec![answers.0, answers.1.clone()] };
            let mut labels = ask_many(self.labeler.as_ref(), &[&group], self.retries).pop().unwrap_or_default();
            self.wants.shape(2, &mut labels);
            let Some(preference) = labels.preferences.first() else { continue };
            match &preference.verdict {
                Verdict::Label(p) => outcomes.push(outcome(preference, *p, same)),
                Verdict::Abstention(_) => without_verdict[0] += 1,
                Verdict::Failure(why) => {
                    without_verdict[1] += 1;
                    failure.get_or_insert_with(|| why.to_string());
                }
            }
        }
        Ok(Evaluation { step, win_rate: interval::mean(&outcomes), lengths, without_verdict, failure })
    }

    fn answer(&self, model: &Arc<Decoder>) -> Result<Vec<Completion>> {
        // Greedy sampling does not use the seed.
        answers(model, &self.tokenizer, &self.prompts, &self.sampling, 0, |_| {})
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn evaluator(work: impl FnOnce() + Send + 'static) -> Evaluator {
        Evaluator { every: 1, jobs: None, win_rates: WinRates::default(), thread: std::thread::spawn(work) }
    }

    #[test]
    fn finish_waits_for_an_evaluation_up_to_its_patience() {
        let done = Arc::new(AtomicBool::new(false));
        let sets = Arc::clone(&done);
        let short = move || {
            std::thread::sleep(Duration::from_millis(100));
            sets.store(true, Ordering::SeqCst);
        };
        evaluator(short).finish(Duration::from_secs(60));
        assert!(done.load(Ordering::SeqCst), "finish did not wait");
        let (_held, never) = bounded::<()>(0);
        let (ends, ended) = bounded(1);
        std::thread::spawn(move || {
            let away = move || {
                let _ = never.recv();
            };
            evaluator(away).finish(Duration::from_millis(50));
            ends.send(())
        });
        ended.recv_timeout(Duration::from_secs(30)).expect("finish waits longer than its patience");
    }
}

//! A worker that answers questions for a run's judges, whose weights it holds.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use preceptor_actors::transport::{Lease, Transport, TransportError};

use super::coordinator::QueueNames;
use super::fetch::WorkerStore;
use super::notices::Notices;
use super::protocol::{JudgeNotice, LabelDone, LabelWork, Pulse, RunNotice, decode, encode};
use super::roster::LABEL;
use super::worker::{Ended, PULL, PULSE, STUCK, Summary, WorkerPlan, folder, host, is_over, wait_for_run};
use crate::config::{Choice, MatmulPrecision};
use crate::lm::load::load;
use crate::lm::model::{Embedder, LoadTarget};
use crate::lm::precision;
use crate::lm::source::{Candidate, ModelRef};
use crate::lm::tokens::chat::Variables;
use crate::observe::telemetry::worker as telemetry;
use crate::pipeline::label::backend::{Backend, Usage};
use crate::pipeline::label::likelihood::TokenJudge;
use crate::pipeline::label::local::{Judge, Local};
use crate::pipeline::label::workers::questions::{LabelAnswer, Question};
use crate::status;

/// Time to wait for an answer before the worker looks for anything else.
const LOOK: Duration = Duration::from_millis(50);

/// Answers questions for the run's judges until the run ends, or until `stop` is set and the question under way is answered
/// or the time for that is over. Models are computed on the threads of `pool`.
///
/// # Errors
/// If the run has no judges on workers, or their weights cannot be used; or if the worker is shut out. Outages of the
/// transport are waited for.
pub fn judge(
    plan: &WorkerPlan,
    device: &Device,
    pool: &rayon::ThreadPool,
    transport: &dyn Transport,
    notices: &dyn Notices,
    stop: &AtomicBool,
) -> Result<Summary> {
    let mut total = Summary::default();
    let (mut left, mut store) = (None, None);
    let mut loaded = HashMap::new();
    'lineages: loop {
        let Some(notice) = wait_for_run(plan, notices, stop, left)? else { return Ok(total) };
        ensure!(
            !notice.judges.is_empty(),
            "the run {} has no judges for workers; set labeler.engine = \"workers\" in its configuration, or start this worker without --role label",
            plan.run
        );
        status!("worker    {} labels for {}, lineage {:016x}", plan.name, plan.run, notice.lineage);
        let opened = WorkerStore::open(&plan.store, &plan.run, &notice.store, store.take())?;
        let store = store.insert(opened);
        for judge in &notice.judges {
            if loaded.contains_key(&judge.name) {
                continue;
            }
            let Some(dir) = folder(plan, store, &notice, (&judge.name, &judge.sha256), notices, stop)? else {
                left = Some(notice.lineage);
                continue 'lineages;
            };
            let model = pool.install(|| Model::load(&dir, judge, device));
            let model = model.with_context(|| format!("the judge {} cannot be used", judge.name))?;
            loaded.insert(judge.name.clone(), Arc::new(model));
        }
        let names = QueueNames::of(&plan.run, notice.lineage);
        let lease = Duration::from_millis(notice.lease_ms);
        let mut lineage =
            Lineage { plan, notice, names, lease, judges: &loaded, pool, total: &mut total, under_way: None };
        let ended = lineage.work(transport, notices, stop);
        plan.health.uses(None);
        let ended = ended?;
        if matches!(ended, Ended::Stopped) {
            lineage.pulse(notices, true)?;
            return Ok(total);
        }
        left = Some(lineage.notice.lineage);
    }
}

/// A judge's model.
enum Model {
    Language(Local),
    Encoder(Box<Embedder>),
}

impl Model {
    fn load(dir: &std::path::Path, notice: &JudgeNotice, device: &Device) -> Result<Self> {
        let check = |fingerprint: u64| {
            ensure!(
                fingerprint == notice.fingerprint,
                "its weights have the fingerprint {fingerprint:016x}, and the coordinator announced {:016x}; use programs of one version",
                notice.fingerprint
            );
            Ok(())
        };
        if notice.encodes {
            let encoder = Embedder::from_directory(dir, device)?;
            check(encoder.identity())?;
            return Ok(Self::Encoder(Box::new(encoder)));
        }
        let dtype = match notice.dtype.as_str() {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            other => bail!("this program does not know weights of the type {other}"),
        };
        let word = MatmulPrecision::WORDS.iter().find(|(word, _)| *word == notice.matmul_precision);
        let (_, matmul) =
            word.with_context(|| format!("this program does not know the precision {}", notice.matmul_precision))?;
        precision::set_matmul_precision(*matmul);
        let files = ModelRef(vec![Candidate::Path(dir.to_owned())]);
        let (model, tokenizer, _) = load(&files, LoadTarget { device, dtype }, Duration::ZERO, false)?;
        let fingerprint = model.weights().fingerprint()?;
        check(fingerprint)?;
        let tokenizer = tokenizer.with_variables(Variables::new(&notice.chat_template_kwargs, notice.date));
        Ok(Self::Language(Local::new(Judge::new(Arc::new(model), tokenizer, fingerprint, notice.chat))))
    }

    fn answer(&self, question: &Question) -> Result<LabelAnswer> {
        let mut usage = Usage::default();
        Ok(match (self, question) {
            (Self::Language(local), Question::Weigh { asks, common }) => {
                warm(local, asks.first().map(|ask| ask.prompt.as_str()), *common)?;
                LabelAnswer::Weighed(local.weigh(asks, &mut usage), usage)
            }
            (Self::Language(local), Question::Write { prompts, decoding, common }) => {
                warm(local, prompts.first().map(String::as_str), *common)?;
                LabelAnswer::Written(local.write(prompts, decoding, &mut usage), usage)
            }
            (Self::Language(local), Question::Score { prompt, completions, temperatures }) => {
                let completions: Vec<&[u32]> = completions.iter().map(Vec::as_slice).collect();
                LabelAnswer::Scored(local.judge().logprobs(prompt, &completions, temperatures)?)
            }
            (Self::Encoder(encoder), Question::Embed(texts)) => {
                LabelAnswer::Embedded(encoder.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>())?)
            }
            _ => bail!("the judge cannot answer this kind of question"),
        })
    }
}

/// Keeps the computed prefix of the first `common` bytes of `prompt`, which all prompts of its template begin with.
fn warm(local: &Local, prompt: Option<&str>, common: usize) -> Result<()> {
    let Some(text) = prompt.and_then(|prompt| prompt.get(..common)).filter(|text| !text.is_empty()) else {
        return Ok(());
    };
    local.warm(&["A", "zebra"].map(|end| format!("{text}{end}")))
}

/// A question that is being answered.
struct UnderWay {
    lease: Box<dyn Lease>,
    id: u64,
    answer: Receiver<LabelAnswer>,
    began: Instant,
    extended: Instant,
    /// The answer, if it could not be handed over yet.
    done: Option<LabelDone>,
}

/// The work for one lineage of a run.
struct Lineage<'a> {
    plan: &'a WorkerPlan,
    notice: RunNotice,
    names: QueueNames,
    lease: Duration,
    judges: &'a HashMap<String, Arc<Model>>,
    pool: &'a rayon::ThreadPool,
    total: &'a mut Summary,
    under_way: Option<UnderWay>,
}

impl Lineage<'_> {
    fn work(&mut self, transport: &dyn Transport, notices: &dyn Notices, stop: &AtomicBool) -> Result<Ended> {
        let (mut pulsed, mut drain) = (None::<Instant>, None::<Instant>);
        loop {
            let used = usize::from(self.under_way.is_some());
            self.plan.health.working([used, 0], [used, 1]);
            // A judge's weights have no versions.
            self.plan.health.uses(Some(0));
            if drain.is_none() && stop.load(Ordering::SeqCst) {
                drain = Some(Instant::now());
            }
            if drain.is_some_and(|began| self.under_way.is_none() || began.elapsed() > self.plan.drain) {
                self.give_back();
                return Ok(Ended::Stopped);
            }
            if pulsed.is_none_or(|at| at.elapsed() > PULSE) {
                pulsed = Some(Instant::now());
                self.pulse(notices, false)?;
                if let Some(ended) = is_over(self.plan, &self.notice, notices)? {
                    self.give_back();
                    return Ok(ended);
                }
            }
            if self.under_way.is_some() {
                self.advance(transport)?;
            } else if !self.pull(transport)? {
                // The queue may be gone, because the run has another coordinator.
                pulsed = None;
            }
        }
    }

    fn give_back(&mut self) {
        if let Some(under_way) = self.under_way.take() {
            self.total.given_back += 1;
            if let Err(error) = under_way.lease.give_back() {
                tracing::debug!("a question cannot be given back: {error}");
            }
        }
    }

    /// Pulls a question and begins to answer it. Returns false if the queue does not answer.
    fn pull(&mut self, transport: &dyn Transport) -> Result<bool> {
        let lease = match transport.pull(&self.names.questions, 1, PULL) {
            Ok(leases) => leases.into_iter().next(),
            Err(error @ (TransportError::Unavailable(_) | TransportError::Unknown(_))) => {
                tracing::debug!("{error}");
                std::thread::sleep(PULL);
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        let Some(lease) = lease else { return Ok(true) };
        let work: LabelWork = decode(lease.body()).context("a question of the run cannot be read")?;
        let (send, answer) = bounded(1);
        let model = self.judges.get(&work.judge).cloned();
        let (id, judge) = (work.id, work.judge.clone());
        self.pool.spawn(move || {
            let answered = match model {
                Some(model) => catch_unwind(AssertUnwindSafe(|| model.answer(&work.question)))
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("internal error: the worker panicked"))),
                None => Err(anyhow::anyhow!("the worker does not have the judge {judge}")),
            };
            // The worker may have stopped meanwhile.
            let _ = send.send(answered.unwrap_or_else(|error| LabelAnswer::Failed(format!("{error:#}"))));
        });
        let now = Instant::now();
        self.under_way = Some(UnderWay { lease, id, answer, began: now, extended: now, done: None });
        Ok(true)
    }

    /// Waits for the answer for a moment, keeps the lease, and hands the answer over once it is there.
    fn advance(&mut self, transport: &dyn Transport) -> Result<()> {
        let Some(under_way) = &mut self.under_way else { return Ok(()) };
        if under_way.done.is_none() {
            match under_way.answer.recv_timeout(LOOK) {
                Ok(answer) => {
                    under_way.done = Some(LabelDone {
                        lineage: self.notice.lineage,
                        id: under_way.id,
                        worker: self.plan.name.clone(),
                        answer,
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("internal error: a question was dropped"),
            }
        }
        if under_way.extended.elapsed() > self.lease / 3 && under_way.began.elapsed() < STUCK * 5 {
            under_way.extended = Instant::now();
            if let Err(error) = under_way.lease.extend() {
                tracing::debug!("the lease of a question cannot be extended: {error}");
            }
        }
        let Some(done) = &under_way.done else { return Ok(()) };
        let id = format!("{}-{}", under_way.lease.id(), self.plan.name);
        let offered = encode(done).map(|body| (transport.offer(&self.names.answers, &id, &body), body.len()))?;
        match offered {
            (Ok(_), bytes) => self.handed_over(bytes),
            (Err(error @ TransportError::TooLarge { .. }), _) => {
                under_way.done = Some(LabelDone { answer: LabelAnswer::Failed(error.to_string()), ..done.clone() });
            }
            (Err(TransportError::Unavailable(why) | TransportError::Unknown(why)), _) => {
                tracing::debug!("an answer is handed over later: {why}");
                std::thread::sleep(PULL);
            }
            (Err(TransportError::Full { .. }), _) => std::thread::sleep(PULL),
            (Err(error), _) => bail!("an answer cannot be handed over: {error}"),
        }
        Ok(())
    }

    fn handed_over(&mut self, bytes: usize) {
        let Some(UnderWay { lease, done: Some(done), .. }) = self.under_way.take() else { return };
        self.total.groups += 1;
        self.total.bytes += bytes as u64;
        let tokens = match done.answer {
            LabelAnswer::Weighed(_, usage) | LabelAnswer::Written(_, usage) => {
                usage.prompt_tokens + usage.completion_tokens
            }
            LabelAnswer::Scored(scores) => scores.read as u64,
            LabelAnswer::Embedded(_) | LabelAnswer::Failed(_) => 0,
        };
        self.total.tokens += tokens;
        telemetry::handed_over(1, tokens, bytes as u64);
        if let Err(error) = lease.acknowledge() {
            // It is delivered again, and its second answer is dropped.
            tracing::debug!("a question cannot be acknowledged: {error}");
        }
    }

    /// Gives a sign of life; the last one if the worker `leaves`.
    fn pulse(&self, notices: &dyn Notices, leaves: bool) -> Result<()> {
        let pulse = Pulse {
            role: LABEL.into(),
            program: env!("CARGO_PKG_VERSION").into(),
            host: host(),
            used: usize::from(self.under_way.is_some()),
            slots: 1,
            completions: self.total.groups,
            tokens: self.total.tokens,
            bytes: self.total.bytes,
            leaves,
            ..Pulse::default()
        };
        if let Err(error) = notices.tell(&self.plan.run, &self.plan.name, &serde_json::to_vec(&pulse)?) {
            tracing::warn!("{error}");
        }
        Ok(())
    }
}

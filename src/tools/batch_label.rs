//! Labeling of files: a graph of a source that reads questions, the labeler actors, and a writer.

pub mod file;

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, bail};
use preceptor_actors::{
    Emitter, GraphBuilder, GraphOptions, Item, Outcome, Source, Stage, StageContext, StageResult, StageSpec,
    WatchdogPolicy, spawn_graph,
};

use crate::config::Config;
use crate::lm::tokens::Tokenizer;
use crate::observe::telemetry;
use crate::pipeline::data::pairs::group;
use crate::pipeline::data::{PreferencePair, Preferences, PromptFormat};
use crate::pipeline::label::guard::without_control;
use crate::pipeline::label::stage::{Wants, ask_many, sign_of_life};
use crate::pipeline::label::{Labeler, Labels};
use crate::types::Group;
use crate::util::mutex::lock;
use crate::util::signals;

/// Source of the questions to label, by index.
pub trait Questions: Send + Sync {
    /// Returns question `i` as a group.
    ///
    /// # Errors
    /// If the question can no longer be read.
    fn group(&self, i: usize) -> Result<Group>;
}

/// Source of questions that compares the two answers of each pair of a file.
pub struct PairQuestions {
    /// The pairs.
    pub pairs: Arc<Preferences>,
    /// Prompt format for judges that read tokens.
    pub format: PromptFormat,
    /// Tokenizer of judges that read tokens.
    pub tokenizer: Tokenizer,
}

impl PairQuestions {
    /// Returns `pair`, the pair `i` of the file, as a group. Text in an answer that spells a control token is escaped
    /// to plain text.
    ///
    /// # Errors
    /// If the format does not support the dialogue.
    pub fn ask(&self, i: usize, mut pair: PreferencePair) -> Result<Group> {
        let control = self.tokenizer.control_tokens();
        for text in [&mut pair.first, &mut pair.second] {
            if let Cow::Owned(plain) = without_control(text, &control) {
                *text = plain;
            }
        }
        group(i as u64, &pair, &self.format, &self.tokenizer)
    }
}

impl Questions for PairQuestions {
    fn group(&self, i: usize) -> Result<Group> {
        self.ask(i, self.pairs.get(i)?)
    }
}

/// A question of a batch job with the labels that it received.
pub struct Annotation {
    /// Index of the question.
    pub question: usize,
    /// The question.
    pub group: Group,
    /// The labeler's answer.
    pub labels: Labels,
}

/// Receiver of labeled questions, in batches. Each question is delivered once.
pub trait Annotations: Send {
    /// Stores a labeled batch.
    ///
    /// # Errors
    /// If the batch cannot be stored, which ends the job.
    fn take(&mut self, batch: Vec<Annotation>) -> Result<()>;
}

/// Specification of a labeling job: the questions, the labelers, and the form of the labels.
pub struct Job {
    /// Configuration with the numbers of workers, threads and retries, and the watchdog's times.
    pub config: Config,
    /// The questions.
    pub questions: Arc<dyn Questions>,
    /// Indices of the questions to label, in order.
    pub todo: Vec<usize>,
    /// Number of questions per labeler call.
    pub batch: usize,
    /// Requested form of the labels.
    pub wants: Wants,
    /// Creates the labeler of each labeler actor.
    pub labelers: Box<dyn Fn() -> Result<Box<dyn Labeler>> + Send + Sync>,
    /// Set when a judge's outage exceeded `labeler.remote.outage_s`. No further question is asked then.
    pub gave_up: Arc<AtomicBool>,
}

/// Labels the questions of `job` with the configured number of labeler actors. Returns false if it was interrupted.
///
/// # Errors
/// If a labeler cannot be created or fails more often than the restart budget allows, or if `out` reports an error.
pub fn annotate(job: Job, out: Arc<Mutex<dyn Annotations>>) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let supervision = &job.config.supervision;
    let options = GraphOptions {
        watchdog: WatchdogPolicy {
            stall_after: std::time::Duration::from_secs_f64(supervision.stall_after_s),
            restart_after: Some(std::time::Duration::from_secs_f64(supervision.restart_after_s)),
        },
        ..GraphOptions::default()
    };
    let left = Arc::new(Mutex::new(job.todo.clone()));
    let _deferred = signals::defer();
    let mut handled = 0;
    let outcome = runtime.block_on(async {
        let graph = spawn_graph(options, move |builder| wire(builder, &job, &left, &out));
        loop {
            tokio::select! {
                outcome = graph.wait() => return outcome,
                _ = signals::after(handled) => {
                    handled = signals::count();
                    graph.halt();
                }
            }
        }
    });
    runtime.shutdown_background();
    match outcome {
        Outcome::Finished => Ok(true),
        Outcome::Drained | Outcome::Halted => Ok(false),
        Outcome::Failed { stage, error, .. } => bail!("labeling ended because {stage} failed: {error}"),
    }
}

fn wire(
    builder: &mut GraphBuilder,
    job: &Job,
    left: &Arc<Mutex<Vec<usize>>>,
    out: &Arc<Mutex<dyn Annotations>>,
) -> StageResult<()> {
    let labeler = &job.config.labeler;
    let (questions_out, questions) = builder.edge("questions", 1);
    let (labeled_out, labeled) = builder.edge("labeled", labeler.capacity);
    // After a restart, questions that were not yet stored are asked again.
    let todo = lock(left).clone();
    let gave_up = || Arc::clone(&job.gave_up);
    let source = Ask { questions: Arc::clone(&job.questions), todo, batch: job.batch, next: 0, gave_up: gave_up() };
    builder.source(StageSpec::new("questions").role("questions"), source, questions_out);
    for worker in 0..labeler.workers {
        let stage =
            Label { labeler: (job.labelers)()?, retries: labeler.retries, wants: job.wants, gave_up: gave_up() };
        let spec = StageSpec::new(format!("label-{worker}")).role("label").threads(labeler.threads);
        builder.stage(spec, stage, questions.clone(), labeled_out.clone());
    }
    drop((questions, labeled_out));
    let take = Take { out: Arc::clone(out), left: Arc::clone(left) };
    builder.sink(StageSpec::new("write").role("write"), take, labeled);
    Ok(())
}

struct Ask {
    questions: Arc<dyn Questions>,
    todo: Vec<usize>,
    batch: usize,
    next: usize,
    gave_up: Arc<AtomicBool>,
}

impl Source for Ask {
    type Out = Vec<(usize, Group)>;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Self::Out>>> {
        let end = (self.next + self.batch.max(1)).min(self.todo.len());
        if self.next == end || self.gave_up.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let body = self.todo[self.next..end]
            .iter()
            .map(|i| Ok((*i, self.questions.group(*i)?)))
            .collect::<Result<Vec<_>>>()?;
        let seq = self.next as u64;
        self.next = end;
        Ok(Some(Item { seq, incarnation: ctx.incarnation(), version: 0, body }))
    }
}

struct Label {
    labeler: Box<dyn Labeler>,
    retries: u32,
    wants: Wants,
    gave_up: Arc<AtomicBool>,
}

impl Stage for Label {
    type In = Vec<(usize, Group)>;
    type Out = Vec<Annotation>;

    fn start(&mut self, ctx: &StageContext) -> StageResult<()> {
        self.labeler.register_liveness(ctx.name(), &sign_of_life(ctx));
        Ok(())
    }

    fn process(&mut self, item: Item<Self::In>, out: &Emitter<'_, Self::Out>) -> StageResult<()> {
        let started = out.ctx().clock().now();
        let groups: Vec<&Group> = item.body.iter().map(|(_, group)| group).collect();
        let mut labels = ask_many(self.labeler.as_ref(), &groups, self.retries);
        if self.labeler.waits() && labels.iter().any(|labels| labels.failure().is_some()) {
            self.gave_up.store(true, Ordering::SeqCst);
        }
        for (labels, group) in labels.iter_mut().zip(&groups) {
            telemetry::labels(self.labeler.name(), &labels.counts());
            self.wants.shape(group.completions.len(), labels);
        }
        telemetry::label_took(out.ctx().clock().now().saturating_sub(started));
        let body = item
            .body
            .into_iter()
            .zip(labels)
            .map(|((question, group), labels)| Annotation { question, group, labels })
            .collect();
        out.emit(Item { seq: item.seq, incarnation: item.incarnation, version: 0, body })?;
        Ok(())
    }
}

struct Take {
    out: Arc<Mutex<dyn Annotations>>,
    left: Arc<Mutex<Vec<usize>>>,
}

impl Stage for Take {
    type In = Vec<Annotation>;
    type Out = ();

    fn process(&mut self, item: Item<Self::In>, _out: &Emitter<'_, ()>) -> StageResult<()> {
        let stored: Vec<usize> = item.body.iter().map(|annotation| annotation.question).collect();
        self.out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(item.body)
            .map_err(preceptor_actors::StageError::fatal)?;
        lock(&self.left).retain(|i| !stored.contains(i));
        Ok(())
    }
}

//! Replays the learner steps of a run from its journal: the same groups in the same order give bit-identical weights,
//! independently of the timing of the original run.

use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use preceptor_actors::{GraphBuilder, Item, Outcome, SnapshotCell, Source, StageContext, StageResult, StageSpec};

use super::journal::{Entry, Journal, Step};
use super::reference;
use super::supervise::graph_options;
use crate::config::{self, Config};
use crate::lm::model::export;
use crate::pipeline::learn::TrainState;
use crate::pipeline::learn::stage::Learn;
use crate::pipeline::learn::{Done, Observer};
use crate::pipeline::setup::{Prepared, prepare_policy};
use crate::pipeline::topology::learning::{adam, algorithm, learn_plan, lora, threads, value_model};
use crate::pipeline::topology::open_gate;
use crate::run::checkpoint::Identity;
use crate::types::Rewarded;
use crate::util::exit::before_work;
use crate::util::mutex::lock;

/// Result of a replay in which all weights were as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// Number of the last replayed step.
    pub steps: u64,
    /// Fingerprint of the weights after that step.
    pub fingerprint: u64,
}

/// Replays the steps of the run in `dir` up to `until` or the end of the journal, and compares the weights after each
/// step with the recorded fingerprint. Writes the final weights to `output`, if given, and calls `report` with each step.
///
/// # Errors
/// If the journal is missing, damaged or empty, the run's models or data cannot be loaded, or a step gives other
/// weights than the run recorded; the first such step is named.
pub async fn replay(
    dir: &Path,
    until: Option<u64>,
    output: Option<PathBuf>,
    report: impl Fn(u64) + Send + Sync + 'static,
) -> Result<Replayed> {
    let (journal, first) = before_work(|| {
        let mut journal = Journal::open(dir)?.peekable();
        let first = next_config(&mut journal)?
            .with_context(|| format!("the journal in {} does not begin with a configuration", dir.display()))?;
        Ok((journal, first))
    })?;
    let mut config = first;
    let prepared = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || prepare_policy(&config, true)).await??
    };
    let base = Identity { reference: prepared.identity, data: prepared.data.identity() };
    let prepared = match reference::find(&config, &base, dir)? {
        Some(reference) => reference.load_into(&config, prepared)?,
        None => {
            ensure!(config.sft.steps == 0, "the fine-tuned policy that the run began with is not in {}", dir.display());
            prepared
        }
    };
    let mut state = TrainState::new(
        prepared.policy(),
        adam(&config),
        value_model(&config, prepared.policy())?,
        lora(&config).as_ref(),
    )?;
    state.place(prepared.devices.learner.clone());
    let progress = Arc::new(Mutex::new(ReplayProgress { expected: None, replayed: None, report: Box::new(report) }));
    let session = Replay {
        state: Arc::new(Mutex::new(state)),
        cell: Arc::new(SnapshotCell::new(0, prepared.identity, Arc::clone(prepared.policy()))),
        journal: Arc::new(Mutex::new(journal)),
        until,
        progress: Arc::clone(&progress),
    };
    loop {
        session.run_segment(&config).await?;
        // The segment ended at a configuration of a resumed run or at the end of the journal.
        match next_config(&mut lock(&session.journal))? {
            Some(next) => config = next,
            None => break,
        }
    }
    let replayed = lock(&progress).replayed.clone();
    let replayed = replayed.with_context(|| format!("the journal in {} has no steps", dir.display()))?;
    if let Some(output) = output {
        write(&output, &prepared, &session.state)?;
    }
    Ok(replayed)
}

fn write(dir: &Path, prepared: &Prepared, state: &Mutex<TrainState>) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let state = lock(state);
    export::write(dir, state.config(), &state.published().merged()?, candle_core::DType::F32)?;
    prepared.tokenizer.save(dir)
}

/// Returns the configuration at the current position of the journal, or `None` at the end or before a step.
fn next_config(journal: &mut Peekable<Journal>) -> Result<Option<Config>> {
    // The journal has the labels, so a change of the judge does not affect a replay.
    while let Some(Ok(entry)) = journal.next_if(|entry| matches!(entry, Ok(Entry::Accepted(_) | Entry::Closed(_)))) {
        if let Entry::Closed(step) = entry {
            let step = u64::from_le_bytes(step);
            tracing::warn!(
                "the journal was full (checkpoint.journal_max_bytes): step {step} and later ones are not in it"
            );
        }
    }
    match journal.next_if(|entry| !matches!(entry, Ok(Entry::Step(_)))) {
        None => Ok(None),
        Some(Ok(Entry::Config(text))) => Ok(Some(config::parse(&text, "the journal", Path::new(""), &[])?)),
        Some(Ok(Entry::Step(_) | Entry::Accepted(_) | Entry::Closed(_))) => {
            bail!("the journal has no configuration where one is expected")
        }
        Some(Err(error)) => Err(error),
    }
}

/// The state that is shared by the graphs of all segments.
struct Replay {
    state: Arc<Mutex<TrainState>>,
    cell: Arc<SnapshotCell<crate::lm::model::Decoder>>,
    journal: Arc<Mutex<Peekable<Journal>>>,
    until: Option<u64>,
    progress: Arc<Mutex<ReplayProgress>>,
}

impl Replay {
    /// Replays the steps up to the next configuration.
    async fn run_segment(&self, config: &Config) -> Result<()> {
        let (state, cell, progress) = (Arc::clone(&self.state), Arc::clone(&self.cell), Arc::clone(&self.progress));
        let (journal, until, settings) = (Arc::clone(&self.journal), self.until, config.clone());
        let wire = move |builder: &mut GraphBuilder| -> StageResult<()> {
            let (out, batches) = builder.edge("journal", settings.reward.capacity);
            let source = JournalSource {
                journal: Arc::clone(&journal),
                until,
                progress: Arc::clone(&progress),
                groups: Vec::new().into_iter(),
            };
            builder.source(StageSpec::new("journal"), source, out);
            let learn = Learn::new(
                Arc::clone(&state),
                algorithm(&settings),
                learn_plan(&settings),
                Arc::clone(&cell),
                open_gate(u64::MAX / 2),
                progress.clone(),
            );
            builder.sink(StageSpec::new("learn").threads(threads(&settings)), learn, batches);
            Ok(())
        };
        let options = preceptor_actors::GraphOptions {
            restart: preceptor_actors::RestartPolicy::never(),
            ..graph_options(config)
        };
        match preceptor_actors::spawn_graph(options, wire).wait().await {
            Outcome::Failed { error, .. } => bail!("{error}"),
            Outcome::Finished | Outcome::Drained | Outcome::Halted => Ok(()),
        }
    }
}

/// Source of the journal's groups, one at a time.
struct JournalSource {
    journal: Arc<Mutex<Peekable<Journal>>>,
    until: Option<u64>,
    progress: Arc<Mutex<ReplayProgress>>,
    groups: std::vec::IntoIter<Rewarded>,
}

impl Source for JournalSource {
    type Out = Rewarded;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Rewarded>>> {
        loop {
            if let Some(body) = self.groups.next() {
                let seq = body.group.prompt.seq;
                return Ok(Some(Item { seq, incarnation: ctx.incarnation(), version: 0, body }));
            }
            let mut journal = lock(&self.journal);
            let wanted = |entry: &Result<Entry>| match entry {
                Ok(Entry::Step(Step { step, .. })) => self.until.is_none_or(|until| *step <= until),
                Ok(Entry::Config(_) | Entry::Accepted(_) | Entry::Closed(_)) => false,
                Err(_) => true,
            };
            match journal.next_if(wanted).transpose()? {
                Some(Entry::Step(Step { step, fingerprint, batch })) => {
                    let mut progress = lock(&self.progress);
                    progress.expected.get_or_insert_default().push_back((step, fingerprint));
                    self.groups = batch.into_iter();
                }
                Some(Entry::Config(_) | Entry::Accepted(_) | Entry::Closed(_)) | None => return Ok(None),
            }
        }
    }
}

/// Observer that compares the weights of each step with the recorded fingerprint.
struct ReplayProgress {
    /// Recorded steps and fingerprints that are still to be compared.
    expected: Option<std::collections::VecDeque<(u64, u64)>>,
    replayed: Option<Replayed>,
    report: Box<dyn Fn(u64) + Send + Sync>,
}

impl Observer for ReplayProgress {
    fn group(&mut self, _done: u64, _of: u64) {}

    fn step(&mut self, done: Done<'_>, state: &TrainState) -> Result<()> {
        let (step, fingerprint) = self.expected.as_mut().and_then(|all| all.pop_front()).unwrap_or_default();
        ensure!(step == state.step, "step {} was taken where the journal has step {step}", state.step);
        ensure!(
            fingerprint == done.fingerprint,
            "step {step} gives weights {:016x}, but the run recorded {fingerprint:016x}; a bit-identical replay needs the same program, kind of processor, learner.threads and learner.replicas",
            done.fingerprint
        );
        self.replayed = Some(Replayed { steps: step, fingerprint });
        (self.report)(step);
        Ok(())
    }

    fn nonfinite(&mut self, _step: u64, _batch: &[Rewarded]) {}
}

//! Opens the directory of a run: finds the checkpoint to resume from and verifies it before anything is changed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};

use super::files::{RunDir, RunFiles, SAMPLES};
use super::resume::AcceptedKeys;
use super::rewind::{self, FileLengths, SetAside};
use super::{StartFrom, begin, evaluation, journal, phases, reference, rotating};
use crate::config::{Config, WIN_RATE};
use crate::pipeline::learn::TrainState;
use crate::pipeline::reward::RewardTrainer;
use crate::pipeline::setup::Prepared;
use crate::pipeline::topology::learning::{adam, lora, value_model};
use crate::pipeline::topology::reward_trainer;
use crate::rl::ledger::SharedLedger;
use crate::run::checkpoint::{
    BestCheckpoint, CheckpointStore, Identity, Lengths, Mirror, OpenedCheckpoint, WinRates, store,
};
use crate::status;
use crate::util::disk;

/// Locks the directory of the run that `from` names, completes an interrupted rewind in it, and removes a partly
/// written reference.
///
/// # Errors
/// If the path is not a checkpoint of a run, or the directory is in use or cannot be written.
pub(super) fn lock_directory(config: &Config, run_dir: Option<PathBuf>, from: &StartFrom) -> Result<RunDir> {
    let dir = match from {
        StartFrom::Beginning => RunDir::create(config, run_dir)?,
        StartFrom::Latest => RunDir::resume(config, run_dir)?,
        StartFrom::Checkpoint(path) => {
            let path = std::path::absolute(path)?;
            let of = run_directory(&path)?;
            ensure!(disk::exists(&of)?, "{} does not exist", path.display());
            let dir = RunDir::resume(config, Some(run_dir.unwrap_or_else(|| of.clone())))?;
            if std::path::absolute(dir.path())? != of {
                bail!(
                    "{} is a checkpoint of the run in {}, not in {}",
                    path.display(),
                    of.display(),
                    dir.path().display()
                );
            }
            dir
        }
    };
    rewind::complete(dir.path())?;
    reference::remove_partial(dir.path())?;
    Ok(dir)
}

/// Returns the directory of the run that the checkpoint at `path` belongs to. The checkpoint may have been set aside.
fn run_directory(path: &Path) -> Result<PathBuf> {
    let of = path.parent().filter(|dir| dir.ends_with("checkpoints")).and_then(Path::parent);
    let of = of.filter(|_| store::step(path).or_else(|| store::step_of_aside(path)).is_some()).with_context(|| {
        format!("{} is not a checkpoint of a run, such as runs/NAME/checkpoints/step-000050", path.display())
    })?;
    if of.ends_with(phases::FINE_TUNING) {
        bail!(
            "{} is a checkpoint of an unfinished fine-tuning, which --resume without a path continues",
            path.display()
        );
    }
    Ok(of.to_owned())
}

/// Directory of a run and the checkpoint that it continues from.
pub(super) struct StartState {
    pub(super) dir: RunDir,
    pub(super) checkpoint: Option<OpenedCheckpoint>,
    pub(super) store: Arc<CheckpointStore>,
    /// Checkpoints after `checkpoint`, with the reason for which they are set aside.
    later: Vec<(PathBuf, &'static str)>,
    /// The record of the rewind that set `checkpoint` aside, if one did.
    aside: Option<SetAside>,
}

/// Opens the checkpoint that `from` selects in `dir`. Changes nothing in the directory, except that it removes unfinished
/// checkpoints and fetches copies from the mirror. `win_rates` selects the best checkpoint if `checkpoint.best` is the
/// win rate.
///
/// # Errors
/// If a checkpoint is damaged or cannot be read, or a new run would overwrite an earlier one.
pub(super) fn open(config: &Config, dir: RunDir, from: &StartFrom, win_rates: WinRates) -> Result<StartState> {
    let mirror = config.checkpoint.mirror.as_deref().map(Mirror::open).transpose()?;
    let keep = &config.checkpoint;
    let best = match keep.best.as_deref() {
        None => BestCheckpoint::None,
        Some(WIN_RATE) => BestCheckpoint::ByWinRate(win_rates),
        Some(_) => BestCheckpoint::ByMetric,
    };
    let store = Arc::new(CheckpointStore::new(dir.path(), keep.keep, best).mirrored(mirror));
    let start = |dir, checkpoint, later, aside, store| Ok(StartState { dir, checkpoint, store, later, aside });
    match from {
        StartFrom::Beginning => start(dir, None, Vec::new(), None, store),
        StartFrom::Latest => {
            // A reference from the mirror does not belong to a fine-tuning that is in progress here.
            let reference = if phases::is_in_progress(dir.path())? {
                None
            } else {
                store.fetch_directory(&reference::directory(dir.path()))?
            };
            for fetched in store.fetch_latest()?.into_iter().chain(reference) {
                status!("fetched   {}", fetched.display());
            }
            let latest = store.latest(|line| status!("{line}"))?;
            if latest.checkpoint.is_none() {
                begin::check_empty(dir.path())?;
            }
            let damaged = latest.damaged.into_iter().map(|path| (path, "damaged")).collect();
            start(dir, latest.checkpoint, damaged, None, store)
        }
        StartFrom::Checkpoint(path) => {
            let path = std::path::absolute(path)?;
            let checkpoint = OpenedCheckpoint::open(&path)?;
            let aside = store::step_of_aside(&path).map(|_| SetAside::find(dir.path(), &path)).transpose()?;
            let branch = aside.as_ref().map_or(checkpoint.step(), SetAside::branch);
            let later = store.later(branch)?.into_iter().map(|path| (path, "superseded")).collect();
            start(dir, Some(checkpoint), later, aside, store)
        }
    }
}

impl StartState {
    /// Opens the files of the run at the point where it continues: the checkpoint, a fine-tuned policy, an unfinished
    /// fine-tuning, or the beginning. Changes the directory, and is therefore called only after all checks have passed.
    ///
    /// # Errors
    /// Names the file that cannot be read or written.
    pub(super) fn files(self, config: &Config, fine_tuning: &FineTuning) -> Result<RunFiles> {
        let run = self.dir.path().to_owned();
        let only_phases = |phases| Lengths { phases, ..Lengths::default() };
        let lengths = match (&self.checkpoint, &fine_tuning.reference, &fine_tuning.unfinished) {
            (Some(checkpoint), _, _) => checkpoint.lengths(),
            (None, Some(reference), _) => only_phases(reference.phases),
            (None, None, Some(unfinished)) => only_phases(unfinished.lengths().phases),
            (None, None, None) => Lengths::default(),
        };
        match &self.checkpoint {
            None => begin::write_pending(&run, config.data.date.as_deref())?,
            Some(checkpoint) => {
                let step = checkpoint.step();
                let set_aside = match &self.aside {
                    None => rewind::rewind(&run, step, &lengths_at(config, &run, lengths, step)?, &self.later)?,
                    Some(aside) => {
                        let later: Vec<PathBuf> = self.later.iter().map(|(path, _)| path.clone()).collect();
                        aside.restore(&run, step, &lengths_of_aside(config, &run, lengths, step, aside)?, &later)?
                    }
                };
                for path in set_aside {
                    status!("set aside {}", path.display());
                }
            }
        }
        for path in &fine_tuning.damaged {
            let to = store::aside_path(path, "damaged")?;
            std::fs::rename(path, &to).map_err(|error| disk::cannot("rename", path, error))?;
            status!("set aside {}", to.display());
        }
        let step = self.checkpoint.as_ref().map_or(0, OpenedCheckpoint::step);
        RunFiles::open(config, self.dir, lengths, step)
    }
}

/// Results of an earlier fine-tuning; empty if the configuration does not ask for fine-tuning.
pub(super) struct FineTuning {
    pub(super) reference: Option<reference::Reference>,
    pub(super) unfinished: Option<OpenedCheckpoint>,
    /// Damaged checkpoints of an unfinished fine-tuning.
    damaged: Vec<PathBuf>,
}

/// Finds the results of fine-tuning `base` in the directory of `start`.
///
/// # Errors
/// If a result is damaged or was made from another model, data set or configuration; or if the run has a checkpoint but
/// its fine-tuned policy is missing.
pub(super) fn fine_tuning(
    config: &Config,
    base: &Identity,
    start: &StartState,
    accepted: &AcceptedKeys,
) -> Result<FineTuning> {
    let run = start.dir.path();
    let reference = reference::find(config, base, run)?;
    let (unfinished, damaged) = match &reference {
        None if config.sft.steps > 0 => phases::resume_fine_tuning(config, base, run, accepted)?,
        _ => (None, Vec::new()),
    };
    if let Some(checkpoint) = start.checkpoint.as_ref().filter(|_| config.sft.steps > 0 && reference.is_none()) {
        bail!(
            "{} is missing, the fine-tuned policy that {} was trained from; restore it, or start a new run from the checkpoint's weights with policy.model = \"{}\"",
            reference::directory(run).display(),
            checkpoint.path().display(),
            checkpoint.path().display()
        );
    }
    Ok(FineTuning { reference, unfinished, damaged })
}

/// The learner's state, the reward model and the ledger, new or restored from a checkpoint.
pub(super) struct LearnerParts {
    pub(super) state: TrainState,
    pub(super) reward_model: Option<Arc<Mutex<RewardTrainer>>>,
    pub(super) ledger: SharedLedger,
}

/// Creates the learner's state, the reward model and the ledger, and restores them from `checkpoint` if there is one.
///
/// # Errors
/// If the checkpoint is of another model or other data, or its tensors do not fit.
pub(super) fn learner(
    config: &Config,
    prepared: &Prepared,
    checkpoint: Option<&OpenedCheckpoint>,
) -> Result<LearnerParts> {
    let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
    if let Some(checkpoint) = checkpoint {
        checkpoint.check_identity(&identity)?;
    }
    let value = value_model(config, prepared.policy())?;
    let mut state = TrainState::new(prepared.policy(), adam(config), value, lora(config).as_ref())?;
    state.place(prepared.devices.learner.clone());
    let reward_model = reward_trainer(config, prepared)?.map(|trainer| Arc::new(Mutex::new(trainer)));
    let ledger = match checkpoint {
        None => SharedLedger::default(),
        Some(checkpoint) => SharedLedger::new(checkpoint.restore(&mut state, reward_model.as_deref())?),
    };
    Ok(LearnerParts { state, reward_model, ledger })
}

/// Returns the lengths that the run's files have at the checkpoint of `step`.
fn lengths_at(config: &Config, run: &Path, lengths: Lengths, step: u64) -> Result<FileLengths> {
    let mut files = FileLengths::from([
        ("metrics.jsonl".to_owned(), lengths.metrics),
        (SAMPLES.to_owned(), rotating::end_of_step(&run.join(SAMPLES), step)?),
        ("phases.jsonl".to_owned(), lengths.phases),
        (evaluation::NAME.to_owned(), evaluation::length(&run.join(evaluation::NAME), step)?),
    ]);
    if config.checkpoint.journal {
        files.insert(journal::NAME.to_owned(), lengths.journal);
    }
    Ok(files)
}

/// Returns the same as [`lengths_at`] for a checkpoint that was set aside with the tails of the run's files.
fn lengths_of_aside(config: &Config, run: &Path, lengths: Lengths, step: u64, aside: &SetAside) -> Result<FileLengths> {
    let mut files = lengths_at(config, run, lengths, step)?;
    let evaluated = evaluation::length(&aside.tail_path(run, evaluation::NAME), step)?;
    files.insert(evaluation::NAME.to_owned(), aside.base_length(evaluation::NAME) + evaluated);
    let sampled = rotating::end_of_step(&aside.tail_path(run, SAMPLES), step)?;
    files.insert(SAMPLES.to_owned(), aside.base_length(SAMPLES) + sampled);
    Ok(files)
}

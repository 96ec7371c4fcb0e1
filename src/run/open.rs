//! Opens the directory of a run: finds what the run is resumed from and verifies it before anything is changed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};

use super::files::{RunDir, RunFiles, SAMPLES};
use super::resume::Accepted;
use super::rewind::{self, Ends, SetAside};
use super::{From, begin, evaluation, journal, phases, reference, rotating};
use crate::config::{Config, WIN_RATE};
use crate::pipeline::learn::TrainState;
use crate::pipeline::reward::RewardTrainer;
use crate::pipeline::setup::Prepared;
use crate::pipeline::topology::learning::{adam, lora, value_model};
use crate::pipeline::topology::reward_trainer;
use crate::rl::ledger::SharedLedger;
use crate::run::checkpoint::{Best, CheckpointStore, Identity, Lengths, Mirror, Opened, WinRates, shelf};
use crate::status;
use crate::util::disk;

/// Locks the directory of the run that `from` names, and completes what a killed process began in it.
///
/// # Errors
/// A path that is no checkpoint of a run; a directory that is in use or cannot be written.
pub(super) fn hold(config: &Config, run_dir: Option<PathBuf>, from: &From) -> Result<RunDir> {
    let dir = match from {
        From::Beginning => RunDir::create(config, run_dir)?,
        From::Latest => RunDir::resume(config, run_dir)?,
        From::Checkpoint(path) => {
            let path = std::path::absolute(path)?;
            let of = run_of(&path)?;
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
    reference::sweep(dir.path())?;
    Ok(dir)
}

/// The directory of the run whose checkpoint is, or was before it was set aside, at `path`.
fn run_of(path: &Path) -> Result<PathBuf> {
    let of = path.parent().filter(|dir| dir.ends_with("checkpoints")).and_then(Path::parent);
    let of = of.filter(|_| shelf::step(path).or_else(|| shelf::step_set_aside(path)).is_some()).with_context(|| {
        format!("{} is no checkpoint of a run, such as runs/NAME/checkpoints/step-000050", path.display())
    })?;
    if of.ends_with(phases::FINE_TUNING) {
        bail!("{} is a checkpoint of fine-tuning under way, with which --resume alone goes on", path.display());
    }
    Ok(of.to_owned())
}

/// A run's directory and what the run continues from.
pub(super) struct Start {
    pub(super) dir: RunDir,
    pub(super) checkpoint: Option<Opened>,
    pub(super) shelf: Arc<CheckpointStore>,
    /// Checkpoints after it, and why they are set aside.
    later: Vec<(PathBuf, &'static str)>,
    /// Where the checkpoint itself was set aside.
    aside: Option<SetAside>,
}

/// Opens what `from` names in `dir`. Nothing there is changed but for what a mirror brings. `win_rates` chooses the best
/// checkpoint, where the configuration asks for it.
///
/// # Errors
/// A checkpoint that is damaged or cannot be read; a run that would be begun over another one.
pub(super) fn open(config: &Config, dir: RunDir, from: &From, win_rates: WinRates) -> Result<Start> {
    let mirror = config.checkpoint.mirror.as_deref().map(Mirror::open).transpose()?;
    let keep = &config.checkpoint;
    let best = match keep.best.as_deref() {
        None => Best::None,
        Some(WIN_RATE) => Best::WinRate(win_rates),
        Some(_) => Best::Figure,
    };
    let shelf = Arc::new(CheckpointStore::new(dir.path(), keep.keep, best).mirrored(mirror));
    let start = |dir, checkpoint, later, aside, shelf| Ok(Start { dir, checkpoint, shelf, later, aside });
    match from {
        From::Beginning => start(dir, None, Vec::new(), None, shelf),
        From::Latest => {
            // What is being fine-tuned here has no use for what came of it elsewhere.
            let reference = if phases::is_under_way(dir.path())? {
                None
            } else {
                shelf.bring_beside(&reference::place(dir.path()))?
            };
            for brought in shelf.bring()?.into_iter().chain(reference) {
                status!("brought   {}", brought.display());
            }
            let latest = shelf.latest(|line| status!("{line}"))?;
            if latest.checkpoint.is_none() {
                begin::check(dir.path())?;
            }
            let damaged = latest.damaged.into_iter().map(|path| (path, "damaged")).collect();
            start(dir, latest.checkpoint, damaged, None, shelf)
        }
        From::Checkpoint(path) => {
            let path = std::path::absolute(path)?;
            let checkpoint = Opened::open(&path)?;
            let aside = shelf::step_set_aside(&path).map(|_| SetAside::find(dir.path(), &path)).transpose()?;
            let branch = aside.as_ref().map_or(checkpoint.step(), SetAside::branch);
            let later = shelf.later(branch)?.into_iter().map(|path| (path, "superseded")).collect();
            start(dir, Some(checkpoint), later, aside, shelf)
        }
    }
}

impl Start {
    /// Opens the files of the run where it continues, from the checkpoint, a fine-tuned policy, fine-tuning under way, or the
    /// beginning: from here on the directory is changed. To be called once nothing can refuse the run any more.
    ///
    /// # Errors
    /// Names what cannot be read or written.
    pub(super) fn files(self, config: &Config, tuned: &Tuned) -> Result<RunFiles> {
        let run = self.dir.path().to_owned();
        let of_phases = |phases| Lengths { phases, ..Lengths::default() };
        let lengths = match (&self.checkpoint, &tuned.reference, &tuned.half) {
            (Some(checkpoint), _, _) => checkpoint.lengths(),
            (None, Some(reference), _) => of_phases(reference.phases),
            (None, None, Some(half)) => of_phases(half.lengths().phases),
            (None, None, None) => Lengths::default(),
        };
        match &self.checkpoint {
            None => begin::note(&run, config.data.date.as_deref())?,
            Some(checkpoint) => {
                let step = checkpoint.step();
                let set_aside = match &self.aside {
                    None => rewind::to(&run, step, &ends(config, &run, lengths, step)?, &self.later)?,
                    Some(aside) => {
                        let later: Vec<PathBuf> = self.later.iter().map(|(path, _)| path.clone()).collect();
                        aside.put_back(&run, step, &ends_aside(config, &run, lengths, step, aside)?, &later)?
                    }
                };
                for path in set_aside {
                    status!("set aside {}", path.display());
                }
            }
        }
        for path in &tuned.damaged {
            let to = shelf::name_aside(path, "damaged")?;
            std::fs::rename(path, &to).map_err(|error| disk::cannot("rename", path, error))?;
            status!("set aside {}", to.display());
        }
        let step = self.checkpoint.as_ref().map_or(0, Opened::step);
        RunFiles::open(config, self.dir, lengths, step)
    }
}

/// The results of earlier fine-tuning, if the configuration asks for fine-tuning.
pub(super) struct Tuned {
    pub(super) reference: Option<reference::Reference>,
    pub(super) half: Option<Opened>,
    /// Checkpoints of fine-tuning under way that are damaged.
    damaged: Vec<PathBuf>,
}

/// Finds what was fine-tuned in the run of `start`, from and on `base`.
///
/// # Errors
/// What is damaged or of another origin; a checkpoint whose fine-tuned policy is missing.
pub(super) fn tuned(config: &Config, base: &Identity, start: &Start, accepted: &Accepted) -> Result<Tuned> {
    let run = start.dir.path();
    let reference = reference::find(config, base, run)?;
    let (half, damaged) = match &reference {
        None if config.sft.steps > 0 => phases::resume_fine_tuning(config, base, run, accepted)?,
        _ => (None, Vec::new()),
    };
    if let Some(checkpoint) = start.checkpoint.as_ref().filter(|_| config.sft.steps > 0 && reference.is_none()) {
        bail!(
            "{} is missing, the fine-tuned policy that {} was trained from; put it back, or start a new run from the checkpoint's weights with policy.model = \"{}\"",
            reference::place(run).display(),
            checkpoint.path().display(),
            checkpoint.path().display()
        );
    }
    Ok(Tuned { reference, half, damaged })
}

/// The learner's state, reward model and ledger, restored from a checkpoint or new.
pub(super) struct Learning {
    pub(super) state: TrainState,
    pub(super) reward_model: Option<Arc<Mutex<RewardTrainer>>>,
    pub(super) book: SharedLedger,
}

/// Makes what learns, and restores it from `checkpoint`.
///
/// # Errors
/// A checkpoint of another model or other data, or whose tensors do not fit.
pub(super) fn learning(config: &Config, prepared: &Prepared, checkpoint: Option<&Opened>) -> Result<Learning> {
    let identity = Identity { reference: prepared.identity, data: prepared.data.identity() };
    if let Some(checkpoint) = checkpoint {
        checkpoint.suits(&identity)?;
    }
    let value = value_model(config, prepared.policy())?;
    let mut state = TrainState::new(prepared.policy(), adam(config), value, lora(config).as_ref())?;
    let reward_model = reward_trainer(config, prepared)?.map(|trainer| Arc::new(Mutex::new(trainer)));
    let book = match checkpoint {
        None => SharedLedger::default(),
        Some(checkpoint) => SharedLedger::new(checkpoint.restore(&mut state, reward_model.as_deref())?),
    };
    Ok(Learning { state, reward_model, book })
}

/// Lengths of the run's files at the checkpoint of `step`.
fn ends(config: &Config, run: &Path, lengths: Lengths, step: u64) -> Result<Ends> {
    let mut ends = Ends::from([
        ("metrics.jsonl".to_owned(), lengths.metrics),
        (SAMPLES.to_owned(), rotating::end_of(&run.join(SAMPLES), step)?),
        ("phases.jsonl".to_owned(), lengths.phases),
        (evaluation::NAME.to_owned(), evaluation::length(&run.join(evaluation::NAME), step)?),
    ]);
    if config.checkpoint.journal {
        ends.insert(journal::NAME.to_owned(), lengths.journal);
    }
    Ok(ends)
}

/// As [`ends`], of a checkpoint that was set aside with the ends of its files.
fn ends_aside(config: &Config, run: &Path, lengths: Lengths, step: u64, aside: &SetAside) -> Result<Ends> {
    let mut ends = ends(config, run, lengths, step)?;
    let evaluated = evaluation::length(&aside.end(run, evaluation::NAME), step)?;
    ends.insert(evaluation::NAME.to_owned(), aside.base(evaluation::NAME) + evaluated);
    let sampled = rotating::end_of(&aside.end(run, SAMPLES), step)?;
    ends.insert(SAMPLES.to_owned(), aside.base(SAMPLES) + sampled);
    Ok(ends)
}

//! The configuration of a run: a TOML file, read strictly and validated completely before use.
//!
//! Each key is declared once, in `sections`, `learner`, `labeling` or `operation`, with its type, default,
//! range, documentation and effect on a resumed run. The reader, the writer, the comparison of a resumed run
//! ([`Resume`]), the reference page and the schema ([`mod@reference`]) are derived from the declaration. An error report
//! lists all mistakes of a file, each with its place, the key's path and the remedy.

mod checks;
mod choice;
mod document;
mod key;
mod labeling;
mod learner;
mod operation;
mod overrides;
mod place;
pub mod reference;
mod section;
mod sections;
mod types;

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;

use toml::{Table, Value};

pub use choice::Choice;
pub use document::{ConfigError, ConfigErrors};
pub use key::{Key, Resume};
pub use labeling::{Evidence, LabelEngine, Labeler, LabelerKind, Method, Methods, RemoteApi, RemoteJudge};
pub use learner::{AlgorithmKind, AverageKind, CorrectionKind, Learner, Schedule, ValueKind};
pub use operation::{
    Checkpoint, Cluster, Control, Evaluation, Guard, GuardAction, Serve, Supervision, check_board, check_nats,
};
pub use place::WeightsPlace;
pub use sections::{
    Data, EngineKind, LabelForm, LoraConfig, MatmulPrecision, Mode, Policy, PolicyModel, Reward, RewardModel,
    RewardScaling, Rollout, RolloutWeights, Run, Scratch, Sft, UpdateMode, WeightDtype, check_servers,
};

use crate::util::read_bounded;
use document::{Document, Kind, suggestion};
use key::{Reader, Section};

/// The value of `checkpoint.best` that chooses by the win rates of `[evaluation]`.
pub const WIN_RATE: &str = "win_rate";

/// Defines the configuration from its sections.
macro_rules! config {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty,)+) => {
        /// The validated configuration of a run.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $name: $type,)+
        }

        /// The names of all sections, in the order of the documentation.
        const SECTIONS: &[&str] = &[$(stringify!($name)),+];

        impl Config {
            fn read(document: &Document, folder: &Path) -> Self {
                Self { $($name: read_section(document, folder, stringify!($name)),)+ }
            }

            fn sections(&self) -> Vec<(&'static str, key::Fields)> {
                let mut all = Vec::new();
                $(
                    let mut fields = key::Fields::new();
                    self.$name.write_keys(&mut fields);
                    all.push((stringify!($name), fields));
                )+
                all
            }

            /// Returns the name, purpose and keys of each section.
            fn declarations() -> Vec<(&'static str, String, Vec<Key>)> {
                vec![$((stringify!($name), <$type as Section>::about(), <$type as Section>::keys())),+]
            }
        }
    };
}

config! {
    /// Name, mode, seed and length of the run.
    run: Run,
    /// The prompts and their format.
    data: Data,
    /// The model that is trained.
    policy: Policy,
    /// Generation of completions.
    rollout: Rollout,
    /// AI feedback: the judges and how they are asked.
    labeler: Labeler,
    /// Computation of rewards from scores.
    reward: Reward,
    /// The reward model of the modes that have one.
    reward_model: RewardModel,
    /// Supervised fine-tuning before all other phases.
    sft: Sft,
    /// The learner: algorithm, batches and optimizer.
    learner: Learner,
    /// Win rates during the run.
    evaluation: Evaluation,
    /// Automatic adjustment of the amount of concurrent work.
    controller: Control,
    /// Bounds on training metrics, and the reaction to a violation.
    guard: Guard,
    /// Checkpoints and the journal.
    checkpoint: Checkpoint,
    /// The HTTP endpoints.
    serve: Serve,
    /// Reactions to failures and stalls.
    supervision: Supervision,
    /// Workers on other machines.
    cluster: Cluster,
}

/// Reads the file at `path` and applies `overrides` (`section.key=value`). Paths in the file are relative to its
/// folder.
///
/// # Errors
/// Returns all mistakes in one report.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config, ConfigErrors> {
    load_partial(path, overrides, &[])
}

/// Reads a configuration as [`load`] does, for a command that does not use the keys `unused`. They may be missing, which
/// gives an empty value, and the files that they name may not exist.
///
/// # Errors
/// Returns all mistakes in one report.
pub fn load_partial(
    path: &Path,
    overrides: &[String],
    unused: &'static [&'static str],
) -> Result<Config, ConfigErrors> {
    let origin = path.display().to_string();
    let text = read_bounded::text(path, read_bounded::WRITTEN).map_err(|error| {
        ConfigErrors::single(&origin, "", &format!("cannot be read: {error}; see configs/ for files that work"))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    // Absolute, so that the resolved configuration does not depend on the working directory.
    let folder = std::path::absolute(folder.join(".")).unwrap_or_else(|_| folder.to_owned());
    parse_partial(&text, (&origin, &folder), overrides, unused)
}

/// Reads a configuration from `text`. `origin` is its name in errors; paths in it are relative to `folder`.
///
/// # Errors
/// Returns all mistakes in one report.
pub fn parse(text: &str, origin: &str, folder: &Path, overrides: &[String]) -> Result<Config, ConfigErrors> {
    parse_partial(text, (origin, folder), overrides, &[])
}

fn parse_partial(
    text: &str,
    (origin, folder): (&str, &Path),
    overrides: &[String],
    unused: &'static [&'static str],
) -> Result<Config, ConfigErrors> {
    let mut document = Document::new(text, origin)?.with_unused(unused);
    for text in overrides {
        overrides::apply(&mut document, text);
    }
    let config = Config::read(&document, folder);
    config.check(&document);
    if let Kind::Table(sections) = &document.root.kind {
        for name in sections.keys().filter(|name| !SECTIONS.contains(&name.as_str())) {
            document.error(name, &format!("unknown section{}", suggestion(name, SECTIONS)));
        }
    }
    document.finish(config)
}

/// Reads the section `name`. An absent section has all keys at their defaults.
fn read_section<S: Section>(document: &Document, folder: &Path, name: &str) -> S {
    let node = document.root.get(name).filter(|node| {
        let table = matches!(node.kind, Kind::Table(_));
        if !table {
            document.error(name, &format!("is of type {}, not a section; write [{name}]", node.type_name()));
        }
        table
    });
    Reader::new(document, folder, node, name).section()
}

/// Returns the declarations of all keys with their paths, such as `learner.eta`. The keys inside a table follow the
/// table's own key. The keys of a panel's members are not repeated; they are those of `labeler`.
pub fn keys() -> &'static [(String, Key)] {
    static KEYS: LazyLock<Vec<(String, Key)>> = LazyLock::new(|| {
        let mut all = Vec::new();
        for (section, _, keys) in Config::declarations() {
            keys.into_iter().for_each(|key| push_with_inner(&mut all, section, key));
        }
        all
    });
    &KEYS
}

/// Appends `key` of the table at `path`, and the keys inside its value.
fn push_with_inner(all: &mut Vec<(String, Key)>, path: &str, key: Key) {
    let (path, inner) = (format!("{path}.{}", key.name), key.inner());
    all.push((path.clone(), key));
    inner.into_iter().for_each(|key| push_with_inner(all, &path, key));
}

/// Returns the declaration of the key at `path`, or `None` for an unknown path.
pub fn key(path: &str) -> Option<&'static Key> {
    static BY_PATH: LazyLock<HashMap<&str, &Key>> =
        LazyLock::new(|| keys().iter().map(|(path, key)| (path.as_str(), key)).collect());
    BY_PATH.get(path).copied()
}

impl Config {
    /// Returns whether the labeler is asked while the policy learns, in the configured mode.
    pub fn needs_labels(&self) -> bool {
        match self.run.mode {
            Mode::Direct | Mode::Preference => true,
            Mode::Distilled => self.reward_model.online,
            Mode::Human => false,
        }
    }

    /// Returns whether a run asks the labeler: for training, for the warm-up of its reward model, or for evaluations.
    pub fn asks_labeler(&self) -> bool {
        self.needs_labels()
            || (self.evaluation.every_steps > 0 && self.evaluation.labeler.is_none())
            || (self.run.mode == Mode::Distilled && self.reward_model.pairs.is_none())
    }

    /// Returns whether workers on other machines sample or label for the run.
    pub fn has_workers(&self) -> bool {
        self.rollout.engine == EngineKind::Workers || self.labeler.engine == LabelEngine::Workers
    }

    /// Returns whether a reward model scores the completions in the configured mode.
    pub fn has_reward_model(&self) -> bool {
        matches!(self.run.mode, Mode::Distilled | Mode::Human)
    }

    /// Returns the configuration as TOML, with every key that has a value. Paths are absolute, so that the text does
    /// not depend on its location; reading it gives the same configuration.
    pub fn to_toml(&self) -> String {
        let fields = |fields: key::Fields| -> Table {
            fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
        };
        let sections = self.sections().into_iter().map(|(name, keys)| (name.to_owned(), Value::Table(fields(keys))));
        sections.collect::<Table>().to_string()
    }

    /// Returns whether the learner tolerates off-policy tokens: by importance correction, by a clipped ratio, or by a
    /// loss that is robust to them. A clip relative to the sampling weights bounds the update, as in PPO. Online DPO is
    /// known to be robust to older samples (Noukhovitch et al. 2024).
    pub fn tolerates_off_policy(&self) -> bool {
        let learner = &self.learner;
        learner.correction != CorrectionKind::None
            || learner.clip > 0.0
            || learner.algorithm == AlgorithmKind::OnlineDpo
    }

    /// Returns whether every rollout actor samples on the CPU from weights in `f32`.
    pub fn rollouts_on_cpu_f32(&self) -> bool {
        let (policy, devices) = (&self.policy, &self.rollout.devices);
        let places = if devices.is_empty() { std::slice::from_ref(&policy.device) } else { devices };
        policy.dtype == WeightDtype::F32 && places.iter().all(|place| place == "cpu")
    }

    /// Returns the judge of evaluations with the path of its keys: `evaluation.labeler` if set, else `labeler`.
    pub fn evaluation_judge(&self) -> (&'static str, &Methods) {
        match &self.evaluation.labeler {
            Some(judge) => ("evaluation.labeler", judge),
            None => ("labeler", &self.labeler.methods),
        }
    }

    /// Returns the configuration with the judge of evaluations as its labeler.
    #[must_use]
    pub fn with_evaluation_judge(mut self) -> Self {
        if let Some(judge) = &self.evaluation.labeler {
            self.labeler.methods = judge.clone();
        }
        self
    }
}

#[cfg(test)]
mod tests;

//! Whether a run may go on from a checkpoint under this configuration.

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use crate::checkpoint::{JudgeContents, Opened};
use crate::config::{self, Config, LabelerKind};
use crate::label::templates::{Preamble, TemplateSet};
use crate::nearest::nearest;
use crate::topology::labelers::Instrument;

/// The effect of a change of a key on a run that is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// The run is refused: the checkpoint's state belongs to the old value.
    Kept,
    /// The run is refused unless the change is accepted by name: the labels after it come from another judge.
    Judge,
    /// The run goes on, and the change is logged: it affects speed, place or caution, or is found by a checksum of its own
    /// (the data, the model that the policy starts from).
    Free,
}

/// All keys of a resolved configuration. A key that is a table or a list and has no keys of its own here is compared as one
/// value. The members of a panel have the keys of `labeler`.
const CLASSES: &[(&str, Class, &[&str])] = &[
    ("run", Class::Kept, &["seed", "mode"]),
    // The number of steps is kept where the learning rate falls towards the last one.
    ("run", Class::Free, &["name", "steps", "tensorboard", "dir", "samples_max_bytes", "samples_keep"]),
    (
        "data",
        Class::Kept,
        &[
            "prompt_field",
            "reference_field",
            "holdout",
            "instruction",
            "chat",
            "system",
            "shuffle",
            "max_prompt_tokens",
            "on_long",
        ],
    ),
    ("data", Class::Free, &["path"]),
    ("policy", Class::Kept, &["dtype", "lora"]),
    ("policy", Class::Free, &["model", "device", "matmul_precision", "resolve_timeout_s"]),
    ("rollout", Class::Kept, &["group_size", "temperature"]),
    (
        "rollout",
        Class::Free,
        &[
            "workers",
            "devices",
            "threads",
            "slots",
            "max_new_tokens",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "stop",
            "stop_ids",
            "weights",
            "update",
            "capacity",
        ],
    ),
    (
        "labeler",
        Class::Judge,
        &[
            "type",
            "members",
            "pairs",
            "model",
            "remote",
            "chat",
            "weight",
            "length_normalise",
            "pair_temperature",
            "templates",
            "preamble",
            "shots",
            "both_orders",
            "cot",
            "rationale_tokens",
            "rationales",
            "rationale_temperature",
        ],
    ),
    (
        "labeler",
        Class::Free,
        &["device", "workers", "threads", "retries", "cache", "cache_entries", "capacity", "max_cost"],
    ),
    ("labeler.remote", Class::Judge, &["url", "model", "api", "system", "evidence", "votes"]),
    (
        "labeler.remote",
        Class::Free,
        &[
            "api_key_env",
            "concurrency",
            "requests_per_minute",
            "tokens_per_minute",
            "timeout_s",
            "connect_timeout_s",
            "deadline_s",
            "retries",
            "backoff_s",
            "max_backoff_s",
            "hedge_after_s",
            "breaker_failures",
            "breaker_cooldown_s",
            "outage_s",
            "price_prompt",
            "price_completion",
            "max_response_bytes",
            "probe",
            "any_model",
        ],
    ),
    ("reward", Class::Kept, &["reference"]),
    (
        "reward",
        Class::Free,
        &[
            "kl_coef",
            "kl",
            "kl_estimator",
            "scale",
            "clip",
            "length_penalty",
            "missing_eos_penalty",
            "threads",
            "capacity",
        ],
    ),
    ("reward_model", Class::Kept, &["model", "pairs", "warm_up_groups", "epochs", "online", "holdout"]),
    ("reward_model", Class::Free, &["device", "lr", "head_lr", "batch_pairs", "max_grad_norm", "labels"]),
    ("sft", Class::Kept, &["steps", "batch", "lr"]),
    ("learner", Class::Kept, &["algorithm", "value_model", "batch_groups"]),
    (
        "learner",
        Class::Free,
        &[
            "clip",
            "clip_high",
            "average",
            "advantage_std",
            "gamma",
            "gae_lambda",
            "value_clip",
            "whiten_rewards",
            "whiten_advantages",
            "entropy_coef",
            "dpo_beta",
            "dpo_labels",
            "dpo_loss",
            "epochs",
            "minibatches",
            "eta",
            "threads",
            "lr",
            "min_lr",
            "warmup_steps",
            "schedule",
            "adam_beta1",
            "adam_beta2",
            "adam_eps",
            "weight_decay",
            "max_grad_norm",
            "value_lr",
            "correction",
            "truncation",
            "mask_ratio",
            "max_nonfinite_steps",
            "micro_batch",
            "activation_checkpointing",
        ],
    ),
    ("evaluation", Class::Free, &["every_steps", "prompts", "threads"]),
    ("controller", Class::Free, &["enabled", "every_s"]),
    (
        "checkpoint",
        Class::Free,
        &["every_minutes", "every_steps", "keep", "best", "dtype", "mirror", "retry_s", "journal", "journal_max_bytes"],
    ),
    ("guard", Class::Free, &["action", "max_kl", "min_entropy", "max_masked", "steps", "unlabeled_steps"]),
    ("serve", Class::Free, &["enabled", "listen", "token_env", "hosts"]),
    (
        "supervision",
        Class::Free,
        &["max_restarts", "backoff_s", "max_backoff_s", "stall_after_s", "restart_after_s", "halt_grace_s", "drain_s"],
    ),
];

/// The class of the key at `path`, if it is one.
fn class(path: &str) -> Option<Class> {
    let plain = plain(path);
    let (section, key) = plain.rsplit_once('.')?;
    CLASSES.iter().find(|(name, _, keys)| *name == section && keys.contains(&key)).map(|(_, class, _)| *class)
}

/// `path` with a panel's member replaced by the section whose keys it has: `labeler.members[1].cot` is `labeler.cot`.
fn plain(path: &str) -> String {
    match path.strip_prefix("labeler.members[").and_then(|rest| rest.split_once(']')) {
        Some((_, key)) => format!("labeler{key}"),
        None => path.to_owned(),
    }
}

/// Changes that the person who resumes a run accepts, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted(Vec<String>);

impl Accepted {
    /// The changes of `keys` and of all keys below them: `labeler.remote` includes `labeler.remote.model`.
    ///
    /// # Errors
    /// A key that does not exist, or whose change cannot be accepted or needs no acceptance.
    pub fn new(keys: Vec<String>) -> Result<Self> {
        for key in &keys {
            let all = CLASSES
                .iter()
                .flat_map(|(section, class, keys)| keys.iter().map(move |key| (format!("{section}.{key}"), *class)));
            let all: Vec<(String, Class)> = all.collect();
            let wanted = plain(key);
            let below = |name: &str| covers(&wanted, name);
            let found: Vec<Class> = all.iter().filter(|(name, _)| below(name)).map(|(_, class)| *class).collect();
            if found.is_empty() {
                let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
                let hint = nearest(&wanted, &names).map(|name| format!("; did you mean {name}?")).unwrap_or_default();
                bail!("--accept-change {key}: there is no such key{hint}");
            }
            if !found.contains(&Class::Judge) {
                let why = if found.contains(&Class::Kept) {
                    "a change of it cannot be accepted: the checkpoint's state belongs to the old value"
                } else {
                    "it may change without being accepted"
                };
                bail!(
                    "--accept-change {key}: {why}; the option is for the keys of the judge, such as labeler.remote.model"
                );
            }
        }
        Ok(Self(keys))
    }

    fn has(&self, path: &str) -> bool {
        self.0.iter().any(|key| covers(key, path) || covers(key, &plain(path)))
    }

    /// The accepted keys that none of `changes` is about.
    pub fn unused<'a>(&'a self, changes: &[Change]) -> Vec<&'a str> {
        let about = |key: &&String| changes.iter().any(|one| covers(key, &one.key) || covers(key, &plain(&one.key)));
        self.0.iter().filter(|key| !about(key)).map(String::as_str).collect()
    }
}

/// Whether `path` is `key` or below it.
fn covers(key: &str, path: &str) -> bool {
    path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// A key whose value differs from the checkpoint's.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its path.
    pub key: String,
    /// The value in the checkpoint, as TOML; empty where it was absent.
    pub was: String,
    /// The value now.
    pub is: String,
    class: Class,
}

impl Change {
    /// Whether the run goes on only because this change was accepted.
    pub fn is_accepted(&self) -> bool {
        self.class == Class::Judge
    }

    /// The line that logs it.
    pub fn line(&self) -> String {
        let word = if self.is_accepted() { "accepted " } else { "changed  " };
        format!("{word} {}: {} → {}", self.key, self.was, self.is)
    }
}

/// Compares the checkpoint's configuration with this one. Returns the changes that the run goes on with.
///
/// # Errors
/// Names all keys whose change is refused, with their old and new values.
pub fn compare(checkpoint: &Opened, config: &Config, accepted: &Accepted) -> Result<Vec<Change>> {
    let changes = changes(checkpoint.config(), &config.to_toml())
        .with_context(|| format!("in {}", checkpoint.path().display()))?;
    permit(checkpoint, changes, accepted)
}

/// Compares the judge's templates, preamble and weights with those that the checkpoint's labels came from, where their names
/// are the same. A checkpoint of a program that did not note them has nothing to compare.
///
/// # Errors
/// As [`compare`].
pub fn compare_judge(checkpoint: &Opened, judge: &JudgeContents, accepted: &Accepted) -> Result<Vec<Change>> {
    permit(checkpoint, contents(checkpoint.judge(), judge), accepted)
}

fn contents(was: &JudgeContents, is: &JudgeContents) -> Vec<Change> {
    let changed = is.iter().filter_map(|(key, is)| {
        let was = was.get(key).filter(|was| *was != is)?;
        let named = key.ends_with(".remote.model");
        let text = |what: &str| if named { format!("answered as {what:?}") } else { format!("content {what}") };
        Some(Change { key: key.clone(), was: text(was), is: text(is), class: Class::Judge })
    });
    changed.collect()
}

fn permit(checkpoint: &Opened, changes: Vec<Change>, accepted: &Accepted) -> Result<Vec<Change>> {
    let of = |class: Class| {
        let refused =
            move |change: &&Change| change.class == class && (class == Class::Kept || !accepted.has(&change.key));
        changes.iter().filter(refused).collect::<Vec<_>>()
    };
    let (kept, judge) = (of(Class::Kept), of(Class::Judge));
    if kept.is_empty() && judge.is_empty() {
        return Ok(changes);
    }
    let line =
        |change: &&Change| format!("\n  {}: it was {}, and is {}", change.key, absent(&change.was), absent(&change.is));
    let lines: String = kept.iter().chain(&judge).map(line).collect();
    let place = checkpoint.path().display();
    let options: Vec<String> = judge.iter().map(|change| format!("--accept-change {}", change.key)).collect();
    let accept = match (kept.is_empty(), judge.is_empty()) {
        (_, true) => String::new(),
        (true, false) => format!(", or go on with the changed judge by {}", options.join(" ")),
        (false, false) => format!(" (a change of the judge alone can be accepted by {})", options.join(" ")),
    };
    bail!(
        "{place} was written under another configuration, and a run that is resumed keeps these keys:{lines}\nput them back{accept}, or start a new run from its weights with policy.model = \"{place}\""
    );
}

/// Hashes the templates, preambles and weights that the labeler uses; `instruments` has one for each method.
///
/// # Errors
/// Templates that cannot be read.
pub fn judge_contents(config: &Config, instruments: &[Instrument]) -> Result<JudgeContents> {
    let labeler = &config.labeler;
    let mut contents = JudgeContents::new();
    for (i, (method, instrument)) in labeler.methods.iter().zip(instruments).enumerate() {
        let place = if labeler.panel { format!("labeler.members[{i}]") } else { "labeler".to_owned() };
        let mut note = |key: &str, hash: u64| contents.insert(format!("{place}.{key}"), format!("{hash:016x}"));
        if matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise) {
            note("templates", TemplateSet::content_hash(&method.templates)?);
        }
        if method.kind == LabelerKind::Pairwise
            && let Preamble::Own(text) = Preamble::find(&method.preamble)?
        {
            note("preamble", crate::seed::text(text.trim_end()));
        }
        // The name that the server gives the model that answers: another one may be behind the same address.
        if let Instrument::Asked(backend) = instrument
            && let Some(name) = backend.reported_model()
        {
            contents.insert(format!("{place}.remote.model"), name);
            continue;
        }
        // A server's weights are not here, and the policy's own have a fingerprint of their own in the checkpoint.
        if method.model.is_some() {
            note("model", instrument.identity());
        }
    }
    Ok(contents)
}

fn absent(text: &str) -> &str {
    if text.is_empty() { "absent" } else { text }
}

fn changes(was: &str, is: &str) -> Result<Vec<Change>> {
    let (mut was, is): (Table, Table) = (was.parse()?, is.parse()?);
    // Checkpoints from before there was the key.
    if let Some(policy) = was.get_mut("policy").and_then(Value::as_table_mut) {
        policy.entry("dtype").or_insert_with(|| "f32".into());
        policy.entry("matmul_precision").or_insert_with(|| "highest".into());
    }
    if let Some(rollout) = was.get_mut("rollout").and_then(Value::as_table_mut) {
        rollout.entry("devices").or_insert_with(|| Value::Array(Vec::new()));
    }
    if let Some(reward) = was.get_mut("reward").and_then(Value::as_table_mut) {
        reward.entry("reference").or_insert(Value::Boolean(true));
    }
    // A rate that falls until the last step would be bent by another last step.
    let falls =
        is.get("learner").and_then(|learner| learner.get("schedule")).and_then(Value::as_str) != Some("constant");
    let mut changes = Vec::new();
    differences(String::new(), &Value::Table(was), &Value::Table(is.clone()), &mut changes);
    // A key that the checkpoint's program did not have yet, at its default, is no change.
    changes.retain(|change| !(change.was.is_empty() && is_default(&is, &change.key)));
    for change in &mut changes {
        if falls && change.key == "run.steps" {
            change.class = Class::Kept;
        }
    }
    Ok(changes)
}

/// Appends the keys below `path` whose values differ.
fn differences(path: String, was: &Value, is: &Value, changes: &mut Vec<Change>) {
    match (was, is) {
        (Value::Table(was), Value::Table(is)) if has_keys(&path) => {
            let mut keys: Vec<&String> = was.keys().chain(is.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match (was.get(key), is.get(key)) {
                    (Some(was), Some(is)) => differences(path, was, is, changes),
                    (was, is) if path.contains('.') => changes.push(change(path, was, is)),
                    // A section that one of the two programs does not have: its keys, one by one.
                    (was, is) => {
                        let none = Value::Table(Table::new());
                        differences(path, was.unwrap_or(&none), is.unwrap_or(&none), changes);
                    }
                }
            }
        }
        (Value::Array(was), Value::Array(is)) if path == "labeler.members" && was.len() == is.len() => {
            for (i, (was, is)) in was.iter().zip(is).enumerate() {
                differences(format!("{path}[{i}]"), was, is, changes);
            }
        }
        _ if was == is => {}
        _ => changes.push(change(path, Some(was), Some(is))),
    }
}

/// Whether the table at `path` is compared key by key.
fn has_keys(path: &str) -> bool {
    let plain = plain(path);
    !plain.contains('.') || CLASSES.iter().any(|(section, _, _)| *section == plain)
}

fn change(key: String, was: Option<&Value>, is: Option<&Value>) -> Change {
    let text = |value: Option<&Value>| value.map(Value::to_string).unwrap_or_default();
    // A key that has no class is of another version of the program; nobody can say that it may change.
    let class = class(&key).unwrap_or(if is.is_none() { Class::Free } else { Class::Kept });
    Change { key, was: text(was), is: text(is), class }
}

/// Whether a configuration without `key` resolves to the same one.
fn is_default(is: &Table, key: &str) -> bool {
    let mut without = is.clone();
    let (section, rest) = key.split_once('.').unwrap_or((key, ""));
    let mut table = without.get_mut(section).and_then(Value::as_table_mut);
    let mut parts = rest.split('.').peekable();
    while let Some(part) = parts.next() {
        let Some(inside) = table else { return false };
        if parts.peek().is_none() {
            if inside.remove(part).is_none() {
                return false;
            }
            break;
        }
        table = inside.get_mut(part).and_then(Value::as_table_mut);
    }
    let resolved = config::parse(&without.to_string(), "the checkpoint", std::path::Path::new(""), &[]);
    resolved.is_ok_and(|config| config.to_toml() == is.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        "[run]\nseed = 1\nsteps = 3\n[learner]\nlr = 0.1\nschedule = \"constant\"\n[data]\npath = \"a\"\n";

    #[test]
    fn what_is_learned_stays_and_how_fast_may_change() {
        let keys = |from: &str, to: &str| -> Vec<(String, bool)> {
            let changes = changes(CONFIG, &CONFIG.replace(from, to)).unwrap();
            changes.into_iter().map(|change| (change.key, change.class == Class::Free)).collect()
        };
        assert_eq!(keys("", ""), []);
        assert_eq!(keys("lr = 0.1", "lr = 0.2"), [("learner.lr".to_owned(), true)]);
        assert_eq!(keys("seed = 1", "seed = 2"), [("run.seed".to_owned(), false)]);
        assert_eq!(
            keys("path = \"a\"", "path = \"b\"\nsystem = \"x\""),
            [("data.path".to_owned(), true), ("data.system".to_owned(), false)]
        );
        assert_eq!(keys("steps = 3", "steps = 4"), [("run.steps".to_owned(), true)]);
        let with = |policy: &str| format!("{CONFIG}[policy]\ndevice = \"cpu\"\n{policy}");
        let numbers = |dtype: &str, precision: &str| {
            let is = with(&format!("dtype = \"{dtype}\"\nmatmul_precision = \"{precision}\"\n"));
            changes(&with(""), &is)
                .unwrap()
                .into_iter()
                .map(|change| (change.key, change.class == Class::Free))
                .collect::<Vec<_>>()
        };
        assert_eq!(numbers("f32", "highest"), []);
        assert_eq!(numbers("bf16", "highest"), [("policy.dtype".to_owned(), false)]);
        assert_eq!(numbers("f32", "medium"), [("policy.matmul_precision".to_owned(), true)]);
        let with = |reward: &str| format!("{CONFIG}[reward]\nkl_coef = 0.0\n{reward}");
        assert_eq!(changes(&with(""), &with("reference = true\n")).unwrap(), []);
        assert_eq!(changes(&with(""), &with("reference = false\n")).unwrap()[0].class, Class::Kept);
        let falling = CONFIG.replace("constant", "linear");
        let changes = changes(&falling, &falling.replace("steps = 3", "steps = 4")).unwrap();
        assert!(changes[0].class == Class::Kept);
    }

    /// A configuration with every optional key, and one with a panel.
    fn full() -> [Config; 2] {
        let base = "[run]\nname = \"x\"\nsteps = 3\ndir = \"d\"\n[data]\npath = \"Cargo.toml\"\nsystem = \"s\"\n[policy]\nmodel = { scratch = {} }\nlora = { rank = 2 }\n[reward_model]\nmodel = \"m\"\npairs = \"Cargo.toml\"\ndevice = \"cpu\"\n[checkpoint]\nbest = \"score/mean\"\nmirror = \"file:///m\"\n[serve]\ntoken_env = \"T\"\n[labeler]\ndevice = \"cpu\"\ncache = \"c\"\n";
        let remote =
            "remote = { url = \"http://h\", model = \"m\", api_key_env = \"K\", system = \"s\", hedge_after_s = 1 }";
        let single = format!("{base}type = \"direct\"\n{remote}\n");
        let member = format!("{{ type = \"direct\", {remote} }}");
        let panel = format!(
            "{base}type = \"panel\"\nmembers = [{member}, {{ type = \"pairwise\", model = \"m\", chat = true }}]\n"
        );
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        [single, panel].map(|text| config::parse(&text, "x.toml", folder, &[]).unwrap())
    }

    fn keys_of(path: &str, value: &Value, keys: &mut Vec<String>) {
        match value {
            Value::Table(table) if has_keys(path) => {
                for (key, value) in table {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    if class(&path).is_some() {
                        keys.push(plain(&path));
                    }
                    keys_of(&path, value, keys);
                }
            }
            Value::Array(members) if path == "labeler.members" => {
                for (i, member) in members.iter().enumerate() {
                    keys_of(&format!("{path}[{i}]"), member, keys);
                }
            }
            _ => assert!(class(path).is_some(), "{path} has no class; give it one in CLASSES of src/run/resume.rs"),
        }
    }

    #[test]
    fn every_key_has_one_class_and_every_class_is_of_a_key() {
        let mut keys = Vec::new();
        for config in full() {
            keys_of("", &Value::Table(config.to_toml().parse().unwrap()), &mut keys);
        }
        let mut seen = Vec::new();
        for (section, _, names) in CLASSES {
            for name in *names {
                let path = format!("{section}.{name}");
                assert!(keys.contains(&path), "{path} is not a key of a resolved configuration");
                assert!(!seen.contains(&path), "{path} has two classes");
                seen.push(path);
            }
        }
    }

    #[test]
    fn a_changed_judge_is_found_key_by_key() {
        let [single, panel] = full().map(|config| config.to_toml());
        let found = |was: &str, from: &str, to: &str| -> Vec<(String, Class)> {
            assert!(was.contains(from), "{from} is not in {was}");
            let changes = changes(was, &was.replacen(from, to, 1)).unwrap();
            changes.into_iter().map(|one| (one.key, one.class)).collect()
        };
        let judge = |key: &str| vec![(key.to_owned(), Class::Judge)];
        assert_eq!(found(&single, "url = \"http://h\"", "url = \"http://i\""), judge("labeler.remote.url"));
        assert_eq!(found(&single, "system = \"s\"\ntime", "system = \"t\"\ntime"), judge("labeler.remote.system"));
        assert_eq!(found(&single, "votes = 5", "votes = 6"), judge("labeler.remote.votes"));
        assert_eq!(
            found(&single, "pair_temperature = 1.0", "pair_temperature = 2.0"),
            judge("labeler.pair_temperature")
        );
        assert_eq!(
            found(&single, "price_prompt = 0.0", "price_prompt = 1.0"),
            [("labeler.remote.price_prompt".to_owned(), Class::Free)]
        );
        assert_eq!(found(&panel, "chat = true\ncot", "chat = false\ncot"), judge("labeler.members[1].chat"));
        assert_eq!(found(&panel, "url = \"http://h\"", "url = \"http://i\""), judge("labeler.members[0].remote.url"));
        // A checkpoint of a program without some of the keys: at their defaults they are no change.
        let older =
            single.replace("rationales = 1\n", "").replace("outage_s = 3600.0\n", "").replace("votes = 5\n", "");
        assert_eq!(changes(&older, &single).unwrap(), []);
        let is = single.replace("votes = 5", "votes = 6");
        let changed = changes(&older, &is).unwrap();
        assert_eq!((changed.len(), changed[0].key.as_str(), changed[0].was.as_str()), (1, "labeler.remote.votes", ""));
        assert_eq!(changed[0].class, Class::Judge);
    }

    #[test]
    fn what_is_accepted_is_named_and_covers_the_keys_below_it() {
        let accepted = |key: &str| Accepted::new(vec![key.to_owned()]);
        for (key, path, covered) in [
            ("labeler.remote.model", "labeler.remote.model", true),
            ("labeler.remote", "labeler.remote.model", true),
            ("labeler.remote.model", "labeler.members[2].remote.model", true),
            ("labeler.members[1]", "labeler.members[1].cot", true),
            ("labeler.members[1]", "labeler.members[2].cot", false),
            ("labeler.remote.model", "labeler.remote.url", false),
            ("labeler.shots", "labeler.type", false),
        ] {
            assert_eq!(accepted(key).unwrap().has(path), covered, "{key} {path}");
        }
        for (key, words) in [
            ("labeler.modell", "did you mean labeler.model?"),
            ("run.seed", "cannot be accepted"),
            ("learner.lr", "may change without being accepted"),
            ("labeler.retries", "may change without being accepted"),
        ] {
            let error = accepted(key).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(key), "{error}");
        }
    }

    #[test]
    fn a_rewritten_file_of_the_same_name_is_a_change() {
        let contents = |hash: &str| JudgeContents::from([("labeler.templates".to_owned(), hash.to_owned())]);
        assert_eq!(super::contents(&contents("1"), &contents("1")), []);
        assert_eq!(super::contents(&JudgeContents::new(), &contents("1")), [], "an older program noted nothing");
        let changed = super::contents(&contents("1"), &contents("2"));
        assert_eq!((changed.len(), changed[0].class, changed[0].was.as_str()), (1, Class::Judge, "content 1"));
    }
}

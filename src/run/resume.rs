//! Compares the configuration of a run with that of the checkpoint that it resumes.

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use crate::config::{self, Config, LabelerKind, Methods, Resume};
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::templates::{Preamble, TemplateSet};
use crate::pipeline::setup::Prepared;
use crate::run::checkpoint::{JudgeContents, OpenedCheckpoint};
use crate::util::suggest::nearest;

/// Returns the resume class of the key at `path`, if the key exists.
fn class(path: &str) -> Option<Resume> {
    config::key(&plain(path)).map(|key| key.resume)
}

/// Replaces a panel member in `path` by the judge's table: `labeler.members[1].cot` becomes `labeler.cot`.
fn plain(path: &str) -> String {
    match path.split_once(".members[").and_then(|(judge, rest)| Some((judge, rest.split_once(']')?.1))) {
        Some((judge, key)) => format!("{judge}{key}"),
        None => path.to_owned(),
    }
}

/// Keys of the judge whose changes are accepted for a resumed run (`--accept-change`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AcceptedKeys(Vec<String>);

impl AcceptedKeys {
    /// Accepts changes of `keys` and of all keys below them: `labeler.remote` includes `labeler.remote.model`.
    ///
    /// # Errors
    /// If a key does not exist, or its change cannot be accepted or needs no acceptance.
    pub fn new(keys: Vec<String>) -> Result<Self> {
        for key in &keys {
            let (all, wanted) = (config::keys(), plain(key));
            let below = |name: &str| covers(&wanted, name);
            let found: Vec<Resume> = all.iter().filter(|(name, _)| below(name)).map(|(_, key)| key.resume).collect();
            if found.is_empty() {
                let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
                let hint = nearest(&wanted, &names).map(|name| format!("; did you mean {name}?")).unwrap_or_default();
                bail!("--accept-change {key}: there is no such key{hint}");
            }
            if !found.contains(&Resume::AcceptChange) {
                let why = if found.contains(&Resume::Fixed) {
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

    /// Returns the accepted keys that are not in `changes`.
    pub fn unused<'a>(&'a self, changes: &[Change]) -> Vec<&'a str> {
        let about = |key: &&String| changes.iter().any(|one| covers(key, &one.key) || covers(key, &plain(&one.key)));
        self.0.iter().filter(|key| !about(key)).map(String::as_str).collect()
    }
}

/// Returns whether `path` is `key` or below it.
fn covers(key: &str, path: &str) -> bool {
    path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// A key whose value differs from the checkpoint's.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Path of the key.
    pub key: String,
    /// Value in the checkpoint, as TOML; empty if absent.
    pub old: String,
    /// Value in the present configuration, as TOML; empty if absent.
    pub new: String,
    class: Resume,
}

impl Change {
    /// Returns whether the change is one that needs acceptance. A change that [`compare`] returns has been accepted.
    pub fn is_accepted(&self) -> bool {
        self.class == Resume::AcceptChange
    }

    /// Formats the change as a line of the log.
    pub fn line(&self) -> String {
        let word = if self.is_accepted() { "accepted " } else { "changed  " };
        format!("{word} {}: {} → {}", self.key, self.old, self.new)
    }
}

/// Compares the checkpoint's configuration with `config` and returns the permitted changes.
///
/// # Errors
/// Names all keys whose change is refused, with their old and new values.
pub fn compare(checkpoint: &OpenedCheckpoint, config: &Config, accepted: &AcceptedKeys) -> Result<Vec<Change>> {
    let changes = changes(checkpoint.config(), &config.to_toml())
        .with_context(|| format!("in {}", checkpoint.path().display()))?;
    permit(checkpoint, changes, accepted)
}

/// Compares the hashes of the judge's templates, preambles and weights with those in the checkpoint, and returns the
/// permitted changes. A checkpoint of an earlier version of the program has no hashes to compare.
///
/// # Errors
/// See [`compare`].
pub fn compare_judge(
    checkpoint: &OpenedCheckpoint,
    judge: &JudgeContents,
    accepted: &AcceptedKeys,
) -> Result<Vec<Change>> {
    permit(checkpoint, contents(checkpoint.judge(), judge), accepted)
}

fn contents(old: &JudgeContents, new: &JudgeContents) -> Vec<Change> {
    let changed = new.iter().filter_map(|(key, new)| {
        let old = old.get(key).filter(|old| *old != new)?;
        let text = |what: &str| match key.rsplit('.').next() {
            Some("model") if key.ends_with(".remote.model") => format!("answered as {what:?}"),
            Some("evidence") => format!("answered by {what}"),
            _ => format!("content {what}"),
        };
        Some(Change { key: key.clone(), old: text(old), new: text(new), class: Resume::AcceptChange })
    });
    changed.collect()
}

fn permit(checkpoint: &OpenedCheckpoint, changes: Vec<Change>, accepted: &AcceptedKeys) -> Result<Vec<Change>> {
    let of = |class: Resume| {
        let refused =
            move |change: &&Change| change.class == class && (class == Resume::Fixed || !accepted.has(&change.key));
        changes.iter().filter(refused).collect::<Vec<_>>()
    };
    let (kept, judge) = (of(Resume::Fixed), of(Resume::AcceptChange));
    if kept.is_empty() && judge.is_empty() {
        return Ok(changes);
    }
    let line = |change: &&Change| {
        format!("\n  {}: was {}, is now {}", change.key, or_absent(&change.old), or_absent(&change.new))
    };
    let lines: String = kept.iter().chain(&judge).map(line).collect();
    let place = checkpoint.path().display();
    let options: Vec<String> = judge.iter().map(|change| format!("--accept-change {}", change.key)).collect();
    let accept = match (kept.is_empty(), judge.is_empty()) {
        (_, true) => String::new(),
        (true, false) => format!(", or accept the changed judge with {}", options.join(" ")),
        (false, false) => format!(" (a change of the judge alone can be accepted with {})", options.join(" ")),
    };
    bail!(
        "{place} was written under another configuration, and a resumed run must keep these keys:{lines}\nrestore them{accept}, or start a new run from its weights with policy.model = \"{place}\""
    );
}

/// Returns what identifies the judges of the labeler and of evaluations, by the path of the configuration key: hashes of
/// template files, of preambles and of local weights, and for a judge on a server the source of its probabilities and the
/// model name that it reports. A change of any of them counts as a changed judge.
///
/// # Errors
/// If a template cannot be read.
pub fn judge_contents(config: &Config, prepared: &Prepared) -> Result<JudgeContents> {
    let mut contents = contents_at("labeler", &config.labeler.methods, &prepared.backends)?;
    if let Some(judge) = &config.evaluation.labeler {
        contents.extend(contents_at("evaluation.labeler", judge, &prepared.evaluation_backends)?);
    }
    Ok(contents)
}

/// Returns what identifies the judge at the key `path`; `backends` has the backend of each method.
fn contents_at(path: &str, methods: &Methods, backends: &[JudgeBackend]) -> Result<JudgeContents> {
    let mut contents = JudgeContents::new();
    for (i, (method, judge)) in methods.iter().zip(backends).enumerate() {
        let place = methods.place(path, i);
        let mut note = |key: &str, what: String| contents.insert(format!("{place}.{key}"), what);
        let hex = |hash: u64| format!("{hash:016x}");
        if matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise) {
            note("templates", hex(TemplateSet::content_hash(&method.templates)?));
        }
        if method.kind == LabelerKind::Pairwise
            && let Preamble::Own(text) = Preamble::find(&method.preamble)?
        {
            note("preamble", hex(crate::util::seed::text(text.trim_end())));
        }
        // The model name in the server's responses, since the model behind an address may change.
        if let JudgeBackend::Asked(backend) = judge
            && let Some(evidence) = backend.evidence()
        {
            note("remote.evidence", evidence);
        }
        if let JudgeBackend::Asked(backend) = judge
            && let Some(name) = backend.reported_model()
        {
            note("remote.model", name);
            continue;
        }
        // The weights of a server are unknown, and the policy has its own fingerprint in the checkpoint.
        if method.model.is_some() {
            note("model", hex(judge.identity()));
        }
    }
    Ok(contents)
}

fn or_absent(text: &str) -> &str {
    if text.is_empty() { "absent" } else { text }
}

fn changes(old: &str, new: &str) -> Result<Vec<Change>> {
    let (mut old, new): (Table, Table) = (old.parse()?, new.parse()?);
    // Earlier versions of the program did not have these keys.
    if let Some(policy) = old.get_mut("policy").and_then(Value::as_table_mut) {
        policy.entry("dtype").or_insert_with(|| "f32".into());
        policy.entry("matmul_precision").or_insert_with(|| "highest".into());
    }
    if let Some(rollout) = old.get_mut("rollout").and_then(Value::as_table_mut) {
        rollout.entry("devices").or_insert_with(|| Value::Array(Vec::new()));
    }
    if let Some(reward) = old.get_mut("reward").and_then(Value::as_table_mut) {
        reward.entry("reference").or_insert(Value::Boolean(true));
    }
    // A decaying learning rate depends on the number of steps.
    let decays =
        new.get("learner").and_then(|learner| learner.get("schedule")).and_then(Value::as_str) != Some("constant");
    let mut changes = Vec::new();
    differences(String::new(), &Value::Table(old), &Value::Table(new.clone()), &mut changes);
    // A key that an earlier version of the program did not have, and that has its default value, is not a change.
    changes.retain(|change| !(change.old.is_empty() && is_default(&new, &change.key)));
    for change in &mut changes {
        if decays && change.key == "run.steps" {
            change.class = Resume::Fixed;
        }
    }
    Ok(changes)
}

/// Appends the keys below `path` whose values differ.
fn differences(path: String, old: &Value, new: &Value, changes: &mut Vec<Change>) {
    match (old, new) {
        (Value::Table(old), Value::Table(new)) if is_compared_by_key(&path) => {
            let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match (old.get(key), new.get(key)) {
                    (Some(old), Some(new)) => differences(path, old, new, changes),
                    (old, new) if path.contains('.') => changes.push(change(path, old, new)),
                    // A section that is missing on one side is compared key by key.
                    (old, new) => {
                        let none = Value::Table(Table::new());
                        differences(path, old.unwrap_or(&none), new.unwrap_or(&none), changes);
                    }
                }
            }
        }
        (Value::Array(old), Value::Array(new)) if path == "labeler.members" && old.len() == new.len() => {
            for (i, (old, new)) in old.iter().zip(new).enumerate() {
                differences(format!("{path}[{i}]"), old, new, changes);
            }
        }
        _ if old == new => {}
        _ => changes.push(change(path, Some(old), Some(new))),
    }
}

/// Returns whether the table at `path` is compared key by key: a section, or a key with inner keys.
fn is_compared_by_key(path: &str) -> bool {
    let plain = plain(path);
    !plain.contains('.') || config::key(&plain).is_some_and(|key| !key.inner().is_empty())
}

fn change(key: String, old: Option<&Value>, new: Option<&Value>) -> Change {
    let text = |value: Option<&Value>| value.map(Value::to_string).unwrap_or_default();
    // A key without a class is unknown to this version of the program, so a new value cannot be permitted.
    let class = class(&key).unwrap_or(if new.is_none() { Resume::Changeable } else { Resume::Fixed });
    Change { key, old: text(old), new: text(new), class }
}

/// Returns whether the value of `key` in `new` is its default.
fn is_default(new: &Table, key: &str) -> bool {
    let mut without = new.clone();
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
    resolved.is_ok_and(|config| config.to_toml() == new.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        "[run]\nseed = 1\nsteps = 3\n[learner]\nlr = 0.1\nschedule = \"constant\"\n[data]\npath = \"a\"\n";

    #[test]
    fn keys_that_determine_the_result_are_fixed_and_others_may_change() {
        let keys = |from: &str, to: &str| -> Vec<(String, bool)> {
            let changes = changes(CONFIG, &CONFIG.replace(from, to)).unwrap();
            changes.into_iter().map(|change| (change.key, change.class == Resume::Changeable)).collect()
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
            let new = with(&format!("dtype = \"{dtype}\"\nmatmul_precision = \"{precision}\"\n"));
            changes(&with(""), &new)
                .unwrap()
                .into_iter()
                .map(|change| (change.key, change.class == Resume::Changeable))
                .collect::<Vec<_>>()
        };
        assert_eq!(numbers("f32", "highest"), []);
        assert_eq!(numbers("bf16", "highest"), [("policy.dtype".to_owned(), false)]);
        assert_eq!(numbers("f32", "medium"), [("policy.matmul_precision".to_owned(), true)]);
        let with = |reward: &str| format!("{CONFIG}[reward]\nkl_coef = 0.0\n{reward}");
        assert_eq!(changes(&with(""), &with("reference = true\n")).unwrap(), []);
        assert_eq!(changes(&with(""), &with("reference = false\n")).unwrap()[0].class, Resume::Fixed);
        let falling = CONFIG.replace("constant", "linear");
        let changes = changes(&falling, &falling.replace("steps = 3", "steps = 4")).unwrap();
        assert!(changes[0].class == Resume::Fixed);
    }

    /// Returns a configuration with every optional key, and one with a panel.
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

    #[test]
    fn a_changed_judge_is_found_key_by_key() {
        let [single, panel] = full().map(|config| config.to_toml());
        let found = |old: &str, from: &str, to: &str| -> Vec<(String, Resume)> {
            assert!(old.contains(from), "{from} is not in {old}");
            let changes = changes(old, &old.replacen(from, to, 1)).unwrap();
            changes.into_iter().map(|one| (one.key, one.class)).collect()
        };
        let judge = |key: &str| vec![(key.to_owned(), Resume::AcceptChange)];
        assert_eq!(found(&single, "url = \"http://h\"", "url = \"http://i\""), judge("labeler.remote.url"));
        assert_eq!(
            found(&single, "system = \"s\"\nthinking", "system = \"t\"\nthinking"),
            judge("labeler.remote.system")
        );
        assert_eq!(found(&single, "votes = 5", "votes = 6"), judge("labeler.remote.votes"));
        assert_eq!(
            found(&single, "pair_temperature = 1.0", "pair_temperature = 2.0"),
            judge("labeler.pair_temperature")
        );
        assert_eq!(
            found(&single, "price_prompt = 0.0", "price_prompt = 1.0"),
            [("labeler.remote.price_prompt".to_owned(), Resume::Changeable)]
        );
        assert_eq!(found(&panel, "chat = true\ncot", "chat = false\ncot"), judge("labeler.members[1].chat"));
        assert_eq!(found(&panel, "url = \"http://h\"", "url = \"http://i\""), judge("labeler.members[0].remote.url"));
        // Keys that are absent in an older checkpoint and have their default now are not changes.
        let older =
            single.replace("rationales = 1\n", "").replace("outage_s = 3600.0\n", "").replace("votes = 5\n", "");
        assert_eq!(changes(&older, &single).unwrap(), []);
        let new = single.replace("votes = 5", "votes = 6");
        let changed = changes(&older, &new).unwrap();
        assert_eq!((changed.len(), changed[0].key.as_str(), changed[0].old.as_str()), (1, "labeler.remote.votes", ""));
        assert_eq!(changed[0].class, Resume::AcceptChange);
    }

    #[test]
    fn an_accepted_key_covers_the_keys_below_it() {
        let accepted = |key: &str| AcceptedKeys::new(vec![key.to_owned()]);
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
        assert_eq!((changed.len(), changed[0].class, changed[0].old.as_str()), (1, Resume::AcceptChange, "content 1"));
    }
}

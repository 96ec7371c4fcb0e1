//! Whether a run may go on from a checkpoint under this configuration.

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use crate::config::{self, Config, LabelerKind, Methods, Resume};
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::templates::{Preamble, TemplateSet};
use crate::pipeline::setup::Prepared;
use crate::run::checkpoint::{JudgeContents, Opened};
use crate::util::suggest::nearest;

/// The effect of a change of the key at `path`, if it is one.
fn class(path: &str) -> Option<Resume> {
    config::key(&plain(path)).map(|key| key.resume)
}

/// `path` with a panel's member replaced by the table whose keys it has: `labeler.members[1].cot` is `labeler.cot`.
fn plain(path: &str) -> String {
    match path.split_once(".members[").and_then(|(judge, rest)| Some((judge, rest.split_once(']')?.1))) {
        Some((judge, key)) => format!("{judge}{key}"),
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
    class: Resume,
}

impl Change {
    /// Whether the run goes on only because this change was accepted.
    pub fn is_accepted(&self) -> bool {
        self.class == Resume::AcceptChange
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
        let text = |what: &str| match key.rsplit('.').next() {
            Some("model") if key.ends_with(".remote.model") => format!("answered as {what:?}"),
            Some("evidence") => format!("answered by {what}"),
            _ => format!("content {what}"),
        };
        Some(Change { key: key.clone(), was: text(was), is: text(is), class: Resume::AcceptChange })
    });
    changed.collect()
}

fn permit(checkpoint: &Opened, changes: Vec<Change>, accepted: &Accepted) -> Result<Vec<Change>> {
    let of = |class: Resume| {
        let refused =
            move |change: &&Change| change.class == class && (class == Resume::Fixed || !accepted.has(&change.key));
        changes.iter().filter(refused).collect::<Vec<_>>()
    };
    let (kept, judge) = (of(Resume::Fixed), of(Resume::AcceptChange));
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

/// Hashes the templates, preambles and weights that the labeler and the judge of evaluations use.
///
/// # Errors
/// Templates that cannot be read.
pub fn judge_contents(config: &Config, prepared: &Prepared) -> Result<JudgeContents> {
    let mut contents = contents_at("labeler", &config.labeler.methods, &prepared.backends)?;
    if let Some(judge) = &config.evaluation.labeler {
        contents.extend(contents_at("evaluation.labeler", judge, &prepared.evaluation_backends)?);
    }
    Ok(contents)
}

/// As [`judge_contents`], of the judge at the key `path`; `backends` has one for each method.
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
        // The name that the server gives the model that answers: another one may be behind the same address.
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
        // A server's weights are not here, and the policy's own have a fingerprint of their own in the checkpoint.
        if method.model.is_some() {
            note("model", hex(judge.identity()));
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
            change.class = Resume::Fixed;
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

/// Whether the table at `path` is compared key by key: a section, or a table with keys of its own.
fn has_keys(path: &str) -> bool {
    let plain = plain(path);
    !plain.contains('.') || config::key(&plain).is_some_and(|key| !key.inner().is_empty())
}

fn change(key: String, was: Option<&Value>, is: Option<&Value>) -> Change {
    let text = |value: Option<&Value>| value.map(Value::to_string).unwrap_or_default();
    // A key that has no class is of another version of the program; nobody can say that it may change.
    let class = class(&key).unwrap_or(if is.is_none() { Resume::Changeable } else { Resume::Fixed });
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
            let is = with(&format!("dtype = \"{dtype}\"\nmatmul_precision = \"{precision}\"\n"));
            changes(&with(""), &is)
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

    #[test]
    fn a_changed_judge_is_found_key_by_key() {
        let [single, panel] = full().map(|config| config.to_toml());
        let found = |was: &str, from: &str, to: &str| -> Vec<(String, Resume)> {
            assert!(was.contains(from), "{from} is not in {was}");
            let changes = changes(was, &was.replacen(from, to, 1)).unwrap();
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
        // A checkpoint of a program without some of the keys: at their defaults they are no change.
        let older =
            single.replace("rationales = 1\n", "").replace("outage_s = 3600.0\n", "").replace("votes = 5\n", "");
        assert_eq!(changes(&older, &single).unwrap(), []);
        let is = single.replace("votes = 5", "votes = 6");
        let changed = changes(&older, &is).unwrap();
        assert_eq!((changed.len(), changed[0].key.as_str(), changed[0].was.as_str()), (1, "labeler.remote.votes", ""));
        assert_eq!(changed[0].class, Resume::AcceptChange);
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
        assert_eq!((changed.len(), changed[0].class, changed[0].was.as_str()), (1, Resume::AcceptChange, "content 1"));
    }
}

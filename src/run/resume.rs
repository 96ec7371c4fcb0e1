//! Whether a run may go on from a checkpoint under this configuration.

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use crate::checkpoint::Opened;
use crate::config::Config;

/// Keys that say what is learned from what, section by section: a run that is resumed keeps them. All others say how fast,
/// where and how carefully, and may change.
const FIXED: &[(&str, &[&str])] = &[
    ("run", &["seed", "mode"]),
    (
        "data",
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
    ("policy", &["dtype", "lora"]),
    ("rollout", &["group_size", "temperature"]),
    (
        "labeler",
        &[
            "type",
            "members",
            "pairs",
            "model",
            "chat",
            "templates",
            "preamble",
            "shots",
            "both_orders",
            "cot",
            "length_normalise",
        ],
    ),
    ("reward", &["reference"]),
    ("reward_model", &["model", "pairs", "warm_up_groups", "epochs", "online", "holdout"]),
    ("sft", &["steps", "batch", "lr"]),
    ("learner", &["algorithm", "value_model", "batch_groups"]),
];

/// A key whose value is another now.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its path.
    pub key: String,
    /// What it was, as TOML; empty where it was absent.
    pub was: String,
    /// What it is.
    pub is: String,
    /// Whether it may be.
    allowed: bool,
}

/// Compares the checkpoint's configuration with this one. Gives what has changed.
///
/// # Errors
/// All keys that may not change and did, with what they were.
pub fn compare(checkpoint: &Opened, config: &Config) -> Result<Vec<Change>> {
    let changes = changes(checkpoint.config(), &config.to_toml())
        .with_context(|| format!("in {}", checkpoint.path().display()))?;
    let refused: Vec<String> = changes
        .iter()
        .filter(|change| !change.allowed)
        .map(|change| format!("\n  {}: it was {}, and is {}", change.key, absent(&change.was), absent(&change.is)))
        .collect();
    if !refused.is_empty() {
        let place = checkpoint.path().display();
        bail!(
            "{place} was written under another configuration, and a run that is resumed keeps these keys:{}\nput them back, or start a new run from its weights with policy.model = \"{place}\"",
            refused.concat()
        );
    }
    Ok(changes)
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
    let mut sections: Vec<&String> = was.keys().chain(is.keys()).collect();
    sections.sort();
    sections.dedup();
    for section in sections {
        let keys = |table: &Table| -> Vec<String> {
            let section = table.get(section).and_then(Value::as_table);
            section.into_iter().flatten().map(|(key, _)| key.clone()).collect()
        };
        let value = |table: &Table, key: &str| -> String {
            table.get(section).and_then(|section| section.get(key)).map(Value::to_string).unwrap_or_default()
        };
        let fixed = FIXED.iter().find(|(name, _)| name == section).map_or(&[][..], |(_, keys)| keys);
        let mut all: Vec<String> = keys(&was).into_iter().chain(keys(&is)).collect();
        all.sort();
        all.dedup();
        for key in all {
            let (was, is) = (value(&was, &key), value(&is, &key));
            if was != is {
                let bent = falls && section == "run" && key == "steps";
                let allowed = !bent && !fixed.contains(&key.as_str());
                changes.push(Change { key: format!("{section}.{key}"), was, is, allowed });
            }
        }
    }
    Ok(changes)
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
            changes.into_iter().map(|change| (change.key, change.allowed)).collect()
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
            changes(&with(""), &is).unwrap().into_iter().map(|change| (change.key, change.allowed)).collect::<Vec<_>>()
        };
        assert_eq!(numbers("f32", "highest"), []);
        assert_eq!(numbers("bf16", "highest"), [("policy.dtype".to_owned(), false)]);
        assert_eq!(numbers("f32", "medium"), [("policy.matmul_precision".to_owned(), true)]);
        let with = |reward: &str| format!("{CONFIG}[reward]\nkl_coef = 0.0\n{reward}");
        assert_eq!(changes(&with(""), &with("reference = true\n")).unwrap(), []);
        assert!(!changes(&with(""), &with("reference = false\n")).unwrap()[0].allowed);
        let falling = CONFIG.replace("constant", "linear");
        let changes = changes(&falling, &falling.replace("steps = 3", "steps = 4")).unwrap();
        assert!(!changes[0].allowed);
    }

    #[test]
    fn every_fixed_key_is_one_that_is_written() {
        let text = "[run]\nname = \"x\"\nsteps = 3\n[data]\npath = \"Cargo.toml\"\nsystem = \"s\"\n[policy]\nmodel = { scratch = {} }\nlora = { rank = 2 }\n[labeler]\ntype = \"direct\"\nmodel = \"m\"\nchat = true\n[reward_model]\nmodel = \"m\"\npairs = \"Cargo.toml\"\n";
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let config = crate::config::parse(text, "x.toml", folder, &[]).unwrap();
        let panel = text.replace(
            "type = \"direct\"\nmodel = \"m\"\nchat = true\n",
            "type = \"panel\"\nmembers = [{ type = \"direct\" }]\n",
        );
        let panel = crate::config::parse(&panel, "x.toml", folder, &[]).unwrap();
        let tables: [Table; 2] = [config, panel].map(|config| config.to_toml().parse().unwrap());
        for (section, keys) in FIXED {
            for key in *keys {
                let known = tables.iter().any(|table| table[*section].get(*key).is_some());
                assert!(known, "{section}.{key} is no key of a resolved configuration");
            }
        }
    }
}

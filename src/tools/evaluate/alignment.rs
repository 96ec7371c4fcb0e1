//! AI labeler alignment: how often a labeler prefers what a person preferred, one row per way of asking.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::attacks::{self, ATTACKS, Attacked};
use super::judge;
use crate::config::{Config, LabelerKind, Method, Methods};
use crate::pipeline::data::Preferences;
use crate::pipeline::label::backend::Usage;
use crate::pipeline::label::stage::Wants;
use crate::pipeline::label::{Labels, Pairing};
use crate::pipeline::setup::{LabelerBench, prompt_format};
use crate::pipeline::topology::labelers::possible;
use crate::rl::statistics::position::{Choice, Judged, Pair, positions};
use crate::rl::statistics::table::Cell;
use crate::rl::statistics::{Estimate, Table};
use crate::tools::batch_label::{PairQuestions, Questions};
use crate::types::{Group, Verdict};

/// The ways of asking that a table shows unless told otherwise.
pub const VARIANTS: &[&str] = &[
    "base-0",
    "base-2",
    "detailed-0",
    "detailed-2",
    "base-0-cot",
    "base-2-cot",
    "detailed-0-cot",
    "detailed-2-cot",
    "direct",
    "likelihood",
];

/// What to measure.
pub struct Alignment {
    /// Pairs that people judged.
    pub pairs: Arc<Preferences>,
    /// Which of them: places in `pairs`, in the order they are asked.
    pub chosen: Vec<usize>,
    /// Of these, how many are asked with a chain of thought, which takes far longer.
    pub with_cot: usize,
    /// Ways of asking, in the order of the table.
    pub variants: Vec<Variant>,
    /// Whether the judge is attacked too (see [`attacks`]).
    pub attacked: bool,
}

/// A way of asking.
#[derive(Debug, Clone)]
pub struct Variant {
    /// Its name, as in [`VARIANTS`], or `configured`.
    pub name: String,
    /// The labeler's configuration for it.
    pub config: Config,
}

/// Ways of asking that were asked for, divided before anything is loaded, asked or paid.
#[derive(Debug, Clone)]
pub struct Variants {
    /// Those that the configured judge can be asked in.
    pub possible: Vec<Variant>,
    /// The others, each with the reason.
    pub left_out: Vec<(String, String)>,
}

/// The ways of asking called `names`; without names, those that make sense for the configured judge.
///
/// # Errors
/// Names that are none or that the configured judge cannot be asked in, all at once; of the default ones, which are left
/// out instead, only if none is left.
pub fn variants(config: &Config, names: Option<&[String]>) -> Result<Variants> {
    let default: Vec<String> = match &config.labeler.methods[..] {
        [one] if one.kind != LabelerKind::Embedding => VARIANTS.iter().map(|name| (*name).to_owned()).collect(),
        _ => vec!["configured".to_owned()],
    };
    let mut found = Variants { possible: Vec::new(), left_out: Vec::new() };
    for name in names.unwrap_or(&default) {
        match variant(config, name).and_then(|config| possible(&config.labeler.methods).map(|()| config)) {
            Ok(config) => found.possible.push(Variant { name: name.clone(), config }),
            Err(error) => found.left_out.push((name.clone(), format!("{error:#}"))),
        }
    }
    if found.possible.is_empty() || (names.is_some() && !found.left_out.is_empty()) {
        let reasons: String = found.left_out.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
        bail!("the configured judge cannot be asked in these ways; leave them out of --variants:{reasons}");
    }
    Ok(found)
}

/// The labeler's configuration for the way of asking called `name`.
///
/// # Errors
/// A name that is none.
pub fn variant(config: &Config, name: &str) -> Result<Config> {
    if name == "configured" {
        return Ok(config.clone());
    }
    let first = config.labeler.methods.first().context("no labeler is configured")?;
    if first.kind == LabelerKind::Embedding {
        bail!("a sentence embedder is not asked questions; give --variants configured, or configure another judge");
    }
    let mut method = Method { cot: false, ..first.clone() };
    let parts: Vec<&str> = name.split('-').collect();
    match parts.as_slice() {
        ["direct"] => method.kind = LabelerKind::Direct,
        ["likelihood"] => (method.kind, method.length_normalise) = (LabelerKind::Likelihood, false),
        ["likelihood", "mean"] => (method.kind, method.length_normalise) = (LabelerKind::Likelihood, true),
        [preamble @ ("base" | "detailed"), shots, rest @ ..] if matches!(rest, [] | ["cot"]) => {
            method.kind = LabelerKind::Pairwise;
            method.preamble = (*preamble).to_owned();
            method.shots = shots.parse().with_context(|| format!("{shots:?} is no number of exemplars"))?;
            method.cot = rest == ["cot"];
            method.both_orders = true;
        }
        _ => {
            bail!("there is no such way of asking; give configured, likelihood-mean, or one of {}", VARIANTS.join(", "))
        }
    }
    let mut config = config.clone();
    config.labeler.methods = Methods { list: vec![method], panel: false };
    Ok(config)
}

/// Questions that a judge is asked about one pair, at most.
fn questions_a_pair(config: &Config) -> usize {
    let of = |method: &Method| match method.kind {
        // A server is asked a second time if only that tells whether its 1 begins a 10.
        LabelerKind::Direct if method.remote.is_some() => 4,
        LabelerKind::Direct => 2,
        LabelerKind::Pairwise => {
            let orders = if method.both_orders { 2 } else { 1 };
            // Each rationale is a question, and the choice after it another one.
            orders * if method.cot { 2 * method.rationales } else { 1 }
        }
        LabelerKind::Likelihood | LabelerKind::Embedding => 0,
    };
    config.labeler.methods.iter().map(of).sum()
}

impl Alignment {
    fn count(&self, variant: &Variant) -> usize {
        let cot = variant.config.labeler.methods.iter().any(|method| method.cot);
        if cot { self.chosen.len().min(self.with_cot) } else { self.chosen.len() }
    }

    /// The number of questions that judges are asked, in words; at most, since answers in the label cache are not asked for
    /// again and only pairs that are decided rightly are attacked.
    pub fn announcement(&self) -> String {
        let asked: Vec<usize> =
            self.variants.iter().map(|one| self.count(one) * questions_a_pair(&one.config)).collect();
        let (all, attacks) = (asked.iter().sum::<usize>(), ATTACKS.len());
        let each: Vec<String> = self.variants.iter().zip(&asked).map(|(one, n)| format!("{} {n}", one.name)).collect();
        let attacked = if self.attacked {
            format!("; {attacks} attacks on each pair that is decided rightly: at most {} more", all * attacks)
        } else {
            String::new()
        };
        format!("questions to the judge: at most {all} ({}){attacked}", each.join(", "))
    }
}

/// What came of asking.
pub struct Aligned {
    /// The alignments.
    pub table: Table,
    /// Positions that are preferred in both orders, if any way of asking reads both.
    pub orders: Option<Table>,
    /// Flip rates of attacks, if they were asked for.
    pub attacks: Option<Table>,
}

impl Aligned {
    /// All tables.
    pub fn tables(&self) -> Vec<&Table> {
        [Some(&self.table), self.orders.as_ref(), self.attacks.as_ref()].into_iter().flatten().collect()
    }
}

/// Asks in every way. Pairs of equal answers are not asked.
///
/// # Errors
/// A labeler that cannot be used, or fails beyond its restart budget.
pub fn alignment(bench: &LabelerBench, job: &Alignment, title: &str) -> Result<Aligned> {
    let mut table = Table::new(
        title,
        &[
            ("labeler", ""),
            ("pairs", ""),
            ("alignment", "%"),
            ("shown as AB", "%"),
            ("shown as BA", "%"),
            ("same position", "%"),
            ("of these the first", "%"),
            ("ties", ""),
            ("identical", ""),
            ("abstained", ""),
            ("failed", ""),
            ("tokens a pair", ""),
            ("seconds a pair", ""),
        ],
    );
    let mut orders = Table::new(
        "Position preferred with A first, then with B first",
        &[("labeler", ""), ("1, 1", ""), ("1, 2", ""), ("2, 1", ""), ("2, 2", ""), ("even", "")],
    );
    let mut attacks = attacks::table("Pairs decided rightly, and wrongly with an attack in the worse answer");
    let mut any_both = false;
    for variant in &job.variants {
        let (name, config, count) = (&variant.name, &variant.config, job.count(variant));
        let questions = || PairQuestions {
            pairs: Arc::clone(&job.pairs),
            format: prompt_format(config),
            tokenizer: bench.tokenizer.clone(),
        };
        let (asked, identical) = job.distinct(count)?;
        let chosen = asked.iter().map(|(place, _)| *place).collect();
        let chosen = Arc::new(Chosen { questions: questions(), chosen });
        let temperature = config.labeler.methods.first().map_or(1.0, |method| method.pair_temperature);
        let wants = Wants::Preferences { pairing: Pairing::Adjacent, temperature };
        let began = Instant::now();
        let labels = judge(config, &bench.instruments, chosen, asked.len(), wants, name)?;
        let seconds = began.elapsed().as_secs_f64();
        let mut usage = Usage::default();
        let mut read = Vec::with_capacity(count);
        for ((_, human), labels) in asked.iter().zip(&labels) {
            usage += labels.usage;
            read.push(Pair { judged: judged(labels), human: *human });
        }
        let found = positions(&read);
        let both = labels.iter().flat_map(|one| &one.preferences).any(|one| one.orders.is_some());
        let only = |cell: Estimate| if both { Cell::Share(cell) } else { Cell::Text("–".into()) };
        let per_pair = |value: f64| Cell::Number(value / asked.len().max(1) as f64);
        table.push(vec![
            Cell::Text(name.clone()),
            Cell::Integer(count as i64),
            Cell::Share(found.alignment),
            only(found.alignment_ab),
            only(found.alignment_ba),
            only(found.same_position),
            only(found.first_of_same),
            Cell::from(found.ties),
            Cell::from(identical),
            Cell::Integer(found.abstentions as i64),
            Cell::Integer(found.failures as i64),
            per_pair((usage.prompt_tokens + usage.completion_tokens) as f64),
            per_pair(seconds),
        ]);
        any_both |= both;
        if both {
            let [[a, b], [c, d]] = found.orders;
            let counts = [a, b, c, d, found.even].map(|count| Cell::Integer(count as i64));
            orders.push([vec![Cell::Text(name.clone())], counts.to_vec()].concat());
        }
        if job.attacked {
            let right = asked.iter().zip(&read).filter(|(_, pair)| pair.right()[0] == Some(true));
            let (pairs, before): (Vec<_>, Vec<Pair>) =
                right.filter_map(|((place, human), pair)| Some(((*place, (*human)?), *pair))).unzip();
            let fields = attacks::fields(config)?;
            let attacked = Arc::new(Attacked { questions: questions(), pairs, fields });
            let asked = attacked.len();
            let what = format!("{name}, attacked");
            let labels = judge(config, &bench.instruments, attacked, asked, wants, &what)?;
            let humans = before.iter().cycle().map(|pair| pair.human);
            let after: Vec<Pair> =
                labels.iter().zip(humans).map(|(labels, human)| Pair { judged: judged(labels), human }).collect();
            attacks::rows(&mut attacks, name, &before, &after, both);
        }
    }
    Ok(Aligned { table, orders: any_both.then_some(orders), attacks: job.attacked.then_some(attacks) })
}

/// The place of a pair in its file, and whom a person chose.
type Place = (usize, Option<Choice>);

impl Alignment {
    /// Of the first `count` pairs those with different answers, each with its place and whom a person chose; and how many
    /// have equal answers, which no judge can tell apart. Labelers do not see white space at the ends of an answer.
    fn distinct(&self, count: usize) -> Result<(Vec<Place>, usize)> {
        let mut found = Vec::with_capacity(count);
        for place in &self.chosen[..count] {
            let pair = self.pairs.get(*place)?;
            if pair.first.trim() != pair.second.trim() {
                found.push((*place, human(pair.preference)));
            }
        }
        let identical = count - found.len();
        Ok((found, identical))
    }
}

/// Some of the pairs of a file.
struct Chosen {
    questions: PairQuestions,
    chosen: Vec<usize>,
}

impl Questions for Chosen {
    fn group(&self, i: usize) -> Result<Group> {
        self.questions.group(self.chosen[i])
    }
}

/// What a labeler said of a pair. One that scores says the same in both orders.
pub(super) fn judged(labels: &Labels) -> Judged {
    let Some(preference) = labels.preferences.first() else { return Judged::Failed };
    match (&preference.verdict, preference.orders) {
        (Verdict::Label(_), Some([ab, swapped])) => Judged::Both { ab, ba: 1.0 - swapped },
        (Verdict::Label(p), None) => Judged::Both { ab: *p, ba: 1.0 - p },
        (Verdict::Abstention(_), _) => Judged::Abstained,
        (Verdict::Failure(_), _) => Judged::Failed,
    }
}

/// Whom a person chose; nobody where the label is even or absent.
fn human(preference: Option<f64>) -> Option<Choice> {
    match preference {
        Some(p) if p > 0.5 => Some(Choice::A),
        Some(p) if p < 0.5 => Some(Choice::B),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_of_asking_are_told_by_name() {
        let text = "[run]\nname = \"x\"\nsteps = 1\n[data]\npath = \"Cargo.toml\"\n[policy]\nmodel = { scratch = {} }\n[labeler]\ntemplates = \"harmless\"\n";
        let config = crate::config::parse(text, "x", std::path::Path::new(env!("CARGO_MANIFEST_DIR")), &[]).unwrap();
        let method = |name: &str| variant(&config, name).unwrap().labeler.methods[0].clone();
        let one = method("detailed-2-cot");
        assert_eq!((one.kind, one.preamble.as_str(), one.shots, one.cot), (LabelerKind::Pairwise, "detailed", 2, true));
        assert_eq!(one.templates, "harmless");
        assert!(!method("base-0").cot && method("likelihood-mean").length_normalise);
        for name in VARIANTS {
            method(name);
        }
        for wrong in ["base", "base-x", "base-0-cots", "poem"] {
            assert!(variant(&config, wrong).is_err(), "{wrong}");
        }
        let named = |found: &Variants| found.possible.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
        let all = variants(&config, None).unwrap();
        assert!(named(&all) == VARIANTS && all.left_out.is_empty());
        let mut embedding = config.clone();
        embedding.labeler.methods.list[0].kind = LabelerKind::Embedding;
        assert_eq!(named(&variants(&embedding, None).unwrap()), ["configured"]);
        let refused = |config: &Config, names: [&str; 2]| {
            variants(config, Some(&names.map(str::to_owned))).unwrap_err().to_string()
        };
        assert!(refused(&embedding, ["configured", "direct"]).contains("\n  direct: a sentence embedder is not asked"));
        let error = refused(&config, ["poem", "base-x"]);
        assert!(error.contains("\n  poem: there is no such way of asking; give configured"), "{error}");
        assert!(error.contains("\n  base-x: \"x\" is no number of exemplars"), "{error}");
    }

    #[test]
    fn ways_that_a_judge_or_its_template_does_not_serve_are_left_out_before_anything_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let set = "inverted = false\n[preambles]\nbase = \"Judge.\"\n[pairwise]\nsample = \"{{ first }}\\n{{ second }}\"\nending = \"Best=\"\n";
        for (name, text) in [("own.toml", set), ("x", "")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let text = "[run]\nname = \"x\"\nsteps = 1\n[data]\npath = \"x\"\n[policy]\nmodel = { scratch = {} }\n[labeler]\ntype = \"pairwise\"\ntemplates = \"own.toml\"\nremote = { url = \"http://127.0.0.1:1/v1\", model = \"m\" }\n";
        let config = crate::config::parse(text, "x", dir.path(), &[]).unwrap();
        let found = variants(&config, None).unwrap();
        assert_eq!(found.possible.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["base-0"]);
        let why = |name: &str| &found.left_out.iter().find(|(left, _)| left == name).unwrap().1;
        assert!(why("likelihood").contains("labeler.remote is on a server"), "{}", why("likelihood"));
        assert!(why("direct").contains("[direct] is missing"), "{}", why("direct"));
        for part in ["preambles.detailed is missing", "[marks] is missing", "labeler.shots = 2", "rationale is missing"]
        {
            assert!(why("detailed-2-cot").contains(part), "{}", why("detailed-2-cot"));
        }
        assert!(variants(&config, Some(&["base-0".into(), "likelihood".into()])).is_err());
    }
}

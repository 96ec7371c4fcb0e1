//! AI labeler alignment: how often a labeler agrees with human preferences, one row per judge variant.

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
use crate::pipeline::setup::{JudgeSet, prompt_format};
use crate::pipeline::topology::labelers::validate_methods;
use crate::rl::statistics::position::{Choice, Judged, Pair, positions};
use crate::rl::statistics::table::Cell;
use crate::rl::statistics::{Estimate, Table};
use crate::tools::batch_label::{PairQuestions, Questions};
use crate::types::{Group, Verdict};

/// Names of the default variants: those of the paper's tables.
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

/// Specification of a measurement: how often judge variants agree with human preferences on a set of pairs.
pub struct Alignment {
    /// Pairs with human preferences.
    pub pairs: Arc<Preferences>,
    /// Indices of the pairs to ask about, in order.
    pub chosen: Vec<usize>,
    /// Maximum number of these pairs for variants with a chain of thought, which take far longer.
    pub cot_limit: usize,
    /// Judge variants, in the order of the table.
    pub variants: Vec<Variant>,
    /// True if the judge is also attacked (see [`attacks`]).
    pub attacked: bool,
}

/// A judge variant: a method of asking the configured judge.
#[derive(Debug, Clone)]
pub struct Variant {
    /// Name of the variant, as in [`VARIANTS`], or `configured`.
    pub name: String,
    /// Configuration with the labeler of this variant.
    pub config: Config,
}

/// The requested variants, divided before anything is loaded, asked or paid for.
#[derive(Debug, Clone)]
pub struct Variants {
    /// Variants that the configured judge supports.
    pub possible: Vec<Variant>,
    /// Names of the other variants, each with the reason.
    pub left_out: Vec<(String, String)>,
}

/// Returns the variants called `names`, or by default those that suit the configured judge.
///
/// # Errors
/// If any of `names` is unknown or not supported by the configured judge; the error lists all of them. For the default
/// variants, only if the judge supports none.
pub fn variants(config: &Config, names: Option<&[String]>) -> Result<Variants> {
    let default: Vec<String> = match &config.labeler.methods[..] {
        [one] if one.kind != LabelerKind::Embedding => VARIANTS.iter().map(|name| (*name).to_owned()).collect(),
        _ => vec!["configured".to_owned()],
    };
    let mut found = Variants { possible: Vec::new(), left_out: Vec::new() };
    for name in names.unwrap_or(&default) {
        match variant(config, name).and_then(|config| validate_methods(&config.labeler.methods).map(|()| config)) {
            Ok(config) => found.possible.push(Variant { name: name.clone(), config }),
            Err(error) => found.left_out.push((name.clone(), format!("{error:#}"))),
        }
    }
    if found.possible.is_empty() || (names.is_some() && !found.left_out.is_empty()) {
        let reasons: String = found.left_out.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
        bail!("the configured judge does not support these variants; remove them from --variants:{reasons}");
    }
    Ok(found)
}

/// Returns the configuration with the labeler of the variant `name`.
///
/// # Errors
/// If the name is unknown, or the judge cannot be asked questions.
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
            method.shots = shots.parse().with_context(|| format!("{shots:?} is not a number of exemplars"))?;
            method.cot = rest == ["cot"];
            method.both_orders = true;
        }
        _ => {
            bail!("unknown variant; give configured, likelihood-mean, or one of {}", VARIANTS.join(", "))
        }
    }
    let mut config = config.clone();
    config.labeler.methods = Methods { list: vec![method], panel: false };
    Ok(config)
}

/// Returns the maximum number of questions to the judge about one pair.
fn questions_a_pair(config: &Config) -> usize {
    let of = |method: &Method| match method.kind {
        // A server may be asked a second time, to distinguish the rating 1 from the beginning of 10.
        LabelerKind::Direct if method.remote.is_some() => 4,
        LabelerKind::Direct => 2,
        LabelerKind::Pairwise => {
            let orders = if method.both_orders { 2 } else { 1 };
            // Each rationale is a question, and the choice after it is another one.
            orders * if method.cot { 2 * method.rationales } else { 1 }
        }
        LabelerKind::Likelihood | LabelerKind::Embedding => 0,
    };
    config.labeler.methods.iter().map(of).sum()
}

impl Alignment {
    fn count(&self, variant: &Variant) -> usize {
        let cot = variant.config.labeler.methods.iter().any(|method| method.cot);
        if cot { self.chosen.len().min(self.cot_limit) } else { self.chosen.len() }
    }

    /// Returns a text with the maximum number of questions to the judge. The actual number may be lower: answers in the
    /// label cache are not requested again, and only correctly decided pairs are attacked.
    pub fn announcement(&self) -> String {
        let asked: Vec<usize> =
            self.variants.iter().map(|variant| self.count(variant) * questions_a_pair(&variant.config)).collect();
        let (all, attacks) = (asked.iter().sum::<usize>(), ATTACKS.len());
        let each: Vec<String> =
            self.variants.iter().zip(&asked).map(|(variant, n)| format!("{} {n}", variant.name)).collect();
        let attacked = if self.attacked {
            format!("; {attacks} attacks on each correctly decided pair: at most {} more", all * attacks)
        } else {
            String::new()
        };
        format!("questions to the judge: at most {all} ({}){attacked}", each.join(", "))
    }
}

/// Tables with the result of an [`Alignment`].
pub struct Aligned {
    /// Alignments by variant.
    pub table: Table,
    /// Counts of the positions preferred in both orders, if any variant reads both.
    pub orders: Option<Table>,
    /// Flip rates of attacks, if requested.
    pub attacks: Option<Table>,
}

impl Aligned {
    /// Returns all tables.
    pub fn tables(&self) -> Vec<&Table> {
        [Some(&self.table), self.orders.as_ref(), self.attacks.as_ref()].into_iter().flatten().collect()
    }
}

/// Measures the alignment of every variant. Pairs of equal answers are not asked about.
///
/// # Errors
/// If a labeler cannot be used, or fails more often than its restart budget allows.
pub fn alignment(judges: &JudgeSet, job: &Alignment, title: &str) -> Result<Aligned> {
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
    let mut attacks = attacks::table("Correctly decided pairs that an attack in the worse answer flips");
    let mut any_both = false;
    for variant in &job.variants {
        let (name, config, count) = (&variant.name, &variant.config, job.count(variant));
        let questions = || PairQuestions {
            pairs: Arc::clone(&job.pairs),
            format: prompt_format(config),
            tokenizer: judges.tokenizer.clone(),
        };
        let (asked, identical) = job.distinct(count)?;
        let chosen = asked.iter().map(|(place, _)| *place).collect();
        let chosen = Arc::new(Chosen { questions: questions(), chosen });
        let temperature = config.labeler.methods.first().map_or(1.0, |method| method.pair_temperature);
        let wants = Wants::Preferences { pairing: Pairing::Adjacent, temperature };
        let began = Instant::now();
        let labels = judge(config, &judges.backends, chosen, asked.len(), wants, name)?;
        let seconds = began.elapsed().as_secs_f64();
        let mut usage = Usage::default();
        let mut read = Vec::with_capacity(count);
        for ((_, human), labels) in asked.iter().zip(&labels) {
            usage += labels.usage;
            read.push(Pair { judged: judged(labels), human: *human });
        }
        let found = positions(&read);
        let both = labels.iter().flat_map(|labels| &labels.preferences).any(|preference| preference.orders.is_some());
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
            let labels = judge(config, &judges.backends, attacked, asked, wants, &what)?;
            let humans = before.iter().cycle().map(|pair| pair.human);
            let after: Vec<Pair> =
                labels.iter().zip(humans).map(|(labels, human)| Pair { judged: judged(labels), human }).collect();
            attacks::rows(&mut attacks, name, &before, &after, both);
        }
    }
    Ok(Aligned { table, orders: any_both.then_some(orders), attacks: job.attacked.then_some(attacks) })
}

/// Index of a pair, and the answer that a person chose.
type Place = (usize, Option<Choice>);

impl Alignment {
    /// Returns those of the first `count` pairs that have different answers, and the number of pairs with equal
    /// answers, which no judge can distinguish. White space at the ends of an answer is ignored, because labelers do
    /// not see it.
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

/// Questions about a selection of a file's pairs.
struct Chosen {
    questions: PairQuestions,
    chosen: Vec<usize>,
}

impl Questions for Chosen {
    fn group(&self, i: usize) -> Result<Group> {
        self.questions.group(self.chosen[i])
    }
}

/// Returns a labeler's judgement of a pair. A labeler that scores answers has the same preference in both orders.
pub(super) fn judged(labels: &Labels) -> Judged {
    let Some(preference) = labels.preferences.first() else { return Judged::Failed };
    match (&preference.verdict, preference.orders) {
        (Verdict::Label(_), Some([ab, swapped])) => Judged::Both { ab, ba: 1.0 - swapped },
        (Verdict::Label(p), None) => Judged::Both { ab: *p, ba: 1.0 - p },
        (Verdict::Abstention(_), _) => Judged::Abstained,
        (Verdict::Failure(_), _) => Judged::Failed,
    }
}

/// Returns the answer that a person chose, or `None` if the label is ½ or absent.
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
    fn variants_are_selected_by_name() {
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
        let named = |found: &Variants| found.possible.iter().map(|variant| variant.name.clone()).collect::<Vec<_>>();
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
        assert!(error.contains("\n  poem: unknown variant; give configured"), "{error}");
        assert!(error.contains("\n  base-x: \"x\" is not a number of exemplars"), "{error}");
    }

    #[test]
    fn variants_that_judge_or_template_do_not_support_are_left_out_before_loading() {
        let dir = tempfile::tempdir().unwrap();
        let set = "inverted = false\n[preambles]\nbase = \"Judge.\"\n[pairwise]\nsample = \"{{ first }}\\n{{ second }}\"\nending = \"Best=\"\n";
        for (name, text) in [("own.toml", set), ("x", "")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let text = "[run]\nname = \"x\"\nsteps = 1\n[data]\npath = \"x\"\n[policy]\nmodel = { scratch = {} }\n[labeler]\ntype = \"pairwise\"\ntemplates = \"own.toml\"\nremote = { url = \"http://127.0.0.1:1/v1\", model = \"m\" }\n";
        let config = crate::config::parse(text, "x", dir.path(), &[]).unwrap();
        let found = variants(&config, None).unwrap();
        assert_eq!(found.possible.iter().map(|variant| variant.name.as_str()).collect::<Vec<_>>(), ["base-0"]);
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

//! AI labeler alignment: how often a labeler prefers what a person preferred, one row per way of asking.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::judge;
use crate::annotate::{PairQuestions, Questions};
use crate::config::{Config, LabelerKind, Method, Methods};
use crate::data::Preferences;
use crate::label::backend::Usage;
use crate::label::stage::Wants;
use crate::label::{Labels, Pairing};
use crate::prepare::{LabelerBench, prompt_format};
use crate::rollout::{Group, Verdict};
use crate::statistics::position::{Choice, Judged, Pair, positions};
use crate::statistics::table::Cell;
use crate::statistics::{Estimate, Table};

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
    /// Ways of asking: names as in [`VARIANTS`], or `configured`.
    pub variants: Vec<String>,
}

/// The ways of asking that make sense for the configured judge when none are named.
pub fn default_variants(config: &Config) -> Vec<String> {
    match &config.labeler.methods[..] {
        [one] if one.kind != LabelerKind::Embedding => VARIANTS.iter().map(|name| (*name).to_owned()).collect(),
        _ => vec!["configured".to_owned()],
    }
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
        bail!(
            "{name}: a sentence embedder is not asked questions; give --variants configured, or configure another judge"
        );
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
            method.shots = shots.parse().with_context(|| format!("{name}: {shots} is no number of exemplars"))?;
            method.cot = rest == ["cot"];
            method.both_orders = true;
        }
        _ => bail!("{name} is no way of asking; give configured, likelihood-mean, or one of {}", VARIANTS.join(", ")),
    }
    let mut config = config.clone();
    config.labeler.methods = Methods { list: vec![method], panel: false };
    Ok(config)
}

/// Asks in every way; returns the table of alignments, and that of both orders if any way of asking reads both.
///
/// # Errors
/// A labeler that cannot be used, or fails beyond its restart budget.
pub fn alignment(
    config: &Config,
    bench: &LabelerBench,
    job: &Alignment,
    title: &str,
) -> Result<(Table, Option<Table>)> {
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
    let mut any_both = false;
    for name in &job.variants {
        let config = variant(config, name)?;
        let cot = config.labeler.methods.iter().any(|method| method.cot);
        let count = if cot { job.chosen.len().min(job.with_cot) } else { job.chosen.len() };
        let questions = PairQuestions {
            pairs: Arc::clone(&job.pairs),
            format: prompt_format(&config),
            tokenizer: bench.tokenizer.clone(),
        };
        let questions = Arc::new(Chosen { questions, chosen: job.chosen[..count].to_vec() });
        let temperature = config.labeler.methods.first().map_or(1.0, |method| method.pair_temperature);
        let wants = Wants::Preferences { pairing: Pairing::Adjacent, temperature };
        let began = Instant::now();
        let labels = judge(&config, &bench.instruments, questions, count, wants, name)?;
        let seconds = began.elapsed().as_secs_f64();
        let mut usage = Usage::default();
        let mut read = Vec::with_capacity(count);
        for (i, labels) in job.chosen.iter().zip(&labels) {
            usage += labels.usage;
            read.push(Pair { judged: judged(labels), human: human(job.pairs.get(*i)?.preference) });
        }
        let found = positions(&read);
        let both = labels.iter().flat_map(|one| &one.preferences).any(|one| one.orders.is_some());
        let only = |cell: Estimate| if both { Cell::Share(cell) } else { Cell::Text("–".into()) };
        let per_pair = |value: f64| Cell::Number(value / count.max(1) as f64);
        table.push(vec![
            Cell::Text(name.clone()),
            Cell::Integer(count as i64),
            Cell::Share(found.alignment),
            only(found.alignment_ab),
            only(found.alignment_ba),
            only(found.same_position),
            only(found.first_of_same),
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
    }
    Ok((table, any_both.then_some(orders)))
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
        assert_eq!(default_variants(&config), VARIANTS);
        let mut embedding = config.clone();
        embedding.labeler.methods.list[0].kind = LabelerKind::Embedding;
        assert_eq!(default_variants(&embedding), ["configured"]);
        assert!(format!("{:#}", variant(&embedding, "direct").unwrap_err()).contains("--variants configured"));
    }
}

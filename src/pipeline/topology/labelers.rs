//! Construction of the configured labeler from its judges.

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::config::{Config, LabelerKind, Method, Methods};
use crate::lm::tokens::Tokenizer;
use crate::pipeline::label::Labeler;
use crate::pipeline::label::backend::Decoding;
use crate::pipeline::label::direct::Direct;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::likelihood::{Likelihood, TokenJudge};
use crate::pipeline::label::pairwise::{ChainOfThought, Pairwise};
use crate::pipeline::label::panel::{Member, Panel};
use crate::pipeline::label::templates::{Preamble, Question, TemplateSet};
use crate::pipeline::setup::Prepared;

/// Checks `methods` without loading or asking a judge.
///
/// # Errors
/// If a method needs local weights but its judge is remote, or if a template set does not exist or lacks a template that
/// its method needs.
pub fn validate_methods(methods: &Methods) -> Result<()> {
    for method in methods.iter() {
        if matches!(method.kind, LabelerKind::Likelihood | LabelerKind::Embedding) && method.remote.is_some() {
            bail!("it reads the weights of its judge, but labeler.remote is on a server");
        }
        if let Some(question) = question(method)? {
            TemplateSet::find_for(&method.templates, &question)?;
        }
    }
    Ok(())
}

/// Returns the kind of question that `method` asks, or `None` if it reads weights instead.
fn question(method: &Method) -> Result<Option<Question>> {
    Ok(match method.kind {
        LabelerKind::Likelihood | LabelerKind::Embedding => None,
        LabelerKind::Direct => Some(Question::Rating),
        LabelerKind::Pairwise => {
            let (preamble, shots, cot) = (Preamble::find(&method.preamble)?, method.shots, method.cot);
            Some(Question::Comparison { preamble, shots, cot })
        }
    })
}

/// Returns the configured labeler: one method, or a panel.
///
/// # Errors
/// If a template cannot be used.
pub fn labeler(config: &Config, prepared: &Prepared) -> Result<Box<dyn Labeler>> {
    labeler_on(config, &prepared.backends)
}

/// Like [`labeler`], with `backends` as the judges, one per method.
///
/// # Errors
/// The same as for [`labeler`].
pub fn labeler_on(config: &Config, backends: &[JudgeBackend]) -> Result<Box<dyn Labeler>> {
    build(config, ("labeler", &config.labeler.methods), backends)
}

/// Returns the labeler of evaluations: `evaluation.labeler` if set, else the configured labeler.
///
/// # Errors
/// The same as for [`labeler`].
pub fn evaluation_judge(config: &Config, prepared: &Prepared) -> Result<Box<dyn Labeler>> {
    let backends = if config.evaluation.labeler.is_some() { &prepared.evaluation_backends } else { &prepared.backends };
    let backends: Vec<JudgeBackend> = backends.iter().map(JudgeBackend::outside_graph).collect();
    build(config, config.evaluation_judge(), &backends)
}

/// Returns the labeler of `methods` with `backends` as the judges, one per method. `path` is the configuration key of the
/// methods, for errors.
fn build(config: &Config, (path, methods): (&str, &Methods), backends: &[JudgeBackend]) -> Result<Box<dyn Labeler>> {
    let mut labelers = Vec::new();
    for (i, (method, judge)) in methods.iter().zip(backends).enumerate() {
        let labeler = method_labeler(config, method, judge);
        labelers.push((method, labeler.with_context(|| format!("{} cannot be used", methods.place(path, i)))?));
    }
    if !methods.panel {
        return labelers.pop().map(|(_, labeler)| labeler).context("no labeler is configured");
    }
    let members = labelers.into_iter().map(|(method, labeler)| Member {
        labeler,
        weight: method.weight,
        pair_temperature: method.pair_temperature,
    });
    Ok(Box::new(Panel { members: members.collect(), pairing: config.labeler.pairs }))
}

fn method_labeler(config: &Config, method: &Method, judge: &JudgeBackend) -> Result<Box<dyn Labeler>> {
    let backend = || judge.backend().context("a sentence embedder cannot be asked questions");
    let tokens: Option<Arc<dyn TokenJudge>> = match judge {
        JudgeBackend::Model(local) | JudgeBackend::Cached { local, .. } => Some(Arc::new(local.judge().clone())),
        JudgeBackend::OnWorkers { judge, .. } => Some(Arc::clone(judge) as _),
        JudgeBackend::Embedder(_) | JudgeBackend::Asked(_) => None,
    };
    match (method.kind, judge, tokens) {
        (LabelerKind::Likelihood, _, Some(judge)) => {
            return Ok(Box::new(Likelihood {
                judge,
                length_normalise: method.length_normalise,
                unconditional_weight: method.unconditional_weight,
                temperature: config.rollout.temperature,
            }));
        }
        (LabelerKind::Embedding, JudgeBackend::Embedder(embedding), _) => return Ok(Box::new(embedding.clone())),
        _ => {}
    }
    let Some(question) = question(method)? else { bail!("the method cannot use this kind of judge") };
    let control = judge.tokenizer().map_or_else(Vec::new, Tokenizer::control_tokens);
    let set = TemplateSet::find_for(&method.templates, &question)?.without_control(control);
    Ok(match question {
        Question::Rating => Box::new(Direct::new(backend()?, set.rating()?)?),
        Question::Comparison { preamble, shots, cot } => {
            let comparison = set.comparison(&preamble, shots, cot)?;
            let decoding = Decoding {
                max_tokens: method.rationale_tokens,
                temperature: method.rationale_temperature,
                top_k: (method.rationale_temperature > 0.0).then_some(40),
                seed: config.run.seed,
            };
            let thought = cot.then_some(ChainOfThought { samples: method.rationales, decoding });
            Box::new(Pairwise::new(backend()?, comparison, config.labeler.pairs, method.both_orders, thought)?)
        }
    })
}

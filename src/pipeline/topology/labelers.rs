//! The labeler that a configuration asks for, on the judges that were prepared for it.

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::config::{Config, LabelerKind, Method, Methods};
use crate::pipeline::label::Labeler;
use crate::pipeline::label::backend::{Backend, Decoding};
use crate::pipeline::label::direct::Direct;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::likelihood::Likelihood;
use crate::pipeline::label::pairwise::{ChainOfThought, Pairwise};
use crate::pipeline::label::panel::{Member, Panel};
use crate::pipeline::label::templates::{Preamble, Question, TemplateSet};
use crate::pipeline::setup::Prepared;

/// Refuses a labeler that cannot be made whatever its judges answer: a method that its judge does not serve, or that needs
/// what its template set lacks. Loads and asks nothing.
///
/// # Errors
/// The first method that cannot be used.
pub fn possible(methods: &Methods) -> Result<()> {
    for method in methods.iter() {
        if matches!(method.kind, LabelerKind::Likelihood | LabelerKind::Embedding) && method.remote.is_some() {
            bail!("it reads the weights of its judge, and labeler.remote is on a server");
        }
        if let Some(question) = question(method)? {
            TemplateSet::find_for(&method.templates, &question)?;
        }
    }
    Ok(())
}

/// What `method` asks with its template set, if it asks.
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

/// The configured labeler: one method, or a panel.
///
/// # Errors
/// A template that cannot be used.
pub fn labeler(config: &Config, prepared: &Prepared) -> Result<Box<dyn Labeler>> {
    labeler_on(config, &prepared.instruments)
}

/// As [`labeler`], on `instruments`, one per method.
///
/// # Errors
/// As [`labeler`].
pub fn labeler_on(config: &Config, instruments: &[JudgeBackend]) -> Result<Box<dyn Labeler>> {
    made_of(config, ("labeler", &config.labeler.methods), instruments)
}

/// The judge of evaluations: `evaluation.labeler`, or the configured labeler.
///
/// # Errors
/// As [`labeler`].
pub fn evaluation_judge(config: &Config, prepared: &Prepared) -> Result<Box<dyn Labeler>> {
    let instruments = if config.evaluation.labeler.is_some() { &prepared.evaluators } else { &prepared.instruments };
    made_of(config, config.evaluation_judge(), instruments)
}

/// The labeler of `methods`, whose keys are at `path`, on `instruments`, one per method.
fn made_of(
    config: &Config,
    (path, methods): (&str, &Methods),
    instruments: &[JudgeBackend],
) -> Result<Box<dyn Labeler>> {
    let mut made = Vec::new();
    for (i, (method, instrument)) in methods.iter().zip(instruments).enumerate() {
        let labeler = one(config, method, instrument);
        made.push((method, labeler.with_context(|| format!("{} cannot be used", methods.place(path, i)))?));
    }
    if !methods.panel {
        return made.pop().map(|(_, labeler)| labeler).context("no labeler is configured");
    }
    let members = made.into_iter().map(|(method, labeler)| Member {
        labeler,
        weight: method.weight,
        pair_temperature: method.pair_temperature,
    });
    Ok(Box::new(Panel { members: members.collect(), pairing: config.labeler.pairs }))
}

fn one(config: &Config, method: &Method, instrument: &JudgeBackend) -> Result<Box<dyn Labeler>> {
    let backend = || -> Result<Arc<dyn Backend>> {
        match instrument {
            JudgeBackend::Model(local) => Ok(Arc::clone(local) as Arc<dyn Backend>),
            JudgeBackend::Cached { backend, .. } | JudgeBackend::Asked(backend) => Ok(Arc::clone(backend)),
            JudgeBackend::Embedder(_) => bail!("a sentence embedder cannot be asked questions"),
        }
    };
    match (method.kind, instrument, instrument.local()) {
        (LabelerKind::Likelihood, _, Some(local)) => {
            return Ok(Box::new(Likelihood {
                judge: local.judge().clone(),
                length_normalise: method.length_normalise,
                temperature: config.rollout.temperature,
            }));
        }
        (LabelerKind::Embedding, JudgeBackend::Embedder(embedding), _) => return Ok(Box::new(embedding.clone())),
        _ => {}
    }
    let Some(question) = question(method)? else { bail!("the judge is of another kind than the method") };
    let control = instrument.local().map_or_else(Vec::new, |local| local.judge().tokenizer.control_tokens());
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

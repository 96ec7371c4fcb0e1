//! The labeler that a configuration asks for, on the judges that were prepared for it.

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::config::{Config, LabelerKind, Method};
use crate::label::Labeler;
use crate::label::backend::{Backend, Decoding};
use crate::label::direct::Direct;
use crate::label::embedding::Embedding;
use crate::label::likelihood::Likelihood;
use crate::label::local::Local;
use crate::label::pairwise::{Pairwise, Thought};
use crate::label::panel::{Member, Panel};
use crate::label::templates::{Preamble, TemplateSet};
use crate::prepare::Prepared;

/// What a method judges with.
#[derive(Clone)]
pub enum Instrument {
    /// A language model whose weights are here.
    Model(Arc<Local>),
    /// A sentence encoder.
    Embedder(Embedding),
    /// A language model that is asked through something: a server, a cache.
    Asked(Arc<dyn Backend>),
}

impl Instrument {
    /// Tells the judge from others: a fingerprint of its weights, or a hash of the server and the model there.
    pub fn identity(&self) -> u64 {
        match self {
            Self::Model(local) => local.judge().identity,
            Self::Embedder(embedding) => embedding.identity,
            Self::Asked(backend) => backend.identity(),
        }
    }
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
pub fn labeler_on(config: &Config, instruments: &[Instrument]) -> Result<Box<dyn Labeler>> {
    let mut made = Vec::new();
    for (i, (method, instrument)) in config.labeler.methods.iter().zip(instruments).enumerate() {
        let place = if config.labeler.methods.panel { format!("labeler.members[{i}]") } else { "labeler".into() };
        made.push((method, one(config, method, instrument).with_context(|| format!("{place} cannot be used"))?));
    }
    if !config.labeler.methods.panel {
        return made.pop().map(|(_, labeler)| labeler).context("no labeler is configured");
    }
    let members = made.into_iter().map(|(method, labeler)| Member {
        labeler,
        weight: method.weight,
        pair_temperature: method.pair_temperature,
    });
    Ok(Box::new(Panel { members: members.collect(), pairing: config.labeler.pairs }))
}

fn one(config: &Config, method: &Method, instrument: &Instrument) -> Result<Box<dyn Labeler>> {
    let backend = || -> Result<Arc<dyn Backend>> {
        match instrument {
            Instrument::Model(local) => Ok(Arc::clone(local) as Arc<dyn Backend>),
            Instrument::Asked(backend) => Ok(Arc::clone(backend)),
            Instrument::Embedder(_) => bail!("a sentence embedder cannot be asked questions"),
        }
    };
    Ok(match (method.kind, instrument) {
        (LabelerKind::Likelihood, Instrument::Model(local)) => Box::new(Likelihood {
            judge: local.judge().clone(),
            length_normalise: method.length_normalise,
            temperature: config.rollout.temperature,
        }),
        (LabelerKind::Embedding, Instrument::Embedder(embedding)) => Box::new(embedding.clone()),
        (LabelerKind::Likelihood | LabelerKind::Embedding, _) => bail!("the judge is of another kind than the method"),
        (LabelerKind::Direct, _) => Box::new(Direct::new(backend()?, TemplateSet::find(&method.templates)?)?),
        (LabelerKind::Pairwise, _) => {
            let preamble = Preamble::find(&method.preamble)?;
            let comparison = TemplateSet::find(&method.templates)?.comparison(&preamble, method.shots, method.cot)?;
            let decoding = Decoding {
                max_tokens: method.rationale_tokens,
                temperature: method.rationale_temperature,
                top_k: (method.rationale_temperature > 0.0).then_some(40),
                seed: config.run.seed,
            };
            let thought = method.cot.then_some(Thought { samples: method.rationales, decoding });
            Box::new(Pairwise::new(backend()?, comparison, config.labeler.pairs, method.both_orders, thought)?)
        }
    })
}

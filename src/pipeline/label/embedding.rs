//! Similarity feedback: the similarity of prompt and answer in the embedding space of a sentence encoder.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Device;

use super::backend::{Alive, Usage};
use super::{Labeler, Labels};
use crate::lm::model::Embedder;
use crate::lm::source::{self, ModelFiles, ModelRef, ResolveOptions};
use crate::types::{Group, Verdict};

/// A sentence encoder.
pub trait Encoder: Send + Sync {
    /// Returns one embedding of length 1 per text.
    ///
    /// # Errors
    /// If the encoder cannot be asked, or fails.
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>>;

    /// Returns the number of values of the encoder's weights in this process.
    fn parameters(&self) -> usize;

    /// Returns the same encoder for askers outside of the run's graph, if halting that ends the questions of this one.
    fn outside_graph(&self) -> Option<Arc<dyn Encoder>> {
        None
    }

    /// Registers a liveness callback; see [`super::backend::Backend::register_liveness`].
    fn register_liveness(&self, _name: &str, _alive: &Alive) {}

    /// Returns whether failures have been waited out already; see [`super::backend::Backend::waits`].
    fn waits(&self) -> bool {
        false
    }
}

impl Encoder for Embedder {
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        Self::embed(self, texts)
    }

    fn parameters(&self) -> usize {
        Self::parameters(self)
    }
}

/// Labeler that scores an answer by the cosine between the embeddings of prompt and answer, in [−1, 1].
#[derive(Clone)]
pub struct Embedding {
    /// Sentence encoder with frozen weights.
    pub embedder: Arc<dyn Encoder>,
    /// Fingerprint of the encoder's weights.
    pub identity: u64,
}

impl Embedding {
    /// Resolves and loads the encoder that `reference` names.
    ///
    /// # Errors
    /// If no candidate of `reference` exists, or the resolved one is not a directory with a BERT encoder.
    pub fn load(reference: &ModelRef, device: &Device, options: &ResolveOptions) -> Result<Self> {
        Ok(Self::load_from(reference, device, options)?.0)
    }

    /// Like [`Self::load`]; also returns the directory of the encoder's files.
    ///
    /// # Errors
    /// The same as for [`Self::load`].
    pub fn load_from(reference: &ModelRef, device: &Device, options: &ResolveOptions) -> Result<(Self, PathBuf)> {
        let resolved = source::resolve(reference, options)?;
        let ModelFiles::Directory(dir) = resolved.files else {
            bail!("{} is a GGUF file; an embedder needs a directory with model.safetensors", resolved.origin)
        };
        let embedder = Embedder::from_directory(&dir, device).with_context(|| format!("in {}", resolved.origin))?;
        Ok((Self { identity: embedder.identity(), embedder: Arc::new(embedder) }, dir))
    }

    /// Returns the score of each answer to `prompt`, in order; `None`, an abstention, if prompt or answer is blank.
    ///
    /// # Errors
    /// If the encoder fails; see [`Embedder::embed`].
    pub fn score(&self, prompt: &str, answers: &[&str]) -> Result<Vec<Option<f64>>> {
        if prompt.trim().is_empty() {
            return Ok(vec![None; answers.len()]);
        }
        let given: Vec<&str> = answers.iter().copied().filter(|answer| !answer.trim().is_empty()).collect();
        let embeddings = self.embedder.embed(&[&[prompt], given.as_slice()].concat())?;
        // All embeddings have length 1, so the dot product is the cosine; rounding may carry it past 1.
        let cosine = |answer: &Vec<f32>| {
            let product: f64 = embeddings[0].iter().zip(answer).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            product.clamp(-1.0, 1.0)
        };
        let mut scores = embeddings[1..].iter().map(cosine);
        Ok(answers.iter().map(|answer| if answer.trim().is_empty() { None } else { scores.next() }).collect())
    }
}

impl Labeler for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn model(&self) -> u64 {
        self.identity
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.embedder.register_liveness(name, alive);
    }

    fn waits(&self) -> bool {
        self.embedder.waits()
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        let answers: Vec<&str> = group.completions.iter().map(|completion| completion.text.as_str()).collect();
        let verdict = |score: Option<f64>| match score {
            Some(score) if score.is_finite() => Verdict::Label(score),
            Some(_) => Verdict::Failure("the embedder's cosine is not finite".into()),
            None => Verdict::Abstention("text or answer is blank: there is nothing to compare".into()),
        };
        let scores = self.score(&group.prompt.text, &answers)?.into_iter().map(verdict).collect();
        let usage = Usage { requests: answers.len() as u64, ..Usage::default() };
        Ok(Labels { scores, usage, ..Labels::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::source::Candidate;
    use std::path::Path;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert")
    }

    fn load(path: PathBuf) -> Result<Embedding> {
        Embedding::load(&ModelRef(vec![Candidate::Path(path)]), &Device::Cpu, &ResolveOptions::default())
    }

    #[test]
    fn scores_are_cosines_of_the_reference_embeddings() {
        let texts: Vec<String> =
            serde_json::from_str(&std::fs::read_to_string(fixture().join("texts.json")).unwrap()).unwrap();
        let reference = candle_core::safetensors::load(fixture().join("ref.safetensors"), &Device::Cpu).unwrap();
        let reference = reference["embeddings"].to_vec2::<f32>().unwrap();
        // In reverse order, so that the text itself does not come first.
        let expected: Vec<Option<f64>> = texts
            .iter()
            .zip(&reference)
            .rev()
            .map(|(text, e)| {
                let cosine = e.iter().zip(&reference[0]).map(|(a, b)| f64::from(a * b)).sum();
                if text.is_empty() { None } else { Some(cosine) }
            })
            .collect();
        assert!(expected.contains(&None), "the texts must include an empty one");
        let answers: Vec<&str> = texts.iter().rev().map(String::as_str).collect();
        let scores = load(fixture()).unwrap().score(&texts[0], &answers).unwrap();
        assert_eq!(scores.len(), expected.len());
        for (i, (score, expected)) in scores.iter().zip(&expected).enumerate() {
            let near = score.zip(*expected).map_or(score == expected, |(a, b)| (a - b).abs() < 1e-5);
            assert!(near, "answer {i}: {score:?} against {expected:?}");
        }
    }

    #[test]
    fn blank_prompts_and_answers_have_no_score() {
        let embedding = load(fixture()).unwrap();
        let scores = embedding.score("a cat", &[" \n", "a cat", ""]).unwrap();
        assert!(scores[0].is_none() && (scores[1].unwrap() - 1.0).abs() < 1e-6 && scores[2].is_none(), "{scores:?}");
        assert_eq!(embedding.score(" ", &["a", "b"]).unwrap(), [None, None]);
        assert!(embedding.score("a cat", &[]).unwrap().is_empty());
    }

    #[test]
    fn a_gguf_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, "").unwrap();
        let error = load(path).err().unwrap().to_string();
        assert!(error.contains("needs a directory"), "{error}");
    }
}

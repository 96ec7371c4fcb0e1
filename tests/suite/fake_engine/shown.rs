//! Completions as an answer of the fake inference server shows them, with its faults.

use serde_json::{Value, json};

use super::core::Sampled;
use super::{Faults, Versions};

/// Tokens, log-probabilities, ranks and spans of weight versions of a completion.
pub struct Shown {
    pub ids: Vec<u32>,
    pub logprobs: Vec<Value>,
    pub ranks: Vec<usize>,
    /// Spans of weight versions; `None` if the answer has none.
    pub spans: Option<Vec<Value>>,
}

impl Shown {
    /// Returns a completion of a model with this vocabulary as the server shows it.
    pub fn of(sampled: &Sampled, faults: &Faults, vocabulary: usize) -> Self {
        let mut ids = sampled.ids.clone();
        if let Some(last) = ids.last_mut().filter(|_| faults.foreign_ids) {
            *last = (vocabulary + 5) as u32;
        }
        let mut logprobs: Vec<Value> = sampled.logprobs.iter().map(|logprob| number(*logprob)).collect();
        if let (Some(bad), Some(first)) = (&faults.bad_logprob, logprobs.first_mut()) {
            *first = bad.clone();
        }
        if faults.short_logprobs {
            logprobs.pop();
        }
        let mut versions = sampled.versions.clone();
        match &faults.versions {
            Versions::Always(version) => versions.fill(version.clone()),
            Versions::Gap => drop(versions.pop()),
            Versions::True | Versions::Missing => {}
        }
        let spans = (faults.versions != Versions::Missing).then(|| spans(&versions));
        Self { ids, logprobs, ranks: sampled.ranks.clone(), spans }
    }
}

/// Returns a log-probability as a JSON number.
pub fn number(logprob: f32) -> Value {
    json!(f64::from(logprob))
}

fn spans(versions: &[String]) -> Vec<Value> {
    let mut start = 0;
    let spans = versions.chunk_by(|a, b| a == b).map(|run| {
        let span = json!({ "version": run[0], "start": start, "end": start + run.len() });
        start += run.len();
        span
    });
    spans.collect()
}

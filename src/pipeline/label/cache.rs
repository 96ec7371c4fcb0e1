//! The label cache on disk, keyed by the complete question, so that no label is bought twice.
//!
//! A key is a hash of everything that determines the answer: the judge ([`Shape`]), the kind of question, the prompt
//! with the template filled in, the possible answers, and the decoding settings of free text. The judge's address is
//! not part of it.

mod database;
mod earlier;
mod entry;
mod store;

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::backend::{Alive, Ask, Backend, Decoding, Reply, Usage};
use super::shape::{Digest, Shape};
use crate::util::limit::AdjustableLimit;
use database::Keys;
pub use store::Store;

type Key = [u8; 32];

/// Backend that looks answers up in the cache before asking another backend. Answers are cached; abstentions and
/// failures are not.
pub struct Cached {
    inner: Arc<dyn Backend>,
    shape: Shape,
    store: Arc<Store>,
}

impl Cached {
    /// Wraps `inner` with the cache `store`.
    pub fn new(inner: Arc<dyn Backend>, store: Arc<Store>) -> Self {
        Self { shape: inner.shape(), inner, store }
    }

    /// Looks up `keys`, calls `ask` with the indices of the missing ones (only the first of equal keys), and caches its
    /// answers.
    fn through<T: Serialize + DeserializeOwned + Clone>(
        &self,
        keys: &[Keys],
        usage: &mut Usage,
        ask: impl FnOnce(&[usize], &mut Usage) -> Vec<Reply<T>>,
    ) -> Vec<Reply<T>> {
        // A cache failure costs money but never a label: the judge is asked, and the fault is logged.
        let known = self.store.get::<T>(keys);
        let mut first: HashMap<Key, usize> = HashMap::new();
        let missing: Vec<usize> = (0..keys.len())
            .filter(|i| {
                let key = keys[*i].key;
                known[*i].is_none() && !first.contains_key(&key) && first.insert(key, *i).is_none()
            })
            .collect();
        let replies = if missing.is_empty() { Vec::new() } else { ask(&missing, usage) };
        let new = missing.iter().zip(&replies).filter_map(|(i, reply)| Some((keys[*i].key, reply.as_ref().ok()?)));
        if !replies.is_empty() {
            self.store.put(new);
        }
        usage.cached += (keys.len() - missing.len()) as u64;
        let asked: HashMap<Key, Reply<T>> = missing.iter().map(|i| keys[*i].key).zip(replies).collect();
        let found =
            known.into_iter().zip(keys).map(|(known, keys)| known.map(Ok).or_else(|| asked.get(&keys.key).cloned()));
        found
            .map(|reply| reply.unwrap_or_else(|| Err(super::NoAnswer::Failure("the judge gave no answer".into()))))
            .collect()
    }

    /// Returns the keys of a question with the given `parts`, and with `earlier` as the parts in the format of earlier
    /// versions.
    fn keys(&self, kind: &str, judge: &Digest, parts: &[&str], earlier: &[&str]) -> Keys {
        let hash = |first: &[u8], parts: &[&str]| -> Key {
            let mut hash = Sha256::new();
            hash.update(first);
            for part in std::iter::once(&kind).chain(parts) {
                // The length prefix keeps adjacent parts apart.
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part.as_bytes());
            }
            hash.finalize().into()
        };
        let earlier = self.shape.earlier.map(|identity| hash(&identity.to_le_bytes(), earlier));
        Keys { key: hash(judge, parts), earlier }
    }
}

/// Formats `decoding` for a key.
fn decoding_part(decoding: &Decoding) -> String {
    // A field that is missing here would give different texts the same key.
    let Decoding { max_tokens, temperature, top_k, seed } = decoding;
    let top_k = top_k.map_or_else(|| "none".to_owned(), |k| k.to_string());
    format!("max_tokens={max_tokens} temperature={temperature} top_k={top_k} seed={seed}")
}

/// Formats `decoding` as earlier versions did in a key.
fn earlier_decoding_part(decoding: &Decoding) -> String {
    let Decoding { max_tokens, temperature, top_k, seed } = decoding;
    format!("Decoding {{ max_tokens: {max_tokens}, temperature: {temperature:?}, top_k: {top_k:?}, seed: {seed} }}")
}

impl Backend for Cached {
    fn identity(&self) -> u64 {
        self.inner.identity()
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.inner.register_liveness(name, alive);
    }

    fn waits(&self) -> bool {
        self.inner.waits()
    }

    fn reported_model(&self) -> Option<String> {
        self.inner.reported_model()
    }

    fn evidence(&self) -> Option<String> {
        self.inner.evidence()
    }

    fn concurrency_limit(&self) -> Option<Arc<AdjustableLimit>> {
        self.inner.concurrency_limit()
    }

    fn warm(&self, examples: &[String]) -> Result<()> {
        self.inner.warm(examples)
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        let keys = |ask: &Ask| {
            let parts: Vec<&str> = std::iter::once(&ask.prompt).chain(&ask.answers).map(String::as_str).collect();
            self.keys("weigh", &self.shape.weighed, &parts, &parts)
        };
        let keys: Vec<Keys> = asks.iter().map(keys).collect();
        self.through(&keys, usage, |missing, usage| {
            let asks: Vec<Ask> = missing.iter().map(|i| asks[*i].clone()).collect();
            self.inner.weigh(&asks, usage)
        })
    }

    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>> {
        let (settings, earlier) = (decoding_part(decoding), earlier_decoding_part(decoding));
        let mut before: HashMap<&str, u64> = HashMap::new();
        let keys: Vec<Keys> = prompts
            .iter()
            .map(|prompt| {
                // Equal prompts of one call are different samples.
                let count = before.entry(prompt).or_default();
                *count += 1;
                let count = count.to_string();
                let parts = |settings| [prompt.as_str(), settings, count.as_str()];
                self.keys("write", &self.shape.written, &parts(settings.as_str()), &parts(earlier.as_str()))
            })
            .collect();
        self.through(&keys, usage, |missing, usage| {
            let prompts: Vec<String> = missing.iter().map(|i| prompts[*i].clone()).collect();
            self.inner.write(&prompts, decoding, usage)
        })
    }
}

#[cfg(test)]
mod tests;

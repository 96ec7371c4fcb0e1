//! Labels on disk, found again by what was asked: no label is bought twice.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::backend::{Alive, Ask, Backend, Decoding, Reply, Usage};
use crate::knob::Knob;
use crate::telemetry;

const REPLIES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("replies");

/// Keys in the order in which their answers came, so that the oldest can go.
const ORDER: TableDefinition<u64, &[u8; 32]> = TableDefinition::new("order");

type Key = [u8; 32];

/// The file that answers are kept in. One process has it open at a time.
pub struct Store {
    database: Database,
    path: PathBuf,
    most: u64,
}

impl Store {
    /// Opens the cache in the folder `dir`, which is made if need be. Beyond `most` answers the oldest go.
    ///
    /// # Errors
    /// A folder that cannot be written, a file that is damaged or is held by another process.
    pub fn open(dir: &Path, most: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the label cache's folder {}", dir.display()))?;
        let path = dir.join("labels.redb");
        let database = match Database::create(&path) {
            Err(DatabaseError::DatabaseAlreadyOpen) => anyhow::bail!(
                "the label cache {} is in use by another run; give this one another labeler.cache",
                path.display()
            ),
            other => other.with_context(|| format!("cannot open the label cache {}", path.display()))?,
        };
        let writing = database.begin_write()?;
        writing.open_table(REPLIES)?;
        writing.open_table(ORDER)?;
        writing.commit()?;
        Ok(Self { database, path, most: most.max(1) })
    }

    /// Answers in it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn len(&self) -> Result<u64> {
        Ok(self.database.begin_read()?.open_table(REPLIES)?.len()?)
    }

    /// Whether there are none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    fn get<T: DeserializeOwned>(&self, keys: &[Key]) -> Result<Vec<Option<T>>> {
        let reading = self.database.begin_read()?;
        let table = reading.open_table(REPLIES)?;
        keys.iter()
            .map(|key| {
                let found = table.get(key)?;
                // What cannot be read, of another version perhaps, is asked again.
                Ok(found.and_then(|value| serde_json::from_slice(value.value()).ok()))
            })
            .collect()
    }

    /// Keeps answers; they are on the disk when this returns.
    fn put<'a, T: Serialize + 'a>(&self, replies: impl Iterator<Item = (Key, &'a T)>) -> Result<()> {
        let writing = self.database.begin_write()?;
        {
            let (mut table, mut order) = (writing.open_table(REPLIES)?, writing.open_table(ORDER)?);
            let mut next = order.last()?.map_or(0, |(last, _)| last.value() + 1);
            for (key, reply) in replies {
                if table.insert(&key, serde_json::to_vec(reply)?.as_slice())?.is_some() {
                    // Two actors asked the same at the same time.
                    telemetry::label_bought_again();
                    continue;
                }
                order.insert(next, &key)?;
                next += 1;
            }
            while table.len()? > self.most {
                let Some(oldest) = order.pop_first()?.map(|(_, key)| *key.value()) else { break };
                table.remove(&oldest)?;
            }
            telemetry::label_cache(table.len()?);
        }
        Ok(writing.commit()?)
    }
}

/// A backend whose answers are looked up first. Answers are kept, refusals are not.
pub struct Cached {
    inner: Arc<dyn Backend>,
    store: Arc<Store>,
}

impl Cached {
    /// `inner` behind `store`.
    pub fn new(inner: Arc<dyn Backend>, store: Arc<Store>) -> Self {
        Self { inner, store }
    }

    /// Looks `keys` up, has what is missing answered by `ask` (given the places of the first of equals), keeps it.
    fn through<T: Serialize + DeserializeOwned + Clone>(
        &self,
        keys: &[Key],
        usage: &mut Usage,
        ask: impl FnOnce(&[usize], &mut Usage) -> Vec<Reply<T>>,
    ) -> Vec<Reply<T>> {
        // A cache that fails costs money and no label: the judge is asked, and the fault is told.
        let known = self.store.get::<T>(keys).unwrap_or_else(|error| {
            tracing::error!("the label cache {} cannot be read: {error:#}", self.store.path.display());
            keys.iter().map(|_| None).collect()
        });
        let mut first: HashMap<Key, usize> = HashMap::new();
        let missing: Vec<usize> = (0..keys.len())
            .filter(|i| known[*i].is_none() && !first.contains_key(&keys[*i]) && first.insert(keys[*i], *i).is_none())
            .collect();
        let replies = if missing.is_empty() { Vec::new() } else { ask(&missing, usage) };
        let new = missing.iter().zip(&replies).filter_map(|(i, reply)| Some((keys[*i], reply.as_ref().ok()?)));
        if !replies.is_empty()
            && let Err(error) = self.store.put(new)
        {
            tracing::error!("the label cache {} cannot be written: {error:#}", self.store.path.display());
        }
        usage.cached += (keys.len() - missing.len()) as u64;
        let asked: HashMap<Key, Reply<T>> = missing.iter().map(|i| keys[*i]).zip(replies).collect();
        let found = known.into_iter().zip(keys).map(|(known, key)| known.map(Ok).or_else(|| asked.get(key).cloned()));
        found
            .map(|reply| reply.unwrap_or_else(|| Err(super::Refusal::Failure("the judge gave no answer".into()))))
            .collect()
    }

    /// A key for `parts`, of this judge.
    fn key(&self, kind: &str, parts: &[&str]) -> Key {
        let mut hash = Sha256::new();
        hash.update(self.inner.identity().to_le_bytes());
        for part in std::iter::once(&kind).chain(parts) {
            // With its length before it, so that parts cannot run into each other.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.finalize().into()
    }
}

impl Backend for Cached {
    fn identity(&self) -> u64 {
        self.inner.identity()
    }

    fn attend(&self, name: &str, alive: &Alive) {
        self.inner.attend(name, alive);
    }

    fn waits(&self) -> bool {
        self.inner.waits()
    }

    fn knob(&self) -> Option<Arc<Knob>> {
        self.inner.knob()
    }

    fn warm(&self, examples: &[String]) -> Result<()> {
        self.inner.warm(examples)
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        let key = |ask: &Ask| {
            let parts: Vec<&str> = std::iter::once(&ask.prompt).chain(&ask.answers).map(String::as_str).collect();
            self.key("weigh", &parts)
        };
        let keys: Vec<Key> = asks.iter().map(key).collect();
        self.through(&keys, usage, |missing, usage| {
            let asks: Vec<Ask> = missing.iter().map(|i| asks[*i].clone()).collect();
            self.inner.weigh(&asks, usage)
        })
    }

    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>> {
        let settings = format!("{decoding:?}");
        let mut before: HashMap<&str, u64> = HashMap::new();
        let keys: Vec<Key> = prompts
            .iter()
            .map(|prompt| {
                // Equal prompts of a call are different draws.
                let count = before.entry(prompt).or_default();
                *count += 1;
                self.key("write", &[prompt, &settings, &count.to_string()])
            })
            .collect();
        self.through(&keys, usage, |missing, usage| {
            let prompts: Vec<String> = missing.iter().map(|i| prompts[*i].clone()).collect();
            self.inner.write(&prompts, decoding, usage)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::label::Refusal;

    /// Answers with the length of the question; fails at those that say so, the first time.
    #[derive(Default)]
    struct Counting {
        asked: AtomicU64,
        failed: AtomicU64,
    }

    impl Backend for Counting {
        fn identity(&self) -> u64 {
            3
        }

        fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
            usage.requests += asks.len() as u64;
            self.asked.fetch_add(asks.len() as u64, Ordering::SeqCst);
            let answer = |ask: &Ask| {
                if ask.prompt.contains("fail") && self.failed.fetch_add(1, Ordering::SeqCst) == 0 {
                    return Err(Refusal::Failure("busy".into()));
                }
                Ok(vec![ask.prompt.len() as f64])
            };
            asks.iter().map(answer).collect()
        }

        fn write(&self, prompts: &[String], _decoding: &Decoding, _usage: &mut Usage) -> Vec<Reply<String>> {
            self.asked.fetch_add(prompts.len() as u64, Ordering::SeqCst);
            prompts.iter().map(|prompt| Ok(prompt.to_uppercase())).collect()
        }
    }

    fn asks(prompts: &[&str]) -> Vec<Ask> {
        prompts.iter().map(|prompt| Ask { prompt: (*prompt).into(), answers: vec!["1".into()] }).collect()
    }

    #[test]
    fn an_answer_is_bought_once_and_a_failure_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let inner = Arc::new(Counting::default());
        let mut usage = Usage::default();
        {
            let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
            let replies = cached.weigh(&asks(&["a", "fail", "a"]), &mut usage);
            assert_eq!((&replies[0], &replies[2]), (&Ok(vec![1.0]), &Ok(vec![1.0])));
            assert!(replies[1].is_err());
            assert_eq!(inner.asked.load(Ordering::SeqCst), 2);
        }
        // As another process would, later.
        let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
        let replies = cached.weigh(&asks(&["fail", "a", "b"]), &mut usage);
        assert_eq!(replies, [Ok(vec![4.0]), Ok(vec![1.0]), Ok(vec![1.0])]);
        assert_eq!(inner.asked.load(Ordering::SeqCst), 4);
        assert_eq!((usage.requests, usage.cached), (4, 2));
        let decoding = Decoding { max_tokens: 3, temperature: 1.0, top_k: None, seed: 0 };
        let both = ["x".to_owned(), "x".to_owned()];
        assert_eq!(cached.write(&both, &decoding, &mut usage), [Ok("X".into()), Ok("X".into())]);
        assert_eq!(inner.asked.load(Ordering::SeqCst), 6, "equal prompts of one call are two draws");
        cached.write(&both, &decoding, &mut usage);
        cached.write(&both, &Decoding { seed: 1, ..decoding }, &mut usage);
        assert_eq!(inner.asked.load(Ordering::SeqCst), 8, "another seed is another draw");
    }

    #[test]
    fn beyond_its_bound_the_oldest_answers_go() {
        let dir = tempfile::tempdir().unwrap();
        let inner = Arc::new(Counting::default());
        let mut usage = Usage::default();
        for _ in 0..2 {
            // Opened anew, as another process would: the order outlives it.
            let store = Arc::new(Store::open(dir.path(), 3).unwrap());
            let cached = Cached::new(inner.clone(), Arc::clone(&store));
            for i in 0..5 {
                cached.weigh(&asks(&[&format!("question {i}")]), &mut usage);
                assert!(store.len().unwrap() <= 3);
            }
        }
        // Of five in turn, three are kept; none is there any more when its turn comes again.
        assert_eq!(inner.asked.load(Ordering::SeqCst), 10);
        let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 3).unwrap()));
        cached.weigh(&asks(&["question 4", "question 3", "question 2"]), &mut usage);
        assert_eq!(inner.asked.load(Ordering::SeqCst), 10, "the latest three are kept");
    }

    #[test]
    fn a_store_in_use_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _held = Store::open(dir.path(), 100).unwrap();
        let error = Store::open(dir.path(), 100).err().unwrap().to_string();
        assert!(error.contains("labels.redb") && error.contains("labeler.cache"), "{error}");
    }
}

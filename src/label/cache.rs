//! Labels on disk, found again by what was asked: no label is bought twice.

mod database;
mod entry;
mod store;

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::backend::{Alive, Ask, Backend, Decoding, Reply, Usage};
use crate::knob::Knob;
pub use store::Store;

type Key = [u8; 32];

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
        // A cache that fails costs money and no label: the judge is asked, and the fault is logged.
        let known = self.store.get::<T>(keys);
        let mut first: HashMap<Key, usize> = HashMap::new();
        let missing: Vec<usize> = (0..keys.len())
            .filter(|i| known[*i].is_none() && !first.contains_key(&keys[*i]) && first.insert(keys[*i], *i).is_none())
            .collect();
        let replies = if missing.is_empty() { Vec::new() } else { ask(&missing, usage) };
        let new = missing.iter().zip(&replies).filter_map(|(i, reply)| Some((keys[*i], reply.as_ref().ok()?)));
        if !replies.is_empty() {
            self.store.put(new);
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

    fn reported_model(&self) -> Option<String> {
        self.inner.reported_model()
    }

    fn evidence(&self) -> Option<String> {
        self.inner.evidence()
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

    fn database(dir: &std::path::Path) -> std::path::PathBuf {
        dir.join("labels.redb")
    }

    /// Questions of many lengths, and the answers that `Counting` gives them.
    fn questions() -> (Vec<Ask>, Vec<Reply<Vec<f64>>>) {
        let prompts: Vec<String> = (0..200).map(|i| format!("{i} {}", "x".repeat(i * 7 % 50))).collect();
        let asks = prompts.iter().map(|prompt| Ask { prompt: prompt.clone(), answers: vec!["1".into()] }).collect();
        (asks, prompts.iter().map(|prompt| Ok(vec![prompt.len() as f64])).collect())
    }

    /// Whatever bits flip and whatever parts are lost, a cache is refused with the remedy, or its answers are right or
    /// asked for again.
    #[test]
    fn damage_is_refused_or_counts_as_missing_and_never_becomes_an_answer() {
        use rand::{Rng, SeedableRng};
        let home = tempfile::tempdir().unwrap();
        let (asks, answers) = questions();
        let inner = Arc::new(Counting::default());
        let cached = Cached::new(inner.clone(), Arc::new(Store::open(home.path(), 10_000).unwrap()));
        cached.weigh(&asks, &mut Usage::default());
        drop(cached);
        let sound = std::fs::read(database(home.path())).unwrap();
        let used = sound.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let mut damaged: Vec<(String, Vec<u8>)> = (0..300)
            .map(|i| {
                let mut bytes = sound.clone();
                for _ in 0..[1, 1, 4, 30][i % 4] {
                    bytes[random.random_range(0..used)] ^= 1 << random.random_range(0..8);
                }
                (format!("flips {i}"), bytes)
            })
            .collect();
        let zeroed = |from: usize, to: usize| {
            let mut bytes = sound.clone();
            bytes[from..to].fill(0);
            bytes
        };
        damaged.extend((0..used.div_ceil(4096)).map(|page| {
            let end = ((page + 1) * 4096).min(sound.len());
            (format!("page {page} of zeros"), zeroed(page * 4096, end))
        }));
        damaged.extend([
            ("zeros".into(), zeroed(0, sound.len())),
            ("zeros after the header".into(), zeroed(4096, sound.len())),
            ("half".into(), sound[..sound.len() / 2].to_vec()),
            ("all but a byte".into(), sound[..sound.len() - 1].to_vec()),
            ("text".into(), b"hello\n".repeat(1000)),
        ]);
        let (mut refused, mut again) = (0, 0);
        for (name, bytes) in damaged {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(database(dir.path()), &bytes).unwrap();
            let store = match Store::open(dir.path(), 10_000) {
                Ok(store) => store,
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("labels.redb") && error.contains("remove it"), "{name}: {error}");
                    refused += 1;
                    continue;
                }
            };
            let before = inner.asked.load(Ordering::SeqCst);
            let cached = Cached::new(inner.clone(), Arc::new(store));
            assert_eq!(cached.weigh(&asks, &mut Usage::default()), answers, "{name}");
            again += u64::from(inner.asked.load(Ordering::SeqCst) > before);
            drop(cached);
        }
        assert!(refused > 5 && again > 50, "{refused} were refused, {again} asked again");
    }

    #[test]
    fn a_changed_answer_is_asked_for_again_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let inner = Arc::new(Counting::default());
        let open = || Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
        let question = asks(&["what is it?"]);
        open().weigh(&question, &mut Usage::default());
        let mut bytes = std::fs::read(database(dir.path())).unwrap();
        let at = bytes.windows(6).position(|window| window == b"[11.0]").unwrap();
        bytes[at + 2] ^= 1;
        std::fs::write(database(dir.path()), bytes).unwrap();
        for asked in [2, 2] {
            assert_eq!(open().weigh(&question, &mut Usage::default()), [Ok(vec![11.0])]);
            assert_eq!(inner.asked.load(Ordering::SeqCst), asked);
        }
    }

    /// As earlier versions wrote them: plain JSON, without a checksum.
    #[test]
    fn a_cache_of_an_earlier_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let inner = Arc::new(Counting::default());
        let key =
            Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap())).key("weigh", &["old", "1"]);
        {
            let database = redb::Database::create(database(dir.path())).unwrap();
            let writing = database.begin_write().unwrap();
            let replies: redb::TableDefinition<&[u8; 32], &[u8]> = redb::TableDefinition::new("replies");
            let order: redb::TableDefinition<u64, &[u8; 32]> = redb::TableDefinition::new("order");
            writing.open_table(replies).unwrap().insert(&key, b"[42.5]".as_slice()).unwrap();
            writing.open_table(order).unwrap().insert(0, &key).unwrap();
            writing.commit().unwrap();
        }
        let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
        assert_eq!(cached.weigh(&asks(&["old"]), &mut Usage::default()), [Ok(vec![42.5])]);
        assert_eq!(inner.asked.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_store_in_use_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _held = Store::open(dir.path(), 100).unwrap();
        let error = Store::open(dir.path(), 100).err().unwrap().to_string();
        assert!(error.contains("labels.redb") && error.contains("labeler.cache"), "{error}");
    }
}

//! Tests of the label cache.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::pipeline::label::NoAnswer;
use crate::pipeline::label::shape::Parts;

/// Backend that answers with the length of the question; questions that contain `fail` fail the first time.
#[derive(Default)]
struct Counting {
    /// Settings, besides its identity, that are part of its shape.
    settings: &'static str,
    asked: AtomicU64,
    failed: AtomicU64,
}

impl Backend for Counting {
    fn identity(&self) -> u64 {
        3
    }

    fn shape(&self) -> Shape {
        let parts = Parts::of("test").with("settings", self.settings);
        Shape { weighed: parts.digest(), written: parts.with("of", "texts").digest(), earlier: Some(self.identity()) }
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        usage.requests += asks.len() as u64;
        self.asked.fetch_add(asks.len() as u64, Ordering::SeqCst);
        let answer = |ask: &Ask| {
            if ask.prompt.contains("fail") && self.failed.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err(NoAnswer::Failure("busy".into()));
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
fn an_answer_is_bought_once_and_a_failed_question_is_asked_again() {
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
    // A later process would do the same.
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
fn the_oldest_answers_beyond_the_limit_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(Counting::default());
    let mut usage = Usage::default();
    for _ in 0..2 {
        // Reopened, as another process would do: the order survives.
        let store = Arc::new(Store::open(dir.path(), 3).unwrap());
        let cached = Cached::new(inner.clone(), Arc::clone(&store));
        for i in 0..5 {
            cached.weigh(&asks(&[&format!("question {i}")]), &mut usage);
            assert!(store.len().unwrap() <= 3);
        }
    }
    // Five questions in turn with three kept: each has been removed when its turn comes again.
    assert_eq!(inner.asked.load(Ordering::SeqCst), 10);
    let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 3).unwrap()));
    cached.weigh(&asks(&["question 4", "question 3", "question 2"]), &mut usage);
    assert_eq!(inner.asked.load(Ordering::SeqCst), 10, "the latest three are kept");
}

fn file(dir: &Path) -> PathBuf {
    dir.join("labels.sqlite")
}

/// Questions of many lengths, with the answers that `Counting` gives them.
fn questions() -> (Vec<Ask>, Vec<Reply<Vec<f64>>>) {
    let prompts: Vec<String> = (0..200).map(|i| format!("{i} {}", "x".repeat(i * 7 % 50))).collect();
    let asks = prompts.iter().map(|prompt| Ask { prompt: prompt.clone(), answers: vec!["1".into()] }).collect();
    (asks, prompts.iter().map(|prompt| Ok(vec![prompt.len() as f64])).collect())
}

/// For any flipped bits or missing parts, a cache is set aside or refused with a remedy, or its answers are correct or
/// asked for again.
#[test]
fn damage_never_becomes_an_answer_but_is_set_aside_or_counts_as_missing() {
    use rand::{Rng, SeedableRng};
    let home = tempfile::tempdir().unwrap();
    let (asks, answers) = questions();
    let inner = Arc::new(Counting::default());
    let cached = Cached::new(inner.clone(), Arc::new(Store::open(home.path(), 10_000).unwrap()));
    cached.weigh(&asks, &mut Usage::default());
    drop(cached);
    let sound = std::fs::read(file(home.path())).unwrap();
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
    let (mut refused, mut aside, mut again) = (0, 0, 0);
    for (name, bytes) in damaged {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(file(dir.path()), &bytes).unwrap();
        let store = match Store::open(dir.path(), 10_000) {
            Ok(store) => store,
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("labels.sqlite") && error.contains("remove it"), "{name}: {error}");
                refused += 1;
                continue;
            }
        };
        let before = inner.asked.load(Ordering::SeqCst);
        let cached = Cached::new(inner.clone(), Arc::new(store));
        assert_eq!(cached.weigh(&asks, &mut Usage::default()), answers, "{name}");
        again += u64::from(inner.asked.load(Ordering::SeqCst) > before);
        // A second pass, after answers were written into the possibly damaged file.
        assert_eq!(cached.weigh(&asks, &mut Usage::default()), answers, "{name}");
        drop(cached);
        let kept = dir.path().join("labels.sqlite.damaged-1");
        if kept.exists() {
            aside += 1;
            // Answers may have been written into it before the damage was found.
            assert!(std::fs::metadata(kept).unwrap().len() >= bytes.len() as u64, "{name}");
        }
    }
    assert!(refused < 10 && aside > 50 && again > 50, "{refused} were refused, {aside} set aside, {again} asked again");
}

#[test]
fn a_changed_answer_is_asked_for_again_and_stored() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(Counting::default());
    let open = || Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
    let question = asks(&["what is it?"]);
    open().weigh(&question, &mut Usage::default());
    let mut bytes = std::fs::read(file(dir.path())).unwrap();
    let at = bytes.windows(6).position(|window| window == b"[11.0]").unwrap();
    bytes[at + 2] ^= 1;
    std::fs::write(file(dir.path()), bytes).unwrap();
    for asked in [2, 2] {
        assert_eq!(open().weigh(&question, &mut Usage::default()), [Ok(vec![11.0])]);
        assert_eq!(inner.asked.load(Ordering::SeqCst), asked);
    }
}

/// Creates a cache in the format of earlier versions, with `entry` as the answer to the question "old".
fn earlier_cache(dir: &Path, entry: &[u8]) -> redb::Database {
    let cached = Cached::new(Arc::new(Counting::default()), Arc::new(Store::open(dir, 100).unwrap()));
    let key = cached.keys("weigh", &[0; 32], &[], &["old", "1"]).earlier.unwrap();
    let database = redb::Database::create(dir.join("labels.redb")).unwrap();
    let writing = database.begin_write().unwrap();
    let replies: redb::TableDefinition<&[u8; 32], &[u8]> = redb::TableDefinition::new("replies");
    let order: redb::TableDefinition<u64, &[u8; 32]> = redb::TableDefinition::new("order");
    writing.open_table(replies).unwrap().insert(&key, entry).unwrap();
    writing.open_table(order).unwrap().insert(0, &key).unwrap();
    writing.commit().unwrap();
    database
}

/// Entries of earlier versions are plain JSON without a checksum.
#[test]
fn an_earlier_cache_is_imported_once_and_its_answers_belong_to_the_first_configuration_that_asks() {
    let dir = tempfile::tempdir().unwrap();
    drop(earlier_cache(dir.path(), b"[42.5]"));
    let before = std::fs::read(dir.path().join("labels.redb")).unwrap();
    let inner = Arc::new(Counting::default());
    let open = |inner: &Arc<Counting>| Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
    for _ in 0..2 {
        let cached = open(&inner);
        assert_eq!(cached.weigh(&asks(&["old"]), &mut Usage::default()), [Ok(vec![42.5])]);
        assert_eq!(cached.store.len().unwrap(), 1);
    }
    assert_eq!(inner.asked.load(Ordering::SeqCst), 0);
    assert!(before == std::fs::read(dir.path().join("labels.redb")).unwrap(), "the earlier file changed");
    // The earlier key left out the difference, so the answer may be a different one.
    let other = Arc::new(Counting { settings: "more votes", ..Counting::default() });
    assert_eq!(open(&other).weigh(&asks(&["old"]), &mut Usage::default()), [Ok(vec![3.0])]);
    assert_eq!(open(&inner).weigh(&asks(&["old"]), &mut Usage::default()), [Ok(vec![42.5])]);
    assert_eq!((inner.asked.load(Ordering::SeqCst), other.asked.load(Ordering::SeqCst)), (0, 1));
}

#[test]
fn an_earlier_cache_that_another_process_has_open_is_imported_later() {
    let dir = tempfile::tempdir().unwrap();
    let held = earlier_cache(dir.path(), b"[42.5]");
    let inner = Arc::new(Counting::default());
    let weigh = |prompt: &str| {
        let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
        cached.weigh(&asks(&[prompt]), &mut Usage::default()).remove(0).unwrap()
    };
    assert_eq!((weigh("other"), inner.asked.load(Ordering::SeqCst)), (vec![5.0], 1));
    drop(held);
    assert_eq!((weigh("old"), weigh("other")), (vec![42.5], vec![5.0]));
    assert_eq!(inner.asked.load(Ordering::SeqCst), 1);
}

#[test]
fn a_damaged_earlier_cache_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    drop(earlier_cache(dir.path(), b"[42.5]"));
    let path = dir.path().join("labels.redb");
    let sound = std::fs::read(&path).unwrap();
    let inner = Arc::new(Counting::default());
    let weigh = || {
        let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
        cached.weigh(&asks(&["old"]), &mut Usage::default()).remove(0).unwrap()
    };
    for bytes in [&b"hello\n".repeat(1000)[..], &sound[..sound.len() / 2], &vec![0; sound.len()], b""] {
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(weigh(), [3.0]);
    }
    assert_eq!(inner.asked.load(Ordering::SeqCst), 1, "the cache itself works");
}

#[test]
fn an_interrupted_import_leaves_nothing_and_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let file = database::File::open(&file(dir.path())).unwrap();
    let done = file.import("labels.redb", "m", 100, |insert| {
        (0..9).try_for_each(|i| insert(&[i; 32], b"[1]"))?;
        Err(database::Fault::Disk("full".into()))
    });
    assert!(matches!(done, Err(database::Fault::Disk(_))), "{done:?}");
    assert_eq!((file.len().unwrap(), file.imported("labels.redb").unwrap()), (0, None));
    for added in [9, 0] {
        let done = file
            .import("labels.redb", "m", 100, |insert| (0..9).try_for_each(|i| insert(&[i; 32], b"[1]")).map(|()| true));
        assert_eq!(done.unwrap(), added);
        assert_eq!((file.len().unwrap(), file.imported("labels.redb").unwrap().as_deref()), (9, Some("m")));
    }
}

#[test]
fn stores_that_share_a_file_find_each_others_answers() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(Counting::default());
    let open = || Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 10_000).unwrap()));
    let early = open();
    let prompts = |writer: usize| (0..50).map(move |i| format!("{writer} asks {i}"));
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let cached = open();
            scope.spawn(move || {
                for prompt in prompts(writer) {
                    cached.weigh(&asks(&[&prompt]), &mut Usage::default());
                }
            });
        }
    });
    assert_eq!((early.store.len().unwrap(), inner.asked.load(Ordering::SeqCst)), (200, 200));
    for prompt in (0..4).flat_map(prompts) {
        assert_eq!(early.weigh(&asks(&[&prompt]), &mut Usage::default()), [Ok(vec![prompt.len() as f64])]);
    }
    assert_eq!(inner.asked.load(Ordering::SeqCst), 200);
}

/// The journal mode for file systems that several machines mount.
#[test]
fn processes_share_a_file_without_a_write_ahead_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path());
    let open = || database::File::open_with(&path, "delete").unwrap();
    let (one, other) = (open(), open());
    let new = |i: u8| database::NewEntry { key: [i; 32], entry: vec![i], replaces: None };
    std::thread::scope(|scope| {
        for (file, from) in [(&one, 0), (&other, 100)] {
            scope.spawn(move || {
                for i in from..from + 50 {
                    file.put(&[new(i)], 1000, |_, _| true).unwrap();
                    let keys = Keys { key: [i; 32], earlier: None };
                    assert_eq!(file.get(&[keys]).unwrap()[0].as_ref().unwrap().entry, [i]);
                }
            });
        }
    });
    assert_eq!((one.len().unwrap(), other.len().unwrap()), (100, 100));
    assert!(!dir.path().join("labels.sqlite-wal").exists());
}

#[test]
fn a_file_that_cannot_be_opened_costs_no_label_and_is_retried() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(file(dir.path())).unwrap();
    let inner = Arc::new(Counting::default());
    let cached = Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
    assert_eq!(cached.weigh(&asks(&["a"]), &mut Usage::default()), [Ok(vec![1.0])]);
    assert_eq!(cached.weigh(&asks(&["a"]), &mut Usage::default()), [Ok(vec![1.0])]);
    assert_eq!(inner.asked.load(Ordering::SeqCst), 1, "unwritten answers are found in memory");
    std::fs::remove_dir(file(dir.path())).unwrap();
    while cached.store.len().ok() != Some(1) {
        std::thread::sleep(std::time::Duration::from_millis(20));
        cached.weigh(&asks(&["a"]), &mut Usage::default());
    }
    drop(cached);
    assert_eq!(Store::open(dir.path(), 100).unwrap().len().unwrap(), 1);
}

#[test]
fn a_file_that_is_removed_or_set_aside_by_another_process_is_no_longer_written() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(Counting::default());
    let open = || Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), 100).unwrap()));
    let cached = open();
    cached.weigh(&asks(&["a"]), &mut Usage::default());
    for end in ["", "-wal", "-shm"] {
        let name = |name: &str| dir.path().join(format!("{name}{end}"));
        std::fs::rename(name("labels.sqlite"), name("elsewhere.sqlite")).unwrap();
    }
    cached.weigh(&asks(&["b"]), &mut Usage::default());
    let found = open().weigh(&asks(&["b"]), &mut Usage::default());
    assert_eq!((found, inner.asked.load(Ordering::SeqCst)), (vec![Ok(vec![1.0])], 2));
}

#[test]
fn a_database_of_another_program_is_refused_and_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let other = rusqlite::Connection::open(file(dir.path())).unwrap();
    other.execute_batch("CREATE TABLE notes (text TEXT); INSERT INTO notes VALUES ('mine')").unwrap();
    drop(other);
    let before = std::fs::read(file(dir.path())).unwrap();
    let error = Store::open(dir.path(), 100).err().unwrap().to_string();
    assert!(error.contains("labels.sqlite") && error.contains("another program"), "{error}");
    assert!(before == std::fs::read(file(dir.path())).unwrap());
    let error = Store::open(&file(dir.path()), 100).err().unwrap().to_string();
    assert!(error.contains("folder cannot be made"), "{error}");
}

#[test]
fn damaged_sequence_numbers_are_reassigned_and_cost_no_label() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(Counting::default());
    let open = |most| Cached::new(inner.clone(), Arc::new(Store::open(dir.path(), most).unwrap()));
    for prompt in ["a", "bb", "ccc"] {
        open(100).weigh(&asks(&[prompt]), &mut Usage::default());
    }
    let raw = rusqlite::Connection::open(file(dir.path())).unwrap();
    raw.execute("UPDATE answers SET seq = seq + (1 << 60) WHERE seq = 1", []).unwrap();
    let cached = open(100);
    cached.weigh(&asks(&["dddd"]), &mut Usage::default());
    assert_eq!(cached.store.len().unwrap(), 4);
    let numbers = "SELECT min(seq), max(seq), count(*) FROM answers";
    let numbers = raw.query_row(numbers, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    assert_eq!(numbers, (1, 4, 4));
    cached.weigh(&asks(&["a", "bb", "ccc", "dddd"]), &mut Usage::default());
    assert_eq!(inner.asked.load(Ordering::SeqCst), 4);
    // A lower limit than before.
    let cached = open(2);
    cached.weigh(&asks(&["eeeee"]), &mut Usage::default());
    assert_eq!(cached.store.len().unwrap(), 2);
}

/// Keys must not change by accident: labels bought before would not be found.
#[test]
fn keys_are_stable_across_versions() {
    let decoding = Decoding { max_tokens: 3, temperature: 1.0, top_k: Some(40), seed: 7 };
    assert_eq!(decoding_part(&decoding), "max_tokens=3 temperature=1 top_k=40 seed=7");
    assert_eq!(earlier_decoding_part(&decoding), format!("{decoding:?}"));
    let dir = tempfile::tempdir().unwrap();
    let cached = Cached::new(Arc::new(Counting::default()), Arc::new(Store::open(dir.path(), 1).unwrap()));
    let keys = cached.keys("weigh", &cached.shape.weighed, &["a"], &["a"]);
    let hex = |key: Key| key[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!((hex(keys.key).as_str(), hex(keys.earlier.unwrap()).as_str()), ("ff48e3d860187104", "0fe64a85c2b7507d"));
}

//! The ledger: where each group of the run stands, and what of it must not be lost.
//!
//! Pure. Which prompt group number `seq` is about and what is drawn for it are functions of the seed and `seq` (see
//! [`crate::pipeline::data::Dataset::order`], [`crate::util::seed::completion`]), so a group that is only admitted can be issued again
//! exactly. What has been generated, labeled and rewarded is kept here until it is trained, so that a restart of the graph
//! or of the program goes on with it, and nothing is paid for twice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::types::{Group, Labeled, Rewarded};

/// Where a group stands that is not trained yet.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum GroupState {
    /// Let in by the staleness bound; nothing is known of it yet.
    Admitted,
    /// Its completions are sampled.
    Generated(Arc<Group>),
    /// It is judged, and the labels are paid for.
    Labeled(Arc<Labeled>),
    /// It has its rewards, and the reward model has learned from it.
    Rewarded(Arc<Rewarded>),
}

impl GroupState {
    fn rank(&self) -> usize {
        match self {
            Self::Admitted => 0,
            Self::Generated(_) => 1,
            Self::Labeled(_) => 2,
            Self::Rewarded(_) => 3,
        }
    }
}

/// Groups by sequence number. All below [`Self::trained`] are trained; of those from there on that were admitted, each has
/// a standing. Rewards are given in order, so the rewarded ones come first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ledger {
    trained: u64,
    groups: BTreeMap<u64, GroupState>,
}

/// An entry that cannot be: what it would say of a group, and what the ledger knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A group was to be trained that has no rewards.
    #[error("group {0} would be trained without having been rewarded")]
    NotRewarded(u64),
    /// A group was rewarded before one with a smaller number.
    #[error("group {0} was rewarded out of order")]
    OutOfOrder(u64),
}

/// How many groups stand where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Trained since the run began.
    pub trained: u64,
    /// Admitted, and nothing more.
    pub admitted: u64,
    /// Generated and not labeled.
    pub generated: u64,
    /// Labeled and not rewarded.
    pub labeled: u64,
    /// Rewarded and not trained.
    pub rewarded: u64,
}

/// What a graph goes on with that is built anew.
#[derive(Debug, Clone, Default)]
pub struct UnderWay {
    /// To be labeled.
    pub generated: Vec<Arc<Group>>,
    /// To be rewarded.
    pub labeled: Vec<Arc<Labeled>>,
    /// To be trained, in order from the first group that is not.
    pub rewarded: Vec<Arc<Rewarded>>,
}

impl Ledger {
    /// Number of the first group that is not trained.
    pub fn trained(&self) -> u64 {
        self.trained
    }

    /// Group `seq` is let in. Says whether it has to be generated: not if it was before.
    pub fn admit(&mut self, seq: u64) -> bool {
        if seq < self.trained {
            return false;
        }
        matches!(self.groups.entry(seq).or_insert(GroupState::Admitted), GroupState::Admitted)
    }

    /// A group's completions are there.
    pub fn generated(&mut self, group: &Group) {
        self.advance(group.prompt.seq, || GroupState::Generated(Arc::new(group.clone())), 1);
    }

    /// A group's labels are there.
    pub fn labeled(&mut self, labeled: &Labeled) {
        self.advance(labeled.group.prompt.seq, || GroupState::Labeled(Arc::new(labeled.clone())), 2);
    }

    /// A group's rewards are there.
    ///
    /// # Errors
    /// A group before it has none yet.
    pub fn rewarded(&mut self, rewarded: &Rewarded) -> Result<(), LedgerError> {
        let seq = rewarded.group.prompt.seq;
        let before = seq.checked_sub(1).filter(|before| *before >= self.trained);
        if before.is_some_and(|before| !matches!(self.groups.get(&before), Some(GroupState::Rewarded(_)))) {
            return Err(LedgerError::OutOfOrder(seq));
        }
        self.advance(seq, || GroupState::Rewarded(Arc::new(rewarded.clone())), 3);
        Ok(())
    }

    /// All groups below `end` are trained.
    ///
    /// # Errors
    /// One of them has no rewards; the ledger is then as before.
    pub fn train(&mut self, end: u64) -> Result<(), LedgerError> {
        if let Some(seq) =
            (self.trained..end).find(|seq| !matches!(self.groups.get(seq), Some(GroupState::Rewarded(_))))
        {
            return Err(LedgerError::NotRewarded(seq));
        }
        self.trained = self.trained.max(end);
        self.groups = self.groups.split_off(&self.trained);
        Ok(())
    }

    /// A group moves on; what is trained, or farther already, stays.
    fn advance(&mut self, seq: u64, standing: impl FnOnce() -> GroupState, rank: usize) {
        if seq >= self.trained && self.groups.get(&seq).is_none_or(|known| known.rank() < rank) {
            self.groups.insert(seq, standing());
        }
    }

    /// Forgets who was only admitted, and gives what a new graph goes on with.
    pub fn resume(&mut self) -> UnderWay {
        self.groups.retain(|_, standing| !matches!(standing, GroupState::Admitted));
        for standing in self.groups.values_mut() {
            // An earlier program handed groups on that got no verdict. They are asked about again.
            if let GroupState::Labeled(labeled) = standing
                && labeled.failed()
            {
                *standing = GroupState::Generated(Arc::new(labeled.group.clone()));
            }
        }
        let mut under_way = UnderWay::default();
        for standing in self.groups.values() {
            match standing {
                GroupState::Admitted => {}
                GroupState::Generated(group) => under_way.generated.push(Arc::clone(group)),
                GroupState::Labeled(labeled) => under_way.labeled.push(Arc::clone(labeled)),
                GroupState::Rewarded(rewarded) => under_way.rewarded.push(Arc::clone(rewarded)),
            }
        }
        under_way
    }

    /// How many groups stand where.
    pub fn count(&self) -> Count {
        let mut count = Count { trained: self.trained, ..Count::default() };
        for standing in self.groups.values() {
            *match standing {
                GroupState::Admitted => &mut count.admitted,
                GroupState::Generated(_) => &mut count.generated,
                GroupState::Labeled(_) => &mut count.labeled,
                GroupState::Rewarded(_) => &mut count.rewarded,
            } += 1;
        }
        count
    }
}

/// The run's ledger, shared: it outlives the graphs that write into it.
#[derive(Clone, Default)]
pub struct Book(Arc<Mutex<Open>>);

#[derive(Default)]
struct Open {
    ledger: Ledger,
    /// Who may write.
    incarnation: u64,
}

impl Book {
    /// A book that goes on from `ledger`.
    pub fn new(ledger: Ledger) -> Self {
        Self(Arc::new(Mutex::new(Open { ledger, incarnation: 0 })))
    }

    /// Opens the book to the actors of `incarnation`, and closes it to all others. Gives what the new graph goes on with.
    pub fn open(&self, incarnation: u64) -> (LedgerWriter, UnderWay) {
        let mut open = self.lock();
        open.incarnation = incarnation;
        (LedgerWriter { book: Some(self.clone()), incarnation }, open.ledger.resume())
    }

    /// The ledger as it is now.
    pub fn copy(&self) -> Ledger {
        self.lock().ledger.clone()
    }

    /// How many groups stand where.
    pub fn count(&self) -> Count {
        self.lock().ledger.count()
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The book as the actors of one incarnation write into it. What an older one says is passed over.
#[derive(Clone, Default)]
pub struct LedgerWriter {
    book: Option<Book>,
    incarnation: u64,
}

impl LedgerWriter {
    /// Of a phase whose groups nobody would go on with.
    pub fn none() -> Self {
        Self::default()
    }

    /// As [`Ledger::admit`].
    pub fn admit(&self, seq: u64) -> bool {
        self.write(true, |ledger| ledger.admit(seq))
    }

    /// As [`Ledger::generated`].
    pub fn generated(&self, group: &Group) {
        self.write((), |ledger| ledger.generated(group));
    }

    /// As [`Ledger::labeled`].
    pub fn labeled(&self, labeled: &Labeled) {
        self.write((), |ledger| ledger.labeled(labeled));
    }

    /// As [`Ledger::rewarded`].
    ///
    /// # Errors
    /// As there.
    pub fn rewarded(&self, rewarded: &Rewarded) -> Result<(), LedgerError> {
        self.write(Ok(()), |ledger| ledger.rewarded(rewarded))
    }

    /// As [`Ledger::train`].
    ///
    /// # Errors
    /// As there.
    pub fn train(&self, end: u64) -> Result<(), LedgerError> {
        self.write(Ok(()), |ledger| ledger.train(end))
    }

    fn write<T>(&self, otherwise: T, write: impl FnOnce(&mut Ledger) -> T) -> T {
        let Some(book) = &self.book else { return otherwise };
        let mut open = book.lock();
        if open.incarnation == self.incarnation { write(&mut open.ledger) } else { otherwise }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Feedback, Prompt, RewardScale, Verdict};

    fn group(seq: u64) -> Group {
        let prompt = Prompt {
            seq,
            epoch: 0,
            row: 0,
            text: "".into(),
            ids: [1][..].into(),
            blank: [1][..].into(),
            reference: None,
        };
        Group { prompt, completions: vec![] }
    }

    fn rewarded(seq: u64) -> Rewarded {
        Rewarded {
            group: group(seq),
            feedback: None,
            scores: vec![],
            rewards: vec![],
            preferences: vec![],
            reference: vec![],
            reward_model: None,
            masked: None,
            scale: RewardScale::default(),
        }
    }

    #[test]
    fn a_group_that_an_earlier_program_labeled_with_a_failure_is_labeled_again() {
        let labeled = |seq, verdict| Labeled {
            group: group(seq),
            feedback: Some(Feedback {
                labeler: "direct".into(),
                model: 0,
                template: 0,
                verdicts: vec![verdict],
                preferences: vec![],
                logprobs: None,
                cost: 0.0,
            }),
        };
        let mut ledger = Ledger::default();
        for (seq, verdict) in [
            (0, Verdict::Label(1.0)),
            (1, Verdict::Failure("gone".into())),
            (2, Verdict::Abstention("cannot say".into())),
        ] {
            ledger.admit(seq);
            ledger.labeled(&labeled(seq, verdict));
        }
        let under_way = ledger.resume();
        assert_eq!(under_way.generated.iter().map(|group| group.prompt.seq).collect::<Vec<_>>(), [1]);
        assert_eq!(under_way.labeled.len(), 2);
        ledger.labeled(&labeled(1, Verdict::Label(0.5)));
        assert_eq!((ledger.count().generated, ledger.count().labeled), (0, 3));
    }

    /// A small system with a random scheduler: actors work in any order, die in between, and are built anew from the
    /// ledger, or from a copy of it that was kept aside. Every group is trained once, in order, and no stage that is done
    /// with a group before a copy is taken does it again after.
    #[test]
    fn whatever_dies_when_every_group_is_trained_once_and_labeled_once() {
        let mut state = 11u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        const BATCH: u64 = 3;
        const ALL: u64 = 60;
        for eta in 0..4u64 {
            for _ in 0..40 {
                let mut ledger = Ledger::default();
                // What a copy holds: the ledger, and how often each group was labeled when it was taken.
                let mut kept = (ledger.clone(), vec![0u32; ALL as usize]);
                let mut labeled_times = vec![0u32; ALL as usize];
                let (mut admitted, mut to_generate, mut to_label, mut to_reward, mut next_reward) =
                    (0u64, vec![], vec![], vec![], 0u64);
                let mut deaths = 0;
                while ledger.trained() < ALL {
                    let version = ledger.trained() / BATCH;
                    match random(20) {
                        0..=3 if admitted < ALL && admitted < (eta + version + 1) * BATCH => {
                            if ledger.admit(admitted) {
                                to_generate.push(admitted);
                            }
                            admitted += 1;
                        }
                        4..=7 if !to_generate.is_empty() => {
                            let seq = to_generate.swap_remove(random(to_generate.len()));
                            ledger.generated(&group(seq));
                            to_label.push(seq);
                        }
                        8..=11 if !to_label.is_empty() => {
                            let seq: u64 = to_label.swap_remove(random(to_label.len()));
                            labeled_times[seq as usize] += 1;
                            ledger.labeled(&Labeled::from(group(seq)));
                            to_reward.push(seq);
                        }
                        12..=15 if to_reward.contains(&next_reward) => {
                            ledger.rewarded(&rewarded(next_reward)).unwrap();
                            next_reward += 1;
                        }
                        16..=17 if next_reward >= ledger.trained() + BATCH => {
                            ledger.train(ledger.trained() + BATCH).unwrap();
                            if random(2) == 0 {
                                kept = (ledger.clone(), labeled_times.clone());
                            }
                        }
                        18 if deaths < 20 && random(4) == 0 => {
                            deaths += 1;
                            if random(2) == 0 {
                                // The program died: all since the copy is forgotten, the world's count is not.
                                ledger = kept.0.clone();
                                labeled_times.clone_from(&kept.1);
                            }
                            // Through the disk, as a checkpoint goes.
                            let bytes = postcard::to_stdvec(&ledger).unwrap();
                            ledger = postcard::from_bytes(&bytes).unwrap();
                            let under_way = ledger.resume();
                            let seqs = |groups: &[Arc<Group>]| -> Vec<u64> {
                                groups.iter().map(|group| group.prompt.seq).collect()
                            };
                            (to_generate, to_label) = (vec![], seqs(&under_way.generated));
                            to_reward = under_way.labeled.iter().map(|one| one.group.prompt.seq).collect();
                            let first = ledger.trained();
                            for (i, one) in under_way.rewarded.iter().enumerate() {
                                assert_eq!(one.group.prompt.seq, first + i as u64);
                            }
                            next_reward = first + under_way.rewarded.len() as u64;
                            admitted = first;
                        }
                        _ => {}
                    }
                    let count = ledger.count();
                    let known = count.admitted + count.generated + count.labeled + count.rewarded;
                    assert!(count.trained + known <= (eta + ledger.trained() / BATCH + 1) * BATCH, "{count:?}");
                }
                // Within what is not forgotten, nothing is labeled twice.
                assert!(labeled_times.iter().all(|times| *times == 1), "{labeled_times:?}");
                assert_eq!(ledger.count(), Count { trained: ALL, ..Count::default() });
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut ledger = Ledger::default();
        ledger.admit(0);
        ledger.admit(1);
        assert_eq!(ledger.rewarded(&rewarded(1)), Err(LedgerError::OutOfOrder(1)));
        ledger.rewarded(&rewarded(0)).unwrap();
        assert_eq!(ledger.train(2), Err(LedgerError::NotRewarded(1)));
        assert_eq!(ledger.trained(), 0);
        ledger.train(1).unwrap();
        // A late word on what is trained, or a step back, is passed over.
        ledger.generated(&group(0));
        assert!(!ledger.admit(0));
        ledger.labeled(&Labeled::from(group(1)));
        ledger.generated(&group(1));
        assert_eq!(ledger.count(), Count { trained: 1, labeled: 1, ..Count::default() });
    }

    #[test]
    fn an_older_incarnation_cannot_write() {
        let book = Book::default();
        let (old, _) = book.open(0);
        assert!(old.admit(0));
        let (new, _) = book.open(1);
        old.generated(&group(0));
        assert_eq!(book.count(), Count::default());
        assert!(new.admit(0));
        new.generated(&group(0));
        assert_eq!(book.count(), Count { generated: 1, ..Count::default() });
        let (_, under_way) = book.open(2);
        assert_eq!(under_way.generated.len(), 1);
    }
}

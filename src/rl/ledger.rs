//! The ledger: the state of each group of the run, with the data that must survive a restart.
//!
//! The prompt of group `seq` and its random draws are functions of the seed and `seq` (see
//! [`crate::pipeline::data::Dataset::order`], [`crate::util::seed::completion`]), so a group that is only admitted can
//! be issued again exactly. Generated, labeled and rewarded groups are kept here until they are trained on, so that a
//! restart of the graph or of the program continues with them and no label is paid for twice. This module does no I/O; a
//! [`LedgerLog`] may write the data down.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::types::{Group, Labeled, Rewarded};
use crate::util::mutex::lock;

/// State of a group that has not been trained on yet.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum GroupState {
    /// Admitted by the staleness bound, without data.
    Admitted,
    /// Sampled: the completions exist.
    Generated(Arc<Group>),
    /// Labeled: the labels exist and are paid for.
    Labeled(Arc<Labeled>),
    /// Rewarded: the rewards exist, and the reward model has been trained on the group's pairs.
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

/// States of the groups by sequence number. All groups below [`Self::trained`] have been trained on; each admitted
/// group from there on has a [`GroupState`]. Rewards are assigned in order of the sequence number, so the rewarded
/// groups come first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ledger {
    trained: u64,
    groups: BTreeMap<u64, GroupState>,
}

/// A transition that contradicts a group's recorded state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A group was to be trained on without rewards.
    #[error("group {0} would be trained on without rewards")]
    NotRewarded(u64),
    /// A group was rewarded before a group with a smaller number.
    #[error("group {0} was rewarded out of order")]
    OutOfOrder(u64),
}

/// Number of groups in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Groups trained on since the run began.
    pub trained: u64,
    /// Groups that are only admitted.
    pub admitted: u64,
    /// Groups that are generated but not labeled.
    pub generated: u64,
    /// Groups that are labeled but not rewarded.
    pub labeled: u64,
    /// Groups that are rewarded but not trained on.
    pub rewarded: u64,
}

/// The groups that a restarted graph continues with.
#[derive(Debug, Clone, Default)]
pub struct UnderWay {
    /// Groups to label.
    pub generated: Vec<Arc<Group>>,
    /// Groups to reward.
    pub labeled: Vec<Arc<Labeled>>,
    /// Groups to train on, in order, from the first untrained group.
    pub rewarded: Vec<Arc<Rewarded>>,
}

impl Ledger {
    /// Returns the number of the first group that has not been trained on.
    pub fn trained(&self) -> u64 {
        self.trained
    }

    /// Records that group `seq` is admitted. Returns whether it has to be generated; false if it was generated before.
    pub fn admit(&mut self, seq: u64) -> bool {
        if seq < self.trained {
            return false;
        }
        matches!(self.groups.entry(seq).or_insert(GroupState::Admitted), GroupState::Admitted)
    }

    /// Records the completions of a group. Returns false if the group is trained on or has them already.
    pub fn generated(&mut self, group: &Group) -> bool {
        self.advance(group.prompt.seq, || GroupState::Generated(Arc::new(group.clone())), 1)
    }

    /// Records the labels of a group. Returns false if the group is trained on or has them already.
    pub fn labeled(&mut self, labeled: &Labeled) -> bool {
        self.advance(labeled.group.prompt.seq, || GroupState::Labeled(Arc::new(labeled.clone())), 2)
    }

    /// Records the rewards of a group.
    ///
    /// # Errors
    /// [`LedgerError::OutOfOrder`] if the previous group has no rewards yet.
    pub fn rewarded(&mut self, rewarded: &Rewarded) -> Result<(), LedgerError> {
        let seq = rewarded.group.prompt.seq;
        let before = seq.checked_sub(1).filter(|before| *before >= self.trained);
        if before.is_some_and(|before| !matches!(self.groups.get(&before), Some(GroupState::Rewarded(_)))) {
            return Err(LedgerError::OutOfOrder(seq));
        }
        self.advance(seq, || GroupState::Rewarded(Arc::new(rewarded.clone())), 3);
        Ok(())
    }

    /// Records that all groups below `end` have been trained on, and drops their data.
    ///
    /// # Errors
    /// [`LedgerError::NotRewarded`] if one of them has no rewards; the ledger is then unchanged.
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

    /// Advances a group to `state`, whose rank is `rank`, unless it is trained on or in a later state already. Returns
    /// whether it did.
    fn advance(&mut self, seq: u64, state: impl FnOnce() -> GroupState, rank: usize) -> bool {
        let advances = seq >= self.trained && self.groups.get(&seq).is_none_or(|known| known.rank() < rank);
        if advances {
            self.groups.insert(seq, state());
        }
        advances
    }

    /// Forgets the data of the untrained groups `seqs`, so that they are generated again. Since rewards are assigned in
    /// order, rewarded groups after the first of them are forgotten as well. Returns the number of forgotten groups that
    /// had labels.
    pub fn forget(&mut self, seqs: &BTreeSet<u64>) -> u64 {
        let first = seqs.first().copied().unwrap_or(u64::MAX);
        let before = self.count();
        self.groups
            .retain(|seq, state| !(seqs.contains(seq) || *seq > first && matches!(state, GroupState::Rewarded(_))));
        let after = self.count();
        (before.labeled + before.rewarded) - (after.labeled + after.rewarded)
    }

    /// Removes groups that are only admitted, and returns the groups that a new graph continues with.
    pub fn resume(&mut self) -> UnderWay {
        self.groups.retain(|_, state| !matches!(state, GroupState::Admitted));
        for state in self.groups.values_mut() {
            // Earlier versions of the program passed on groups whose labeling failed. They are labeled again.
            if let GroupState::Labeled(labeled) = state
                && labeled.failed()
            {
                *state = GroupState::Generated(Arc::new(labeled.group.clone()));
            }
        }
        let mut under_way = UnderWay::default();
        for state in self.groups.values() {
            match state {
                GroupState::Admitted => {}
                GroupState::Generated(group) => under_way.generated.push(Arc::clone(group)),
                GroupState::Labeled(labeled) => under_way.labeled.push(Arc::clone(labeled)),
                GroupState::Rewarded(rewarded) => under_way.rewarded.push(Arc::clone(rewarded)),
            }
        }
        under_way
    }

    /// Returns the numbers of groups by state.
    pub fn count(&self) -> Count {
        let mut count = Count { trained: self.trained, ..Count::default() };
        for state in self.groups.values() {
            *match state {
                GroupState::Admitted => &mut count.admitted,
                GroupState::Generated(_) => &mut count.generated,
                GroupState::Labeled(_) => &mut count.labeled,
                GroupState::Rewarded(_) => &mut count.rewarded,
            } += 1;
        }
        count
    }
}

/// Shared handle of the run's ledger, which outlives the graphs that write into it.
#[derive(Clone, Default)]
pub struct SharedLedger(Arc<Mutex<Inner>>);

/// Record of the data of groups outside this process, for example in a file. It is called in the order of the changes.
pub trait LedgerLog: Send + Sync {
    /// Writes the completions of a group down.
    fn generated(&self, group: &Group);

    /// Writes the labels of a group down, with its completions.
    fn labeled(&self, labeled: &Labeled);
}

#[derive(Default)]
struct Inner {
    ledger: Ledger,
    /// The incarnation that may write.
    incarnation: u64,
    log: Option<Arc<dyn LedgerLog>>,
}

impl SharedLedger {
    /// Creates a handle that continues from `ledger`.
    pub fn new(ledger: Ledger) -> Self {
        Self(Arc::new(Mutex::new(Inner { ledger, incarnation: 0, log: None })))
    }

    /// Writes all completions and labels down in `log` from now on.
    pub fn log_to(&self, log: Arc<dyn LedgerLog>) {
        self.lock().log = Some(log);
    }

    /// Records groups that were generated or labeled before the program was restarted.
    pub fn restore(&self, groups: &[GroupState]) {
        let ledger = &mut self.lock().ledger;
        for group in groups {
            match group {
                GroupState::Generated(group) => ledger.generated(group),
                GroupState::Labeled(labeled) => ledger.labeled(labeled),
                GroupState::Admitted | GroupState::Rewarded(_) => false,
            };
        }
    }

    /// Calls [`Ledger::forget`]. The graph must be wired again afterwards, since its actors may have the groups.
    pub fn forget(&self, seqs: &BTreeSet<u64>) -> u64 {
        self.lock().ledger.forget(seqs)
    }

    /// Grants write access to the actors of `incarnation` and revokes all others. Returns the groups that the new graph
    /// continues with.
    pub fn open(&self, incarnation: u64) -> (LedgerWriter, UnderWay) {
        let mut open = self.lock();
        open.incarnation = incarnation;
        (LedgerWriter { shared: Some(self.clone()), incarnation }, open.ledger.resume())
    }

    /// Returns a copy of the ledger.
    pub fn copy(&self) -> Ledger {
        self.lock().ledger.clone()
    }

    /// Returns the numbers of groups by state.
    pub fn count(&self) -> Count {
        self.lock().ledger.count()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

/// Write access to the ledger for the actors of one incarnation. Writes of an older incarnation are ignored.
#[derive(Clone, Default)]
pub struct LedgerWriter {
    shared: Option<SharedLedger>,
    incarnation: u64,
}

impl LedgerWriter {
    /// Returns a writer that records nothing, for phases that are not resumed group by group.
    pub fn none() -> Self {
        Self::default()
    }

    /// Calls [`Ledger::admit`]; returns true if the incarnation may not write.
    pub fn admit(&self, seq: u64) -> bool {
        self.write(true, |ledger| ledger.admit(seq))
    }

    /// Calls [`Ledger::generated`], and logs the group if it is new.
    pub fn generated(&self, group: &Group) {
        self.write_and_log(|ledger| ledger.generated(group), |log| log.generated(group));
    }

    /// Calls [`Ledger::labeled`], and logs the labels if they are new.
    pub fn labeled(&self, labeled: &Labeled) {
        self.write_and_log(|ledger| ledger.labeled(labeled), |log| log.labeled(labeled));
    }

    /// Calls [`Ledger::rewarded`].
    ///
    /// # Errors
    /// See [`Ledger::rewarded`].
    pub fn rewarded(&self, rewarded: &Rewarded) -> Result<(), LedgerError> {
        self.write(Ok(()), |ledger| ledger.rewarded(rewarded))
    }

    /// Calls [`Ledger::train`].
    ///
    /// # Errors
    /// See [`Ledger::train`].
    pub fn train(&self, end: u64) -> Result<(), LedgerError> {
        self.write(Ok(()), |ledger| ledger.train(end))
    }

    fn write_and_log(&self, write: impl FnOnce(&mut Ledger) -> bool, note: impl FnOnce(&dyn LedgerLog)) {
        let Some(shared) = &self.shared else { return };
        let mut open = shared.lock();
        if open.incarnation == self.incarnation
            && write(&mut open.ledger)
            && let Some(log) = &open.log
        {
            note(&**log);
        }
    }

    fn write<T>(&self, otherwise: T, write: impl FnOnce(&mut Ledger) -> T) -> T {
        let Some(shared) = &self.shared else { return otherwise };
        let mut open = shared.lock();
        if open.incarnation == self.incarnation { write(&mut open.ledger) } else { otherwise }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Feedback, Prompt, RewardScale, Verdict};

    fn group(seq: u64) -> Group {
        Group { prompt: Prompt::new(seq, "", [1]), completions: vec![] }
    }

    fn rewarded(seq: u64) -> Rewarded {
        Rewarded::new(group(seq), RewardScale::default())
    }

    #[test]
    fn a_group_recorded_with_a_failed_label_is_labeled_again() {
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

    /// A small system with a random scheduler: actors work in any order, die, and are restarted from the ledger or from
    /// an earlier copy of it. Every group is trained on once, in order, and no stage repeats work that a copy already
    /// contains.
    #[test]
    fn every_group_is_trained_and_labeled_once_despite_restarts() {
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
                // A copy of the ledger, and how often each group had been labeled when it was taken.
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
                                // The program died: everything after the copy is lost.
                                ledger = kept.0.clone();
                                labeled_times.clone_from(&kept.1);
                            }
                            // Serialised and read back, as by a checkpoint.
                            let bytes = postcard::to_stdvec(&ledger).unwrap();
                            ledger = postcard::from_bytes(&bytes).unwrap();
                            let under_way = ledger.resume();
                            let seqs = |groups: &[Arc<Group>]| -> Vec<u64> {
                                groups.iter().map(|group| group.prompt.seq).collect()
                            };
                            (to_generate, to_label) = (vec![], seqs(&under_way.generated));
                            to_reward = under_way.labeled.iter().map(|labeled| labeled.group.prompt.seq).collect();
                            let first = ledger.trained();
                            for (i, rewarded) in under_way.rewarded.iter().enumerate() {
                                assert_eq!(rewarded.group.prompt.seq, first + i as u64);
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
                // Except for lost work, no group is labeled twice.
                assert!(labeled_times.iter().all(|times| *times == 1), "{labeled_times:?}");
                assert_eq!(ledger.count(), Count { trained: ALL, ..Count::default() });
            }
        }
    }

    #[test]
    fn a_contradicting_transition_is_refused_and_changes_nothing() {
        let mut ledger = Ledger::default();
        ledger.admit(0);
        ledger.admit(1);
        assert_eq!(ledger.rewarded(&rewarded(1)), Err(LedgerError::OutOfOrder(1)));
        ledger.rewarded(&rewarded(0)).unwrap();
        assert_eq!(ledger.train(2), Err(LedgerError::NotRewarded(1)));
        assert_eq!(ledger.trained(), 0);
        ledger.train(1).unwrap();
        // A late report on a trained group, or a step back, is ignored.
        ledger.generated(&group(0));
        assert!(!ledger.admit(0));
        ledger.labeled(&Labeled::from(group(1)));
        ledger.generated(&group(1));
        assert_eq!(ledger.count(), Count { trained: 1, labeled: 1, ..Count::default() });
    }

    #[test]
    fn forgotten_groups_are_generated_again_and_rewards_stay_in_order() {
        let mut ledger = Ledger::default();
        for seq in 0..3 {
            ledger.rewarded(&rewarded(seq)).unwrap();
        }
        ledger.labeled(&Labeled::from(group(3)));
        ledger.generated(&group(4));
        assert_eq!(ledger.forget(&BTreeSet::from([1, 4])), 2);
        let left = ledger.count();
        assert_eq!((left.rewarded, left.labeled, left.generated), (1, 1, 0));
        assert!(ledger.admit(1) && ledger.admit(2) && ledger.admit(4) && !ledger.admit(3));
    }

    #[test]
    fn an_older_incarnation_cannot_write() {
        let shared = SharedLedger::default();
        let (old, _) = shared.open(0);
        assert!(old.admit(0));
        let (new, _) = shared.open(1);
        old.generated(&group(0));
        assert_eq!(shared.count(), Count::default());
        assert!(new.admit(0));
        new.generated(&group(0));
        assert_eq!(shared.count(), Count { generated: 1, ..Count::default() });
        let (_, under_way) = shared.open(2);
        assert_eq!(under_way.generated.len(), 1);
    }
}

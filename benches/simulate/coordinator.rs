//! The coordinator of a simulated run, and the messages that it gets, with the rules of the program.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use preceptor::pipeline::cluster::protocol::{Answer, Bounds, Done, Work, decode, encode};
use preceptor::pipeline::generate::Sampled;
use preceptor::rl::ledger::Ledger;
use preceptor::types::{Completion, Finish, Group, Prompt, RewardScale, Rewarded};
use preceptor::util::seed;
use preceptor_actors::transport::LeasedQueue;
use preceptor_actors::{Admission, AdmissionGate};

use super::setting::{Setting, Violation};

/// Number of results that the coordinator takes at once.
pub const MOST: usize = 16;
const LINEAGE: u64 = 1;
/// Number of tokens of a prompt in the simulation, and where the cost is measured.
pub const PROMPT: [usize; 2] = [8, 256];

/// Returns a worker's result of `work`, with completions of `length` tokens. The first two ids are the seed, by which the
/// coordinator's side checks that it got the completion that it asked for.
pub fn result(work: &Work, worker: &str, (first, last): (u64, u64), length: impl Fn(u64) -> usize) -> Done {
    let completions = work.seeds.iter().map(|seed| {
        let tokens = length(*seed).max(2);
        let mut ids = vec![30_000; tokens];
        (ids[0], ids[1]) = (*seed as u32, (*seed >> 32) as u32);
        let mut versions = vec![first; tokens];
        versions[tokens / 2..].fill(last);
        Answer { ids, logprobs: vec![-1.0; tokens], versions, finish: Finish::Eos }
    });
    Done {
        lineage: LINEAGE,
        seq: work.seq,
        worker: worker.to_owned(),
        completions: completions.collect(),
        fingerprints: if first == last { vec![(first, first)] } else { vec![(first, first), (last, last)] },
    }
}

/// A group that can be trained.
pub struct Ready {
    pub seq: u64,
    /// Version of the first token of each completion.
    pub versions: Vec<u64>,
    pub foreign: u64,
}

/// The coordinator's side: gate, ledger, and the order of rewards.
pub struct Coordinator {
    setting: Setting,
    pub prompt: usize,
    rule: Admission,
    pub gate: AdmissionGate,
    ledger: Ledger,
    /// Work that has no result yet, by its number. With `part` < `group`, a group is several numbers.
    open: HashMap<u64, Work>,
    /// Completions of groups of which not all parts have arrived.
    partial: HashMap<u64, Vec<Option<Vec<Sampled>>>>,
    /// Complete groups that wait for the rewards of an earlier one.
    generated: BTreeMap<u64, Group>,
    rewarded: u64,
    pub ready: VecDeque<Ready>,
    pub used: f64,
    pub repeated: u64,
    pub refused: u64,
}

impl Coordinator {
    pub fn new(setting: &Setting) -> Self {
        let rule = Admission { eta: setting.eta, batch: setting.batch };
        Self {
            setting: setting.clone(),
            prompt: PROMPT[0],
            rule,
            gate: AdmissionGate::new(rule, 0, 0),
            ledger: Ledger::default(),
            open: HashMap::new(),
            partial: HashMap::new(),
            generated: BTreeMap::new(),
            rewarded: 0,
            ready: VecDeque::new(),
            used: 0.0,
            repeated: 0,
            refused: 0,
        }
    }

    fn parts(&self) -> u64 {
        (self.setting.group / self.setting.part) as u64
    }

    fn seed(&self, seq: u64, completion: usize) -> u64 {
        seed::completion(self.setting.seed, seq, completion)
    }

    /// Admits the groups that the gate lets start, and offers their work.
    pub fn admit(&mut self, queue: &mut LeasedQueue, now: Duration) {
        while self.gate.admitted() < self.setting.groups()
            && let Some(seq) = self.gate.try_admit(1)
        {
            if !self.ledger.admit(seq) {
                continue;
            }
            self.partial.insert(seq, vec![None; self.parts() as usize]);
            for part in 0..self.parts() {
                let first = part as usize * self.setting.part;
                let work = Work {
                    lineage: LINEAGE,
                    seq: seq * self.parts() + part,
                    min_version: self.rule.min_version(seq),
                    ids: vec![1; self.prompt],
                    seeds: (first..first + self.setting.part).map(|k| self.seed(seq, k)).collect(),
                };
                let body = encode(&work).expect("work is encodable");
                let id = format!("{LINEAGE:016x}-{}-0", work.seq);
                queue.offer(&id, body.into(), now).expect("the queue of work has room");
                self.open.insert(work.seq, work);
            }
        }
    }

    /// Takes the results that wait.
    pub fn collect(&mut self, queue: &mut LeasedQueue, results: &mut LeasedQueue, now: Duration) {
        for delivered in results.pull(MOST, now) {
            let done: Done = decode(&delivered.body).expect("a result is readable");
            self.take(queue, done, now);
            results.acknowledge(delivered.lease, now).expect("the lease of a result has begun now");
        }
    }

    fn take(&mut self, queue: &mut LeasedQueue, done: Done, now: Duration) {
        let Some(work) = self.open.get(&done.seq) else {
            self.repeated += 1;
            return;
        };
        let bounds = Bounds { rows: usize::MAX, max_new_tokens: self.setting.lengths.longest as usize };
        let unchecked = self.setting.violation == Violation::AnyVersion;
        if !unchecked && done.check(work, &bounds).is_err() {
            self.refused += 1;
            let body = encode(work).expect("work is encodable");
            let id = format!("{LINEAGE:016x}-{}-{}", work.seq, self.refused);
            queue.offer(&id, body.into(), now).expect("the queue of work has room");
            return;
        }
        self.used += work.seeds.iter().map(|seed| self.setting.lengths.of(*seed)).sum::<f64>();
        self.open.remove(&done.seq);
        let (seq, part) = (done.seq / self.parts(), done.seq % self.parts());
        let partial = self.partial.get_mut(&seq).expect("a group with open work is incomplete");
        partial[part as usize] = Some(done.into_sampled());
        if partial.iter().all(Option::is_some) {
            let sampled = self.partial.remove(&seq).into_iter().flatten().flatten().flatten();
            self.complete(seq, sampled.collect());
        }
    }

    /// Records a complete group, and the rewards of all groups that are complete without a gap.
    fn complete(&mut self, seq: u64, sampled: Vec<Sampled>) {
        let one = |sampled: Sampled| Completion {
            ids: sampled.ids,
            logprobs: sampled.logprobs,
            versions: sampled.versions,
            finish: sampled.finish.unwrap_or(Finish::Eos),
            text: String::new(),
        };
        let completions = sampled.into_iter().map(one).collect();
        let group = Group { prompt: Prompt::new(seq, "", vec![1; self.prompt]), completions };
        self.ledger.generated(&group);
        self.generated.insert(seq, group);
        while let Some(group) = self.generated.remove(&self.rewarded) {
            let rewarded = Rewarded::new(group, RewardScale::default());
            self.ledger.rewarded(&rewarded).expect("rewards are in order");
            let seq = rewarded.group.prompt.seq;
            let foreign = |(k, completion): &(usize, &Completion)| {
                let seed = self.seed(seq, *k);
                completion.ids[..2] != [seed as u32, (seed >> 32) as u32]
            };
            let completions = &rewarded.group.completions;
            self.ready.push_back(Ready {
                seq,
                versions: completions.iter().map(Completion::oldest_version).collect(),
                foreign: completions.iter().enumerate().filter(foreign).count() as u64,
            });
            self.rewarded += 1;
        }
    }

    /// Counts a step: all groups below `end` are trained.
    pub fn publish(&mut self, end: u64) {
        self.ledger.train(end).expect("all groups of the batch have rewards");
        self.gate.set_version(end / self.setting.batch);
    }
}

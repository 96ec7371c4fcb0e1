//! Discrete-event simulation of a run whose completions are sampled by workers that come and go.
//!
//! The rules are those of the program: the admission gate, the ledger, the queues with leases, and the messages with their
//! checks. Only durations are simulated, and the instants at which workers die, lose their connection and join. One thread
//! handles the events in the order of their times; the clock of the runtime's tests (`Clock::simulated`) needs a thread for
//! each worker, and takes minutes for the same number of groups.

mod coordinator;
mod events;
mod setting;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use preceptor::pipeline::cluster::protocol::{Done, MAX_MESSAGE, Work, decode, encode};
use preceptor::util::seed;
use preceptor_actors::transport::{LeaseId, LeasedQueue, QueueLimits};

use coordinator::{Coordinator, MOST, PROMPT, Ready, result};
use events::{Event, Events, Timer};
pub use setting::{Lengths, Outcome, Setting, Violation};

/// Time of a message from a worker to the coordinator, and between a worker's result and its acknowledgement of the work.
const MESSAGE: Duration = Duration::from_millis(50);
/// Time between two checks for work whose lease has expired.
const EXPIRY_CHECK: Duration = Duration::from_secs(1);

/// Simulates a run.
pub fn simulate(setting: &Setting) -> Outcome {
    let mut simulation = Simulation::new(setting);
    simulation.run();
    simulation.outcome()
}

/// Real cost of a group to the coordinator, with messages of their full size.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// Time of the rules on the coordinator's side, without the broker, the network and the disk.
    pub time: Duration,
    /// Size in bytes of the messages with the prompt, and of those with the completions.
    pub bytes: (usize, usize),
}

/// Measures the coordinator's work on a group: the fastest of `batches` batches.
pub fn cost(setting: &Setting, batches: u64) -> Cost {
    let setting = Setting { eta: 0, steps: batches, ..setting.clone() };
    let limits = QueueLimits { lease: setting.lease, messages: 1_000_000, bytes: MAX_MESSAGE };
    let (mut work, mut results) = (LeasedQueue::new("work", limits), LeasedQueue::new("results", limits));
    let mut coordinator = Coordinator::new(&setting);
    coordinator.prompt = PROMPT[1];
    let mut cost = Cost { time: Duration::MAX, bytes: (0, 0) };
    for version in 0..batches {
        let now = Duration::from_secs(version);
        let began = Instant::now();
        coordinator.admit(&mut work, now);
        let mut spent = began.elapsed();
        let mut bytes = (0, 0);
        loop {
            let pulled = work.pull(MOST, now);
            if pulled.is_empty() {
                break;
            }
            for delivered in pulled {
                bytes.0 += delivered.body.len();
                let asked: Work = decode(&delivered.body).expect("work is readable");
                let done = result(&asked, "worker", (version, version), |seed| setting.lengths.of(seed) as usize);
                let body = encode(&done).expect("a result is encodable");
                bytes.1 += body.len();
                results.offer(&format!("{}-worker", asked.seq), body.into(), now).expect("the results' queue has room");
                work.acknowledge(delivered.lease, now).expect("the lease has begun now");
            }
            let began = Instant::now();
            coordinator.collect(&mut work, &mut results, now);
            spent += began.elapsed();
        }
        let began = Instant::now();
        coordinator.publish((version + 1) * setting.batch);
        spent += began.elapsed();
        coordinator.ready.clear();
        cost.time = cost.time.min(spent / setting.batch as u32);
        cost.bytes = (bytes.0 / setting.batch as usize, bytes.1 / setting.batch as usize);
    }
    cost
}

struct Random(u64);

impl Random {
    /// Returns a number from 0 to 1, without 0.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(1);
        1.0 - (seed::mix(self.0) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns the time to the next event of a Poisson process, if its rate per minute is above zero.
    fn wait(&mut self, per_minute: f64) -> Option<Duration> {
        let uniform = self.uniform();
        (per_minute > 0.0).then(|| Duration::from_secs_f64(-60.0 * uniform.ln() / per_minute))
    }
}

/// Work of a worker.
struct Item {
    lease: LeaseId,
    work: Work,
    began: Option<Begun>,
}

/// Beginning of a worker's work, once its weights are new enough.
#[derive(Clone, Copy)]
struct Begun {
    at: Duration,
    /// Version of the first token.
    version: u64,
    /// Number of tokens of each completion that another worker had sampled.
    before: f64,
}

#[derive(Default)]
struct Worker {
    /// Number of the process in this place.
    life: u32,
    token_s: f64,
    version: Option<u64>,
    receiving: bool,
    cut: bool,
    item: Option<Item>,
    /// A result that could not be handed over, with the lease of its work.
    kept: Option<(Done, LeaseId)>,
}

struct Simulation<'a> {
    setting: &'a Setting,
    token_s: f64,
    now: Duration,
    events: Events,
    random: Random,
    work: LeasedQueue,
    results: LeasedQueue,
    workers: Vec<Worker>,
    /// Time per token above which a worker takes no work.
    limit_s: f64,
    /// Tokens of each completion, and the version of the first, at the last sign of life of unfinished work.
    signs: HashMap<u64, (f64, u64)>,
    /// Workers that wait for work, with their lives, in the order in which they asked.
    idle: VecDeque<(u32, u32)>,
    coordinator: Coordinator,
    /// The group that the learner works on.
    training: Option<Ready>,
    /// How often each group was trained.
    trained: Vec<u8>,
    progress: Duration,
    measured_from: Duration,
    sampled: f64,
    ages: f64,
    outcome: Outcome,
}

impl<'a> Simulation<'a> {
    fn new(setting: &'a Setting) -> Self {
        let limits = QueueLimits { lease: setting.lease, messages: 1_000_000, bytes: MAX_MESSAGE };
        Self {
            setting,
            token_s: setting.token_s(),
            now: Duration::ZERO,
            events: Events::default(),
            random: Random(seed::mix(setting.seed)),
            work: LeasedQueue::new("work", limits),
            results: LeasedQueue::new("results", limits),
            workers: Vec::new(),
            limit_s: f64::INFINITY,
            signs: HashMap::new(),
            idle: VecDeque::new(),
            coordinator: Coordinator::new(setting),
            training: None,
            trained: vec![0; setting.groups() as usize],
            progress: Duration::ZERO,
            measured_from: Duration::ZERO,
            sampled: 0.0,
            ages: 0.0,
            outcome: Outcome::default(),
        }
    }

    fn run(&mut self) {
        for place in 0..self.setting.workers as u32 {
            self.workers.push(Worker::default());
            self.join(place);
        }
        if let Some(slowest) = self.setting.slowest {
            let mut times: Vec<f64> = self.workers.iter().map(|worker| worker.token_s).collect();
            times.sort_unstable_by(f64::total_cmp);
            self.limit_s = slowest * times[times.len() / 2];
        }
        self.coordinator.admit(&mut self.work, self.now);
        self.after(EXPIRY_CHECK, Event::Timer(Timer::Expiry));
        // A run that makes no progress for this long has lost a group.
        let patience = 20 * (self.setting.step + self.setting.lease) + 50 * self.setting.transfer;
        while let Some((now, event)) = self.events.pop() {
            self.now = now;
            self.outcome.stalled = self.now > self.progress + patience;
            if self.outcome.groups == self.setting.groups() || self.outcome.stalled {
                break;
            }
            self.handle(event);
        }
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.events.schedule(self.now + wait, event);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Timer(Timer::Trained) => self.finish_training(),
            Event::Timer(Timer::Expiry) => {
                self.after(EXPIRY_CHECK, Event::Timer(Timer::Expiry));
                self.dispatch();
            }
            Event::Received(place, life, version) if self.lives(place, life) => {
                let worker = &mut self.workers[place as usize];
                let first = worker.version.replace(version).is_none();
                worker.receiving = false;
                self.receive(place);
                if first {
                    self.ask(place);
                }
                self.begin(place);
            }
            Event::Timer(Timer::Sampled(place, life)) if self.lives(place, life) => self.finish_work(place),
            Event::Acknowledged(place, life, lease) if self.lives(place, life) => {
                // If the lease has expired, the work is done again, and its second result is dropped.
                let _ = self.work.acknowledge(lease, self.now);
            }
            Event::Extended(place, life, lease) if self.lives(place, life) => {
                let worker = &self.workers[place as usize];
                let Some(item) = worker.item.as_ref().filter(|item| item.lease == lease) else { return };
                if !worker.cut {
                    if let (true, Some(begun)) = (self.setting.resumed, item.began) {
                        let tokens = begun.before + (self.now - begun.at).as_secs_f64() / worker.token_s;
                        self.signs.insert(item.work.seq, (tokens, begun.version));
                    }
                    let _ = self.work.extend(lease, self.now);
                }
                self.after(self.setting.lease / 3, event);
            }
            Event::Timer(Timer::Died(place, life)) if self.lives(place, life) => {
                self.outcome.deaths += 1;
                if let Some(Item { work, began: Some(begun), .. }) = self.workers[place as usize].item.take() {
                    let tokens =
                        begun.before + (self.now - begun.at).as_secs_f64() / self.workers[place as usize].token_s;
                    self.count(&work, begun.before, tokens);
                }
                self.join(place);
            }
            Event::Timer(Timer::Cut(place, life)) if self.lives(place, life) => {
                self.workers[place as usize].cut = true;
                self.after(self.setting.lease * 3 / 2, Event::Timer(Timer::Connected(place, life)));
            }
            Event::Timer(Timer::Connected(place, life)) if self.lives(place, life) => {
                self.workers[place as usize].cut = false;
                if let Some(wait) = self.random.wait(self.setting.cuts) {
                    self.after(wait, Event::Timer(Timer::Cut(place, life)));
                }
                if let Some((done, lease)) = self.workers[place as usize].kept.take() {
                    self.hand_over(place, &done, lease);
                } else if self.workers[place as usize].item.is_none() {
                    self.ask(place);
                }
            }
            _ => {}
        }
    }

    fn lives(&self, place: u32, life: u32) -> bool {
        self.workers[place as usize].life == life
    }

    /// Starts a new worker.
    fn join(&mut self, place: u32) {
        let slow = self.random.uniform() < self.setting.slow.0;
        let life = self.workers[place as usize].life + 1;
        let token_s = self.token_s * if slow { self.setting.slow.1 } else { 1.0 };
        self.workers[place as usize] = Worker { life, token_s, ..Worker::default() };
        let death = self.random.wait(self.setting.deaths);
        if let Some(wait) = death {
            self.after(wait, Event::Timer(Timer::Died(place, life)));
        }
        // A worker that dies first is not cut off.
        let cut = self.random.wait(self.setting.cuts);
        if let Some(wait) = cut.filter(|wait| death.is_none_or(|death| *wait < death)) {
            self.after(wait, Event::Timer(Timer::Cut(place, life)));
        }
        self.receive(place);
    }

    /// Begins to fetch the newest version, if the worker does not have it. It samples meanwhile.
    fn receive(&mut self, place: u32) {
        let newest = self.coordinator.gate.version();
        let worker = &mut self.workers[place as usize];
        if !worker.receiving && worker.version.is_none_or(|version| version < newest) {
            worker.receiving = true;
            self.outcome.transfers += 1;
            let life = worker.life;
            self.after(self.setting.transfer, Event::Received(place, life, newest));
        }
    }

    /// A worker asks for work.
    fn ask(&mut self, place: u32) {
        let worker = &self.workers[place as usize];
        // Its first version has arrived, so the worker has measured its own speed.
        if worker.version.is_none() || worker.item.is_some() || worker.token_s > self.limit_s {
            return;
        }
        self.idle.push_back((place, worker.life));
        self.dispatch();
    }

    /// Gives waiting work to the workers that wait for it.
    fn dispatch(&mut self) {
        while self.work.depth(self.now).waiting > 0
            && let Some((place, life)) = self.idle.pop_front()
        {
            let worker = &self.workers[place as usize];
            if worker.life != life || worker.cut || worker.item.is_some() {
                continue;
            }
            let Some(delivered) = self.work.pull(1, self.now).pop() else { return };
            let work: Work = decode(&delivered.body).expect("work is readable");
            if self.setting.violation == Violation::EarlyAcknowledgement {
                let _ = self.work.acknowledge(delivered.lease, self.now);
            }
            self.workers[place as usize].item = Some(Item { lease: delivered.lease, work, began: None });
            let lasts = self.begin(place);
            let interval = self.setting.lease / 3;
            if lasts.is_none_or(|lasts| lasts > interval) {
                self.after(interval, Event::Extended(place, life, delivered.lease));
            }
        }
    }

    /// Begins a worker's work if its weights are new enough. Returns how long it takes.
    fn begin(&mut self, place: u32) -> Option<Duration> {
        let worker = &mut self.workers[place as usize];
        let (item, version) = (worker.item.as_mut()?, worker.version?);
        let may = item.work.min_version <= version || self.setting.violation == Violation::AnyVersion;
        if item.began.is_some() || !may {
            return None;
        }
        let (before, version) = self.signs.get(&item.work.seq).copied().unwrap_or((0.0, version));
        item.began = Some(Begun { at: self.now, version, before });
        let longest = item.work.seeds.iter().map(|seed| self.setting.lengths.of(*seed)).fold(0.0, f64::max);
        let (life, lasts) = (worker.life, Duration::from_secs_f64((longest - before).max(0.0) * worker.token_s));
        self.after(lasts, Event::Timer(Timer::Sampled(place, life)));
        Some(lasts)
    }

    /// Counts the tokens of `work` that a worker sampled, from the `from`th to the `to`th of each completion.
    fn count(&mut self, work: &Work, from: f64, to: f64) {
        let lengths = work.seeds.iter().map(|seed| self.setting.lengths.of(*seed));
        self.sampled += lengths.map(|length| length.min(to) - length.min(from)).sum::<f64>();
    }

    /// Ends a worker's work and hands the result over.
    fn finish_work(&mut self, place: u32) {
        let worker = &mut self.workers[place as usize];
        let Some(Item { lease, work, began: Some(begun) }) = worker.item.take() else { return };
        let versions = (begun.version, worker.version.unwrap_or(begun.version));
        let done = result(&work, &format!("worker-{place}-{}", worker.life), versions, |_| 2);
        match worker.cut {
            true => worker.kept = Some((done, lease)),
            false => self.hand_over(place, &done, lease),
        }
        self.signs.remove(&work.seq);
        self.count(&work, begun.before, f64::INFINITY);
    }

    fn hand_over(&mut self, place: u32, done: &Done, lease: LeaseId) {
        let body = encode(done).expect("a result is encodable");
        let id = format!("{}-{}", done.seq, done.worker);
        self.results.offer(&id, body.into(), self.now).expect("the results' queue has room");
        let life = self.workers[place as usize].life;
        self.after(MESSAGE, Event::Acknowledged(place, life, lease));
        self.coordinator.collect(&mut self.work, &mut self.results, self.now);
        self.train();
        self.ask(place);
    }

    /// Lets the learner begin with the next group, if it is ready.
    fn train(&mut self) {
        if self.training.is_none()
            && let Some(ready) = self.coordinator.ready.pop_front()
        {
            self.training = Some(ready);
            self.after(self.setting.step / self.setting.batch as u32, Event::Timer(Timer::Trained));
        }
    }

    fn finish_training(&mut self) {
        let Some(ready) = self.training.take() else { return };
        let version = self.coordinator.gate.version();
        self.progress = self.now;
        self.outcome.groups += 1;
        self.outcome.foreign += ready.foreign;
        self.trained[ready.seq as usize] += 1;
        for born in &ready.versions {
            self.outcome.oldest = self.outcome.oldest.max(version - born);
            self.ages += (version - born) as f64;
        }
        if (ready.seq + 1).is_multiple_of(self.setting.batch) {
            self.coordinator.publish(ready.seq + 1);
            self.outcome.steps += 1;
            if self.outcome.steps == self.setting.warm_up {
                self.measured_from = self.now;
            }
            for place in 0..self.workers.len() as u32 {
                self.receive(place);
            }
            self.coordinator.admit(&mut self.work, self.now);
            self.dispatch();
        }
        self.train();
    }

    fn outcome(mut self) -> Outcome {
        let (setting, coordinator) = (self.setting, &self.coordinator);
        let steps = self.outcome.steps.saturating_sub(setting.warm_up);
        let time = (self.progress - self.measured_from).as_secs_f64();
        self.outcome.share = steps as f64 * setting.step.as_secs_f64() / time.max(f64::MIN_POSITIVE);
        self.outcome.redone = self.sampled / coordinator.used.max(1.0) - 1.0;
        self.outcome.age = self.ages / (self.outcome.groups * setting.group as u64).max(1) as f64;
        self.outcome.lost = self.trained.iter().filter(|times| **times == 0).count() as u64;
        self.outcome.doubled = self.trained.iter().filter(|times| **times > 1).count() as u64;
        self.outcome.repeated = coordinator.repeated;
        self.outcome.refused = coordinator.refused;
        self.outcome.time = self.progress;
        self.outcome
    }
}

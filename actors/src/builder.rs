//! Wiring of one incarnation: edges, and stages ready to be started.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::clock::Clock;
use crate::control::Control;
use crate::edge::{Account, Ended, Inlet, Outlet, edge};
use crate::pending::{KEPT, Pending, Work as Done};
use crate::pulse::{Pulse, State};
use crate::report::{EdgeReport, Span, SpanCursor, StageReport};
use crate::stage::{Emitter, Source, Stage, StageContext, StageError, StageResult, StageSpec};

/// Maximum number of spans in a report's timeline.
const TIMELINE: usize = 256;

/// Result of a stage's thread.
pub(crate) struct StageEnd {
    pub(crate) stage: String,
    pub(crate) failure: Option<StageFailure>,
}

/// Failure of a stage, as reported to the supervisor.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub(crate) struct StageFailure {
    pub(crate) stage: String,
    pub(crate) error: String,
    pub(crate) panicked: bool,
    pub(crate) fatal: bool,
}

/// Complete work of a stage's thread.
pub(crate) type Work = Box<dyn FnOnce() -> StageEnd + Send>;

pub(crate) struct Planned {
    pub(crate) spec: StageSpec,
    pub(crate) work: Work,
}

/// Observable state of an incarnation.
pub(crate) struct View {
    pub(crate) incarnation: u64,
    pub(crate) clock: Clock,
    pub(crate) began: Duration,
    pub(crate) control: Arc<Control>,
    stages: Vec<Watched>,
    edges: Vec<(Arc<Account>, Vec<String>, Vec<String>)>,
}

/// Observable state of one stage.
struct Watched {
    spec: StageSpec,
    pulse: Arc<Pulse>,
    pending: Arc<Pending>,
}

/// Builder that collects the stages and edges of one incarnation.
pub struct GraphBuilder {
    view: View,
    planned: Vec<Planned>,
}

impl GraphBuilder {
    pub(crate) fn new(incarnation: u64, clock: Clock) -> Self {
        let control = Arc::new(Control::new(clock.simulation().cloned()));
        let view = View { incarnation, began: clock.now(), clock, control, stages: Vec::new(), edges: Vec::new() };
        Self { view, planned: Vec::new() }
    }

    /// Returns the number of the incarnation, from zero.
    pub fn incarnation(&self) -> u64 {
        self.view.incarnation
    }

    /// Creates a bounded edge that holds `capacity` items (at least one). Senders to a full edge wait.
    ///
    /// Clone the ends for several producers or consumers, and drop the ends that no stage receives: an edge drains when
    /// its last producer has ended.
    pub fn edge<T>(&mut self, name: &str, capacity: usize) -> (Outlet<T>, Inlet<T>) {
        let (outlet, inlet) = edge(name, capacity, self.view.incarnation, self.view.clock.simulation());
        self.view.edges.push((Arc::clone(&outlet.account), Vec::new(), Vec::new()));
        (outlet, inlet)
    }

    /// Adds a stage without input.
    pub fn source<S: Source>(&mut self, spec: StageSpec, mut source: S, outlet: Outlet<S::Out>) {
        let (ctx, pending) = self.join(&spec, None, Some(&outlet.account));
        self.plan(spec, ctx, move |ctx, pool| {
            let out = Emitter { outlet: Some(&outlet), ctx, pending: &pending };
            ctx.enter(State::Busy);
            while !ctx.halted() {
                let start = ctx.clock.now();
                let Some(item) = pool.run(|| source.next(ctx))? else { break };
                pending.begin(item.seq, item.version, start);
                pending.end(item.seq, || ctx.clock.now());
                out.emit(item)?;
            }
            Ok(())
        });
    }

    /// Adds a stage between two edges.
    pub fn stage<S: Stage>(&mut self, spec: StageSpec, stage: S, inlet: Inlet<S::In>, outlet: Outlet<S::Out>) {
        self.add(spec, stage, inlet, Some(outlet));
    }

    /// Adds a stage without output.
    pub fn sink<S: Stage<Out = ()>>(&mut self, spec: StageSpec, stage: S, inlet: Inlet<S::In>) {
        self.add(spec, stage, inlet, None);
    }

    fn add<S: Stage>(&mut self, spec: StageSpec, mut stage: S, inlet: Inlet<S::In>, outlet: Option<Outlet<S::Out>>) {
        let (ctx, pending) = self.join(&spec, Some(&inlet.account), outlet.as_ref().map(|outlet| &outlet.account));
        self.plan(spec, ctx, move |ctx, pool| {
            let out = Emitter { outlet: outlet.as_ref(), ctx, pending: &pending };
            ctx.enter(State::Busy);
            pool.run(|| stage.start(ctx))?;
            let mut drained = false;
            loop {
                // A busy stage does not wait on an edge, so it must check for a halt itself.
                if ctx.halted() {
                    return Err(Ended::Halted.into());
                }
                let received = match stage.busy() {
                    false if drained => break,
                    true if drained || !stage.open() => Ok(None),
                    busy => inlet.next(ctx, !busy),
                };
                match received {
                    Ok(Some((item, now))) => {
                        ctx.pulse.beat(now);
                        let seq = item.seq;
                        pending.begin(seq, item.version, now);
                        pool.run(|| stage.process(item, &out))?;
                        ctx.pulse.items_in.fetch_add(1, Relaxed);
                        if !stage.busy() {
                            pending.end(seq, || ctx.clock.now());
                        }
                    }
                    Ok(None) => {
                        pool.run(|| stage.advance(&out))?;
                        if !stage.busy() {
                            pending.clear();
                        }
                        ctx.beat();
                    }
                    Err(Ended::Drained) => drained = true,
                    Err(ended) => return Err(ended.into()),
                }
            }
            pool.run(|| stage.finish(&out))
        });
    }

    fn join(
        &mut self,
        spec: &StageSpec,
        inlet: Option<&Arc<Account>>,
        outlet: Option<&Arc<Account>>,
    ) -> (StageContext, Arc<Pending>) {
        for (account, from, to) in &mut self.view.edges {
            if outlet.is_some_and(|outlet| Arc::ptr_eq(outlet, account)) {
                from.push(spec.name.clone());
            }
            if inlet.is_some_and(|inlet| Arc::ptr_eq(inlet, account)) {
                to.push(spec.name.clone());
            }
        }
        let pulse = Arc::new(Pulse::default());
        let now = self.view.clock.now();
        pulse.enter(State::Starting, now);
        pulse.beat(now);
        let pending = Arc::<Pending>::default();
        let watched = Watched { spec: spec.clone(), pulse: Arc::clone(&pulse), pending: Arc::clone(&pending) };
        self.view.stages.push(watched);
        let ctx = StageContext {
            name: spec.name.as_str().into(),
            incarnation: self.view.incarnation,
            clock: self.view.clock.clone(),
            control: Arc::clone(&self.view.control),
            pulse,
        };
        (ctx, pending)
    }

    fn plan(
        &mut self,
        spec: StageSpec,
        ctx: StageContext,
        body: impl FnOnce(&StageContext, &Pool) -> StageResult<()> + Send + 'static,
    ) {
        let threads = spec.threads;
        let name = spec.name.clone();
        let work = move || {
            let ended = catch_unwind(AssertUnwindSafe(|| {
                let pool = Pool::new(&ctx.name, threads)?;
                body(&ctx, &pool)
            }));
            ctx.enter(State::Ended);
            // After a halt the simulation no longer counts threads, and an abandoned thread must not be subtracted from
            // those of the next incarnation.
            if let Some(simulation) = ctx.clock.simulation().filter(|_| !ctx.halted()) {
                simulation.leave();
            }
            StageEnd { failure: failure(&name, ended), stage: name }
        };
        self.planned.push(Planned { spec, work: Box::new(work) });
    }

    pub(crate) fn finish(self) -> (View, Vec<Planned>) {
        (self.view, self.planned)
    }
}

/// Classifies the end of a thread. The end of an edge is not a failure; a refused item is.
fn failure(stage: &str, ended: std::thread::Result<StageResult<()>>) -> Option<StageFailure> {
    let (error, panicked, fatal) = match ended {
        Ok(Ok(())) => return None,
        Ok(Err(error)) if matches!(error.ended(), Some(Ended::Drained | Ended::Halted)) => return None,
        Ok(Err(error)) => (error.to_string(), false, error.is_fatal()),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            (format!("panicked: {}", text.unwrap_or_else(|| "no message".into())), true, false)
        }
    };
    Some(StageFailure { stage: stage.to_owned(), error, panicked, fatal })
}

/// Rayon pool of a stage, if it has its own.
struct Pool(Option<rayon::ThreadPool>);

impl Pool {
    fn new(name: &str, threads: Option<usize>) -> StageResult<Self> {
        let Some(threads) = threads else { return Ok(Self(None)) };
        let name = name.to_owned();
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = builder.thread_name(move |i| format!("{name}.{i}")).build().map_err(StageError::new)?;
        Ok(Self(Some(pool)))
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl View {
    pub(crate) fn stages(&self) -> Vec<StageReport> {
        let now = self.clock.now();
        let report = |Watched { spec, pulse, .. }: &Watched| {
            let spent = |state| pulse.spent(state, now).as_secs_f64();
            StageReport {
                name: spec.name.clone(),
                role: spec.role.clone(),
                state: pulse.state(),
                note: pulse.read_note(),
                since_s: pulse.in_state(now).as_secs_f64(),
                items_in: pulse.items_in.load(Relaxed),
                items_out: pulse.items_out.load(Relaxed),
                busy_s: spent(State::Busy),
                idle_s: spent(State::Input),
                blocked_s: spent(State::Output),
                admission_s: spent(State::Admission),
                last_beat_s: pulse.since_beat(now).as_secs_f64(),
            }
        };
        self.stages.iter().map(report).collect()
    }

    pub(crate) fn edges(&self) -> Vec<EdgeReport> {
        let now = self.clock.now();
        let report = |(account, from, to): &(Arc<Account>, Vec<String>, Vec<String>)| {
            let load = |counter: &AtomicU64| counter.load(Relaxed);
            EdgeReport {
                name: account.name.clone(),
                from: from.clone(),
                to: to.clone(),
                depth: account.depth(),
                capacity: account.capacity,
                items: load(&account.sent.items),
                refused: load(&account.sent.refused),
                send_blocked_s: Account::seconds(&account.sent.blocked),
                recv_blocked_s: Account::seconds(&account.received.blocked),
                high_water: load(&account.sent.high_water),
                age_s: account.age(now).as_secs_f64(),
                waited_s: Account::seconds(&account.received.waited),
            }
        };
        self.edges.iter().map(report).collect()
    }

    /// Returns the last spans of all stages, ordered by their end.
    pub(crate) fn timeline(&self) -> Vec<Span> {
        let mut all: Vec<(&Watched, Done)> = Vec::new();
        for stage in &self.stages {
            all.extend(stage.pending.since(0, TIMELINE).0.into_iter().map(|done| (stage, done)));
        }
        all.sort_by_key(|(_, done)| done.end);
        let left_out = all.len().saturating_sub(TIMELINE);
        all.into_iter().skip(left_out).map(|(stage, done)| self.span(stage, done)).collect()
    }

    /// Returns the spans after `cursor`, and advances `cursor` past them. Stages are visited last to first, so that an
    /// item's downstream span is never reported without its upstream ones.
    pub(crate) fn new_spans(&self, cursor: &mut SpanCursor) -> Vec<Span> {
        if cursor.incarnation != Some(self.incarnation) {
            *cursor = SpanCursor { incarnation: Some(self.incarnation), counts: Vec::new(), lost: cursor.lost };
        }
        cursor.counts.resize(self.stages.len(), 0);
        let mut new_spans = Vec::new();
        for (stage, before) in self.stages.iter().zip(&mut cursor.counts).rev() {
            let (done, count) = stage.pending.since(*before, KEPT);
            cursor.lost += count.saturating_sub(*before).saturating_sub(done.len() as u64);
            *before = count;
            new_spans.extend(done.into_iter().map(|work| self.span(stage, work)));
        }
        new_spans
    }

    fn span(&self, stage: &Watched, Done { seq, version, start, end }: Done) -> Span {
        let since = |at: u64| Duration::from_nanos(at).saturating_sub(self.began).as_secs_f64();
        Span { stage: stage.spec.name.clone(), seq, version, start_s: since(start), end_s: since(end) }
    }
}

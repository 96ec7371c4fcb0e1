//! Complete graphs of scripted stages.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use preceptor_actors::scripted::{Fault, ScriptedSink, ScriptedSource, ScriptedStage};
use preceptor_actors::{
    Admission, AdmissionGate, Clock, Emitter, GraphBuilder, GraphEvent, GraphHandle, GraphOptions, Item, Outcome,
    RestartPolicy, Span, SpanCursor, Stage, StageError, StageResult, StageSpec, State, WatchdogPolicy, spawn_graph,
};

/// Result of a run.
struct Ran {
    outcome: Outcome,
    events: Vec<GraphEvent>,
    handle: GraphHandle,
}

/// Options that restart at once, and give a stage on a busy machine a minute to end.
fn quick() -> GraphOptions {
    let restart = RestartPolicy { initial_backoff: Duration::from_millis(1), ..RestartPolicy::default() };
    GraphOptions { restart, halt_grace: Duration::from_secs(60), ..GraphOptions::default() }
}

/// Options for graphs with a stage that never ends: the grace period is short.
fn impatient() -> GraphOptions {
    GraphOptions { halt_grace: Duration::from_millis(200), ..quick() }
}

/// Waits until `holds` is true.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !holds() {
        assert!(Instant::now() < deadline, "waited two minutes for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a graph to its end; `meanwhile` may act on it after it has started.
fn run(
    options: GraphOptions,
    build: impl FnMut(&mut GraphBuilder) -> StageResult<()> + Send + 'static,
    meanwhile: impl FnOnce(&GraphHandle),
) -> Ran {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let handle = spawn_graph(options, build);
        let mut subscription = handle.subscribe();
        let mut events = Vec::new();
        loop {
            match subscription.recv().await.unwrap() {
                GraphEvent::Started { incarnation } => {
                    events.push(GraphEvent::Started { incarnation });
                    if incarnation == 0 {
                        break;
                    }
                }
                event => events.push(event),
            }
        }
        meanwhile(&handle);
        let outcome = handle.wait().await;
        while let Ok(event) = subscription.try_recv() {
            events.push(event);
        }
        Ran { outcome, events, handle }
    })
}

type Log = Arc<Mutex<Vec<(u64, u64, u64)>>>;

/// Wires source → two workers → sink in order; the log holds (item, version it began at, version it was consumed at).
fn pipeline(
    builder: &mut GraphBuilder,
    count: u64,
    eta_and_batch: Option<(u64, u64)>,
    workers: &[ScriptedStage],
    sink: ScriptedStage,
    log: &Log,
) {
    let (eta, batch) = eta_and_batch.unwrap_or((count, count));
    let gate = Arc::new(AdmissionGate::new(Admission { eta, batch }, 0, 0));
    let (to_work, from_source) = builder.edge("work", 1);
    let (to_sink, from_work) = builder.edge("done", 1);
    let source = ScriptedSource { next: 0, end: count, gate: Some(Arc::clone(&gate)) };
    builder.source(StageSpec::new("source"), source, to_work);
    for (i, worker) in workers.iter().enumerate() {
        let spec = StageSpec::new(format!("worker-{i}")).role("worker").stack(128 << 10);
        builder.stage(spec, worker.clone(), from_source.clone(), to_sink.clone());
    }
    let log = Arc::clone(log);
    let each = move |item: &Item<u64>, version| log.lock().unwrap().push((item.seq, item.version, version));
    builder.sink(StageSpec::new("sink"), ScriptedSink::new(sink, batch, Some(gate), each), from_work);
}

fn taking(ms: u64) -> ScriptedStage {
    ScriptedStage::taking(Duration::from_millis(ms))
}

#[test]
fn every_item_arrives_once_with_many_workers() {
    let log = Log::default();
    let inner = Arc::clone(&log);
    let workers: Vec<ScriptedStage> = (0..8).map(|i| ScriptedStage::taking(Duration::from_micros(i * 37))).collect();
    let ran = run(
        quick(),
        move |builder| {
            pipeline(builder, 500, None, &workers, taking(0), &inner);
            Ok(())
        },
        |_| {},
    );
    assert_eq!(ran.outcome, Outcome::Finished);
    let seen: Vec<u64> = log.lock().unwrap().iter().map(|(seq, ..)| *seq).collect();
    assert_eq!(seen, (0..500).collect::<Vec<_>>());
    let edges = ran.handle.report().edges;
    assert!(edges.iter().all(|edge| edge.items == 500 && edge.depth == 0), "{edges:?}");
    assert_eq!(
        (edges[0].from.as_slice(), edges[1].to.as_slice()),
        (&["source".to_owned()][..], &["sink".to_owned()][..])
    );
}

#[test]
fn an_edge_reports_how_long_its_items_wait() {
    let build = |builder: &mut GraphBuilder| {
        let (out, inlet) = builder.edge("edge", 4);
        builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 4, gate: None }, out);
        builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(2000), 4, None, |_, _| {}), inlet);
        Ok(())
    };
    let ran = run(GraphOptions { clock: Clock::simulated(), ..quick() }, build, |_| {});
    assert_eq!(ran.outcome, Outcome::Finished);
    let edge = &ran.handle.report().edges[0];
    // All four arrive at once; the first is taken at once, the others after 2, 4 and 6 seconds.
    assert_eq!((edge.items, edge.waited_s, edge.age_s), (4, 12.0, 0.0));
    // In real time the age of the items on the edge grows while its consumer hangs.
    let build = |builder: &mut GraphBuilder| {
        let (out, inlet) = builder.edge("edge", 4);
        builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 4, gate: None }, out);
        let hangs = ScriptedStage { fault: (0, Fault::Hang), ..ScriptedStage::default() };
        builder.sink(StageSpec::new("sink"), ScriptedSink::new(hangs, 4, None, |_, _| {}), inlet);
        Ok(())
    };
    let ran = run(quick(), build, |handle| {
        let edge = || handle.report().edges[0].clone();
        wait_until("the sink holds one of four items", || (edge().items, edge().depth) == (4, 3));
        let before = edge().age_s;
        wait_until("the oldest item on the edge grows older", || edge().age_s >= before + 0.02);
        handle.halt();
    });
    assert_eq!(ran.outcome, Outcome::Halted);
}

#[test]
fn spans_are_returned_once_and_unread_overwritten_ones_are_counted() {
    let build = |builder: &mut GraphBuilder| {
        let (out, inlet) = builder.edge("edge", 4);
        builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 1500, gate: None }, out);
        builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(1), 1500, None, |_, _| {}), inlet);
        Ok(())
    };
    let (mut cursor, mut early) = (SpanCursor::default(), Vec::new());
    let reads = |handle: &GraphHandle| {
        wait_until("a hundred spans", || {
            early.extend(handle.spans(&mut cursor));
            early.len() >= 100
        });
    };
    let ran = run(quick(), build, reads);
    assert_eq!(ran.outcome, Outcome::Finished);
    // A second reader does not depend on the first.
    let mut other = SpanCursor::default();
    assert_eq!((ran.handle.spans(&mut other).len(), other.lost()), (2 * 1024, 2 * (1500 - 1024)));
    early.extend(ran.handle.spans(&mut cursor));
    assert!(ran.handle.spans(&mut cursor).is_empty());
    assert_eq!(early.len() as u64 + cursor.lost(), 2 * 1500);
    for stage in ["source", "sink"] {
        let seqs: Vec<u64> = early.iter().filter(|span| span.stage == stage).map(|span| span.seq).collect();
        assert!(seqs.windows(2).all(|pair| pair[0] < pair[1]), "{stage} gives each once and in order: {seqs:?}");
    }
    assert_eq!(ran.handle.report().timeline.len(), 256);
}

#[test]
fn a_drain_lets_items_under_way_finish() {
    let log = Log::default();
    let inner = Arc::clone(&log);
    let ran = run(
        quick(),
        move |builder| {
            pipeline(builder, u64::MAX, Some((1000, 10)), &[taking(1), taking(2)], taking(0), &inner);
            Ok(())
        },
        GraphHandle::drain,
    );
    assert_eq!(ran.outcome, Outcome::Drained);
    let seen: Vec<u64> = log.lock().unwrap().iter().map(|(seq, ..)| *seq).collect();
    assert_eq!(seen, (0..seen.len() as u64).collect::<Vec<_>>());
    let edges = ran.handle.report().edges;
    assert!(edges.iter().all(|edge| edge.items == seen.len() as u64), "{edges:?} for {} items", seen.len());
}

/// Stage that works on up to four items at once, each in three steps.
#[derive(Default)]
struct Juggler {
    under_way: Vec<(Item<u64>, u32)>,
    most: Arc<Mutex<usize>>,
}

impl Stage for Juggler {
    type In = u64;
    type Out = u64;

    fn process(&mut self, item: Item<u64>, _out: &Emitter<'_, u64>) -> StageResult<()> {
        self.under_way.push((item, 3));
        let mut most = self.most.lock().unwrap();
        *most = most.max(self.under_way.len());
        Ok(())
    }

    fn busy(&self) -> bool {
        !self.under_way.is_empty()
    }

    fn open(&self) -> bool {
        self.under_way.len() < 4
    }

    fn advance(&mut self, out: &Emitter<'_, u64>) -> StageResult<()> {
        out.ctx().sleep(Duration::from_millis(1));
        for (_, left) in &mut self.under_way {
            *left -= 1;
        }
        let (ended, going): (Vec<_>, Vec<_>) = self.under_way.drain(..).partition(|(_, left)| *left == 0);
        self.under_way = going;
        ended.into_iter().try_for_each(|(item, _)| Ok(out.emit(item)?))
    }
}

/// In real time and in simulated time, all items pass exactly once, several at a time, never more than the stage
/// accepts, and the timeline has each from the moment it is taken until it is emitted.
#[test]
fn a_stage_may_work_on_many_items_at_once() {
    for (clock, simulated) in [(Clock::real(), false), (Clock::simulated(), true)] {
        let (log, most) = (Log::default(), Arc::new(Mutex::new(0)));
        let (inner, counted) = (Arc::clone(&log), Arc::clone(&most));
        let options = GraphOptions { clock, ..quick() };
        let build = move |builder: &mut GraphBuilder| {
            let (to_work, work) = builder.edge("work", 2);
            let (to_sink, done) = builder.edge("done", 1);
            builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 50, gate: None }, to_work);
            let juggler = Juggler { most: Arc::clone(&counted), ..Juggler::default() };
            builder.stage(StageSpec::new("juggler"), juggler, work, to_sink);
            let log = Arc::clone(&inner);
            let each = move |item: &Item<u64>, version| log.lock().unwrap().push((item.seq, item.version, version));
            builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(0), 1, None, each), done);
            Ok(())
        };
        let ran = run(options, build, |_| {});
        assert_eq!(ran.outcome, Outcome::Finished);
        let seen: Vec<u64> = log.lock().unwrap().iter().map(|(seq, ..)| *seq).collect();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
        // In real time a busy machine may let the source deliver too slowly for four at once.
        let most = *most.lock().unwrap();
        assert!(if simulated { most == 4 } else { most <= 4 }, "{most} items at once");
        let spans: Vec<Span> =
            ran.handle.report().timeline.into_iter().filter(|span| span.stage == "juggler").collect();
        assert_eq!(spans.len(), 50);
        assert!(spans.iter().all(|span| span.end_s - span.start_s > 0.002), "{spans:?}");
    }
}

/// Stage that is always busy and accepts no more items.
struct Endless(Arc<Mutex<bool>>);

impl Stage for Endless {
    type In = u64;
    type Out = u64;

    fn process(&mut self, _item: Item<u64>, _out: &Emitter<'_, u64>) -> StageResult<()> {
        Ok(())
    }

    fn busy(&self) -> bool {
        true
    }

    fn open(&self) -> bool {
        false
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        *self.0.lock().unwrap() = true;
    }
}

#[test]
fn a_halt_ends_a_busy_stage_that_accepts_no_items() {
    let ended = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&ended);
    let build = move |builder: &mut GraphBuilder| {
        let (to_work, work) = builder.edge("work", 1);
        let (to_sink, done) = builder.edge("done", 1);
        builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 9, gate: None }, to_work);
        builder.stage(StageSpec::new("endless"), Endless(Arc::clone(&seen)), work, to_sink);
        builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(0), 1, None, |_, _| ()), done);
        Ok(())
    };
    let ran = run(quick(), build, GraphHandle::halt);
    assert_eq!(ran.outcome, Outcome::Halted);
    assert!(*ended.lock().unwrap(), "the stage was abandoned instead of ended");
}

#[test]
fn a_halt_ends_every_wait() {
    // The sink hangs, so the workers block on a full edge and the source blocks behind them.
    let log = Log::default();
    let sink = ScriptedStage { fault: (0, Fault::Hang), ..taking(0) };
    let ran = run(
        quick(),
        move |builder| {
            pipeline(builder, 100, None, &[taking(0), taking(0)], sink.clone(), &log);
            Ok(())
        },
        GraphHandle::halt,
    );
    assert_eq!(ran.outcome, Outcome::Halted);
}

#[test]
fn a_panic_rebuilds_the_graph_under_a_new_incarnation() {
    for fault in [Fault::Panic, Fault::Error] {
        let log = Log::default();
        let inner = Arc::clone(&log);
        let ran = run(
            quick(),
            move |builder| {
                let first = builder.incarnation() == 0;
                inner.lock().unwrap().clear();
                let worker = ScriptedStage { fault: (7, if first { fault } else { Fault::None }), ..taking(0) };
                pipeline(builder, 20, None, &[worker], taking(0), &inner);
                Ok(())
            },
            |_| {},
        );
        assert_eq!(ran.outcome, Outcome::Finished);
        assert_eq!(log.lock().unwrap().len(), 20);
        assert_eq!((ran.handle.report().incarnation, ran.handle.report().restarts), (1, 1));
        let failed = ran.events.iter().find_map(|event| match event {
            GraphEvent::StageFailed { stage, error, panicked } => Some((stage.as_str(), error.as_str(), *panicked)),
            _ => None,
        });
        let (stage, error, panicked) = failed.expect("the failure is reported");
        assert_eq!((stage, panicked), ("worker-0", fault == Fault::Panic));
        assert!(error.contains("scripted"), "{error}");
    }
}

#[test]
fn a_fatal_error_is_not_retried_and_a_restart_budget_ends() {
    for (fault, restarts) in [(Fault::Fatal, 0), (Fault::Error, 3)] {
        let log = Log::default();
        let worker = ScriptedStage { fault: (2, fault), ..taking(0) };
        let ran = run(
            quick(),
            move |builder| {
                pipeline(builder, 20, None, std::slice::from_ref(&worker), taking(0), &log);
                Ok(())
            },
            |_| {},
        );
        let Outcome::Failed { stage, error, restarts: counted, fatal } = ran.outcome else {
            panic!("{:?}", ran.outcome)
        };
        assert_eq!((stage.as_str(), counted, fatal), ("worker-0", restarts, fault == Fault::Fatal));
        assert!(error.contains("scripted"), "{error}");
    }
}

#[test]
fn a_failing_builder_fails_the_graph() {
    let options = GraphOptions { restart: RestartPolicy::never(), ..quick() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(async { spawn_graph(options, |_| Err(StageError::fatal("no wires"))).wait().await });
    let Outcome::Failed { stage, error, fatal, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!((stage.as_str(), error.as_str(), fatal), ("the builder", "no wires", true));
}

#[test]
fn builds_that_fail_after_a_healthy_incarnation_spend_the_budget() {
    let mut options = quick();
    options.restart = RestartPolicy { max_restarts: 2, healthy_after: Duration::from_millis(20), ..options.restart };
    let log = Log::default();
    let ran = run(
        options,
        move |builder| {
            match builder.incarnation() {
                0 => {}
                // If the budget were never spent, the test would not end otherwise.
                40 => return Err(StageError::fatal("the budget is never spent")),
                _ => return Err(StageError::new("no wires")),
            }
            let worker = ScriptedStage { fault: (0, Fault::Error), ..taking(40) };
            pipeline(builder, 5, None, &[worker], taking(0), &log);
            Ok(())
        },
        |_| {},
    );
    let Outcome::Failed { stage, error, restarts, .. } = ran.outcome else { panic!("{:?}", ran.outcome) };
    assert_eq!((stage.as_str(), error.as_str(), restarts), ("the builder", "no wires", 2));
}

#[test]
fn a_thread_that_cannot_be_started_is_a_failure_of_its_stage() {
    let ran = run(
        GraphOptions { restart: RestartPolicy::never(), ..quick() },
        |builder| {
            let (to_sink, from_source) = builder.edge("in", 1);
            builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 5, gate: None }, to_sink);
            // More bytes than the address space has.
            let spec = StageSpec::new("sink").stack(1 << 60);
            builder.sink(spec, ScriptedSink::new(taking(0), 1, None, |_, _| {}), from_source);
            Ok(())
        },
        |_| {},
    );
    let Outcome::Failed { stage, error, .. } = ran.outcome else { panic!("{:?}", ran.outcome) };
    assert_eq!(stage, "sink");
    assert!(error.contains("could not be started"), "{error}");
}

/// Stage that sends an item of another incarnation.
struct Stray;

impl Stage for Stray {
    type In = u64;
    type Out = u64;

    fn process(&mut self, item: Item<u64>, out: &Emitter<'_, u64>) -> StageResult<()> {
        Ok(out.emit(Item { incarnation: item.incarnation + 1, ..item })?)
    }
}

#[test]
fn an_item_of_another_incarnation_is_refused_and_fails_the_run() {
    let log = Log::default();
    let inner = Arc::clone(&log);
    let ran = run(
        GraphOptions { restart: RestartPolicy::never(), ..quick() },
        move |builder| {
            let (to_stray, from_source) = builder.edge("in", 1);
            let (to_sink, from_stray) = builder.edge("out", 1);
            builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 1, gate: None }, to_stray);
            builder.stage(StageSpec::new("stray"), Stray, from_source, to_sink);
            let log = Arc::clone(&inner);
            let each = move |item: &Item<u64>, _| log.lock().unwrap().push((item.seq, 0, 0));
            builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(0), 1, None, each), from_stray);
            Ok(())
        },
        |_| {},
    );
    // A run that loses an item must not end as finished.
    let Outcome::Failed { stage, error, .. } = ran.outcome else { panic!("{:?}", ran.outcome) };
    assert_eq!(stage, "stray");
    assert!(error.contains("incarnation 1 is refused by incarnation 0"), "{error}");
    assert!(log.lock().unwrap().is_empty());
    assert_eq!(ran.handle.report().edges[1].refused, 1);
}

/// Stage that ignores a halt: it waits on a channel that the test holds.
struct Deaf(Arc<Mutex<Receiver<()>>>, bool);

impl Stage for Deaf {
    type In = u64;
    type Out = u64;

    fn process(&mut self, item: Item<u64>, out: &Emitter<'_, u64>) -> StageResult<()> {
        if self.1 {
            // The wait ends when the test drops the other end.
            let _ = self.0.lock().unwrap().recv();
        }
        Ok(out.emit(item)?)
    }
}

#[test]
fn the_watchdog_names_the_blocking_stage_and_restarts_past_one_that_ignores_halts() {
    let (hold, wait) = sync_channel::<()>(0);
    let wait = Arc::new(Mutex::new(wait));
    let watchdog =
        WatchdogPolicy { stall_after: Duration::from_millis(500), restart_after: Some(Duration::from_secs(2)) };
    // On a machine so busy that a later incarnation also stalls, one more restart is harmless.
    let restart = RestartPolicy { max_restarts: 100, ..impatient().restart };
    let log = Log::default();
    let inner = Arc::clone(&log);
    let ran = run(
        GraphOptions { watchdog, restart, ..impatient() },
        move |builder| {
            inner.lock().unwrap().clear();
            let (to_deaf, from_source) = builder.edge("in", 1);
            let (to_sink, from_deaf) = builder.edge("out", 1);
            builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 5, gate: None }, to_deaf);
            let deaf = Deaf(Arc::clone(&wait), builder.incarnation() == 0);
            builder.stage(StageSpec::new("deaf"), deaf, from_source, to_sink);
            let log = Arc::clone(&inner);
            let each = move |item: &Item<u64>, _| log.lock().unwrap().push((item.seq, 0, 0));
            builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(0), 1, None, each), from_deaf);
            Ok(())
        },
        |_| {},
    );
    drop(hold);
    assert_eq!(ran.outcome, Outcome::Finished);
    assert_eq!(log.lock().unwrap().len(), 5);
    let stalled = ran.events.iter().any(|event| matches!(event, GraphEvent::Stalled { stage, .. } if stage == "deaf"));
    assert!(stalled, "{:?}", ran.events);
    assert!(ran.handle.report().incarnation >= 1);
}

#[test]
fn a_halt_does_not_wait_for_a_stage_that_ignores_it() {
    let (hold, wait) = sync_channel::<()>(0);
    let wait = Arc::new(Mutex::new(wait));
    let ran = run(
        impatient(),
        move |builder| {
            let (to_deaf, from_source) = builder.edge("in", 1);
            let (to_sink, from_deaf) = builder.edge("out", 1);
            builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: 5, gate: None }, to_deaf);
            builder.stage(StageSpec::new("deaf"), Deaf(Arc::clone(&wait), true), from_source, to_sink);
            builder.sink(StageSpec::new("sink"), ScriptedSink::new(taking(0), 1, None, |_, _| {}), from_deaf);
            Ok(())
        },
        |handle| {
            // Two items were put on an edge for one: the first has been taken, so the stage that ignores halts is
            // working.
            wait_until("the stage that ignores halts is working", || handle.report().edges[0].items >= 2);
            handle.halt();
        },
    );
    drop(hold);
    assert_eq!(ran.outcome, Outcome::Halted);
}

#[test]
fn staleness_stays_within_the_bound_and_nothing_is_lost() {
    for eta in [0, 1, 3] {
        let log = Log::default();
        let inner = Arc::clone(&log);
        let ran = run(
            GraphOptions { clock: Clock::simulated(), ..quick() },
            move |builder| {
                pipeline(builder, 240, Some((eta, 8)), &[taking(3), taking(11), taking(40)], taking(2), &inner);
                Ok(())
            },
            |_| {},
        );
        assert_eq!(ran.outcome, Outcome::Finished);
        let log = log.lock().unwrap();
        assert_eq!(log.iter().map(|(seq, ..)| *seq).collect::<Vec<_>>(), (0..240).collect::<Vec<_>>());
        let worst = log.iter().map(|(_, began, consumed)| consumed - began).max().unwrap();
        assert!(worst <= eta, "staleness {worst} under a bound of {eta}");
        assert_eq!(worst > 0, eta > 0, "with slack, work is ahead of the learner; without, it is not");
    }
}

/// Returns the virtual time of a simulated run, and the timeline of its last spans.
fn simulate(
    workers: usize,
    count: u64,
    eta: u64,
    batch: u64,
    work_ms: u64,
    learn_ms: u64,
) -> (f64, Vec<(String, u64, f64, f64)>) {
    let clock = Clock::simulated();
    let log = Log::default();
    let stages = vec![taking(work_ms); workers];
    let ran = run(
        GraphOptions { clock: clock.clone(), ..quick() },
        move |builder| {
            pipeline(builder, count, Some((eta, batch)), &stages, taking(learn_ms), &log);
            Ok(())
        },
        |_| {},
    );
    assert_eq!(ran.outcome, Outcome::Finished);
    let spans = ran.handle.report().timeline.into_iter();
    (clock.now().as_secs_f64(), spans.map(|span| (span.stage, span.seq, span.start_s, span.end_s)).collect())
}

#[test]
fn simulated_throughput_is_that_of_the_slowest_stage() {
    // Two workers of 10 ms produce an item every 5 ms; the learner takes 8 ms. With slack it never waits.
    let (took, _) = simulate(2, 400, 2, 8, 10, 8);
    assert!((took / (400.0 * 0.008) - 1.0).abs() < 0.01, "{took}");
    // Without slack, each batch of 8 is first generated (4 rounds of 10 ms), then learned as it arrives, the last pair
    // at its end.
    let (synchronous, _) = simulate(2, 400, 0, 8, 10, 8);
    assert!(synchronous > took * 1.1, "{synchronous} against {took}");
}

#[test]
fn simulated_time_is_reproducible() {
    let order = |spans: Vec<(String, u64, f64, f64)>| -> BTreeMap<(u64, String), (String, String)> {
        spans
            .into_iter()
            .map(|(stage, seq, start, end)| ((seq, stage), (format!("{start:.6}"), format!("{end:.6}"))))
            .collect()
    };
    let (a, first) = simulate(1, 60, 1, 4, 5, 3);
    let (b, second) = simulate(1, 60, 1, 4, 5, 3);
    assert_eq!(a, b);
    assert_eq!(order(first), order(second));
}

#[test]
fn a_thousand_rollout_actors_run_in_simulated_time() {
    // Three rounds of 10 s; in the first all finish at once, and the learner takes 5 ms for each of the thousand.
    let (took, _) = simulate(1000, 3000, 400, 10, 10_000, 5);
    assert!((took / 35.0 - 1.0).abs() < 0.01, "{took}");
}

#[test]
fn simulated_time_continues_after_a_restart() {
    let clock = Clock::simulated();
    let (log, began) = (Log::default(), Arc::new(Mutex::new(Duration::ZERO)));
    let (watch, noted) = (clock.clone(), Arc::clone(&began));
    let ran = run(
        GraphOptions { clock: clock.clone(), ..quick() },
        move |builder| {
            *noted.lock().unwrap() = watch.now();
            let fault = if builder.incarnation() == 0 { Fault::Error } else { Fault::None };
            let worker = ScriptedStage { fault: (2, fault), ..taking(1000) };
            pipeline(builder, 10, None, &[worker], taking(0), &log);
            Ok(())
        },
        |_| {},
    );
    assert_eq!((ran.outcome, ran.handle.report().incarnation), (Outcome::Finished, 1));
    assert_eq!(clock.now() - *began.lock().unwrap(), Duration::from_secs(10));
}

#[test]
fn a_drain_ends_a_wait_for_admission() {
    for clock in [Clock::real(), Clock::simulated()] {
        let ran = run(
            GraphOptions { clock, ..quick() },
            |builder| {
                // Four items may start, and the sink never publishes a version that would admit a fifth.
                let gate = Arc::new(AdmissionGate::new(Admission { eta: 0, batch: 4 }, 0, 0));
                let (to_sink, from_source) = builder.edge("in", 1);
                let source = ScriptedSource { next: 0, end: 100, gate: Some(gate) };
                builder.source(StageSpec::new("source"), source, to_sink);
                let sink = ScriptedSink::new(taking(0), 1000, None, |_, _| {});
                builder.sink(StageSpec::new("sink"), sink, from_source);
                Ok(())
            },
            |handle| {
                wait_until("the source waits", || handle.report().stages[0].state == State::Admission);
                handle.drain();
            },
        );
        assert_eq!(ran.outcome, Outcome::Drained);
        assert_eq!(ran.handle.report().edges[0].items, 4);
    }
}

//! A running graph and its handle.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ractor::{ActorRef, ActorRuntime};
use serde::Serialize;
use tokio::sync::{broadcast, watch};

use crate::backoff::RestartPolicy;
use crate::builder::{GraphBuilder, View};
use crate::clock::Clock;
use crate::pulse::State;
use crate::report::{GraphReport, Span, SpanCursor, Stall};
use crate::stage::StageResult;
use crate::supervisor::{GraphActor, GraphMessage};
use crate::watchdog::WatchdogPolicy;

/// Number of events that a subscriber may lag behind before it loses the oldest.
const EVENTS: usize = 256;

/// Supervision settings of a graph.
#[derive(Clone)]
pub struct GraphOptions {
    /// Policy for restarts after a failure.
    pub restart: RestartPolicy,
    /// Policy for graphs that make no progress.
    pub watchdog: WatchdogPolicy,
    /// Time that a halted stage has to stop before it is abandoned. The default is 10 s.
    pub halt_grace: Duration,
    /// Clock of the graph.
    pub clock: Clock,
}

impl Default for GraphOptions {
    fn default() -> Self {
        Self {
            restart: RestartPolicy::default(),
            watchdog: WatchdogPolicy::default(),
            halt_grace: Duration::from_secs(10),
            clock: Clock::real(),
        }
    }
}

/// Result of a graph's run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Outcome {
    /// The sources ended and all items were processed.
    Finished,
    /// The graph was drained, and all items under way were processed.
    Drained,
    /// The graph was halted.
    Halted,
    /// A stage failed permanently.
    Failed {
        /// Name of the stage.
        stage: String,
        /// Error message of the stage.
        error: String,
        /// Number of restarts before the failure.
        restarts: u32,
        /// True if the error was fatal, so that no restart was attempted.
        fatal: bool,
    },
}

/// Event in the life of a graph.
#[derive(Debug, Clone, Serialize)]
pub enum GraphEvent {
    /// An incarnation was started.
    Started {
        /// Number of the incarnation, from zero.
        incarnation: u64,
    },
    /// A stage failed; the incarnation is being taken down.
    StageFailed {
        /// Name of the stage.
        stage: String,
        /// Error message of the stage.
        error: String,
        /// True if the stage panicked.
        panicked: bool,
    },
    /// The graph will be rebuilt after a pause.
    Restarting {
        /// Number of the next incarnation.
        incarnation: u64,
        /// Length of the pause.
        backoff: Duration,
    },
    /// No stage makes progress.
    Stalled {
        /// Name of the stage that blocks the graph.
        stage: String,
        /// State of that stage.
        state: State,
        /// Time since any stage made progress.
        for_: Duration,
    },
    /// A stalled graph makes progress again.
    Recovered {
        /// Name of the stage that had blocked the graph.
        stage: String,
    },
    /// The graph has ended.
    Ended(Outcome),
}

/// State shared by the handle and the supervisor.
pub(crate) struct Shared {
    view: Mutex<Option<Arc<View>>>,
    stall: Mutex<Option<Stall>>,
    restarts: AtomicU32,
    events: broadcast::Sender<GraphEvent>,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Shared {
    pub(crate) fn set_view(&self, view: Arc<View>) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = Some(view);
    }

    pub(crate) fn stall(&self, stall: Option<Stall>) {
        *self.stall.lock().unwrap_or_else(PoisonError::into_inner) = stall;
    }

    pub(crate) fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::SeqCst)
    }

    pub(crate) fn count_restart(&self) {
        self.restarts.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn publish(&self, event: GraphEvent) {
        // Without subscribers the event is lost.
        let _ = self.events.send(event);
    }

    pub(crate) fn finish(&self, outcome: Outcome) {
        self.publish(GraphEvent::Ended(outcome.clone()));
        self.outcome.send_replace(Some(outcome));
    }
}

/// Starts a graph. Must be called within a tokio runtime. `build` wires each incarnation on a blocking thread, where it
/// may load files; it is called again after a failure.
pub fn spawn_graph(
    options: GraphOptions,
    build: impl FnMut(&mut GraphBuilder) -> StageResult<()> + Send + 'static,
) -> GraphHandle {
    let shared = Arc::new(Shared {
        view: Mutex::new(None),
        stall: Mutex::new(None),
        restarts: AtomicU32::new(0),
        events: broadcast::Sender::new(EVENTS),
        outcome: watch::Sender::new(None),
    });
    let actor = GraphActor { options, shared: Arc::clone(&shared) };
    let (actor, _) = ActorRuntime::spawn_instant(None, actor, Box::new(build))
        .expect("an actor without a name cannot clash with another");
    GraphHandle { actor, shared }
}

/// Handle of a running graph. Clones refer to the same graph.
#[derive(Clone)]
pub struct GraphHandle {
    actor: ActorRef<GraphMessage>,
    shared: Arc<Shared>,
}

impl GraphHandle {
    /// Ends the sources; items under way are still processed.
    pub fn drain(&self) {
        // Fails only if the supervisor has ended, and then nothing is left to drain.
        let _ = self.actor.cast(GraphMessage::Drain);
    }

    /// Stops every stage as soon as it checks for a halt or waits.
    pub fn halt(&self) {
        // Fails only if the supervisor has ended.
        let _ = self.actor.cast(GraphMessage::Halt);
        if let Some(view) = &*self.shared.view.lock().unwrap_or_else(PoisonError::into_inner) {
            view.control.halt();
        }
    }

    /// Waits for the graph to end and returns its outcome.
    pub async fn wait(&self) -> Outcome {
        let (mut outcome, supervisor) = (self.shared.outcome.subscribe(), self.actor.get_cell());
        tokio::select! {
            ended = outcome.wait_for(Option::is_some) => {
                return ended.ok().and_then(|outcome| outcome.clone()).unwrap_or(Outcome::Halted);
            }
            // The supervisor publishes the outcome before it stops, so its end is only a reason to check for one.
            _ = supervisor.wait(None) => {}
        }
        if let Some(outcome) = self.shared.outcome.borrow().clone() {
            return outcome;
        }
        // Without a supervisor nothing else stops the remaining stages.
        self.halt();
        let outcome = Outcome::Failed {
            stage: "the supervisor".into(),
            error: "internal error: the supervisor exited without an outcome".into(),
            restarts: self.shared.restarts(),
            fatal: true,
        };
        self.shared.finish(outcome.clone());
        outcome
    }

    /// Returns a receiver of the events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<GraphEvent> {
        self.shared.events.subscribe()
    }

    /// Returns the spans of this incarnation after `cursor`, the last stage's first, and advances `cursor` past them.
    /// Each stage keeps its last 1,024.
    pub fn spans(&self, cursor: &mut SpanCursor) -> Vec<Span> {
        let view = self.shared.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        view.map(|view| view.new_spans(cursor)).unwrap_or_default()
    }

    /// Returns the current state of the graph; empty before the first incarnation is built. It reads counters without
    /// blocking the stages, so any thread may call it.
    pub fn report(&self) -> GraphReport {
        let view = self.shared.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let restarts = self.shared.restarts();
        let Some(view) = view else { return GraphReport { restarts, ..GraphReport::default() } };
        let stages = view.stages();
        GraphReport {
            incarnation: view.incarnation,
            uptime_s: view.clock.now().saturating_sub(view.began).as_secs_f64(),
            restarts,
            stages,
            edges: view.edges(),
            stalled: self.shared.stall.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            timeline: view.timeline(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::Ended;
    use crate::item::Item;
    use crate::stage::{Emitter, Source, Stage, StageContext, StageSpec};

    /// Source that gives nothing until the graph halts, and reports when it begins and ends.
    struct Idle(std::sync::mpsc::SyncSender<()>);

    impl Source for Idle {
        type Out = u64;

        fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<u64>>> {
            let _ = self.0.send(());
            ctx.sleep(Duration::from_secs(60));
            let _ = self.0.send(());
            Err(Ended::Halted.into())
        }
    }

    struct Nothing;

    impl Stage for Nothing {
        type In = u64;
        type Out = ();

        fn process(&mut self, _item: Item<u64>, _out: &Emitter<'_, ()>) -> StageResult<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn the_death_of_the_supervisor_ends_the_wait_and_the_stages() {
        let (sender, events) = std::sync::mpsc::sync_channel(2);
        let graph = spawn_graph(GraphOptions::default(), move |builder| {
            let (out, inlet) = builder.edge("edge", 1);
            builder.source(StageSpec::new("source"), Idle(sender.clone()), out);
            builder.sink(StageSpec::new("sink"), Nothing, inlet);
            Ok(())
        });
        while events.try_recv().is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        graph.actor.kill();
        let Outcome::Failed { stage, fatal: true, .. } = graph.wait().await else { panic!("it did not fail") };
        assert_eq!(stage, "the supervisor");
        events.recv_timeout(Duration::from_secs(30)).expect("the source is halted");
    }
}

//! A running graph, and the handle on it.

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
use crate::report::{GraphReport, Span, SpansSeen, Stall};
use crate::stage::StageResult;
use crate::supervisor::{GraphActor, GraphMessage};
use crate::watchdog::WatchdogPolicy;

/// Events that a subscriber may lag behind before it loses the oldest.
const EVENTS: usize = 256;

/// How a graph is supervised.
#[derive(Clone)]
pub struct GraphOptions {
    /// What happens after a failure.
    pub restart: RestartPolicy,
    /// What happens without progress.
    pub watchdog: WatchdogPolicy,
    /// How long a halted stage may take to come back before it is abandoned.
    pub halt_grace: Duration,
    /// The graph's time.
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

/// How a graph ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Outcome {
    /// Its sources ended and everything flowed out.
    Finished,
    /// It was told to drain, and everything flowed out.
    Drained,
    /// It was told to halt.
    Halted,
    /// A stage failed for good.
    Failed {
        /// The stage.
        stage: String,
        /// What it said.
        error: String,
        /// Restarts before that.
        restarts: u32,
        /// Whether a restart would have been of no use.
        fatal: bool,
    },
}

/// What happens to a graph.
#[derive(Debug, Clone, Serialize)]
pub enum GraphEvent {
    /// An incarnation runs.
    Started {
        /// Which.
        incarnation: u64,
    },
    /// A stage failed; the incarnation is taken down.
    StageFailed {
        /// The stage.
        stage: String,
        /// What it said.
        error: String,
        /// Whether it panicked.
        panicked: bool,
    },
    /// The graph will be rebuilt.
    Restarting {
        /// As this incarnation.
        incarnation: u64,
        /// After this pause.
        backoff: Duration,
    },
    /// No stage makes progress.
    Stalled {
        /// Who holds the run.
        stage: String,
        /// What it is doing.
        state: State,
        /// For how long nothing has moved.
        for_: Duration,
    },
    /// The run moves again.
    Recovered {
        /// Who held it.
        stage: String,
    },
    /// The graph has ended.
    Ended(Outcome),
}

/// What the handle and the supervisor share.
pub(crate) struct Shared {
    view: Mutex<Option<Arc<View>>>,
    stall: Mutex<Option<Stall>>,
    restarts: AtomicU32,
    events: broadcast::Sender<GraphEvent>,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Shared {
    pub(crate) fn show(&self, view: Arc<View>) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = Some(view);
    }

    pub(crate) fn stall(&self, stall: Option<Stall>) {
        *self.stall.lock().unwrap_or_else(PoisonError::into_inner) = stall;
    }

    pub(crate) fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::SeqCst)
    }

    pub(crate) fn restarted(&self) {
        self.restarts.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn tell(&self, event: GraphEvent) {
        // Without subscribers an event goes unheard.
        let _ = self.events.send(event);
    }

    pub(crate) fn finish(&self, outcome: Outcome) {
        self.tell(GraphEvent::Ended(outcome.clone()));
        self.outcome.send_replace(Some(outcome));
    }
}

/// Starts a graph; must be called within a tokio runtime. `build` wires each incarnation: it is called again after
/// a failure, on a blocking thread, and may load what it needs.
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

/// A handle on a running graph.
#[derive(Clone)]
pub struct GraphHandle {
    actor: ActorRef<GraphMessage>,
    shared: Arc<Shared>,
}

impl GraphHandle {
    /// Ends the sources; what is under way flows out.
    pub fn drain(&self) {
        // An actor that has gone has nothing to drain.
        let _ = self.actor.cast(GraphMessage::Drain);
    }

    /// Stops every stage as soon as it looks.
    pub fn halt(&self) {
        // As above.
        let _ = self.actor.cast(GraphMessage::Halt);
        if let Some(view) = &*self.shared.view.lock().unwrap_or_else(PoisonError::into_inner) {
            view.control.halt();
        }
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Outcome {
        let (mut outcome, supervisor) = (self.shared.outcome.subscribe(), self.actor.get_cell());
        tokio::select! {
            ended = outcome.wait_for(Option::is_some) => {
                return ended.ok().and_then(|outcome| outcome.clone()).unwrap_or(Outcome::Halted);
            }
            // That it has stopped is no more than a sign to look: it says how the graph ended before it stops.
            _ = supervisor.wait(None) => {}
        }
        if let Some(outcome) = self.shared.outcome.borrow().clone() {
            return outcome;
        }
        // Without a supervisor nobody would take down what is left of the graph.
        self.halt();
        let outcome = Outcome::Failed {
            stage: "the supervisor".into(),
            error: "it stopped without a word; this is a fault of the program".into(),
            restarts: self.shared.restarts(),
            fatal: true,
        };
        self.shared.finish(outcome.clone());
        outcome
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<GraphEvent> {
        self.shared.events.subscribe()
    }

    /// The spans of this incarnation that `seen` does not know of yet, the last stage's first; each stage keeps its last thousand.
    pub fn spans(&self, seen: &mut SpansSeen) -> Vec<Span> {
        let view = self.shared.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        view.map(|view| view.news(seen)).unwrap_or_default()
    }

    /// The graph as it is; empty before the first incarnation is built. Reads counters alone: any thread may ask.
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

    /// Gives nothing until the graph halts; says when it has begun and when it has ended.
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
    async fn a_supervisor_that_dies_ends_the_wait_and_the_stages() {
        let (sender, said) = std::sync::mpsc::sync_channel(2);
        let graph = spawn_graph(GraphOptions::default(), move |builder| {
            let (out, inlet) = builder.edge("edge", 1);
            builder.source(StageSpec::new("source"), Idle(sender.clone()), out);
            builder.sink(StageSpec::new("sink"), Nothing, inlet);
            Ok(())
        });
        while said.try_recv().is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        graph.actor.kill();
        let Outcome::Failed { stage, fatal: true, .. } = graph.wait().await else { panic!("it did not fail") };
        assert_eq!(stage, "the supervisor");
        said.recv_timeout(Duration::from_secs(30)).expect("the source is told to halt");
    }
}

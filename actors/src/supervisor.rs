//! Supervision by ractor: one actor for the graph and one for each stage, none of which touches data.
//!
//! A stage's actor owns its thread. The thread reports its end by a cast; a failure reaches the graph's actor as a
//! supervision event. One failed stage takes the complete incarnation down, because the stages' states would otherwise
//! be inconsistent.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};

use crate::backoff::RestartPolicy;
use crate::builder::{GraphBuilder, Planned, StageEnd, StageFailure, View, Work};
use crate::graph::{GraphEvent, GraphOptions, Outcome, Shared};
use crate::report::Stall;
use crate::stage::{StageResult, StageSpec};
use crate::watchdog::stalled;

/// Function that wires an incarnation.
pub(crate) type Build = Box<dyn FnMut(&mut GraphBuilder) -> StageResult<()> + Send>;

pub(crate) enum GraphMessage {
    Drain,
    Halt,
    Build,
    Built(Build, Result<(View, Vec<Planned>), StageFailure>),
    CheckStall,
    GraceOver(u64),
}

/// Actor that supervises a graph.
pub(crate) struct GraphActor {
    pub(crate) options: GraphOptions,
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct GraphState {
    build: Option<Build>,
    incarnation: u64,
    view: Option<Arc<View>>,
    alive: HashMap<ActorId, String>,
    failures: u32,
    failure: Option<StageFailure>,
    stall: Option<Stall>,
    halting: bool,
    /// Incarnation for which the grace period of a halt is running.
    grace_period_of: Option<u64>,
    draining: bool,
}

impl Actor for GraphActor {
    type Msg = GraphMessage;
    type State = GraphState;
    type Arguments = Build;

    async fn pre_start(&self, myself: ActorRef<GraphMessage>, build: Build) -> Result<GraphState, ActorProcessingErr> {
        myself.cast(GraphMessage::Build)?;
        let stall_after = self.options.watchdog.stall_after;
        let every = (stall_after / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
        myself.send_interval(every, || GraphMessage::CheckStall);
        Ok(GraphState {
            build: Some(build),
            incarnation: 0,
            view: None,
            alive: HashMap::new(),
            failures: 0,
            failure: None,
            stall: None,
            halting: false,
            grace_period_of: None,
            draining: false,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<GraphMessage>,
        message: GraphMessage,
        state: &mut GraphState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GraphMessage::Drain => {
                state.draining = true;
                if let Some(view) = &state.view {
                    view.control.drain();
                }
                if state.build.is_some() && state.alive.is_empty() {
                    self.end(&myself, state, Outcome::Drained);
                }
            }
            GraphMessage::Halt => {
                state.halting = true;
                self.halt(&myself, state);
                if state.build.is_some() && state.alive.is_empty() {
                    self.end(&myself, state, Outcome::Halted);
                }
            }
            GraphMessage::Build => self.build(&myself, state),
            GraphMessage::Built(build, built) => {
                state.build = Some(build);
                match built {
                    Ok((view, planned)) => self.start(&myself, state, view, planned).await,
                    Err(failure) => {
                        state.failure = Some(failure);
                        self.settle(&myself, state);
                    }
                }
            }
            GraphMessage::CheckStall => self.check_stall(&myself, state),
            GraphMessage::GraceOver(incarnation) if incarnation == state.incarnation && !state.alive.is_empty() => {
                let mut left: Vec<String> = state.alive.drain().map(|(_, name)| name).collect();
                left.sort();
                tracing::error!("stages abandoned because they did not stop in time: {}", left.join(", "));
                self.settle(&myself, state);
            }
            GraphMessage::GraceOver(_) => {}
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<GraphMessage>,
        event: SupervisionEvent,
        state: &mut GraphState,
    ) -> Result<(), ActorProcessingErr> {
        let ended = match event {
            SupervisionEvent::ActorTerminated(who, _, _) => state.alive.remove(&who.get_id()),
            SupervisionEvent::ActorFailed(who, error) => {
                let name = state.alive.remove(&who.get_id());
                if let Some(stage) = &name {
                    let failure = error.downcast_ref::<StageFailure>().cloned().unwrap_or_else(|| StageFailure {
                        stage: stage.clone(),
                        error: error.to_string(),
                        panicked: false,
                        fatal: false,
                    });
                    self.fail(&myself, state, failure);
                }
                name
            }
            _ => None,
        };
        if ended.is_some() && state.alive.is_empty() {
            self.settle(&myself, state);
        }
        Ok(())
    }
}

impl GraphActor {
    /// Runs the builder on a blocking thread, because it may take long.
    fn build(&self, myself: &ActorRef<GraphMessage>, state: &mut GraphState) {
        let Some(mut build) = state.build.take() else { return };
        let (myself, incarnation, clock) = (myself.clone(), state.incarnation, self.options.clock.clone());
        tokio::task::spawn_blocking(move || {
            let mut builder = GraphBuilder::new(incarnation, clock);
            let wired = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| build(&mut builder)));
            let failure =
                |error: String, panicked, fatal| StageFailure { stage: "the builder".into(), error, panicked, fatal };
            let built = match wired {
                Ok(Ok(())) => Ok(builder.finish()),
                Ok(Err(error)) => Err(failure(error.to_string(), false, error.is_fatal())),
                Err(_) => Err(failure("panicked".into(), true, false)),
            };
            // If the graph's actor has ended, the result is not needed.
            let _ = myself.cast(GraphMessage::Built(build, built));
        });
    }

    async fn start(
        &self,
        myself: &ActorRef<GraphMessage>,
        state: &mut GraphState,
        mut view: View,
        planned: Vec<Planned>,
    ) {
        if let Some(simulation) = view.clock.simulation() {
            simulation.begin(planned.len());
        }
        // Time spent building does not count as healthy life.
        view.began = view.clock.now();
        let view = Arc::new(view);
        state.view = Some(Arc::clone(&view));
        state.stall = None;
        self.shared.set_view(Arc::clone(&view));
        self.shared.publish(GraphEvent::Started { incarnation: state.incarnation });
        if state.draining {
            view.control.drain();
        }
        if state.halting {
            self.halt(myself, state);
        }
        for Planned { spec, work } in planned {
            let name = spec.name.clone();
            match Actor::spawn_linked(None, StageActor, (spec, work), myself.get_cell()).await {
                Ok((actor, _)) => drop(state.alive.insert(actor.get_id(), name)),
                Err(error) => {
                    let error = format!("its thread could not be started: {error}");
                    let failure = StageFailure { stage: name, error, panicked: false, fatal: false };
                    self.fail(myself, state, failure);
                    break;
                }
            }
        }
        if state.alive.is_empty() {
            self.settle(myself, state);
        }
    }

    /// Takes the incarnation down after a failed stage. The first failure is reported as the cause.
    fn fail(&self, myself: &ActorRef<GraphMessage>, state: &mut GraphState, failure: StageFailure) {
        tracing::error!(stage = failure.stage, "{failure}");
        self.shared.publish(GraphEvent::StageFailed {
            stage: failure.stage.clone(),
            error: failure.error.clone(),
            panicked: failure.panicked,
        });
        state.failure.get_or_insert(failure);
        self.halt(myself, state);
    }

    /// Halts the incarnation and starts the grace period of its stages. The handle may have halted the stages already.
    fn halt(&self, myself: &ActorRef<GraphMessage>, state: &mut GraphState) {
        let Some(view) = &state.view else { return };
        view.control.halt();
        let incarnation = state.incarnation;
        if state.grace_period_of.replace(incarnation) != Some(incarnation) {
            myself.send_after(self.options.halt_grace, move || GraphMessage::GraceOver(incarnation));
        }
    }

    /// Decides how to continue once all stages have ended or were abandoned.
    fn settle(&self, myself: &ActorRef<GraphMessage>, state: &mut GraphState) {
        // `take`, so that a later failed build is not credited with the life of this incarnation.
        let view = state.view.take();
        let lived = view.as_ref().map_or(Duration::ZERO, |view| view.clock.now().saturating_sub(view.began));
        let Some(failure) = state.failure.take() else {
            // The handle halts the stages directly, so they may all have ended before its message arrives here.
            let halted = state.halting || view.is_some_and(|view| view.control.halted());
            let outcome = match (halted, state.draining) {
                (true, _) => Outcome::Halted,
                (false, true) => Outcome::Drained,
                (false, false) => Outcome::Finished,
            };
            return self.end(myself, state, outcome);
        };
        state.failures = self.options.restart.count(state.failures, lived);
        let pause = if failure.fatal || state.halting { None } else { self.options.restart.pause(state.failures) };
        let Some(backoff) = pause else {
            if state.halting && !failure.fatal {
                return self.end(myself, state, Outcome::Halted);
            }
            let StageFailure { stage, error, fatal, .. } = failure;
            let restarts = self.shared.restarts();
            return self.end(myself, state, Outcome::Failed { stage, error, restarts, fatal });
        };
        state.incarnation += 1;
        self.shared.count_restart();
        self.shared.publish(GraphEvent::Restarting { incarnation: state.incarnation, backoff });
        myself.send_after(backoff, || GraphMessage::Build);
    }

    fn end(&self, myself: &ActorRef<GraphMessage>, state: &mut GraphState, outcome: Outcome) {
        state.build = None;
        self.shared.finish(outcome);
        myself.stop(None);
    }

    /// Runs the watchdog's check.
    fn check_stall(&self, myself: &ActorRef<GraphMessage>, state: &mut GraphState) {
        let Some(view) = state.view.as_ref().filter(|view| !view.control.halted()) else { return };
        let found = stalled(&self.options.watchdog, &view.stages(), &view.edges());
        match (&found, &state.stall) {
            (Some(stall), None) => {
                tracing::warn!(stage = stall.stage, "no progress for {:.1} s, {}", stall.for_s, stall.state);
                self.shared.publish(GraphEvent::Stalled {
                    stage: stall.stage.clone(),
                    state: stall.state,
                    for_: Duration::from_secs_f64(stall.for_s),
                });
            }
            (None, Some(stall)) => self.shared.publish(GraphEvent::Recovered { stage: stall.stage.clone() }),
            _ => {}
        }
        self.shared.stall(found.clone());
        let limit = self.options.watchdog.restart_after;
        if let (Some(stall), Some(limit)) = (&found, limit)
            && stall.for_s >= limit.as_secs_f64()
        {
            let error = format!("no progress for {:.1} s, {}", stall.for_s, stall.state);
            state.failure.get_or_insert(StageFailure {
                stage: stall.stage.clone(),
                error,
                panicked: false,
                fatal: false,
            });
            self.halt(myself, state);
        }
        state.stall = found;
    }
}

/// Actor that owns a stage's thread.
struct StageActor;

impl Actor for StageActor {
    type Msg = StageEnd;
    type State = ();
    type Arguments = (StageSpec, Work);

    async fn pre_start(
        &self,
        myself: ActorRef<StageEnd>,
        (spec, work): (StageSpec, Work),
    ) -> Result<(), ActorProcessingErr> {
        let mut builder = std::thread::Builder::new().name(spec.name);
        if let Some(stack) = spec.stack {
            builder = builder.stack_size(stack);
        }
        builder.spawn(move || {
            let end = work();
            // If the actor has ended, the stage was abandoned.
            let _ = myself.cast(end);
        })?;
        Ok(())
    }

    async fn handle(
        &self,
        myself: ActorRef<StageEnd>,
        end: StageEnd,
        _state: &mut (),
    ) -> Result<(), ActorProcessingErr> {
        tracing::debug!(stage = end.stage, "ended");
        match end.failure {
            Some(failure) => Err(failure.into()),
            None => {
                myself.stop(None);
                Ok(())
            }
        }
    }
}

impl RestartPolicy {
    /// Returns a policy that never restarts.
    pub fn never() -> Self {
        Self { max_restarts: 0, ..Self::default() }
    }
}

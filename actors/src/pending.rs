//! What a stage has taken and not yet given on, and the timeline of what was.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::report::Span;
use crate::stage::StageContext;

/// Spans that the timeline keeps.
const SPANS: usize = 256;

/// The last spans of a graph.
pub(crate) type Timeline = Arc<Mutex<VecDeque<Span>>>;

/// One stage's items under way.
pub(crate) struct Pending {
    timeline: Timeline,
    begun: Mutex<Vec<Begun>>,
}

struct Begun {
    seq: u64,
    version: u64,
    start: Duration,
}

impl Pending {
    pub(crate) fn new(timeline: Timeline) -> Self {
        Self { timeline, begun: Mutex::default() }
    }

    /// The stage turns to an item.
    pub(crate) fn begin(&self, seq: u64, version: u64, start: Duration) {
        if cfg!(feature = "unobserved") {
            return;
        }
        self.begun().push(Begun { seq, version, start });
    }

    /// It is done with it; nothing happens where that is known, or the item was never begun.
    pub(crate) fn end(&self, seq: u64, ctx: &StageContext) {
        if cfg!(feature = "unobserved") {
            return;
        }
        let mut begun = self.begun();
        let Some(at) = begun.iter().position(|one| one.seq == seq) else { return };
        let Begun { seq, version, start } = begun.swap_remove(at);
        drop(begun);
        let (start_s, end_s) = (start.as_secs_f64(), ctx.clock().now().as_secs_f64());
        let mut timeline = self.timeline.lock().unwrap_or_else(PoisonError::into_inner);
        if timeline.len() == SPANS {
            timeline.pop_front();
        }
        timeline.push_back(Span { stage: ctx.name().to_owned(), seq, version, start_s, end_s });
    }

    /// Nothing is under way any more.
    pub(crate) fn clear(&self) {
        self.begun().clear();
    }

    fn begun(&self) -> MutexGuard<'_, Vec<Begun>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

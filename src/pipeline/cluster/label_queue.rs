//! The coordinator's side of label workers: it offers the questions of the labelers, and collects and checks the answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use preceptor_actors::transport::{Lease, QueueLimits, TransportError};

use super::coordinator::Coordinator;
use super::protocol::{LabelDone, LabelWork, MAX_MESSAGE, decode, encode};
use super::roster::LABEL;
use crate::observe::telemetry;
use crate::pipeline::label::workers::questions::LabelAnswer;
use crate::pipeline::label::workers::{ATTEMPTS, Asked, JudgePool};
use crate::status;

/// Time between two looks for questions to offer.
const LOOK: Duration = Duration::from_millis(5);
/// Longest wait for an answer before the thread looks for its end.
const PULL: Duration = Duration::from_millis(500);
/// Number of answers that are taken at once.
const MOST: usize = 16;

impl Coordinator {
    /// Creates the queues of questions and answers, and begins to offer the questions in `pool` and to collect their answers.
    ///
    /// # Errors
    /// If the transport is not available.
    pub fn open_judges(self: &Arc<Self>, pool: &Arc<JudgePool>) -> Result<()> {
        self.create_label_queues()?;
        let (offering, collecting) = (Arc::clone(self), Arc::clone(self));
        let (asked, answered) = (Arc::clone(pool), Arc::clone(pool));
        let offer = move || {
            while !offering.is_stopped() {
                match asked.unoffered() {
                    Some((id, question)) => offering.offer_question(&asked, id, question),
                    None => std::thread::sleep(LOOK),
                }
                asked.explain(offering.reason_without_labels());
            }
            asked.close();
        };
        let collect = move || collecting.collect_answers(&answered);
        self.spawn("questions", offer)?;
        self.spawn("answers", collect)
    }

    fn create_label_queues(&self) -> Result<(), TransportError> {
        let limits = QueueLimits { lease: self.plan.lease, messages: 100_000, bytes: MAX_MESSAGE };
        self.transport.create(&self.names.questions, limits)?;
        self.transport.create(&self.names.answers, limits)
    }

    fn offer_question(&self, pool: &JudgePool, id: u64, asked: Asked) {
        let name = format!("{:016x}-q{id}-{}", self.plan.lineage, asked.attempts);
        let work = LabelWork { lineage: self.plan.lineage, id, judge: asked.judge, question: asked.question };
        let offered = match encode(&work) {
            Ok(body) => self.transport.offer(&self.names.questions, &name, &body),
            Err(error) => Err(TransportError::Refused(format!("{error:#}"))),
        };
        match offered {
            Ok(_) => self.recovered(),
            Err(error @ (TransportError::TooLarge { .. } | TransportError::Refused(_))) => {
                pool.with(id, |asked| asked.answer(Err(format!("the question cannot be sent to workers: {error}"))));
            }
            Err(error) => {
                self.failed(&error.to_string());
                // The same offer is made again, since it may have succeeded.
                pool.with(id, |asked| asked.offered = false);
                std::thread::sleep(PULL);
            }
        }
    }

    fn collect_answers(&self, pool: &JudgePool) {
        let mut looked = Instant::now();
        while !self.is_stopped() {
            match self.transport.pull(&self.names.answers, MOST, PULL) {
                Ok(leases) => leases.into_iter().for_each(|lease| self.take_answer(pool, lease)),
                Err(error) => {
                    self.failed(&error.to_string());
                    std::thread::sleep(PULL);
                    // A broker that lost its data has no queues.
                    if let TransportError::Unknown(_) = error
                        && !self.is_replaced()
                        && self.create_label_queues().is_ok()
                    {
                        pool.offer_again();
                    }
                }
            }
            if looked.elapsed() >= self.plan.lease {
                looked = Instant::now();
                let depth = |queue: &str| self.transport.depth(queue).map(|depth| depth.waiting + depth.leased);
                let empty = depth(&self.names.questions) == Ok(0) && depth(&self.names.answers) == Ok(0);
                if empty && pool.has_offered() {
                    let again = pool.offer_again();
                    tracing::warn!("the broker has lost {again} questions; they are offered again");
                }
            }
        }
    }

    fn take_answer(&self, pool: &JudgePool, lease: Box<dyn Lease>) {
        let refused = match decode::<LabelDone>(lease.body()) {
            Err(error) => Some(("unknown".to_owned(), format!("{error:#}"))),
            Ok(done) if self.roster.is_shut_out(&done.worker) => Some((done.worker, "it was shut out".to_owned())),
            Ok(done) if done.lineage != self.plan.lineage => {
                Some((done.worker, format!("the answer to question {} is of another lineage", done.id)))
            }
            Ok(LabelDone { id, worker, answer, .. }) => {
                let taken = pool.with(id, |asked| {
                    if let Err(error) = asked.question.check(&answer) {
                        asked.offer_again();
                        return Err(format!("the answer to question {id}: {error:#}"));
                    }
                    match answer {
                        LabelAnswer::Failed(why) => {
                            asked.failures += 1;
                            status!("workers   {worker} could not answer a question: {why}");
                            if asked.failures < ATTEMPTS {
                                asked.offer_again();
                            } else {
                                asked.answer(Err(format!(
                                    "{ATTEMPTS} workers could not answer, the last because {why}"
                                )));
                            }
                        }
                        answer => asked.answer(Ok(answer)),
                    }
                    Ok(())
                });
                telemetry::worker_result(match &taken {
                    Some(Ok(())) => "taken",
                    Some(Err(_)) => "refused",
                    None => "repeated",
                });
                if let Some(Ok(())) = taken {
                    self.roster.taken(&worker);
                }
                taken.and_then(Result::err).map(|why| (worker, why))
            }
        };
        if let Some((worker, why)) = refused {
            self.refused(&worker, &why);
        }
        self.acknowledge(lease);
    }

    /// Returns why no labels come; empty if they come.
    fn reason_without_labels(&self) -> String {
        self.outage().or_else(|| self.roster.reason_of_wait(LABEL)).unwrap_or_else(|| {
            format!(
                "waits for workers that label; start one with: preceptor worker --join ADDRESS --run {} --role label",
                self.plan.run
            )
        })
    }
}

//! Replicas of the learner: threads that compute the gradients of different groups at the same time.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use crossbeam::channel::{Receiver, Sender, bounded};
use kernels::Gradients;

use crate::util::mutex::lock;

/// Sums of the gradients of a batch, or of one replica's part of it: of the policy, then of the parts of the value
/// baseline.
pub type Sums = Vec<Gradients>;

/// Work of a replica: it may add gradients to the replica's sums.
pub type Job<T> = Box<dyn FnOnce(&mut Sums) -> Result<T> + Send>;

/// Number of replicas, and threads of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Number of replicas R, at least one.
    pub replicas: usize,
    /// Number of threads of each replica.
    pub threads: usize,
}

impl Layout {
    /// One replica, which works on the thread of its caller.
    pub const SINGLE: Self = Self { replicas: 1, threads: 1 };
}

/// Replicas that work on jobs with results of type `T`. Jobs of one replica are done in the order in which they are submitted.
/// A single replica works on the calling thread.
pub struct Replicas<T> {
    sums: Vec<Arc<Mutex<Sums>>>,
    threads: Vec<Replica<T>>,
    /// Replica of each submitted job whose result was not taken, in order.
    submitted: VecDeque<usize>,
    /// Results of a single replica.
    done: VecDeque<Result<T>>,
}

struct Replica<T> {
    /// `None` only while the value is dropped.
    jobs: Option<Sender<Job<T>>>,
    results: Receiver<std::thread::Result<Result<T>>>,
    thread: Option<JoinHandle<()>>,
    /// Number of submitted jobs whose result was not taken.
    open: usize,
}

impl<T: Send + 'static> Replicas<T> {
    /// Starts one replica for each of `sums`, with `threads` threads each. At most `most` jobs may be submitted whose results
    /// were not taken; one more waits.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(sums: Vec<Arc<Mutex<Sums>>>, threads: usize, most: usize) -> Result<Self> {
        let each = most.div_ceil(sums.len().max(1));
        let start = |(rank, sums): (usize, &Arc<Mutex<Sums>>)| Replica::start(rank, Arc::clone(sums), threads, each);
        let threads =
            if sums.len() > 1 { sums.iter().enumerate().map(start).collect::<Result<_>>()? } else { Vec::new() };
        Ok(Self { sums, threads, submitted: VecDeque::new(), done: VecDeque::new() })
    }

    /// Returns the number of replicas.
    pub fn count(&self) -> usize {
        self.sums.len()
    }

    /// Gives `job` to the replica `rank`.
    pub fn submit(&mut self, rank: usize, job: Job<T>) {
        self.submitted.push_back(rank);
        match self.threads.get_mut(rank) {
            None => self.done.push_back(job(&mut lock(&self.sums[rank]))),
            Some(replica) => {
                replica.open += 1;
                // If the thread has ended, `take` says so.
                if let Some(jobs) = &replica.jobs {
                    let _ = jobs.send(job);
                }
            }
        }
    }

    /// Waits for the result of the job that was submitted first among those whose results were not taken. `None` if there is
    /// none.
    pub fn take(&mut self) -> Option<Result<T>> {
        let rank = self.submitted.pop_front()?;
        let Some(replica) = self.threads.get_mut(rank) else { return self.done.pop_front() };
        replica.open -= 1;
        Some(match replica.results.recv() {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => Err(anyhow!("internal error: the thread of learner replica {rank} has ended")),
        })
    }

    /// Returns whether the replica `rank` has a job whose result was not taken.
    pub fn is_busy(&self, rank: usize) -> bool {
        self.threads.get(rank).map_or(!self.done.is_empty(), |replica| replica.open > 0)
    }

    /// Waits for all jobs and drops their results.
    pub fn drain(&mut self) {
        while let Some(result) = self.take() {
            drop(result);
        }
    }
}

impl<T: Send + 'static> Replica<T> {
    fn start(rank: usize, sums: Arc<Mutex<Sums>>, threads: usize, most: usize) -> Result<Self> {
        let (jobs, inbox) = bounded::<Job<T>>(most);
        let (outbox, results) = bounded(most);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(move |i| format!("learn-{rank}.{i}"))
            .build()
            .context("cannot start the threads of a learner replica")?;
        let work = move || {
            for job in inbox {
                let run = || pool.install(|| job(&mut lock(&sums)));
                if outbox.send(catch_unwind(AssertUnwindSafe(run))).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("learn-{rank}")).spawn(work)?;
        Ok(Self { jobs: Some(jobs), results, thread: Some(thread), open: 0 })
    }
}

impl<T> Drop for Replica<T> {
    fn drop(&mut self) {
        self.jobs = None;
        // A panic of a job was caught.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::learn::collective::{Collective, SharedWeights};
    use candle_core::{DType, Device, Var};

    fn sums(count: usize) -> (Var, Vec<Arc<Mutex<Sums>>>) {
        let var = Var::ones(3, DType::F32, &Device::Cpu).unwrap();
        let params = [("w".to_owned(), var.clone())];
        (var, (0..count).map(|_| Arc::new(Mutex::new(vec![Gradients::new(&params)]))).collect())
    }

    #[test]
    fn results_come_in_the_order_of_submission_and_sums_are_added() {
        for count in [1, 2, 3] {
            let (var, sums) = sums(count);
            let mut replicas = Replicas::start(sums.clone(), 1, 7).unwrap();
            for job in 0..7 {
                let var = var.clone();
                let work = move |sums: &mut Sums| {
                    std::thread::sleep(std::time::Duration::from_millis(7 - job));
                    kernels::backward(&(var.sum_all()? * job as f64)?, &mut [&mut sums[0]])?;
                    Ok(job)
                };
                replicas.submit(job as usize % count, Box::new(work));
            }
            let results: Vec<u64> = std::iter::from_fn(|| replicas.take()).map(Result::unwrap).collect();
            assert_eq!(results, (0..7).collect::<Vec<u64>>());
            SharedWeights.reduce(&sums).unwrap();
            assert_eq!(lock(&sums[0])[0].get("w").unwrap().to_vec1::<f32>().unwrap(), [21.0; 3]);
        }
    }

    #[test]
    fn an_error_of_a_job_is_its_result_and_a_panic_is_continued() {
        let mut replicas: Replicas<()> = Replicas::start(sums(2).1, 1, 2).unwrap();
        replicas.submit(0, Box::new(|_| Err(anyhow!("out of memory"))));
        replicas.submit(1, Box::new(|_| panic!("a fault of the test")));
        assert_eq!(replicas.take().unwrap().unwrap_err().to_string(), "out of memory");
        let panic = catch_unwind(AssertUnwindSafe(|| replicas.take())).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"a fault of the test"));
        assert!(replicas.take().is_none());
    }
}

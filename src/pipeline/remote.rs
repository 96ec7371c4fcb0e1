//! A judge behind a server that speaks OpenAI's protocol: completions and chat, log-probabilities or votes.
//!
//! Pure parts with tests of their own decide ([`abilities`], [`answer`], [`breaker`], [`evidence`], [`limit`], [`retry`],
//! [`wire`]); [`question`] turns questions into exchanges, [`client`] waits and repeats, [`pace`] keeps the rate limits, which
//! the processes of a machine share ([`shared`]), [`transport`] sends, on a thread that computes nothing.

pub mod abilities;
pub mod answer;
pub mod breaker;
pub mod budget;
pub mod client;
pub mod evidence;
pub mod identity;
pub mod key;
pub mod lenient;
pub mod limit;
pub mod outage;
pub mod pace;
pub mod question;
pub mod reading;
pub mod retry;
pub mod shared;
pub mod stats;
pub mod tokens;
pub mod transport;
pub mod wire;

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::config::RemoteJudge;
use crate::pipeline::label::backend::{Alive, Ask, Backend, Decoding, NoAnswer, Reply, Usage};
use crate::pipeline::label::shape::Shape;
use crate::util::limit::AdjustableLimit;
use crate::util::seed;
use budget::Budget;
use client::Client;
use stats::RemoteStats;
use wire::Request;

/// Asks a server. Shared by all labeler actors; its limits hold for all of them together.
pub struct Remote {
    client: Arc<Client>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Remote {
    /// A client for `judge` without a bound on what it may spend. Nothing is sent yet.
    ///
    /// # Errors
    /// A secret that is not in the environment; an address, header or certificate that cannot be used.
    pub fn new(judge: RemoteJudge) -> Result<Self> {
        Self::within(judge, None)
    }

    /// A client for `judge` that spends no more than `budget` allows. Nothing is sent yet.
    ///
    /// # Errors
    /// As [`Remote::new`].
    pub fn within(judge: RemoteJudge, budget: Option<Arc<Budget>>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("preceptor-remote")
            .enable_all()
            .build()
            .context("cannot start the thread for remote judges")?;
        Ok(Self { client: Arc::new(Client::new(judge, budget)?), runtime: Some(runtime) })
    }

    /// Asks the judge two simple questions, one for log-probabilities and one for sampled answers, so that a run does not
    /// begin on a judge that refuses or cannot be reached, and so that it is known how the judge has to be asked. Returns a
    /// warning where it does not answer as it was asked.
    ///
    /// # Errors
    /// The judge refuses, or does not answer within half a minute; see [`Unusable`].
    pub fn probe(&self) -> Result<Option<String>, Unusable> {
        let Some(runtime) = &self.runtime else { return Ok(None) };
        runtime.block_on(self.client.find_abilities())
    }

    /// What was sent and what came back, so far.
    pub fn stats(&self) -> &RemoteStats {
        &self.client.stats
    }

    /// Runs `work` for each of `count` questions side by side, and waits for all.
    fn each<T: Send + 'static, F>(&self, count: usize, work: impl Fn(usize) -> F) -> Vec<(Reply<T>, Usage)>
    where
        F: Future<Output = (Reply<T>, Usage)> + Send + 'static,
    {
        let Some(runtime) = &self.runtime else { return Vec::new() };
        let tasks: Vec<_> = (0..count).map(|i| runtime.spawn(work(i))).collect();
        runtime.block_on(async {
            let mut replies = Vec::with_capacity(count);
            for task in tasks {
                // Each task ends within the client's deadline.
                replies.push(task.await.unwrap_or_else(|error| {
                    (Err(NoAnswer::Failure(format!("the request broke off: {error}"))), Usage::default())
                }));
            }
            replies
        })
    }
}

/// A judge that cannot be used: what came of the question that it was asked before the run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the judge cannot be used: {words}")]
pub struct Unusable {
    /// The address asked, the status, and the server's own sentence.
    pub words: String,
    /// Whether the judge refuses, so that a person has to change something; otherwise it may recover by itself.
    pub refuses: bool,
}

impl Drop for Remote {
    fn drop(&mut self) {
        // What is still in flight is nobody's any more.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Backend for Remote {
    fn identity(&self) -> u64 {
        identity::identity(&self.client.judge)
    }

    fn shape(&self) -> Shape {
        identity::shape(&self.client.judge)
    }

    fn attend(&self, name: &str, alive: &Alive) {
        self.client.attend(name, alive);
    }

    fn waits(&self) -> bool {
        true
    }

    fn reported_model(&self) -> Option<String> {
        self.client.reported_model()
    }

    fn evidence(&self) -> Option<String> {
        self.client.evidence()
    }

    fn knob(&self) -> Option<Arc<AdjustableLimit>> {
        Some(Arc::clone(&self.client.knob))
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        let ask = |asks: &[Ask], usage: &mut Usage| -> Vec<Reply<(Vec<f64>, bool)>> {
            let replies = self.each(asks.len(), |i| {
                let (client, ask) = (Arc::clone(&self.client), asks[i].clone());
                async move {
                    let mut usage = Usage::default();
                    let reply = question::weigh(&client, &ask, &mut usage).await;
                    (reply, usage)
                }
            });
            let reply = |(reply, taken)| {
                *usage += taken;
                reply
            };
            replies.into_iter().map(reply).collect()
        };
        let mut replies = ask(asks, usage);
        // The questions of a label are asked together. Where the server refused log-probabilities in between, all of them are
        // answered by votes, so that no label mixes two kinds of evidence.
        let voted = |reply: &Reply<(Vec<f64>, bool)>| reply.as_ref().is_ok_and(|(_, votes)| *votes);
        let listed = |reply: &Reply<(Vec<f64>, bool)>| reply.as_ref().is_ok_and(|(_, votes)| !*votes);
        if replies.iter().any(voted) && replies.iter().any(listed) {
            let again: Vec<usize> = (0..asks.len()).filter(|i| listed(&replies[*i])).collect();
            let questions: Vec<Ask> = again.iter().map(|i| asks[*i].clone()).collect();
            for (i, reply) in again.into_iter().zip(ask(&questions, usage)) {
                replies[i] = reply;
            }
        }
        replies.into_iter().map(|reply| reply.map(|(weights, _)| weights)).collect()
    }

    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>> {
        let replies = self.each(prompts.len(), |i| {
            let before = prompts[..i].iter().filter(|other| **other == prompts[i]).count() as u64;
            let request = Request {
                prompt: prompts[i].clone(),
                begun: None,
                max_tokens: decoding.max_tokens,
                temperature: decoding.temperature,
                top_k: decoding.top_k,
                top_logprobs: 0,
                // Servers take the seed as a signed number.
                seed: Some((seed::mix(decoding.seed ^ seed::text(&prompts[i]) ^ seed::mix(before))) >> 33),
            };
            let client = Arc::clone(&self.client);
            async move {
                let mut usage = Usage::default();
                let reply =
                    client.ask(&request, &mut usage).await.and_then(|answer| question::written(&client, answer));
                (reply, usage)
            }
        });
        replies
            .into_iter()
            .map(|(reply, taken)| {
                *usage += taken;
                reply
            })
            .collect()
    }
}

//! Judges behind servers with OpenAI's API: completions and chat, log-probabilities or votes.
//!
//! Decisions are made by pure, separately tested modules ([`abilities`], [`answer`], [`breaker`], [`evidence`],
//! [`limit`], [`retry`], [`wire`]). [`question`] turns questions into exchanges, [`client`] waits and retries, [`pace`]
//! keeps the rate limits, which the processes of a machine share ([`shared`]), and [`transport`] sends requests on a
//! thread that does no other work.

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

/// Backend for a judge behind a server. All labeler actors share it, and its limits apply to all of them together.
pub struct Remote {
    client: Arc<Client>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Remote {
    /// Creates a client for `judge` without a spending limit. Nothing is sent yet.
    ///
    /// # Errors
    /// If a secret is missing from the environment, or an address, header or certificate is invalid.
    pub fn new(judge: RemoteJudge) -> Result<Self> {
        Self::within(judge, None)
    }

    /// Creates a client for `judge` that spends no more than `budget` allows. Nothing is sent yet.
    ///
    /// # Errors
    /// The same as for [`Remote::new`].
    pub fn within(judge: RemoteJudge, budget: Option<Arc<Budget>>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("preceptor-remote")
            .enable_all()
            .build()
            .context("cannot start the thread for remote judges")?;
        Ok(Self { client: Arc::new(Client::new(judge, budget)?), runtime: Some(runtime) })
    }

    /// Asks the judge two simple questions, one for log-probabilities and one for sampled answers. This detects a judge
    /// that refuses or is unreachable before a run starts, and finds out which request fields it accepts. Returns a
    /// warning if the judge does not answer in the requested form.
    ///
    /// # Errors
    /// If the judge refuses, or does not answer within half a minute; see [`Unusable`].
    pub fn probe(&self) -> Result<Option<String>, Unusable> {
        let Some(runtime) = &self.runtime else { return Ok(None) };
        runtime.block_on(self.client.find_abilities())
    }

    /// Returns the counts of exchanges so far.
    pub fn stats(&self) -> &RemoteStats {
        &self.client.stats
    }

    /// Runs `work` concurrently for each of `count` questions, and waits for all results.
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
                    (Err(NoAnswer::Failure(format!("the request was interrupted: {error}"))), Usage::default())
                }));
            }
            replies
        })
    }
}

/// Result of a failed probe: the judge cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the judge cannot be used: {words}")]
pub struct Unusable {
    /// Address asked, status, and the server's error message.
    pub words: String,
    /// True if the judge refuses, so that a person has to act; otherwise it may recover by itself.
    pub refuses: bool,
}

impl Drop for Remote {
    fn drop(&mut self) {
        // No actor waits for the remaining exchanges.
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

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.client.register_liveness(name, alive);
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

    fn concurrency_limit(&self) -> Option<Arc<AdjustableLimit>> {
        Some(Arc::clone(&self.client.concurrency_limit))
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
            let reply = |(reply, used)| {
                *usage += used;
                reply
            };
            replies.into_iter().map(reply).collect()
        };
        let mut replies = ask(asks, usage);
        // The questions of a label are asked together. If the server starts to refuse log-probabilities between them,
        // all are answered by votes, so that no label mixes two kinds of evidence.
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
                // Servers read the seed as a signed number.
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
            .map(|(reply, used)| {
                *usage += used;
                reply
            })
            .collect()
    }
}

//! Transport and notices over NATS JetStream.
//!
//! Each queue is a stream with work-queue retention and one durable pull consumer, whose `ack_wait` is the lease; notices are
//! a stream that keeps the last message of each subject. A stream refuses new messages when it is full, so that nothing is
//! dropped in silence.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{AckKind, Context, Message};
use async_nats::{ConnectError, ConnectErrorKind, ConnectOptions, Event, HeaderMap, Subscriber};
use futures_util::{FutureExt, StreamExt};
use preceptor_actors::transport::{Depth, Lease, Offered, QueueLimits, Transport, TransportError};
use tokio::runtime::Runtime;

use super::notices::Notices;
use crate::status;
use crate::util::mutex::lock;

/// Longest wait for an answer of the broker.
const ANSWER: Duration = Duration::from_secs(10);
/// Longest wait for an answer to a pull, in addition to the time to wait for messages.
const PULL: Duration = Duration::from_secs(3);
/// Time for which the broker remembers the identifiers of messages.
const REMEMBERED: Duration = Duration::from_secs(120);
/// Name of the consumer that all workers of a queue share.
const CONSUMER: &str = "workers";
/// Number of different refusals of the server that are told.
const MOST_REFUSALS: usize = 20;
/// Error code of JetStream: there is no such stream.
const NO_STREAM: u64 = 10059;

/// Connection to NATS: the address, and what proves who connects.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NatsPlan {
    /// Address, such as `nats://broker:4222`; several are separated by commas.
    pub url: String,
    /// Certificate of the authority that signed the broker's, in PEM format.
    pub ca: Option<PathBuf>,
    /// Own certificate and its key, in PEM format.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Name that the broker shows for this connection.
    pub name: String,
}

/// Error of a connection to a NATS server that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{words}")]
pub struct NoConnection {
    words: String,
    /// True if the server refuses this process, so that a person has to act.
    pub refuses: bool,
}

/// Connection to a NATS server with JetStream. A clone shares it.
#[derive(Clone)]
pub struct Nats(Arc<Inner>);

struct Inner {
    /// `None` only while the value is dropped.
    runtime: Option<Runtime>,
    context: Context,
    /// False while the connection is lost.
    link: Arc<AtomicBool>,
    queues: Mutex<HashMap<String, Queue>>,
    /// Subscriptions to what others tell, by prefix.
    heard: Mutex<HashMap<String, Subscriber>>,
}

#[derive(Clone)]
struct Queue {
    consumer: PullConsumer,
    limits: QueueLimits,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Dropping a runtime waits for its blocking tasks, which is not allowed within another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Nats {
    /// Connects, and checks that JetStream is enabled.
    ///
    /// # Errors
    /// If the broker cannot be reached, refuses the connection, or has no JetStream; the error says how to proceed.
    pub fn connect(plan: &NatsPlan) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("nats")
            .enable_all()
            .build()
            .context("cannot start the thread of the connection to NATS")?;
        let mut options =
            ConnectOptions::new().name(&plan.name).connection_timeout(ANSWER).request_timeout(Some(ANSWER));
        // Without this, a request that the account does not allow only runs into its time limit.
        let told = Arc::new(Mutex::new(HashSet::new()));
        let link = Arc::new(AtomicBool::new(true));
        let linked = Arc::clone(&link);
        options = options.event_callback(move |event| {
            match event {
                Event::Connected => linked.store(true, Ordering::SeqCst),
                Event::Disconnected => linked.store(false, Ordering::SeqCst),
                _ => {}
            }
            if let Event::ServerError(error) = &event {
                let (words, mut told) = (error.to_string(), lock(&told));
                if told.len() < MOST_REFUSALS && told.insert(words.clone()) {
                    status!(
                        "nats      the server refuses: {words}; see deploy/account.sh for what an account must allow"
                    );
                }
            }
            std::future::ready(())
        });
        if let Some(ca) = &plan.ca {
            options = options.add_root_certificates(ca.clone()).require_tls(true);
        }
        if let Some((certificate, key)) = &plan.certificate {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        let servers: Vec<&str> = plan.url.split(',').map(str::trim).collect();
        let client = runtime.block_on(options.connect(servers)).map_err(|error| refusal(&error, &plan.url))?;
        // The context starts a task.
        let guard = runtime.enter();
        let mut context = async_nats::jetstream::new(client);
        drop(guard);
        context.set_timeout(ANSWER);
        // The library's own query does not understand the answer of NATS 2.9.
        let asked = runtime.block_on(context.client().request("$JS.API.INFO", Vec::new().into()));
        let account: serde_json::Value = asked
            .map_err(anyhow::Error::from)
            .and_then(|answer| Ok(serde_json::from_slice(&answer.payload)?))
            .with_context(|| format!("NATS at {} does not offer JetStream; start it with -js", plan.url))?;
        ensure!(
            account["error"].is_null(),
            "NATS at {} does not offer JetStream to this account: {}; enable it in the broker's configuration",
            plan.url,
            account["error"]["description"]
        );
        let inner = Inner { runtime: Some(runtime), context, link, queues: Mutex::default(), heard: Mutex::default() };
        Ok(Self(Arc::new(inner)))
    }

    /// Connects like [`Nats::connect`], and tries again for as long as `patience` while the broker cannot be reached and
    /// `stop` is not set.
    ///
    /// # Errors
    /// See [`Nats::connect`].
    pub fn connect_within(plan: &NatsPlan, patience: Duration, stop: &AtomicBool) -> Result<Self> {
        let began = Instant::now();
        let mut told = false;
        loop {
            let error = match Self::connect(plan) {
                Ok(nats) => return Ok(nats),
                Err(error) => error,
            };
            let waits = error.downcast_ref::<NoConnection>().is_some_and(|error| !error.refuses);
            if !waits || began.elapsed() >= patience || stop.load(Ordering::SeqCst) {
                return Err(error);
            }
            if !told {
                status!("waiting   {error:#}; it is tried again for {} s", patience.as_secs());
                told = true;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Returns a flag that is false while the connection to the broker is lost.
    pub fn link(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0.link)
    }

    /// Waits for `work` on the thread of the connection.
    fn wait<T: Send>(&self, work: impl Future<Output = Result<T, TransportError>> + Send) -> Result<T, TransportError> {
        self.wait_up_to(2 * ANSWER, work)
    }

    fn wait_up_to<T: Send>(
        &self,
        most: Duration,
        work: impl Future<Output = Result<T, TransportError>> + Send,
    ) -> Result<T, TransportError> {
        let Some(runtime) = &self.0.runtime else {
            return Err(TransportError::Unavailable("the connection is closed".into()));
        };
        let wait = || {
            runtime.block_on(async {
                tokio::time::timeout(most, work)
                    .await
                    .unwrap_or_else(|_| Err(TransportError::Unavailable("NATS does not answer".into())))
            })
        };
        if tokio::runtime::Handle::try_current().is_err() {
            return wait();
        }
        // A thread of another runtime must not wait for this one.
        let waited = std::thread::scope(|scope| scope.spawn(wait).join());
        waited.unwrap_or_else(|_| Err(TransportError::Unavailable("the connection panicked".into())))
    }

    fn queue(&self, queue: &str) -> Result<Queue, TransportError> {
        if let Some(known) = lock(&self.0.queues).get(queue) {
            return Ok(known.clone());
        }
        let found = self.wait(async {
            let stream = self.0.context.get_stream(stream_name(queue)).await.map_err(|error| match error.kind() {
                async_nats::jetstream::context::GetStreamErrorKind::JetStream(inner)
                    if inner.error_code().0 == NO_STREAM =>
                {
                    TransportError::Unknown(queue.to_owned())
                }
                _ => unavailable(&error),
            })?;
            let consumer: PullConsumer =
                stream.get_consumer(CONSUMER).await.map_err(|error| TransportError::Unavailable(error.to_string()))?;
            let config = &stream.cached_info().config;
            let limits = QueueLimits {
                lease: consumer.cached_info().config.ack_wait,
                messages: usize::try_from(config.max_messages).unwrap_or(usize::MAX),
                bytes: usize::try_from(config.max_message_size).unwrap_or(usize::MAX),
            };
            Ok(Queue { consumer, limits })
        })?;
        lock(&self.0.queues).insert(queue.to_owned(), found.clone());
        Ok(found)
    }
}

/// Returns the error of a connection to `url` that failed. Only a server that refuses it does so for good.
fn refusal(error: &ConnectError, url: &str) -> NoConnection {
    let (refuses, remedy) = match error.kind() {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            (true, "it accepts only certificates or accounts that it knows; give one with tls_certificate and tls_key")
        }
        ConnectErrorKind::Tls => (true, "correct tls_ca, or the certificate of this process and its key"),
        ConnectErrorKind::ServerParse => (true, "correct the address"),
        _ => (false, "start it with JetStream (nats-server -js), or correct the address"),
    };
    let words = format!("cannot connect to NATS at {url}: {}; {remedy}", causes(error));
    NoConnection { words, refuses }
}

/// Returns the name of the stream of a queue. It may not contain dots.
fn stream_name(queue: &str) -> String {
    format!("PRECEPTOR_{}", queue.replace('.', "_"))
}

fn subject(queue: &str) -> String {
    format!("preceptor.queue.{queue}")
}

fn unavailable(error: &dyn std::error::Error) -> TransportError {
    TransportError::Unavailable(format!("NATS: {}", causes(error)))
}

/// Returns the message of an error with its causes.
fn causes(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        words += &format!(": {cause}");
        source = cause.source();
    }
    words
}

impl Transport for Nats {
    fn create(&self, queue: &str, limits: QueueLimits) -> Result<(), TransportError> {
        let config = Config {
            name: stream_name(queue),
            subjects: vec![subject(queue)],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_messages: i64::try_from(limits.messages).unwrap_or(i64::MAX),
            max_message_size: i32::try_from(limits.bytes).unwrap_or(i32::MAX),
            duplicate_window: REMEMBERED,
            ..Config::default()
        };
        let consumer = pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: limits.lease,
            max_deliver: -1,
            max_ack_pending: -1,
            ..pull::Config::default()
        };
        let consumer = self.wait(async {
            self.0.context.create_or_update_stream(config).await.map_err(|error| unavailable(&error))?;
            let stream = stream_name(queue);
            let consumer = self.0.context.create_consumer_on_stream(consumer, stream).await;
            consumer.map_err(|error| unavailable(&error))
        })?;
        lock(&self.0.queues).insert(queue.to_owned(), Queue { consumer, limits });
        Ok(())
    }

    fn offer(&self, queue: &str, id: &str, body: &[u8]) -> Result<Offered, TransportError> {
        let limits = self.queue(queue)?.limits;
        if body.len() > limits.bytes {
            return Err(TransportError::TooLarge { queue: queue.to_owned(), bytes: body.len(), limit: limits.bytes });
        }
        let mut headers = HeaderMap::new();
        headers.insert(async_nats::header::NATS_MESSAGE_ID, id);
        let body = body.to_vec().into();
        self.wait(async {
            let sent = self.0.context.publish_with_headers(subject(queue), headers, body).await;
            let sent = sent.map_err(|error| unavailable(&error))?.await;
            let refused = |error: async_nats::jetstream::context::PublishError| {
                let error = unavailable(&error);
                if error.to_string().contains("maximum messages exceeded") {
                    TransportError::Full { queue: queue.to_owned(), limit: limits.messages }
                } else {
                    error
                }
            };
            let answer = sent.map_err(refused)?;
            Ok(if answer.duplicate { Offered::Duplicate } else { Offered::Accepted })
        })
    }

    fn pull(&self, queue: &str, most: usize, wait: Duration) -> Result<Vec<Box<dyn Lease>>, TransportError> {
        let consumer = self.queue(queue)?.consumer;
        // The consumer of a queue that was removed answers nothing.
        let pulled = self.wait_up_to(wait + PULL, async {
            let mut messages = Vec::new();
            let began = std::time::Instant::now();
            loop {
                // What waits is taken at once; only the first message is waited for.
                let batch = consumer.fetch().max_messages(most).messages().await;
                let mut batch = batch.map_err(|error| unavailable(&error))?;
                while let Some(message) = batch.next().await {
                    messages.push(message.map_err(|error| TransportError::Unavailable(format!("NATS: {error}")))?);
                }
                let left = wait.saturating_sub(began.elapsed());
                if !messages.is_empty() || left.is_zero() {
                    return Ok(messages);
                }
                let mut first = consumer
                    .batch()
                    .max_messages(1)
                    .expires(left.min(ANSWER))
                    .messages()
                    .await
                    .map_err(|error| unavailable(&error))?;
                if let Some(message) = first.next().await {
                    messages.push(message.map_err(|error| TransportError::Unavailable(format!("NATS: {error}")))?);
                    return Ok(messages);
                }
            }
        });
        let messages = pulled.inspect_err(|_| {
            // It is looked up again, and may be gone.
            lock(&self.0.queues).remove(queue);
        })?;
        let lease = |message: Message| -> Box<dyn Lease> {
            let id = message.headers.as_ref().and_then(|all| all.get(async_nats::header::NATS_MESSAGE_ID));
            let id = id.map(|id| id.as_str().to_owned()).unwrap_or_default();
            let deliveries = message.info().map_or(1, |info| u64::try_from(info.delivered).unwrap_or(1));
            Box::new(NatsLease { nats: self.clone(), message, id, deliveries })
        };
        Ok(messages.into_iter().map(lease).collect())
    }

    fn depth(&self, queue: &str) -> Result<Depth, TransportError> {
        let mut consumer = self.queue(queue)?.consumer;
        self.wait(async {
            let info = consumer.info().await.map_err(|error| unavailable(&error))?;
            Ok(Depth { waiting: usize::try_from(info.num_pending).unwrap_or(usize::MAX), leased: info.num_ack_pending })
        })
    }

    fn remove(&self, queue: &str) -> Result<(), TransportError> {
        lock(&self.0.queues).remove(queue);
        self.wait(async {
            match self.0.context.delete_stream(stream_name(queue)).await {
                Ok(_) => Ok(()),
                Err(error) if unavailable(&error).to_string().contains("stream not found") => Ok(()),
                Err(error) => Err(unavailable(&error)),
            }
        })
    }
}

struct NatsLease {
    nats: Nats,
    message: Message,
    id: String,
    deliveries: u64,
}

impl NatsLease {
    fn answer(&self, kind: AckKind, confirmed: bool) -> Result<(), TransportError> {
        self.nats.wait(async {
            let sent = match confirmed {
                true => self.message.double_ack_with(kind).await,
                false => self.message.ack_with(kind).await,
            };
            sent.map_err(|error| TransportError::Unavailable(format!("NATS: {error}")))
        })
    }
}

impl Lease for NatsLease {
    fn id(&self) -> &str {
        &self.id
    }

    fn body(&self) -> &[u8] {
        &self.message.payload
    }

    fn deliveries(&self) -> u64 {
        self.deliveries
    }

    fn extend(&self) -> Result<(), TransportError> {
        self.answer(AckKind::Progress, false)
    }

    fn acknowledge(self: Box<Self>) -> Result<(), TransportError> {
        self.answer(AckKind::Ack, true)
    }

    fn give_back(self: Box<Self>) -> Result<(), TransportError> {
        self.answer(AckKind::Nak(None), true)
    }
}

/// Returns the name of the stream that keeps the notices of `board`.
fn board_name(board: &str) -> String {
    format!("PRECEPTOR_NOTICES_{}", board.replace('.', "_"))
}

impl Notices for Nats {
    fn open(&self, board: &str) -> Result<(), TransportError> {
        let config = Config {
            name: board_name(board),
            subjects: vec![format!("preceptor.notice.{board}.>")],
            max_messages_per_subject: 1,
            ..Config::default()
        };
        self.wait(async {
            self.0.context.create_or_update_stream(config).await.map_err(|error| unavailable(&error))?;
            Ok(())
        })
    }

    fn set(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError> {
        let (subject, value) = (format!("preceptor.notice.{board}.{key}"), value.to_vec().into());
        self.wait(async {
            let sent = self.0.context.publish(subject, value).await.map_err(|error| unavailable(&error))?;
            sent.await.map_err(|error| unavailable(&error))?;
            Ok(())
        })
    }

    fn get(&self, board: &str, key: &str) -> Result<Option<Vec<u8>>, TransportError> {
        let subject = format!("preceptor.notice.{board}.{key}");
        self.wait(async {
            let stream = match self.0.context.get_stream(board_name(board)).await {
                Ok(stream) => stream,
                Err(error) if unavailable(&error).to_string().contains("stream not found") => return Ok(None),
                Err(error) => return Err(unavailable(&error)),
            };
            match stream.get_last_raw_message_by_subject(&subject).await {
                Ok(message) => Ok(Some(message.payload.to_vec())),
                Err(error)
                    if error.kind() == async_nats::jetstream::stream::LastRawMessageErrorKind::NoMessageFound =>
                {
                    Ok(None)
                }
                Err(error) => Err(unavailable(&error)),
            }
        })
    }

    fn tell(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError> {
        let (subject, value) = (format!("preceptor.told.{board}.{key}"), value.to_vec().into());
        let client = self.0.context.client();
        self.wait(async { client.publish(subject, value).await.map_err(|error| unavailable(&error)) })
    }

    fn heard(&self, board: &str) -> Result<Vec<(String, Vec<u8>)>, TransportError> {
        let prefix = format!("preceptor.told.{board}.");
        let mut heard = lock(&self.0.heard);
        if !heard.contains_key(board) {
            let client = self.0.context.client();
            let subscription =
                self.wait(async { client.subscribe(format!("{prefix}>")).await.map_err(|error| unavailable(&error)) })?;
            heard.insert(board.to_owned(), subscription);
        }
        let Some(subscription) = heard.get_mut(board) else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        while let Some(Some(message)) = subscription.next().now_or_never() {
            let key = message.subject.strip_prefix(&prefix).unwrap_or_default().to_owned();
            all.push((key, message.payload.to_vec()));
        }
        Ok(all)
    }
}

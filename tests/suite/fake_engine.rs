//! A fake inference server with the protocol of vLLM 0.32 or SGLang, for tests of rollouts on servers. It samples with
//! this program's own decoder, and misbehaves as instructed.

mod core;
mod http;
mod sglang;
mod shown;
mod tests;
mod vllm;
mod weights;

use std::collections::HashMap;
use std::io::BufReader;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use self::core::{Answer, Command, Core, PauseMode, Request};
pub use self::http::Received;
use self::http::Reply;
use self::weights::Base;
use crate::common::fixture;

/// Protocol of the server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Vllm,
    Sglang,
}

/// Settings of a server, which do not change.
#[derive(Debug, Clone)]
pub struct Options {
    pub kind: Kind,
    /// Hugging Face directory of the base model, which is called `policy`.
    pub model: PathBuf,
    pub api_key: Option<String>,
    /// Maximum number of completions under way, at most 64.
    pub max_num_seqs: usize,
    /// Maximum length of a sequence; at most the model's context.
    pub max_model_len: usize,
    /// Maximum rank of an adapter.
    pub max_lora_rank: usize,
}

impl Options {
    /// Returns the settings of a server of `model` without a key.
    pub fn new(kind: Kind, model: &Path) -> Self {
        let (max_num_seqs, max_model_len, max_lora_rank) = (16, 512, 16);
        Self { kind, model: model.to_owned(), api_key: None, max_num_seqs, max_model_len, max_lora_rank }
    }
}

/// Copies the model of a fixture to `dir` without the reference values next to it, which a server refuses to load.
/// Returns the directory of the copy.
pub fn copy_model(name: &str, dir: &Path) -> PathBuf {
    let to = dir.join(name);
    std::fs::create_dir_all(&to).unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        let from = fixture(name).join(file);
        if from.exists() {
            std::fs::copy(from, to.join(file)).unwrap();
        }
    }
    to
}

/// Weight versions of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Versions {
    #[default]
    True,
    /// This version for all tokens.
    Always(String),
    /// The answer has no versions.
    Missing,
    /// The last token has no version.
    Gap,
}

/// Faults of the server, none by default.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Paths to which `hang`, `closes_mid_answer`, `fail_next` and `delay` apply; empty: those that generate.
    pub paths: Vec<&'static str>,
    /// Never answers.
    pub hang: bool,
    /// Sends half of each answer.
    pub closes_mid_answer: bool,
    /// Number of the next requests that are answered with status 500.
    pub fail_next: usize,
    /// Duration by which each request is delayed.
    pub delay: Duration,
    /// Duration by which each change of weights is delayed.
    pub handover_delay: Duration,
    /// Acknowledges new weights and adapters, and keeps the old ones.
    pub ignores_handover: bool,
    /// Acknowledges that generation resumes, and stays paused.
    pub ignores_resume: bool,
    /// Computes in bf16.
    pub bf16: bool,
    /// Number of tokens, counted as by [`FakeEngine::generated_tokens`], from which on no token is sampled.
    pub stalls_at: Option<u64>,
    /// Answers a request for several completions as it answered the first one with as many of the same length.
    pub repeats_answers: bool,
    /// Speed of the server; `None` for the speed of the machine.
    pub tokens_per_second: Option<f64>,
    /// Answers one log-probability fewer than tokens.
    pub short_logprobs: bool,
    /// Value in place of the first log-probability, such as null or `"NaN"`.
    pub bad_logprob: Option<Value>,
    /// Replaces the last token by an id beyond the vocabulary.
    pub foreign_ids: bool,
    /// Weight versions in answers.
    pub versions: Versions,
    /// Refuses vLLM's `/inference/v1/generate` with status 403.
    pub no_scale_out: bool,
    /// Refuses changes of adapters with status 404.
    pub no_lora_updates: bool,
    /// Version of the server's program.
    pub program_version: Option<&'static str>,
    /// Answer to each request for a text's tokens.
    pub tokens: Option<Vec<u32>>,
}

/// The server. It ends with the test's process, or when it is killed.
pub struct FakeEngine {
    server: Arc<Server>,
    address: SocketAddr,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

/// State that the threads of a server share.
struct Server {
    options: Options,
    faults: Mutex<Faults>,
    received: Mutex<Vec<Received>>,
    generated: AtomicU64,
    /// Answers that [`Faults::repeats_answers`] repeats, by number and length of the completions.
    repeated: Mutex<HashMap<[u64; 2], String>>,
    running: Mutex<Option<Running>>,
}

/// A server that has not been killed.
struct Running {
    commands: SyncSender<Command>,
    connections: Vec<TcpStream>,
    killed: Arc<AtomicBool>,
}

impl FakeEngine {
    /// Starts a server on a free port of the loopback interface.
    pub fn start(options: Options) -> Self {
        let faults = Mutex::new(Faults::default());
        let received = Mutex::default();
        let server = Server {
            options,
            faults,
            received,
            generated: AtomicU64::new(0),
            repeated: Mutex::default(),
            running: Mutex::new(None),
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let engine = Self { server: Arc::new(server), address, acceptor: Mutex::new(None) };
        engine.listen(listener);
        engine
    }

    fn listen(&self, listener: TcpListener) {
        let server = &self.server;
        let Options { max_num_seqs, max_model_len, model, .. } = &server.options;
        let base = Base::read(model).unwrap_or_else(|error| panic!("the server does not start: {error:#}"));
        let length = (*max_model_len).min(base.config.context);
        let (commands, inbox) = sync_channel::<Command>(256);
        let killed = Arc::new(AtomicBool::new(false));
        *server.running.lock().unwrap() =
            Some(Running { commands, connections: Vec::new(), killed: Arc::clone(&killed) });
        let core = Core::new(base, (*max_num_seqs).clamp(1, 64), length);
        let shared = Arc::clone(server);
        std::thread::spawn(move || core.run(&inbox, &shared));
        let shared = Arc::clone(server);
        *self.acceptor.lock().unwrap() = Some(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if killed.load(Ordering::SeqCst) {
                    return;
                }
                if let (Some(running), Ok(copy)) = (&mut *shared.running.lock().unwrap(), stream.try_clone()) {
                    running.connections.push(copy);
                }
                let server = Arc::clone(&shared);
                std::thread::spawn(move || server.serve(&stream));
            }
        }));
    }

    /// Returns the server's address, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes the faults from now on.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.server.faults.lock().unwrap());
        // Wakes the engine, which may wait because of an earlier fault.
        let _ = self.server.call(|_| ());
    }

    /// Closes the listener and all connections. Weights, adapters, versions and requests are lost.
    pub fn kill(&self) {
        let Some(running) = self.server.running.lock().unwrap().take() else { return };
        running.killed.store(true, Ordering::SeqCst);
        for connection in &running.connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        let _ = running.commands.send(Box::new(|core| core.stopped = true));
        // Wakes the acceptor, which closes the listener.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.lock().unwrap().take() {
            acceptor.join().unwrap();
        }
    }

    /// Starts a killed server again on the same port, with the base model only. The faults remain.
    pub fn restart(&self) {
        self.kill();
        self.listen(TcpListener::bind(self.address).unwrap());
    }

    /// Returns all requests since the start, in order.
    pub fn requests(&self) -> Vec<Received> {
        self.server.received.lock().unwrap().clone()
    }

    /// Returns the names of the loaded adapters; empty if the server was killed.
    pub fn adapters(&self) -> Vec<String> {
        self.server.call(|core| core.adapters.keys().cloned().collect()).unwrap_or_default()
    }

    /// Returns the version of the weights; empty if the server was killed.
    pub fn weight_version(&self) -> String {
        self.server.call(|core| core.version.clone()).unwrap_or_default()
    }

    /// Returns whether generation is paused.
    pub fn is_paused(&self) -> bool {
        self.server.call(|core| core.is_paused()).unwrap_or(false)
    }

    /// Returns the number of tokens that were sampled since the start, before and after restarts.
    pub fn generated_tokens(&self) -> u64 {
        self.server.generated.load(Ordering::SeqCst)
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    fn faults_now(&self) -> Faults {
        self.faults.lock().unwrap().clone()
    }

    /// Runs `f` on the engine between two decode steps. `None` if the server was killed.
    fn call<R: Send + 'static>(&self, f: impl FnOnce(&mut Core) -> R + Send + 'static) -> Option<R> {
        let commands = self.running.lock().unwrap().as_ref().map(|running| running.commands.clone())?;
        let (reply, result) = sync_channel(1);
        let command = move |core: &mut Core| {
            // The connection may have ended.
            let _ = reply.send(f(core));
        };
        commands.send(Box::new(command)).ok()?;
        result.recv().ok()
    }

    /// Generates the completions of `request`. `None` if the engine died or the client disconnected.
    fn generate(&self, request: Request, stream: &TcpStream) -> Option<Answer> {
        let (reply, answer) = sync_channel(1);
        let ticket = self.call(move |core| core.submit(request, reply))?;
        loop {
            match answer.recv_timeout(Duration::from_millis(20)) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if http::is_closed(stream) => {
                    return self.call(move |core| core.cancel(ticket)).and(None);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Pauses the engine, and waits until it is paused.
    fn pause(&self, mode: PauseMode) -> Option<()> {
        let (reply, paused) = sync_channel(1);
        self.call(move |core| core.pause(mode, reply))?;
        paused.recv().ok()
    }

    /// Resumes the engine, unless a fault prevents it.
    fn resume(&self) -> Option<()> {
        let stays = self.faults_now().ignores_resume;
        self.call(move |core| {
            if !stays {
                core.resume();
            }
        })
    }

    /// Answers the requests of a connection until it is closed.
    fn serve(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        while let Some(received) = http::read(&mut reader) {
            self.received.lock().unwrap().push(received.clone());
            let reply = self.answer(&received, stream).unwrap_or(Reply::Close);
            if !http::send(stream, &reply) {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    }

    fn answer(&self, received: &Received, stream: &TcpStream) -> Option<Reply> {
        let generates = ["/inference/v1/generate", "/v1/completions", "/generate"];
        let faults = {
            let mut faults = self.faults.lock().unwrap();
            let paths = if faults.paths.is_empty() { &generates[..] } else { &faults.paths };
            if paths.contains(&received.path.as_str()) {
                if faults.fail_next > 0 {
                    faults.fail_next -= 1;
                    return Some(Reply::error(500, "InternalServerError", "Internal server error", ""));
                }
                faults.clone()
            } else {
                Faults { hang: false, closes_mid_answer: false, delay: Duration::ZERO, ..faults.clone() }
            }
        };
        std::thread::sleep(faults.delay);
        if faults.hang {
            return Some(Reply::Hang);
        }
        let reply = match self.options.kind {
            Kind::Vllm => vllm::answer(self, received, &faults, stream),
            Kind::Sglang => sglang::answer(self, received, &faults, stream),
        }?;
        match reply {
            Reply::Json(_, body) if faults.closes_mid_answer => Some(Reply::Cut(body)),
            reply => Some(reply),
        }
    }

    /// Returns whether the request has the server's key, if the server has one.
    fn is_authorised(&self, received: &Received) -> bool {
        self.options.api_key.is_none() || received.bearer == self.options.api_key
    }

    /// Answers a request for the tokens of a text.
    fn tokenize(&self, received: &Received, faults: &Faults) -> Option<Reply> {
        let Some(text) = received.body["prompt"].as_str().map(str::to_owned) else {
            return Some(Reply::error(400, "BadRequestError", "prompt: a text is required", "prompt"));
        };
        let is_document = received.body["add_special_tokens"].as_bool() != Some(false);
        let tokenizer = self.call(|core| core.base.tokenizer.clone())?;
        let ids = if is_document { tokenizer.encode_document(&text) } else { tokenizer.encode(&text) };
        let ids = faults.tokens.clone().or_else(|| ids.ok()).unwrap_or_default();
        let length = self.options.max_model_len;
        let count = ids.len();
        Some(Reply::ok(json!({ "count": count, "max_model_len": length, "tokens": ids, "token_strs": null })))
    }

    /// Answers a request for metrics, whose names begin with `prefix`.
    fn metrics(&self, names: [&str; 3]) -> Option<Reply> {
        let [running, waiting] = self.call(|core| core.load())?;
        let generated = self.generated.load(Ordering::SeqCst);
        let line = |name: &str, kind: &str, value: u64| {
            format!("# TYPE {name} {kind}\n{name}{{model_name=\"policy\"}} {value}.0\n")
        };
        let [a, b, c] = names;
        let text =
            line(a, "gauge", running as u64) + &line(b, "gauge", waiting as u64) + &line(c, "counter", generated);
        Some(Reply::Text(200, text))
    }
}

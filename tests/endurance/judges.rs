//! An asynchronous run with three labelers. Its judge shows a random behaviour of the zoo for each question, and is
//! slow or silent at random so that questions are hedged. The client's counts must match the judge's, no failure may
//! become a label, no question may be asked again after its answer, and memory must not grow.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use preceptor::pipeline::label::cache::Store;
use preceptor::pipeline::remote::retry::ExchangeOutcome;
use preceptor::run::journal::{Entry, Journal};
use preceptor::types::Verdict;
use preceptor::util::seed;
use serde_json::{Value, json};

use crate::mock_judge::{Act, MockJudge};
use crate::run::train;
use crate::zoo::{QUESTION, Row, rows};

/// Number of questions of a learner step.
const PER_STEP: u64 = 8;
/// Time after which a question is hedged, and duration of a slow answer.
const HEDGE: Duration = Duration::from_millis(60);
const SLOW: Duration = Duration::from_millis(150);

/// Percentage of questions with a behaviour that leads to an abstention.
const ABSTAINING: u64 = 10;

/// Behaviours of single answers that lead to a label, with the outcome of the first exchange by its name in metrics.
const LABELED: &[(&str, &str, &str)] = &[
    ("OpenAI", "20 alternatives of a chat's first token", "ok"),
    ("OpenAI", "the rate of requests is limited (Retry-After in seconds)", "rate_limited"),
    ("Azure OpenAI", "the rate of requests is limited (retry-after-ms)", "rate_limited"),
    ("vLLM", "alternatives with bytes", "ok"),
    ("vLLM", "-9999 for the logarithm of zero", "ok"),
    ("SGLang", "tokens in the spelling of the vocabulary", "ok"),
    ("SGLang", "null for the logarithm of zero", "ok"),
    ("llama.cpp", "alternatives with id and bytes", "ok"),
    ("llama.cpp", "the model is being loaded (503)", "http_5xx"),
    ("TGI", "overloaded (429)", "rate_limited"),
    ("OpenRouter", "a rate limit inside a 200", "rate_limited"),
    ("OpenRouter", "choices is null", "malformed"),
    ("OpenRouter", "comments keep the connection alive", "ok"),
    ("LiteLLM", "no deployment is available (429)", "rate_limited"),
    ("Groq", "the rate of tokens is limited (Retry-After)", "rate_limited"),
    ("Together", "a chat's alternatives as a map", "ok"),
    ("DeepSeek", "empty lines keep the connection alive", "ok"),
    ("a gateway", "an event stream although stream is false", "ok"),
    ("a gateway", "unrequested gzip compression", "ok"),
    ("a gateway", "a byte order mark", "ok"),
    ("a gateway", "the answer ends with the end marker of a stream", "ok"),
    ("a gateway", "a connection that was closed while it was idle", "connection"),
    ("a gateway", "an incomplete response body", "connection"),
    ("a gateway", "an empty body", "malformed"),
    ("a proxy", "the server is unavailable for a moment (502)", "http_5xx"),
    ("any", "a rounding error above zero", "ok"),
    ("any", "half of a surrogate pair in a token", "ok"),
    ("any", "a usage of zero", "ok"),
];

/// Behaviours of single answers that lead to an abstention, with the outcome of each exchange.
const ABSTAINED: &[(&str, &str, &str)] = &[
    ("OpenAI", "an answer is withheld (finish_reason content_filter)", "filtered"),
    ("OpenAI", "the model refuses in message.refusal", "filtered"),
    ("OpenAI", "a prompt is too long for the model", "http_4xx"),
    ("Azure OpenAI", "the content filter refuses a prompt", "http_4xx"),
    ("vLLM", "a prompt is too long for the model", "http_4xx"),
    ("vLLM", "a prompt is too long, with status 500", "http_5xx"),
    ("llama.cpp", "a prompt is larger than the context", "http_4xx"),
    ("any", "NaN for an answer", "ok"),
];

/// Probabilities of the ratings 1, 2, 3 and 10 that the behaviours list.
const LISTED: [[f64; 4]; 4] =
    [[0.6, 0.3, 0.05, 0.0001], [0.6, 0.3, 0.0, 0.0001], [0.6, 0.3, 0.0, 0.000_123_409_804], [1.0, 0.0, 0.0, 0.0]];

/// Counts of the judge.
#[derive(Default)]
struct BatchStats {
    requests: u64,
    /// Exchanges by the outcome that the client must count, if it waits for it.
    outcomes: BTreeMap<&'static str, u64>,
    questions: HashMap<u64, Question>,
    slow: u64,
    /// Requests for a question whose answer was sent before.
    again: u64,
}

#[derive(Default)]
struct Question {
    requests: u64,
    abstains: bool,
    /// Time at which the last answer to the question is sent, if any.
    answered: Option<Instant>,
}

/// A behaviour of the zoo.
struct Behaviour {
    row: Row,
    first: &'static str,
    abstains: bool,
}

pub fn trial(questions: u64, seed: u64) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let (labeled, abstained) = (chosen(LABELED, false)?, chosen(ABSTAINED, true)?);
    let tally: Arc<Mutex<BatchStats>> = Arc::default();
    let seen = Arc::clone(&tally);
    let mock = MockJudge::start(move |_, path, body| {
        let mut tally = lock(&seen);
        let (act, pause) = behave(&mut tally, (&labeled, &abstained), seed, path, body);
        if pause > Duration::ZERO { Act::Slow(pause, Box::new(act)) } else { act }
    });
    let cache = dir.path().join("labels");
    let overrides = [
        format!("run.steps={}", questions.div_ceil(PER_STEP)),
        "learner.eta=4".into(),
        // The completions must stay varied, so that each is a distinct question.
        "learner.lr=1e-7".into(),
        "labeler.type=direct".into(),
        "labeler.workers=3".into(),
        format!(
            "labeler.remote={{ url = \"{}\", model = \"m\", probe = false, hedge_after_s = {}, timeout_s = 20, backoff_s = 0.005, max_backoff_s = 0.02 }}",
            mock.url,
            HEDGE.as_secs_f64()
        ),
        format!("labeler.cache=\"{}\"", cache.display()),
    ];
    let log = dir.path().join("log");
    let mut child = train(dir.path(), "run", &overrides).stderr(File::create(&log)?).spawn()?;
    let memory = watch(&mut child, || lock(&tally).questions.len() as f64 / questions as f64)?;
    let status = child.wait()?;
    ensure!(status.success(), "the run ended with {status}: {}", std::fs::read_to_string(&log)?);
    let run = dir.path().join("run");
    let figures = Figures::read(&run)?;
    let tally = lock(&tally);
    let counts = compare(&figures, &tally)?;
    let labels = labels(&run, &figures, &tally, &cache)?;
    let text = format!("judges: {counts}; {labels}; {memory}");
    // At the beginning of a short run, memory is still growing.
    ensure!(questions < 5000 || memory.grown() < 0.1, "memory grew: {text}");
    Ok(text)
}

fn chosen(list: &[(&str, &str, &'static str)], abstains: bool) -> Result<Vec<Behaviour>> {
    let mut all = rows();
    let mut chosen = Vec::new();
    for (server, behaviour, first) in list {
        let at = all.iter().position(|row| row.server == *server && row.behaviour == *behaviour);
        let row = all.swap_remove(at.with_context(|| format!("the zoo has no behaviour {server}: {behaviour}"))?);
        chosen.push(Behaviour { row, first, abstains });
    }
    Ok(chosen)
}

/// Returns the response to a request and its duration, and counts it.
fn behave(
    tally: &mut BatchStats,
    (labeled, abstained): (&[Behaviour], &[Behaviour]),
    seed: u64,
    path: &str,
    body: &Value,
) -> (Act, Duration) {
    let (key, number) = (seed::text(&body["messages"].to_string()), tally.requests);
    let chance = seed::mix(key ^ seed);
    let kind = if chance % 100 < ABSTAINING { abstained } else { labeled };
    let behaviour = &kind[(chance / 100) as usize % kind.len()];
    let (now, question) = (Instant::now(), tally.questions.entry(key).or_default());
    tally.requests += 1;
    tally.again += u64::from(question.answered.is_some_and(|at| at < now));
    question.abstains = behaviour.abstains;
    let attempt = question.requests;
    question.requests += 1;
    let chance = seed::mix(number ^ seed.rotate_left(32)) % 1000;
    if chance < 3 {
        *tally.outcomes.entry("timeout").or_default() += 1;
        return (Act::Hang, Duration::ZERO);
    }
    let outcome = if attempt == 0 || behaviour.abstains { behaviour.first } else { "ok" };
    *tally.outcomes.entry(outcome).or_default() += 1;
    let pause = if chance < 40 { SLOW } else { Duration::ZERO };
    tally.slow += u64::from(pause > Duration::ZERO);
    if outcome == "ok" || behaviour.abstains {
        question.answered = Some(now + pause);
    }
    // The rows of the zoo misbehave at one specific question.
    let mut body = body.clone();
    body["user"] = json!(QUESTION);
    ((behaviour.row.plan)(attempt, path, &body), pause)
}

/// Results of a finished run.
struct Figures {
    text: String,
}

impl Figures {
    fn read(run: &Path) -> Result<Self> {
        Ok(Self { text: std::fs::read_to_string(run.join("metrics.prom"))? })
    }

    fn of(&self, series: &str) -> u64 {
        let line = self.text.lines().find(|line| line.starts_with(&format!("{series} ")));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map_or(0, |value| value as u64)
    }
}

/// Compares the exchanges that the client counted with those of the judge.
fn compare(figures: &Figures, tally: &BatchStats) -> Result<String> {
    let counted: BTreeMap<&str, u64> = ExchangeOutcome::NAMES
        .into_iter()
        .map(|name| (name, figures.of(&format!("preceptor_judge_requests_total{{outcome=\"{name}\"}}"))))
        .filter(|(_, count)| *count > 0)
        .collect();
    let overtaken = counted.get("hedged_away").copied().unwrap_or(0);
    let hedges = figures.of("preceptor_judge_hedges_total");
    let all: u64 = counted.values().sum();
    let both = format!("counted {counted:?}, {hedges} hedges; the judge had {:?}", tally.outcomes);
    ensure!(hedges > 0 && overtaken > 0 && overtaken <= hedges, "{both}");
    // The first of two hedged requests may have been cancelled before the judge read it.
    ensure!(all >= tally.requests && all - tally.requests <= overtaken, "{all} of {} requests: {both}", tally.requests);
    let mut missing = 0;
    for (outcome, count) in &tally.outcomes {
        let here = counted.get(outcome).copied().unwrap_or(0);
        ensure!(here <= *count, "{outcome}: {both}");
        missing += count - here;
    }
    ensure!(missing <= overtaken && overtaken - missing == all - tally.requests, "{missing} were not counted: {both}");
    ensure!(counted.keys().all(|name| *name == "hedged_away" || tally.outcomes.contains_key(name)), "{both}");
    Ok(format!(
        "{} requests for {} questions, {} of them slow; {both}",
        tally.requests,
        tally.questions.len(),
        tally.slow
    ))
}

/// Compares the labels of a run with the answers of the judge.
fn labels(run: &Path, figures: &Figures, tally: &BatchStats, cache: &Path) -> Result<String> {
    let allowed = LISTED.map(|p| {
        let rating = (p[0] + 2.0 * p[1] + 3.0 * p[2] + 10.0 * p[3]) / p.iter().sum::<f64>();
        (rating - 5.5) / 4.5
    });
    let (mut labels, mut abstentions, mut seen) = (0u64, 0u64, HashSet::new());
    for entry in Journal::open(run)? {
        let Entry::Step(step) = entry? else { continue };
        for group in &step.batch {
            for verdict in group.feedback.iter().flat_map(|feedback| &feedback.verdicts) {
                match verdict {
                    Verdict::Label(label) => {
                        labels += 1;
                        let given = allowed.iter().any(|one| (one - label).abs() < 1e-9);
                        ensure!(given, "the judge gave no such label: {label}");
                        seen.insert(label.to_bits());
                    }
                    Verdict::Abstention(_) => {
                        abstentions += 1;
                        ensure!(group.rewards.is_empty(), "a group with an abstention has rewards");
                    }
                    Verdict::Failure(why) => bail!("a failure was learned from: {why}"),
                }
            }
        }
    }
    let verdict = |kind: &str| figures.of(&format!("preceptor_labels_total{{labeler=\"direct\",verdict=\"{kind}\"}}"));
    let failures = verdict("failure");
    let counted = (verdict("label"), verdict("abstention"));
    ensure!(
        (labels, abstentions) == counted,
        "{labels} labels and {abstentions} abstentions arrived, counted {counted:?}"
    );
    let abstained = tally.questions.values().filter(|question| question.abstains).count() as u64;
    let answered = tally.questions.len() as u64 - abstained;
    let kept = Store::open(cache, u64::MAX)?.len()?;
    ensure!(kept == answered, "{answered} questions were answered, and {kept} labels are kept");
    ensure!(
        labels >= answered && abstentions >= abstained,
        "{labels} labels of {answered}, {abstentions} of {abstained}"
    );
    let bought = figures.of("preceptor_labels_bought_again_total");
    ensure!(bought == 0, "{bought} labels were bought that were kept already");
    // The client distinguishes the refusal of one question from an outage by repeating a question that was answered
    // before, unless another one is answered meanwhile.
    let refusals: u64 = ["filtered", "http_4xx", "http_5xx"].iter().filter_map(|name| tally.outcomes.get(name)).sum();
    let hedges = figures.of("preceptor_judge_hedges_total");
    ensure!(
        tally.again <= refusals + hedges,
        "{} requests for questions that were answered, after {refusals} refusals and {hedges} hedges",
        tally.again
    );
    Ok(format!(
        "{labels} labels (of {} values that the judge gave), {abstentions} abstentions, {failures} failures; {kept} labels kept, none bought twice; {} requests repeated an answered question: hedges, or control questions after one of {refusals} refusals",
        seen.len(),
        tally.again
    ))
}

/// Resident memory of the run.
struct Memory {
    /// Medians after a tenth of the questions and at the end, in bytes.
    early: u64,
    last: u64,
}

impl Memory {
    fn grown(&self) -> f64 {
        self.last as f64 / self.early as f64 - 1.0
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        let grown = 100.0 * self.grown();
        write!(
            f,
            "resident memory {:.1} MiB after a tenth of the questions, {:.1} MiB at the end ({grown:+.1} %)",
            mib(self.early),
            mib(self.last)
        )
    }
}

/// Watches the memory of a run until it ends; `done` returns the share of its questions so far.
fn watch(child: &mut Child, done: impl Fn() -> f64) -> Result<Memory> {
    let statm = Path::new("/proc").join(child.id().to_string()).join("statm");
    let mut samples: Vec<(f64, u64)> = Vec::new();
    while child.try_wait()?.is_none() {
        let text = std::fs::read_to_string(&statm).unwrap_or_default();
        if let Some(pages) =
            text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).filter(|n| *n > 0)
        {
            samples.push((done(), 4096 * pages));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let median = |from: f64, to: f64| {
        let mut part: Vec<u64> =
            samples.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, held)| *held).collect();
        part.sort_unstable();
        part.get(part.len() / 2).copied()
    };
    // If the run is too short for these intervals, all samples are used.
    let end = samples.last().map_or(0.0, |(at, _)| *at);
    let all = || median(0.0, f64::MAX);
    let early = median(0.1 * end, 0.15 * end).or_else(all).context("the run ended before its memory was sampled")?;
    let last = median(0.9 * end, f64::MAX).or_else(all).context("the run ended before its memory was sampled")?;
    Ok(Memory { early, last })
}

fn lock(tally: &Mutex<BatchStats>) -> MutexGuard<'_, BatchStats> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

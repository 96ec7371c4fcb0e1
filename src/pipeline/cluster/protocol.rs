//! Messages between the coordinator of a run and its workers.
//!
//! Work and results are in postcard format after a header of four bytes: `P`, `W` and the protocol's number (little-endian).
//! Notices are JSON, in which unknown keys are ignored, so that programs of neighbouring versions work together.

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::pipeline::generate::Sampled;
use crate::pipeline::label::workers::questions::{LabelAnswer, Question};
use crate::types::Finish;

/// Number of this program's protocol.
pub const PROTOCOL: u16 = 1;
/// Number of the oldest protocol that this program understands.
pub const OLDEST_PROTOCOL: u16 = 1;

/// Largest message in bytes; NATS servers accept 1 MiB unless they are configured otherwise.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Key of the [`RunNotice`] on a run's board.
pub const RUN: &str = "run";
/// Key of the [`WeightsNotice`] on a run's board.
pub const WEIGHTS: &str = "weights";

/// Returns the key of the notice that shuts a worker out.
pub(super) fn shut_out(worker: &str) -> String {
    format!("out-{worker}")
}

/// Returns the key of the notice that tells a worker to take no work, with the reason; empty if it may take work.
pub(super) fn rest(worker: &str) -> String {
    format!("rest-{worker}")
}

const MAGIC: [u8; 2] = *b"PW";

/// What a worker must know of a run before it works for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunNotice {
    /// Number of the coordinator's protocol.
    pub protocol: u16,
    /// Number of the oldest protocol that the coordinator understands.
    pub oldest_protocol: u16,
    /// Version of the coordinator's program.
    pub program: String,
    /// Lineage: a coordinator that starts or restores the run begins another one.
    pub lineage: u64,
    /// State of the run.
    pub state: RunState,
    /// Folder below the store that has the model's configuration and tokenizer, and with adapters its weights.
    pub base: String,
    /// SHA-256 of the folder's list of checksums.
    pub base_sha256: String,
    /// Store as the coordinator sees it: the path of a folder, or the URL of an object store.
    pub store: String,
    /// Sampling of completions.
    pub sampling: SamplingNotice,
    /// Adapters that are trained, if not all weights are.
    pub lora: Option<LoraNotice>,
    /// Maximum number of completions in a piece of work.
    pub group_size: usize,
    /// Longest time in milliseconds without a sign of life of a worker.
    pub lease_ms: u64,
    /// True if workers sample. Earlier programs have runs with workers that sample only, and do not write it.
    #[serde(default = "yes")]
    pub samples: bool,
    /// Judges whose weights are on workers.
    #[serde(default)]
    pub judges: Vec<JudgeNotice>,
}

fn yes() -> bool {
    true
}

/// What a worker must know of a judge before it answers for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeNotice {
    /// Folder below the store with the judge's configuration, weights and tokenizer.
    pub name: String,
    /// SHA-256 of the folder's list of checksums.
    pub sha256: String,
    /// True for a sentence encoder, false for a language model.
    pub encodes: bool,
    /// Fingerprint of the weights.
    pub fingerprint: u64,
    /// Data type of the weights: `f32` or `bf16`.
    pub dtype: String,
    /// Precision of `f32` matrix products, as in `policy.matmul_precision`.
    pub matmul_precision: String,
    /// True if questions are wrapped in the model's chat template.
    pub chat: bool,
    /// Variables of the chat template, as in `data.chat_template_kwargs`.
    #[serde(default)]
    pub chat_template_kwargs: toml::Table,
    /// Time of `strftime_now` in the chat template, in seconds since 1970.
    #[serde(default)]
    pub date: Option<u64>,
}

/// A question for a judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelWork {
    /// Lineage of the work.
    pub lineage: u64,
    /// Number of the question.
    pub id: u64,
    /// Folder of the judge, [`JudgeNotice::name`].
    pub judge: String,
    /// The question.
    pub question: Question,
}

/// Answer to a question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelDone {
    /// Lineage of the work.
    pub lineage: u64,
    /// Number of the question.
    pub id: u64,
    /// Name of the worker.
    pub worker: String,
    /// The answer.
    pub answer: LabelAnswer,
}

/// State of a run, as its workers must know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// The coordinator offers work, or was killed: workers work.
    Open,
    /// The coordinator ended before the last step: workers wait for the next one.
    Paused,
    /// The run has all its steps: workers leave.
    Ended,
}

/// Adapters, as in the key `policy.lora` of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraNotice {
    /// Rank.
    pub rank: usize,
    /// Numerator α of the scale α/r.
    pub alpha: f64,
    /// Names of the adapted matrices.
    pub targets: Vec<String>,
}

/// Sampling of completions, as in the section `rollout` of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingNotice {
    /// Temperature.
    pub temperature: f64,
    /// Number of most likely tokens to sample from.
    pub top_k: Option<usize>,
    /// Probability mass to sample from.
    pub top_p: Option<f64>,
    /// Minimum probability relative to that of the most likely token.
    pub min_p: Option<f64>,
    /// Repetition penalty.
    pub repetition_penalty: f64,
    /// Maximum number of tokens of a completion.
    pub max_new_tokens: usize,
    /// Number of tokens that the tokenizer knows.
    pub vocabulary: usize,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
    /// Texts that end a completion.
    pub stop: Vec<String>,
    /// True if weights may change while a completion is under way.
    pub in_flight: bool,
    /// Format of the weights for sampling: `f32`, `bf16` or `q8_0`.
    pub weights: String,
    /// Number of concurrent completions of one process whose samples workers give to the last bit; by default each worker's
    /// own number.
    #[serde(default)]
    pub kernels_for: Option<usize>,
    /// Whether the learner corrects for log-probabilities that differ slightly from its own, as those of inference servers;
    /// earlier programs do not write it.
    #[serde(default)]
    pub corrects: Option<bool>,
    /// Number of tokens of the longest prompt; 0 if it is not known.
    #[serde(default)]
    pub longest_prompt: usize,
}

/// The newest weights of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsNotice {
    /// Lineage of the weights.
    pub lineage: u64,
    /// Version of the weights.
    pub version: u64,
    /// Fingerprint of the weights.
    pub fingerprint: u64,
    /// Folder below the store.
    pub name: String,
    /// SHA-256 of the folder's list of checksums.
    pub sha256: String,
    /// True if the folder has adapters for the base model, false if it has all weights.
    pub adapters: bool,
}

/// A piece of work: a prompt, and seeds of some or all completions of its group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Lineage of the work.
    pub lineage: u64,
    /// Number of the piece of work.
    pub seq: u64,
    /// Oldest version that the first token may be sampled with.
    pub min_version: u64,
    /// Token ids of the prompt.
    pub ids: Vec<u32>,
    /// Seeds of the completions.
    pub seeds: Vec<u64>,
}

/// Completions of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// Lineage of the work.
    pub lineage: u64,
    /// Number of the piece of work.
    pub seq: u64,
    /// Name of the worker.
    pub worker: String,
    /// Fingerprints of the versions that tokens were sampled with.
    pub fingerprints: Vec<(u64, u64)>,
    /// The completions, in the order of the seeds.
    pub completions: Vec<Answer>,
}

/// A completion. The first three lists have one entry per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Token ids, including the end token.
    pub ids: Vec<u32>,
    /// Log-probabilities in nats.
    pub logprobs: Vec<f32>,
    /// Versions of the weights.
    pub versions: Vec<u64>,
    /// Reason for the end.
    pub finish: Finish,
}

/// Sign of life of a worker, which it tells every few seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// Role of the worker.
    pub role: String,
    /// Version of the worker's program.
    pub program: String,
    /// Name of the worker's machine.
    pub host: String,
    /// Version of the weights in use.
    pub version: Option<u64>,
    /// Number of completions under way.
    pub used: usize,
    /// Maximum number of completions under way.
    pub slots: usize,
    /// Number of sampled completions since the worker started.
    pub completions: u64,
    /// Number of sampled tokens since the worker started.
    pub tokens: u64,
    /// Size in bytes of the results since the worker started.
    pub bytes: u64,
    /// Reason why the worker does not work, if it does not.
    pub waits: String,
    /// Tokens per second of one completion while the worker samples; `None` if it is not known.
    #[serde(default)]
    pub pace: Option<f64>,
    /// True for the last sign of life of a worker that leaves.
    #[serde(default)]
    pub leaves: bool,
}

/// Returns the identifier of a result: that of its work, the worker's name, and how often the work was delivered.
pub fn result_id(work: &str, worker: &str, deliveries: u64) -> String {
    format!("{work}-{worker}-d{deliveries}")
}

/// Returns whether the work of a result with this identifier was delivered before to a worker that did not complete it.
pub fn is_redone(result: &str) -> bool {
    let deliveries = result.rsplit_once("-d").and_then(|(_, count)| count.parse::<u64>().ok());
    deliveries.is_some_and(|count| count > 1)
}

/// Encodes work or a result.
///
/// # Errors
/// If it cannot be encoded.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(256);
    bytes.extend(MAGIC);
    bytes.extend(PROTOCOL.to_le_bytes());
    postcard::to_extend(value, bytes).context("a message cannot be encoded")
}

/// Decodes work or a result of another process.
///
/// # Errors
/// If it is not of this protocol, or damaged.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let (head, body) = bytes.split_at_checked(4).context("a message is too short")?;
    ensure!(head[..2] == MAGIC, "a message is not of this protocol");
    let protocol = u16::from_le_bytes([head[2], head[3]]);
    ensure!(
        (OLDEST_PROTOCOL..=PROTOCOL).contains(&protocol),
        "a message is of protocol {protocol}, and this program understands {OLDEST_PROTOCOL} to {PROTOCOL}"
    );
    let (value, rest) = postcard::take_from_bytes(body).context("a message is damaged")?;
    ensure!(rest.is_empty(), "a message has {} bytes too many", rest.len());
    Ok(value)
}

impl Done {
    /// Checks a result against its work, as foreign input: the number of completions, their lengths, the ids, the
    /// log-probabilities and the versions.
    ///
    /// # Errors
    /// If anything is impossible; the error says what.
    pub fn check(&self, work: &Work, bounds: &Bounds) -> Result<()> {
        ensure!(
            self.completions.len() == work.seeds.len(),
            "it has {} completions for {} seeds",
            self.completions.len(),
            work.seeds.len()
        );
        for (i, answer) in self.completions.iter().enumerate() {
            let n = answer.ids.len();
            ensure!(
                n == answer.logprobs.len() && n == answer.versions.len(),
                "completion {i} has {n} tokens, {} log-probabilities and {} versions",
                answer.logprobs.len(),
                answer.versions.len()
            );
            ensure!(
                (1..=bounds.max_new_tokens).contains(&n),
                "completion {i} has {n} tokens of 1 to {}",
                bounds.max_new_tokens
            );
            if let Some(id) = answer.ids.iter().find(|id| **id as usize >= bounds.rows) {
                anyhow::bail!("completion {i} has token {id}, and the model has {}", bounds.rows);
            }
            // Rounding may leave the logarithm of a probability of one slightly above zero.
            if let Some(p) = answer.logprobs.iter().find(|p| !(p.is_finite() && **p <= 1e-3)) {
                anyhow::bail!("completion {i} has a log-probability of {p}");
            }
            ensure!(answer.versions.is_sorted(), "completion {i} has versions that decrease");
            let oldest = answer.versions.first().copied().unwrap_or_default();
            ensure!(
                oldest >= work.min_version,
                "completion {i} begins with version {oldest}, and its work needs {} at least",
                work.min_version
            );
            if let Some(version) = answer.versions.iter().find(|v| !self.fingerprints.iter().any(|(of, _)| of == *v)) {
                anyhow::bail!("completion {i} has version {version} without a fingerprint");
            }
        }
        Ok(())
    }

    /// Returns the completions as an engine returns them.
    pub fn into_sampled(self) -> Vec<Sampled> {
        let one =
            |Answer { ids, logprobs, versions, finish }| Sampled { ids, logprobs, versions, finish: Some(finish) };
        self.completions.into_iter().map(one).collect()
    }
}

/// Bounds of what a result may contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Number of rows of the model's embedding.
    pub rows: usize,
    /// Maximum number of tokens of a completion.
    pub max_new_tokens: usize,
}

/// Returns whether two programs understand each other: each must understand the other's number, or a common one.
pub fn is_compatible(notice: &RunNotice) -> bool {
    notice.oldest_protocol <= PROTOCOL && OLDEST_PROTOCOL <= notice.protocol
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work { lineage: 3, seq: 7, min_version: 2, ids: vec![1, 2], seeds: vec![10, 11] }
    }

    fn done() -> Done {
        let answer = Answer { ids: vec![4, 5], logprobs: vec![-1.0, -0.5], versions: vec![2, 3], finish: Finish::Eos };
        Done {
            lineage: 3,
            seq: 7,
            worker: "w".into(),
            fingerprints: vec![(2, 20), (3, 30)],
            completions: vec![answer.clone(), answer],
        }
    }

    #[test]
    fn messages_are_read_as_they_were_written_and_others_are_refused() {
        let bytes = encode(&done()).unwrap();
        assert_eq!(decode::<Done>(&bytes).unwrap(), done());
        assert_eq!(decode::<Work>(&encode(&work()).unwrap()).unwrap(), work());
        let mut newer = bytes.clone();
        newer[2..4].copy_from_slice(&(PROTOCOL + 1).to_le_bytes());
        for (bytes, words) in [
            (&bytes[..3], "too short"),
            (&bytes[..bytes.len() - 1], "damaged"),
            (&[&bytes[..], &[0]].concat(), "too many"),
            (b"PXxxxxxxxx".as_slice(), "not of this protocol"),
            (&newer, "understands"),
        ] {
            let error = format!("{:#}", decode::<Done>(bytes).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn the_identifier_of_a_result_tells_whether_its_work_was_begun_before() {
        for (deliveries, redone) in [(1, false), (2, true), (12, true)] {
            assert_eq!(is_redone(&result_id("00ab-7-0-0", "gpu-d2", deliveries)), redone);
        }
        assert!(!is_redone("00ab-7-0-0-worker"), "of an earlier program");
    }

    #[test]
    fn impossible_results_are_refused() {
        let bounds = Bounds { rows: 6, max_new_tokens: 2 };
        done().check(&work(), &bounds).unwrap();
        type Break = fn(&mut Done);
        let broken: [(Break, &str); 9] = [
            (|done| done.completions.truncate(1), "1 completions for 2 seeds"),
            (|done| done.completions[1].logprobs.truncate(1), "1 log-probabilities"),
            (
                |done| {
                    done.completions[0] =
                        Answer { ids: vec![], logprobs: vec![], versions: vec![], finish: Finish::Eos }
                },
                "0 tokens",
            ),
            (|done| done.completions[0].ids[1] = 6, "token 6"),
            (|done| done.completions[0].logprobs[0] = f32::NAN, "NaN"),
            (|done| done.completions[0].logprobs[0] = 0.5, "0.5"),
            (|done| done.completions[0].versions = vec![3, 2], "decrease"),
            (|done| done.completions[0].versions = vec![1, 2], "its work needs 2"),
            (|done| done.fingerprints.truncate(1), "version 3 without a fingerprint"),
        ];
        for (change, words) in broken {
            let mut done = done();
            change(&mut done);
            let error = done.check(&work(), &bounds).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}

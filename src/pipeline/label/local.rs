//! A judge whose weights are in this process.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};

use super::backend::{Ask, Backend, Decoding, NoAnswer, Reply, Usage};
use super::likelihood::{TokenJudge, TokenScores};
use super::shape::{Parts, Shape};
use crate::lm::model::{Decoder, Pack, Prefix, Trie};
use crate::lm::tokens::Tokenizer;
use crate::lm::tokens::chat::Message;
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::{Engine, Fixed, MAX_SLOTS, Request, generate_with};
use crate::util::mutex::lock;
use crate::util::seed;

/// Maximum number of tokens per forward pass. Longer rows save little and increase attention cost.
const ROW: usize = 1024;

/// Maximum number of texts generated at once.
const MAX_CONCURRENT_TEXTS: usize = 32;

/// A frozen language model used as a judge.
#[derive(Clone)]
pub struct Judge {
    /// The model; its weights never change.
    pub model: Arc<Decoder>,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// Fingerprint of the model's weights.
    pub identity: u64,
    /// True if prompts are wrapped in the model's chat template.
    pub chat: bool,
}

impl TokenJudge for Judge {
    fn identity(&self) -> u64 {
        self.identity
    }

    fn logprobs(&self, prompt: &[u32], completions: &[&[u32]], temperatures: &[f64]) -> Result<TokenScores> {
        let pack = Pack::new(prompt, completions);
        let scored = self.model.score(&pack, temperatures)?;
        Ok(TokenScores { logprobs: scored.iter().map(|row| pack.split(row)).collect(), read: pack.len() })
    }
}

impl Judge {
    /// Creates a judge whose weights have the fingerprint `fingerprint`. Reasoning models in chat format have another identity
    /// than in earlier versions of the program, which did not suppress their reasoning and got other labels.
    pub fn new(model: Arc<Decoder>, tokenizer: Tokenizer, fingerprint: u64, chat: bool) -> Self {
        let identity = if chat && tokenizer.thinks() { seed::mix(fingerprint ^ 0x7417) } else { fingerprint };
        Self { model, tokenizer, identity, chat }
    }
}

/// Backend that asks a [`Judge`]. It lays many prompts out in one row and computes shared prefixes once.
pub struct Local {
    judge: Judge,
    /// Key/value caches of the common prefixes of each template's prompts, computed at the first [`Local::warm`] of it.
    prefixes: Mutex<Vec<Arc<Prefix>>>,
}

/// Token sequence of a prompt followed by one spelling of an answer.
struct Path {
    tokens: Vec<u32>,
    /// Range of the answer's tokens; the tokens before it belong to the prompt.
    answer: Range<usize>,
}

impl Local {
    /// Creates a backend without precomputed prefixes.
    pub fn new(judge: Judge) -> Self {
        Self { judge, prefixes: Mutex::default() }
    }

    /// Returns the model with its tokenizer.
    pub fn judge(&self) -> &Judge {
        &self.judge
    }

    /// Computes and keeps the common prefix of `examples`, prompts of one template whose filled-in texts have nothing in
    /// common.
    ///
    /// # Errors
    /// If a text cannot be tokenised.
    pub fn warm(&self, examples: &[String]) -> Result<()> {
        let encoded = examples.iter().map(|text| self.encode(text)).collect::<Result<Vec<_>>>()?;
        let common = common(&encoded);
        let mut prefixes = lock(&self.prefixes);
        let known = prefixes.iter().any(|prefix| prefix.ids() == common);
        if !known && common.len() >= 8 && common.len() < self.judge.model.config().context {
            prefixes.push(Arc::new(Prefix::new(&self.judge.model, common)?));
        }
        Ok(())
    }

    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let tokenizer = &self.judge.tokenizer;
        if !self.judge.chat {
            return tokenizer.encode_document(prompt);
        }
        let messages = [Message { role: "user".into(), content: prompt.into() }];
        tokenizer.encode(&tokenizer.render_question(&messages)?)
    }

    /// Returns the longest precomputed prefix that is a proper prefix of all `sequences`.
    fn prefix(&self, sequences: &[&[u32]]) -> Option<Arc<Prefix>> {
        let prefixes = lock(&self.prefixes);
        let fits = |prefix: &&Arc<Prefix>| {
            sequences.iter().all(|tokens| tokens.len() > prefix.ids().len() && tokens.starts_with(prefix.ids()))
        };
        prefixes.iter().filter(fits).max_by_key(|prefix| prefix.ids().len()).cloned()
    }

    /// Returns the spellings of each answer. In a chat the answer starts a turn; otherwise it may follow a space.
    fn paths(&self, ask: &Ask) -> Result<Vec<Vec<Path>>> {
        let prompt = self.encode(&ask.prompt)?;
        ensure!(!prompt.is_empty(), "the judge's prompt has no tokens");
        ask.answers
            .iter()
            .map(|answer| {
                if self.judge.chat {
                    let tokens = [prompt.as_slice(), &self.judge.tokenizer.encode(answer)?].concat();
                    return Ok(vec![Path { answer: prompt.len()..tokens.len(), tokens }]);
                }
                let spelt = ["", " "].map(|space| {
                    let tokens = self.judge.tokenizer.encode_document(&format!("{}{space}{answer}", ask.prompt))?;
                    // If the answer's first token merges with the prompt's end, the answer starts at that token.
                    let shared = prompt.iter().zip(&tokens).take_while(|(a, b)| a == b).count().max(1);
                    Ok(Path { answer: shared..tokens.len(), tokens })
                });
                spelt.into_iter().collect()
            })
            .collect()
    }

    fn weigh_row(&self, asks: &[Vec<Vec<Path>>], usage: &mut Usage) -> Result<Vec<Reply<Vec<f64>>>> {
        let paths: Vec<&Path> = asks.iter().flatten().flatten().collect();
        // The last token of an answer is predicted but never fed.
        let fed: Vec<&[u32]> = paths.iter().map(|path| &path.tokens[..path.tokens.len() - 1]).collect();
        let prefix = self.prefix(&fed);
        let trie = Trie::new(&fed, prefix.as_ref().map_or(0, |prefix| prefix.ids().len()));
        usage.requests += asks.len() as u64;
        usage.prompt_tokens += trie.len() as u64;
        let hidden = trie.hidden(&self.judge.model, prefix.as_deref())?;
        let wanted = |path: usize| paths[path].answer.clone().map(move |index| (index, path));
        let mut rows: Vec<u32> =
            (0..paths.len()).flat_map(wanted).map(|(index, path)| trie.row(path, index - 1)).collect();
        rows.sort_unstable();
        rows.dedup();
        let picked = hidden.index_select(&Tensor::new(rows.as_slice(), hidden.device())?, 0)?;
        let logits = self.judge.model.logits(&picked)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let totals: Vec<f32> = logits.iter().map(|row| kernels::row_logsumexp(row, 1.0)).collect();
        let probability = |path: usize| -> f64 {
            let log: f64 = wanted(path)
                .map(|(index, path)| {
                    let at = rows.partition_point(|row| *row < trie.row(path, index - 1));
                    f64::from(logits[at][paths[path].tokens[index] as usize] - totals[at])
                })
                .sum();
            log.exp()
        };
        let mut next = 0..paths.len();
        Ok(asks.iter().map(|answers| exact(answers, |_| probability(next.next().unwrap_or_default()))).collect())
    }

    fn weigh_all(&self, asks: &[Ask], usage: &mut Usage) -> Result<Vec<Reply<Vec<f64>>>> {
        let room = self.judge.model.config().context;
        let mut replies: Vec<Option<Reply<Vec<f64>>>> = Vec::with_capacity(asks.len());
        let (mut waiting, mut tokens) = (Vec::new(), 0);
        let mut flush = |waiting: &mut Vec<(usize, Vec<Vec<Path>>)>, replies: &mut Vec<Option<_>>| -> Result<()> {
            let (at, asked): (Vec<usize>, Vec<_>) = waiting.drain(..).unzip();
            if !asked.is_empty() {
                for (i, reply) in at.into_iter().zip(self.weigh_row(&asked, usage)?) {
                    replies[i] = Some(reply);
                }
            }
            Ok(())
        };
        for (i, ask) in asks.iter().enumerate() {
            let paths = self.paths(ask)?;
            let longest = paths.iter().flatten().map(|path| path.tokens.len()).max().unwrap_or(0);
            if longest > room {
                replies.push(Some(Err(too_long(longest, room))));
                continue;
            }
            replies.push(None);
            if tokens + longest > ROW {
                flush(&mut waiting, &mut replies)?;
                tokens = 0;
            }
            tokens += longest;
            waiting.push((i, paths));
        }
        flush(&mut waiting, &mut replies)?;
        let unanswered = || Err(NoAnswer::Failure("the judge gave no answer".into()));
        Ok(replies.into_iter().map(|reply| reply.unwrap_or_else(unanswered)).collect())
    }

    fn write_all(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Result<Vec<Reply<String>>> {
        let tokenizer = &self.judge.tokenizer;
        let config = self.judge.model.config();
        let sampling = Sampling {
            temperature: decoding.temperature,
            top_k: decoding.top_k,
            max_new_tokens: decoding.max_tokens,
            vocabulary: tokenizer.vocab_size(),
            eos: tokenizer.eos_ids().to_vec(),
            ..Sampling::default()
        };
        let mut replies = Vec::with_capacity(prompts.len());
        // Consecutive samples of one prompt share its computed prefix.
        let mut runs: Vec<(Vec<u32>, Vec<u64>)> = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let seed = stream(decoding.seed, prompts, i);
            match runs.last_mut() {
                Some((_, seeds)) if i > 0 && prompts[i - 1] == *prompt => seeds.push(seed),
                _ => runs.push((self.encode(prompt)?, vec![seed])),
            }
        }
        let mut rest = runs.as_slice();
        while !rest.is_empty() {
            let mut rows = 0;
            let end = rest.iter().take_while(|(_, seeds)| {
                rows += seeds.len();
                rows <= MAX_CONCURRENT_TEXTS
            });
            let (lot, later) = rest.split_at(end.count().max(1));
            rest = later;
            let fits = |ids: &[u32]| ids.len() + decoding.max_tokens <= config.context;
            let fitting: Vec<&(Vec<u32>, Vec<u64>)> = lot.iter().filter(|(ids, _)| fits(ids)).collect();
            let prefix = self.prefix(&fitting.iter().map(|(ids, _)| ids.as_slice()).collect::<Vec<_>>());
            let shared = prefix.as_ref().map_or(0, |prefix| prefix.ids().len());
            let requests: Vec<Request> = fitting
                .iter()
                .map(|(ids, seeds)| Request { prompt: ids.into(), prefix: prefix.as_deref(), seeds: seeds.clone() })
                .collect();
            // A constant slot count and a sparse engine: the text must not depend on the number of prompts in the call.
            let engine = Engine::new(&sampling, MAX_SLOTS).with_small_batch_kernels();
            let mut judge = Fixed(Arc::clone(&self.judge.model));
            let mut written = generate_with(engine, &mut judge, requests)?.into_iter();
            for (ids, seeds) in lot {
                if !fits(ids) {
                    let refusal = too_long(ids.len() + decoding.max_tokens, config.context);
                    replies.extend(seeds.iter().map(|_| Err(refusal.clone())));
                    continue;
                }
                usage.requests += seeds.len() as u64;
                usage.prompt_tokens += (ids.len() - shared) as u64;
                for sampled in written.next().unwrap_or_default() {
                    usage.completion_tokens += sampled.ids.len() as u64;
                    replies.push(Ok(tokenizer.decode(&sampled.ids)?));
                }
            }
        }
        Ok(replies)
    }
}

impl Backend for Local {
    fn identity(&self) -> u64 {
        self.judge.identity
    }

    fn shape(&self) -> Shape {
        // The template's text, not its rendering for a prompt, which may contain the date.
        let template = self.judge.chat.then(|| self.judge.tokenizer.chat_template().unwrap_or_default());
        let identity = format!("{:016x}", self.judge.identity);
        let parts = Parts::of("weights").with("model", &identity).with_some("chat template", template);
        Shape { weighed: parts.digest(), written: parts.digest(), earlier: Some(self.judge.identity) }
    }

    fn warm(&self, examples: &[String]) -> Result<()> {
        Self::warm(self, examples)
    }

    fn weigh(&self, asks: &[Ask], usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
        self.weigh_all(asks, usage).unwrap_or_else(|error| failed(asks.len(), &error))
    }

    fn write(&self, prompts: &[String], decoding: &Decoding, usage: &mut Usage) -> Vec<Reply<String>> {
        self.write_all(prompts, decoding, usage).unwrap_or_else(|error| failed(prompts.len(), &error))
    }
}

/// Returns the probability of each answer, summed over its spellings. If the tokens of one answer are a prefix of
/// another's (`1` of `10` when digits are tokens), the longer one's probability is subtracted from the shorter one's,
/// since "1" then means "1 not followed by 0". `path_probability` returns the probability of a path and is called once
/// for each, in order.
fn exact(answers: &[Vec<Path>], mut path_probability: impl FnMut(&Path) -> f64) -> Reply<Vec<f64>> {
    let probabilities: Vec<Vec<f64>> =
        answers.iter().map(|paths| paths.iter().map(&mut path_probability).collect()).collect();
    if !probabilities.iter().flatten().all(|p| p.is_finite()) {
        return Err(NoAnswer::Failure("the judge's log-probabilities are not finite".into()));
    }
    let exactly = |i: usize, k: usize| {
        let path = &answers[i][k];
        let begins = |other: &Path| other.tokens.len() > path.tokens.len() && other.tokens.starts_with(&path.tokens);
        let longer = answers.iter().enumerate().filter(|(j, _)| *j != i).flat_map(|(j, paths)| {
            let probabilities = &probabilities;
            paths.iter().enumerate().filter(|(_, other)| begins(other)).map(move |(l, _)| probabilities[j][l])
        });
        (probabilities[i][k] - longer.sum::<f64>()).max(0.0)
    };
    Ok((0..answers.len()).map(|i| (0..answers[i].len()).map(|k| exactly(i, k)).sum()).collect())
}

/// Returns the seed of prompt `i`: a function of its text and of the number of equal prompts before it, not of the
/// other prompts in the call.
fn stream(seed: u64, prompts: &[String], i: usize) -> u64 {
    let before = prompts[..i].iter().filter(|other| **other == prompts[i]).count() as u64;
    seed::mix(seed ^ seed::mix(seed::text(&prompts[i]) ^ seed::mix(before)))
}

fn too_long(tokens: usize, room: usize) -> NoAnswer {
    NoAnswer::Abstention(format!("the prompt of {tokens} tokens exceeds the judge's context of {room}"))
}

fn failed<T>(count: usize, error: &anyhow::Error) -> Vec<Reply<T>> {
    (0..count).map(|_| Err(NoAnswer::Failure(format!("{error:#}")))).collect()
}

/// Returns the longest common prefix of `sequences`.
fn common(sequences: &[Vec<u32>]) -> &[u32] {
    let Some((first, rest)) = sequences.split_first() else { return &[] };
    let shared = |other: &Vec<u32>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    &first[..rest.iter().map(shared).min().unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(tokens: &[u32], from: usize) -> Path {
        Path { tokens: tokens.to_vec(), answer: from..tokens.len() }
    }

    #[test]
    fn the_probability_of_10_is_subtracted_from_that_of_1() {
        // Tokens are digits after a prompt of one token; P(1) = 0.4, a quarter of which continues with 0; P(9) = 0.1.
        let answers: Vec<Vec<Path>> =
            (1..=10).map(|i| vec![if i == 10 { path(&[99, 1, 0], 1) } else { path(&[99, i], 1) }]).collect();
        let path_probability = |path: &Path| match path.tokens[1..] {
            [1] => 0.4,
            [9] => 0.1,
            [1, 0] => 0.1,
            _ => 0.0,
        };
        let weights = exact(&answers, path_probability).unwrap();
        assert!((weights[0] - 0.3).abs() < 1e-12 && (weights[9] - 0.1).abs() < 1e-12, "{weights:?}");
        assert!((weights[8] - 0.1).abs() < 1e-12);
        assert!(matches!(exact(&answers, |_| f64::NAN), Err(NoAnswer::Failure(_))));
    }

    #[test]
    fn spellings_of_an_answer_are_summed() {
        let answers = [vec![path(&[5, 1], 1), path(&[5, 7, 1], 1)], vec![path(&[5, 2], 1), path(&[5, 7, 2], 1)]];
        let weights = exact(&answers, |path| if path.tokens.len() == 2 { 0.125 } else { 0.25 }).unwrap();
        assert_eq!(weights, [0.375, 0.375]);
    }
}

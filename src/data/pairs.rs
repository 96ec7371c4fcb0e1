//! A preference file as groups of two, tokenised for a reward model.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use preceptor_actors::{AdmissionGate, Ended, Item, Source, StageContext, StageResult};
use rayon::prelude::*;

use super::{Faults, OnLong, PreferencePair, Preferences, PromptFormat, Split, surely_longer};
use crate::rollout::{Completion, Feedback, Finish, Group, Labeled, Preference, Prompt, Verdict};
use crate::tokens::Tokenizer;

/// Labeled pairs that fit the model.
pub struct PairSet {
    preferences: Preferences,
    usable: Vec<usize>,
    order: Vec<usize>,
    format: PromptFormat,
    tokenizer: Tokenizer,
}

impl PairSet {
    /// Opens `path`, tokenises every pair once, and shuffles them by `seed`. `limit` is the most tokens that a prompt
    /// and an answer may have together.
    ///
    /// # Errors
    /// As [`Preferences::read`], and pairs that are too long, unless `on_long` leaves them out.
    pub fn read(
        path: &Path,
        format: &PromptFormat,
        tokenizer: &Tokenizer,
        limit: usize,
        on_long: OnLong,
        seed: u64,
    ) -> Result<Self> {
        let preferences = Preferences::read(path, &Split::default(), true)?;
        let (format, tokenizer) = (format.clone(), tokenizer.clone());
        let mut set = Self { preferences, usable: vec![], order: vec![], format, tokenizer };
        let lengths: Vec<Result<usize>> = (0..set.preferences.len())
            .into_par_iter()
            .map(|i| {
                let pair = set.preferences.get(i)?;
                let bytes = pair.dialogue.text().len() + pair.first.len().max(pair.second.len());
                if surely_longer(bytes, limit) {
                    ensure!(
                        on_long == OnLong::Skip,
                        "prompt and answer have {bytes} bytes, and the model's context of {limit} tokens is far below that; set data.on_long = \"skip\""
                    );
                    return Ok(usize::MAX);
                }
                let group = set.group(i as u64, &pair)?;
                let longest = group.completions.iter().map(|one| one.ids.len()).max().unwrap_or(0);
                Ok(group.prompt.ids.len() + longest)
            })
            .collect();
        let mut faults = Faults::default();
        for (i, length) in lengths.into_iter().enumerate() {
            let length = length.and_then(|length| {
                ensure!(
                    length <= limit || on_long == OnLong::Skip,
                    "prompt and answer have {length} tokens, the model's context is {limit}; set data.on_long = \"skip\""
                );
                Ok(length)
            });
            match length {
                Ok(length) if length <= limit => set.usable.push(i),
                Ok(_) => {}
                Err(error) => faults.add(&set.preferences.place(i), &error),
            }
        }
        faults.report()?;
        if set.usable.is_empty() {
            bail!("{} has no pair that fits the model's context of {limit} tokens", path.display());
        }
        set.order = super::order(set.usable.len(), Some(seed), 0);
        Ok(set)
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.usable.len()
    }

    /// Always false: a file without usable pairs is refused.
    pub fn is_empty(&self) -> bool {
        self.usable.is_empty()
    }

    /// Pair number `seq` in the shuffled order, as a group whose two completions are compared.
    ///
    /// # Errors
    /// A row that was changed since the file was opened.
    pub fn labeled(&self, seq: u64) -> Result<Labeled> {
        let pair = self.preferences.get(self.usable[self.order[seq as usize]])?;
        let group = self.group(seq, &pair)?;
        let p = pair.preference.unwrap_or(0.5);
        let preference = Preference { first: 0, second: 1, verdict: Verdict::Label(p), orders: None };
        let feedback = Feedback {
            labeler: "file".into(),
            model: 0,
            template: 0,
            verdicts: vec![],
            preferences: vec![preference],
            logprobs: None,
            cost: 0.0,
        };
        Ok(Labeled { group, feedback: Some(feedback) })
    }

    fn group(&self, seq: u64, pair: &PreferencePair) -> Result<Group> {
        group(seq, pair, &self.format, &self.tokenizer)
    }
}

/// A pair as a group of two completions; each ends with the end token, as an answer of the policy does.
///
/// # Errors
/// A dialogue that the format cannot take.
pub fn group(seq: u64, pair: &PreferencePair, format: &PromptFormat, tokenizer: &Tokenizer) -> Result<Group> {
    let prompt = Prompt {
        seq,
        epoch: 0,
        row: pair.row,
        text: pair.dialogue.text().into(),
        ids: format.encode_dialogue(&pair.dialogue, tokenizer)?.into(),
        blank: format.encode("", tokenizer)?.into(),
        reference: None,
    };
    let completion = |text: &str| -> Result<Completion> {
        let mut ids = tokenizer.encode(text)?;
        ids.extend(tokenizer.end(format.chat));
        let (logprobs, versions) = (vec![0.0; ids.len()], vec![0; ids.len()]);
        Ok(Completion { ids, logprobs, versions, finish: Finish::Eos, text: text.to_owned() })
    };
    Ok(Group { prompt, completions: vec![completion(&pair.first)?, completion(&pair.second)?] })
}

/// Emits every pair once, in order.
pub struct PairSource {
    set: Arc<PairSet>,
    gate: Arc<AdmissionGate>,
    next: u64,
}

impl PairSource {
    /// From the first pair on; `gate` must admit them all.
    pub fn new(set: Arc<PairSet>, gate: Arc<AdmissionGate>) -> Self {
        Self { set, gate, next: 0 }
    }
}

impl Source for PairSource {
    type Out = Labeled;

    fn next(&mut self, ctx: &StageContext) -> StageResult<Option<Item<Labeled>>> {
        if self.next >= self.set.len() as u64 {
            return Ok(None);
        }
        match self.gate.admit(ctx, 1) {
            Ok(_) => {}
            Err(Ended::Drained) => return Ok(None),
            Err(ended) => return Err(ended.into()),
        }
        let (seq, body) = (self.next, self.set.labeled(self.next)?);
        self.next += 1;
        Ok(Some(Item { seq, incarnation: ctx.incarnation(), version: self.gate.version(), body }))
    }
}

//! Preference files as groups of two completions, tokenised for a reward model.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use preceptor_actors::{AdmissionGate, Ended, Item, Source, StageContext, StageResult};
use rayon::prelude::*;

use super::{
    Faults, ModelBounds, OnBad, OnLong, PairOptions, PreferencePair, Preferences, PromptFormat, Rows, certainly_longer,
};
use crate::lm::tokens::Tokenizer;
use crate::types::{Completion, Feedback, Group, Labeled, Preference, Prompt, Verdict};

/// Labeled pairs that fit the model's context.
pub struct PairSet {
    preferences: Preferences,
    usable: Vec<usize>,
    order: Vec<usize>,
    format: PromptFormat,
    tokenizer: Tokenizer,
}

impl PairSet {
    /// Tokenises every pair of `rows` once, and shuffles them by `seed`. A prompt and an answer may together have as
    /// many tokens as the context of `model`.
    ///
    /// # Errors
    /// The same as for [`Preferences::of`]; also if tokens are outside the model's vocabulary, or if pairs are too long, unless
    /// `on_long` skips them.
    pub fn read(
        rows: Rows,
        format: &PromptFormat,
        tokenizer: &Tokenizer,
        model: ModelBounds,
        (on_long, on_bad): (OnLong, OnBad),
        seed: u64,
    ) -> Result<Self> {
        let limit = model.context;
        let options =
            PairOptions { labeled: true, on_bad, prompt_field: format.field.clone(), ..PairOptions::default() };
        let preferences = Preferences::of(rows, &options)?;
        let (format, tokenizer) = (format.clone(), tokenizer.clone());
        let mut set = Self { preferences, usable: vec![], order: vec![], format, tokenizer };
        // The inner error describes the length of a pair that does not fit.
        let fits: Vec<Result<Result<(), String>>> = (0..set.preferences.len())
            .into_par_iter()
            .map(|i| {
                let pair = set.preferences.get(i)?;
                let bytes = pair.dialogue.text().len() + pair.first.len().max(pair.second.len());
                if certainly_longer(bytes, limit) {
                    return Ok(Err(format!(
                        "prompt and answer have {bytes} bytes, and the model's context of {limit} tokens is far below that"
                    )));
                }
                let group = set.group(i as u64, &pair)?;
                model.check(&group.prompt.ids, &set.tokenizer)?;
                for answer in &group.completions {
                    model.check(&answer.ids, &set.tokenizer).context("in an answer")?;
                }
                let longest = group.completions.iter().map(|completion| completion.ids.len()).max().unwrap_or(0);
                let length = group.prompt.ids.len() + longest;
                let words = || format!("prompt and answer have {length} tokens, the model's context is {limit}");
                Ok(if length > limit { Err(words()) } else { Ok(()) })
            })
            .collect();
        let (mut faults, mut long) = (Faults::default(), Faults::default());
        for (i, fits) in fits.into_iter().enumerate() {
            match fits {
                Ok(Ok(())) => set.usable.push(i),
                Ok(Err(_)) if on_long == OnLong::Skip => {}
                Ok(Err(words)) => {
                    long.add(&set.preferences.place(i), &anyhow!("{words}; set data.on_long = \"skip\""));
                }
                Err(error) => faults.add(&set.preferences.place(i), &error),
            }
        }
        long.report_long()?;
        let all_bad = set.usable.is_empty();
        if let Some(report) = faults.report(on_bad, all_bad)? {
            tracing::warn!("{report}");
        }
        if set.usable.is_empty() {
            bail!("{} has no pair that fits the model's context of {limit} tokens", set.preferences.name());
        }
        set.order = super::order(set.usable.len(), Some(seed), 0);
        Ok(set)
    }

    /// Returns the number of pairs.
    pub fn len(&self) -> usize {
        self.usable.len()
    }

    /// Always returns false: a file without usable pairs is refused.
    pub fn is_empty(&self) -> bool {
        self.usable.is_empty()
    }

    /// Returns pair number `seq` in the shuffled order, as a group whose two completions are compared.
    ///
    /// # Errors
    /// If the row was changed since the file was opened.
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

/// Converts a pair into a group of two completions; each ends with the end token, as the policy's completions do.
///
/// # Errors
/// If the format does not support the dialogue, or it has no tokens.
pub fn group(seq: u64, pair: &PreferencePair, format: &PromptFormat, tokenizer: &Tokenizer) -> Result<Group> {
    let ids = format.encode_dialogue(&pair.dialogue, tokenizer)?;
    ensure!(!ids.is_empty(), "the prompt has no tokens");
    let (first_kept, first) = tokenizer.encode_after(&ids, &pair.first)?;
    let (second_kept, second) = tokenizer.encode_after(&ids, &pair.second)?;
    // Both answers must follow the same tokens.
    let kept = first_kept.min(second_kept);
    let completion = |text: &str, own: usize, behind: Vec<u32>| {
        let mut all = [&ids[kept..own], &behind].concat();
        all.extend(tokenizer.end(format.chat));
        Completion::unsampled(all, text)
    };
    let completions = vec![completion(&pair.first, first_kept, first), completion(&pair.second, second_kept, second)];
    let prompt = Prompt {
        row: pair.row,
        blank: format.blank(tokenizer)?,
        ..Prompt::new(seq, pair.dialogue.text(), &ids[..kept])
    };
    Ok(Group { prompt, completions })
}

/// Source that emits every pair once, in order.
pub struct PairSource {
    set: Arc<PairSet>,
    gate: Arc<AdmissionGate>,
    next: u64,
}

impl PairSource {
    /// Starts at the first pair; `gate` must admit all pairs.
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

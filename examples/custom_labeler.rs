//! Labels pairs of answers with a custom labeler, which prefers the shorter answer.
//!
//!     cargo run --release --example custom_labeler
//!
//! The labeler actors, their supervision and their batches are those of `preceptor label`.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use preceptor::config;
use preceptor::pipeline::label::stage::Wants;
use preceptor::pipeline::label::{Labeler, Labels, Pairing};
use preceptor::tools::batch_label::{Annotation, Annotations, Job, Questions, annotate};
use preceptor::types::{Completion, Group, Preference, Prompt, Verdict};

/// Prefers the shorter of two answers; answers of the same length are equally good.
struct Shorter;

impl Labeler for Shorter {
    fn name(&self) -> &'static str {
        "shorter"
    }

    fn model(&self) -> u64 {
        0
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        let length = |i: usize| group.completions[i].text.chars().count();
        let compare = |(first, second): (usize, usize)| {
            let probability = match length(first).cmp(&length(second)) {
                std::cmp::Ordering::Less => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Greater => 0.0,
            };
            Preference { first, second, verdict: Verdict::Label(probability), orders: None }
        };
        let preferences = Pairing::Adjacent.pairs(group.completions.len()).into_iter().map(compare).collect();
        Ok(Labels { preferences, ..Labels::default() })
    }
}

/// Prompts, each with two answers.
const PAIRS: [[&str; 3]; 3] = [
    ["Name a colour.", "Blue.", "The colour that I would name is blue."],
    ["What is 2 + 2?", "It is four, as everybody knows.", "4"],
    ["Say yes.", "yes", "YES"],
];

struct Pairs;

impl Questions for Pairs {
    fn group(&self, i: usize) -> Result<Group> {
        let [prompt, first, second] = PAIRS[i];
        let completion = |text: &str| Completion::unsampled(Vec::new(), text);
        let prompt = Prompt { row: i, ..Prompt::new(i as u64, prompt, []) };
        Ok(Group { prompt, completions: vec![completion(first), completion(second)] })
    }
}

/// Prints each label.
struct Printed;

impl Annotations for Printed {
    fn take(&mut self, batch: Vec<Annotation>) -> Result<()> {
        for annotation in batch {
            for preference in &annotation.labels.preferences {
                println!("{:?}: {:?}", PAIRS[annotation.question][0], preference.verdict);
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let configuration = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/offline.toml");
    let job = Job {
        config: config::load(configuration.as_ref(), &[])?,
        questions: Arc::new(Pairs),
        todo: (0..PAIRS.len()).collect(),
        batch: 2,
        wants: Wants::Preferences { pairing: Pairing::Adjacent, temperature: 1.0 },
        labelers: Box::new(|| Ok(Box::new(Shorter))),
        gave_up: Arc::default(),
    };
    annotate(job, Arc::new(Mutex::new(Printed)))?;
    Ok(())
}

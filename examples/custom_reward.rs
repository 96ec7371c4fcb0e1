//! Trains a tiny model with a reward that is a function of the completion's text: the share of vowels among its letters.
//!
//!     cargo run --release --example custom_reward
//!
//! It runs for a few seconds. In direct mode the scores of a labeler are the reward, so that any program that scores texts (a
//! compiler, a unit test, a checker of answers) can take the place of the judge.

use anyhow::Result;
use preceptor::config;
use preceptor::pipeline::label::{Labeler, Labels};
use preceptor::run::resume::AcceptedKeys;
use preceptor::run::{self, StartFrom};
use preceptor::types::{Group, Verdict};

/// Scores a completion by the share of vowels among its letters. A completion without letters has no score.
struct Vowels;

impl Labeler for Vowels {
    fn name(&self) -> &'static str {
        "vowels"
    }

    fn model(&self) -> u64 {
        0
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        let scores = group.completions.iter().map(|completion| score(&completion.text)).collect();
        Ok(Labels { scores, ..Labels::default() })
    }
}

fn score(text: &str) -> Verdict {
    let letters = text.chars().filter(char::is_ascii_alphabetic).count();
    let vowels = text.chars().filter(|letter| "aeiouAEIOU".contains(*letter)).count();
    if letters == 0 {
        return Verdict::Abstention("the completion has no letters".into());
    }
    Verdict::Label(vowels as f64 / letters as f64)
}

fn main() -> Result<()> {
    let configuration = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/offline.toml");
    let overrides = ["run.steps=10", "serve.enabled=false"].map(str::to_owned);
    let config = config::load(configuration.as_ref(), &overrides)?;
    let directory = tempfile::tempdir()?;
    let run_dir = Some(directory.path().join("run"));
    let labelers = Box::new(|_: &_, _: &_| Ok(Box::new(Vowels) as Box<dyn Labeler>));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let accepted = AcceptedKeys::new(Vec::new())?;
    let summary = runtime.block_on(run::train_with(config, run_dir, StartFrom::Beginning, accepted, labelers))?;
    println!("{} steps, checkpoint {}", summary.steps, summary.checkpoint.display());
    Ok(())
}

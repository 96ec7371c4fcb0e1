//! `preceptor pairs`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::input;
use crate::pipeline::data::corrupt::corrupt;
use crate::pipeline::data::{Notes, PromptFormat};
use crate::status;
use crate::util::disk::cannot;
use crate::util::exit::before_work;

/// Timeout of a model hub's answers, in seconds.
const HUB_TIMEOUT_S: u64 = 20;

/// Arguments of `preceptor pairs`.
#[derive(Debug, Args)]
#[command(after_help = "The better answer is the row's reference. The worse answer is, in half of the pairs, another \
row's reference of about the same length (swap), and in the other half the same reference with its words in another \
order (shuffle). The better answer comes first in half of the pairs. A hash of the seed and the prompt decides both.")]
pub struct Pairs {
    /// Rows with a prompt and a reference: a file, a folder or a glob pattern, see docs/data.md.
    #[arg(long, value_name = "FILE")]
    input: String,
    /// File to which the pairs are written, as JSON lines.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Field that holds the prompt.
    #[arg(long, default_value = "prompt", value_name = "NAME")]
    prompt_field: String,
    /// Field that holds the reference.
    #[arg(long, default_value = "reference", value_name = "NAME")]
    reference_field: String,
    /// Seed of the choice between swap and shuffle and of the order.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Maximum number of pairs. The default is one per row.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

impl Pairs {
    /// Reads the prompts and references of all rows.
    fn texts(&self) -> Result<Vec<(String, String)>> {
        let rows = input::rows(&self.input, HUB_TIMEOUT_S)?;
        let format = PromptFormat {
            special_tokens: true,
            field: self.prompt_field.clone(),
            reference_field: self.reference_field.clone(),
            instruction: "{{ prompt }}".into(),
            chat: true,
            system: None,
        };
        let mut texts = Vec::new();
        for i in 0..rows.len() {
            if let Some(row) = rows.get(i).with_context(|| rows.place(i))? {
                let read = format.read(&row, true, &mut Notes::default()).map_err(|error| named(&error));
                let (prompt, reference) = read.with_context(|| rows.place(i))?;
                texts.push((prompt.text(), reference.unwrap_or_default()));
            }
        }
        Ok(texts)
    }

    /// Makes the pairs and writes them.
    ///
    /// # Errors
    /// If rows cannot be read, or the output cannot be written.
    pub fn run(self) -> Result<()> {
        let (texts, file) = before_work(|| {
            let texts = self.texts()?;
            let file = std::fs::File::create(&self.output).map_err(|error| cannot("write", &self.output, error))?;
            Ok((texts, file))
        })?;
        let (mut out, mut written, mut left_out) = (BufWriter::new(file), 0, 0);
        for i in 0..texts.len() {
            if self.limit.is_some_and(|limit| written >= limit) {
                break;
            }
            let Some(corrupted) = corrupt(&texts, i, self.seed) else {
                left_out += 1;
                continue;
            };
            let (prompt, reference) = (&texts[i].0, texts[i].1.as_str());
            let (first, second) = if corrupted.better_first {
                (reference, corrupted.worse.as_str())
            } else {
                (corrupted.worse.as_str(), reference)
            };
            let preference = f64::from(u8::from(corrupted.better_first));
            let pair = json!({ "prompt": prompt, "first": first, "second": second, "preference": preference,
                "kind": corrupted.kind.name() });
            writeln!(out, "{pair}")?;
            written += 1;
        }
        out.flush()?;
        status!("{written} pairs in {} ({left_out} rows skipped: no worse answer found)", self.output.display());
        Ok(())
    }
}

/// Rewrites an error about a row so that it names this command's options instead of configuration keys.
fn named(error: &anyhow::Error) -> anyhow::Error {
    let words = format!("{error:#}");
    let words = words.replace("data.prompt_field =", "--prompt-field").replace("data.prompt_field", "--prompt-field");
    anyhow::anyhow!(words.replace("data.reference_field", "--reference-field"))
}

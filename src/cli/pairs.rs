//! `preceptor pairs`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::data::corrupt::corrupt;
use crate::data::{Dialogue, Rows};
use crate::say;

/// Arguments of `preceptor pairs`.
#[derive(Debug, Args)]
#[command(after_help = "The rule: half of the rows get another row's reference of about the same length (swap), half \
their own with its words in another order (shuffle); the better one stands first in half of the pairs. Which is \
decided by a hash of the seed and the prompt.")]
pub struct Pairs {
    /// Rows with a prompt and a reference: .jsonl, .jsonl.gz or .parquet.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where the pairs are written, as JSON lines.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Field that holds the prompt.
    #[arg(long, default_value = "prompt", value_name = "NAME")]
    prompt_field: String,
    /// Field that holds the reference.
    #[arg(long, default_value = "reference", value_name = "NAME")]
    reference_field: String,
    /// Seed of the rule.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most pairs; by default as many as there are rows.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

impl Pairs {
    /// Makes the pairs.
    ///
    /// # Errors
    /// Rows that cannot be read, or an output that cannot be written.
    pub fn run(self) -> Result<()> {
        let rows = Rows::open(&self.input)?;
        let mut texts = Vec::new();
        for i in 0..rows.len() {
            if let Some(row) = rows.get(i).with_context(|| rows.place(i))? {
                texts.push(self.texts(&row).with_context(|| rows.place(i))?);
            }
        }
        let file =
            std::fs::File::create(&self.output).with_context(|| format!("cannot write {}", self.output.display()))?;
        let (mut out, mut written, mut left_out) = (BufWriter::new(file), 0, 0);
        for i in 0..texts.len() {
            if self.limit.is_some_and(|limit| written >= limit) {
                break;
            }
            let Some(made) = corrupt(&texts, i, self.seed) else {
                left_out += 1;
                continue;
            };
            let (prompt, reference) = (&texts[i].0, texts[i].1.as_str());
            let (first, second) =
                if made.better_first { (reference, made.worse.as_str()) } else { (made.worse.as_str(), reference) };
            let preference = f64::from(u8::from(made.better_first));
            let pair = json!({ "prompt": prompt, "first": first, "second": second, "preference": preference,
                "kind": made.kind.name() });
            writeln!(out, "{pair}")?;
            written += 1;
        }
        out.flush()?;
        say!("{written} pairs in {} ({left_out} rows left out: nothing to spoil them with)", self.output.display());
        Ok(())
    }

    fn texts(&self, row: &Value) -> Result<(String, String)> {
        let Some(prompt) = row.get(&self.prompt_field) else {
            bail!("no field {:?}; set --prompt-field", self.prompt_field)
        };
        let Some(reference) = row.get(&self.reference_field).and_then(Value::as_str) else {
            bail!("no text in field {:?}; set --reference-field", self.reference_field)
        };
        Ok((Dialogue::from_json(prompt)?.text(), reference.to_owned()))
    }
}

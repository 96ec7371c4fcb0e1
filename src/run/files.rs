//! The directory of a run: resolved configuration, `metrics.jsonl`, `samples.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::config::Config;
use crate::learn::StepRecord;
use crate::rollout::Rewarded;

/// Files that a run appends to.
pub struct RunFiles {
    dir: PathBuf,
    metrics: File,
    samples: File,
}

impl RunFiles {
    /// Makes the directory and writes the resolved configuration into it. Without `given`, the configured
    /// directory is used, or the first of `-2`, `-3`, … that is free.
    ///
    /// # Errors
    /// A given directory that holds a run already, or one that cannot be written.
    pub fn create(config: &Config, given: Option<PathBuf>) -> Result<Self> {
        let explicit = given.or_else(|| config.run.dir.clone());
        let dir = match explicit {
            Some(dir) => {
                ensure!(
                    std::fs::metadata(dir.join("metrics.jsonl")).map_or(0, |metadata| metadata.len()) == 0,
                    "{} holds a run already; give another --run-dir, or remove it",
                    dir.display()
                );
                dir
            }
            None => free(Path::new("runs"), &config.run.name),
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make the run directory {}", dir.display()))?;
        let path = dir.join("config.toml");
        std::fs::write(&path, config.to_toml()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { metrics: append(&dir.join("metrics.jsonl"))?, samples: append(&dir.join("samples.jsonl"))?, dir })
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Appends a step's figures, and its first group to read.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn step(&mut self, record: &StepRecord, batch: &[Rewarded]) -> Result<()> {
        let mut lines = String::new();
        for group in batch.iter().take(1) {
            for (i, completion) in group.group.completions.iter().enumerate() {
                let line = json!({
                    "step": record.0["step"],
                    "group": group.group.prompt.seq,
                    "row": group.group.prompt.row,
                    "prompt": group.group.prompt.text,
                    "completion": completion.text,
                    "finish": completion.finish,
                    "tokens": completion.ids.len(),
                    "versions": [completion.oldest_version(), completion.versions.iter().max()],
                    "labeler": group.feedback.as_ref().map(|feedback| &feedback.labeler),
                    "verdict": group.feedback.as_ref().and_then(|feedback| feedback.verdicts.get(i)),
                    "preferences": preferences(group, i),
                    "score": group.scores.get(i),
                    "reward_model": group.reward_model,
                    "reward": group.rewards.get(i),
                    "masked": group.masked,
                });
                lines.push_str(&line.to_string());
                lines.push('\n');
            }
        }
        self.samples.write_all(lines.as_bytes()).with_context(|| self.cannot("samples.jsonl"))?;
        let line = serde_json::to_string(record)? + "\n";
        self.metrics.write_all(line.as_bytes()).with_context(|| self.cannot("metrics.jsonl"))
    }

    /// Appends figures of a phase before training to `phases.jsonl`.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn phase(&self, figures: &serde_json::Value) -> Result<()> {
        let mut file = append(&self.dir.join("phases.jsonl"))?;
        file.write_all(format!("{figures}\n").as_bytes()).with_context(|| self.cannot("phases.jsonl"))
    }

    /// Keeps what `/metrics` said last, as `metrics.prom`: totals that no scrape would see after the end.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn last_metrics(&self, text: &str) -> Result<()> {
        std::fs::write(self.dir.join("metrics.prom"), text).with_context(|| self.cannot("metrics.prom"))
    }

    /// Saves a batch whose gradient was not finite, for study.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn nonfinite(&self, step: u64, batch: &[Rewarded]) -> Result<PathBuf> {
        let path = self.dir.join(format!("nonfinite-step-{step}.json"));
        std::fs::write(&path, serde_json::to_vec(batch)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    fn cannot(&self, file: &str) -> String {
        format!("cannot write {}", self.dir.join(file).display())
    }
}

/// What the judge said of completion `i` against others: with whom it was compared, and P(it is the better one).
fn preferences(group: &Rewarded, i: usize) -> Vec<serde_json::Value> {
    let all = group.feedback.iter().flat_map(|feedback| &feedback.preferences);
    let mine = all.filter(|one| one.first == i || one.second == i);
    mine.map(|one| {
        let with = if one.first == i { one.second } else { one.first };
        let p = one.probability().map(|p| if one.first == i { p } else { 1.0 - p });
        json!({ "with": with, "better": p, "flipped": one.flipped(), "refused": p.is_none().then_some(&one.verdict) })
    })
    .collect()
}

fn free(parent: &Path, name: &str) -> PathBuf {
    let candidates = std::iter::once(name.to_owned()).chain((2..).map(|n| format!("{name}-{n}")));
    let mut free = candidates.map(|name| parent.join(name)).filter(|dir| !dir.exists());
    free.next().expect("the candidates never end")
}

fn append(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("cannot open {}", path.display()))
}

//! Event files that TensorBoard reads: records in TFRecord's framing, each an `Event` of TensorFlow's `event.proto`.
//!
//! The file is a function of `metrics.jsonl`, from which it is made anew when a run is resumed.

use std::path::Path;

use anyhow::{Context, Result};
use crc::{CRC_32_ISCSI, Crc};
use serde_json::{Map, Value};

use super::log::Log;
use crate::util::process::unix_seconds;

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// What is added to a checksum that is rotated, so that sums of sums stay good (TensorFlow, `core/lib/hash/crc32c.h`).
const MASK: u32 = 0xa282_ead8;

/// The events of a run.
pub struct Events(Log);

impl Events {
    /// Begins the events in `dir` with the steps that were taken before.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn open(dir: &Path, before: impl Iterator<Item = Map<String, Value>>) -> Result<Self> {
        let dir = dir.join("tensorboard");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        // One name for the run's life: TensorBoard reads on in a file that grows, and reads one anew that has shrunk.
        let mut log = Log::open(&dir.join("events.out.tfevents.preceptor"), 0)?;
        log.append(&record(&event(unix_seconds(), 0, &version())))?;
        for figures in before {
            log.append(&step(&figures))?;
        }
        Ok(Self(log))
    }

    /// Where they are written.
    pub fn log(&self) -> &Log {
        &self.0
    }

    /// Takes back what came after `length`.
    ///
    /// # Errors
    /// Names the file that cannot be shortened.
    pub fn rewind(&mut self, length: u64) -> Result<()> {
        self.0.rewind(length)
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.0.flush()
    }

    /// Appends the figures of a step.
    ///
    /// # Errors
    /// Names the file that cannot be written; what was to be written waits for the next try.
    pub fn step(&mut self, figures: &Map<String, Value>) -> Result<()> {
        self.0.append(&step(figures))
    }
}

/// One step's figures as a record.
fn step(figures: &Map<String, Value>) -> Vec<u8> {
    let number = figures.get("step").and_then(Value::as_u64).unwrap_or_default();
    let at = figures.get("time/unix_seconds").and_then(Value::as_f64).unwrap_or_default();
    let mut summary = Vec::new();
    for (tag, value) in figures {
        let told = ["step", "version", "time/unix_seconds"].contains(&tag.as_str());
        let Some(value) = value.as_f64().filter(|_| !told) else { continue };
        let mut scalar = Vec::new();
        field(&mut scalar, 1, tag.as_bytes());
        scalar.push(2 << 3 | 5);
        scalar.extend((value as f32).to_le_bytes());
        field(&mut summary, 1, &scalar);
    }
    let mut body = Vec::new();
    field(&mut body, 5, &summary);
    record(&event(at, number, &body))
}

fn version() -> Vec<u8> {
    let mut body = Vec::new();
    field(&mut body, 3, b"brain.Event:2");
    body
}

/// `Event { wall_time = 1, step = 2 }` and what follows.
fn event(at: f64, step: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1 << 3 | 1];
    bytes.extend(at.to_le_bytes());
    bytes.push(2 << 3);
    varint(&mut bytes, step);
    bytes.extend(body);
    bytes
}

/// A field of bytes in protobuf's encoding.
fn field(bytes: &mut Vec<u8>, number: u8, value: &[u8]) {
    bytes.push(number << 3 | 2);
    varint(bytes, value.len() as u64);
    bytes.extend(value);
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// A record with its length, and the checksums of both.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let masked = |bytes: &[u8]| CRC.checksum(bytes).rotate_right(15).wrapping_add(MASK).to_le_bytes();
    [&length[..], &masked(&length), event, &masked(event)].concat()
}

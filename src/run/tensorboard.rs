//! Event files for TensorBoard: records in TFRecord framing, each an `Event` of TensorFlow's `event.proto`.
//!
//! The file is derived from `metrics.jsonl`, and is written again when a run is resumed.

use std::path::Path;

use anyhow::{Context, Result};
use crc::{CRC_32_ISCSI, Crc};
use serde_json::{Map, Value};

use super::log::Log;
use crate::util::process::unix_seconds;

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// Constant added to a rotated checksum, so that checksums of data that contains checksums remain good (TensorFlow,
/// `core/lib/hash/crc32c.h`).
const MASK: u32 = 0xa282_ead8;

/// TensorBoard's event file of a run, with the scalars of each learner step.
pub struct EventFile(Log);

impl EventFile {
    /// Creates the event file in `dir` with the records of earlier steps.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn open(dir: &Path, before: impl Iterator<Item = Map<String, Value>>) -> Result<Self> {
        let dir = dir.join("tensorboard");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        // One name for all processes of a run: TensorBoard follows a file that grows, and reads a file again that has
        // shrunk.
        let mut log = Log::open(&dir.join("events.out.tfevents.preceptor"), 0)?;
        log.append(&record(&event(unix_seconds(), 0, &version())))?;
        for figures in before {
            log.append(&step_record(&figures))?;
        }
        Ok(Self(log))
    }

    /// Returns the underlying append-only file.
    pub fn log(&self) -> &Log {
        &self.0
    }

    /// Removes all bytes of the file after the first `length`.
    ///
    /// # Errors
    /// Names the file that cannot be shortened.
    pub fn rewind(&mut self, length: u64) -> Result<()> {
        self.0.rewind(length)
    }

    /// Writes the bytes that could not be written before.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.0.flush()
    }

    /// Appends the numbers of `figures`, a line of `metrics.jsonl`, as scalars of its step.
    ///
    /// # Errors
    /// Names the file that cannot be written. The record is kept in memory for the next attempt.
    pub fn step(&mut self, figures: &Map<String, Value>) -> Result<()> {
        self.0.append(&step_record(figures))
    }
}

/// Encodes the figures of a step as a record.
fn step_record(figures: &Map<String, Value>) -> Vec<u8> {
    let number = figures.get("step").and_then(Value::as_u64).unwrap_or_default();
    let at = figures.get("time/unix_seconds").and_then(Value::as_f64).unwrap_or_default();
    let mut summary = Vec::new();
    for (tag, value) in figures {
        let excluded = ["step", "version", "time/unix_seconds"].contains(&tag.as_str());
        let Some(value) = value.as_f64().filter(|_| !excluded) else { continue };
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

/// Encodes an `Event` with the fields `wall_time` (1) and `step` (2), followed by `body`.
fn event(at: f64, step: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1 << 3 | 1];
    bytes.extend(at.to_le_bytes());
    bytes.push(2 << 3);
    varint(&mut bytes, step);
    bytes.extend(body);
    bytes
}

/// Appends a length-delimited field in the encoding of protobuf.
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

/// Frames an event: its length, the event, and the masked checksum of each.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let masked = |bytes: &[u8]| CRC.checksum(bytes).rotate_right(15).wrapping_add(MASK).to_le_bytes();
    [&length[..], &masked(&length), event, &masked(event)].concat()
}

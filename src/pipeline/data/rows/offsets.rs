//! File offsets, stored in blocks.

use std::fs::File;
use std::io::{BufRead, BufReader};

use anyhow::Result;

use super::Positioned;

/// List of numbers in blocks. A growing `Vec` would need three times its size while it is reallocated.
#[derive(Default)]
pub(super) struct Offsets(Vec<Vec<u64>>);

impl Offsets {
    pub(super) const BLOCK: usize = 1 << 16;

    pub(super) fn push(&mut self, offset: u64) {
        match self.0.last_mut() {
            Some(block) if block.len() < Self::BLOCK => block.push(offset),
            _ => self.0.push(vec![offset]),
        }
    }

    pub(super) fn len(&self) -> usize {
        let last = self.0.last().map_or(0, Vec::len);
        self.0.len().saturating_sub(1) * Self::BLOCK + last
    }

    pub(super) fn get(&self, i: usize) -> u64 {
        self.0[i / Self::BLOCK][i % Self::BLOCK]
    }
}

/// Returns the offset of each line of `file` from `begin` on, and of the end of the file.
pub(super) fn lines(file: &File, begin: u64) -> Result<Offsets> {
    let (mut offsets, mut at) = (Offsets::default(), begin);
    offsets.push(begin);
    let mut reader = BufReader::with_capacity(1 << 20, Positioned { file, at });
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            break;
        }
        for (i, _) in buffer.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            offsets.push(at + i as u64 + 1);
        }
        let read = buffer.len();
        at += read as u64;
        reader.consume(read);
    }
    if offsets.get(offsets.len() - 1) != at {
        offsets.push(at);
    }
    Ok(offsets)
}

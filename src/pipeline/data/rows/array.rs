//! Index of the elements of a JSON array in a file, built without reading the file into memory.

use std::fs::File;
use std::io::{BufRead, BufReader};

use anyhow::{Result, bail, ensure};

use super::Positioned;
use super::offsets::Offsets;

/// State of the scanner between two bytes.
enum Place {
    /// Before the opening bracket.
    Before,
    /// Between elements; after a comma an element must follow.
    Between { comma: bool },
    /// In an element, at this bracket depth.
    Inside { depth: usize, text: Text },
    /// After the closing bracket.
    After,
}

/// Position of a byte relative to quoted strings.
#[derive(Clone, Copy, PartialEq)]
enum Text {
    Outside,
    Quoted,
    Escaped,
}

/// Returns the line, counted from 1, and the offset of each element of the array in `file`; the last offset is that of
/// the closing bracket.
///
/// # Errors
/// If the file is not exactly one array: it is truncated, followed by text, or has too many or too few commas.
pub(super) fn index(file: &File, begin: u64) -> Result<(Offsets, Offsets)> {
    let (mut lines, mut offsets) = (Offsets::default(), Offsets::default());
    let (mut at, mut line, mut place) = (begin, 1, Place::Before);
    let mut reader = BufReader::with_capacity(1 << 20, Positioned { file, at });
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            break;
        }
        for byte in buffer {
            let blank = byte.is_ascii_whitespace();
            place = match place {
                Place::Before if blank => place,
                Place::Before => Place::Between { comma: false },
                Place::Between { .. } if blank => place,
                Place::Between { comma } => match byte {
                    b']' if !comma => {
                        offsets.push(at);
                        Place::After
                    }
                    b',' | b']' => bail!("not JSON: there is a superfluous comma in line {line}"),
                    _ => {
                        offsets.push(at);
                        lines.push(line);
                        let text = if *byte == b'"' { Text::Quoted } else { Text::Outside };
                        Place::Inside { depth: usize::from(matches!(byte, b'{' | b'[')), text }
                    }
                },
                Place::Inside { depth, text } => match (text, byte) {
                    (Text::Escaped, _) => Place::Inside { depth, text: Text::Quoted },
                    (Text::Quoted, b'\\') => Place::Inside { depth, text: Text::Escaped },
                    (Text::Quoted, b'"') => Place::Inside { depth, text: Text::Outside },
                    (Text::Quoted, _) => place,
                    (Text::Outside, b'"') => Place::Inside { depth, text: Text::Quoted },
                    (Text::Outside, b'{' | b'[') => Place::Inside { depth: depth + 1, text },
                    (Text::Outside, b',') if depth == 0 => Place::Between { comma: true },
                    (Text::Outside, b']') if depth == 0 => {
                        offsets.push(at);
                        Place::After
                    }
                    (Text::Outside, b'}' | b']') => Place::Inside { depth: depth.saturating_sub(1), text },
                    (Text::Outside, _) => place,
                },
                Place::After if blank => place,
                Place::After => bail!("not JSON: there is text after the end of the list, in line {line}"),
            };
            line += u64::from(*byte == b'\n');
            at += 1;
        }
        let read = buffer.len();
        reader.consume(read);
    }
    ensure!(matches!(place, Place::After), "not JSON: the list is not closed; the file was cut off after line {line}");
    Ok((lines, offsets))
}

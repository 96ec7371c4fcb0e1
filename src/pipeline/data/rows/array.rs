//! Elements of a JSON array in a file, found without reading the file into memory.

use std::fs::File;
use std::io::{BufRead, BufReader};

use anyhow::{Result, bail, ensure};

use super::Positioned;
use super::offsets::Offsets;

/// The scanner's place between two bytes.
enum Place {
    /// Before the opening bracket.
    Before,
    /// Where an element may begin; after a comma it must.
    Between { comma: bool },
    /// In an element, so many brackets deep.
    Inside { depth: usize, text: Text },
    /// Behind the closing bracket.
    After,
}

/// Whether a byte is part of a text in quotes.
#[derive(Clone, Copy, PartialEq)]
enum Text {
    Outside,
    Quoted,
    Escaped,
}

/// Returns the lines, counted from 1, on which the elements of the array in `file` begin, and where they begin; the last place
/// is that of the closing bracket.
///
/// # Errors
/// A file that is not one array: cut off, with text behind it, or with a comma too many or too few.
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
                    b',' | b']' => bail!("not JSON: there is a comma too many in line {line}"),
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
                Place::After => bail!("not JSON: there is text behind the end of the list, in line {line}"),
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

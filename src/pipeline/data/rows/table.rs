//! Comma- and tab-separated values: the first record names the columns, and all values are texts.

use std::fs::File;
use std::io::BufReader;

use anyhow::{Context, Result, anyhow, bail, ensure};
use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};

use super::super::dialogue::messages_in;
use super::Positioned;
use super::offsets::Offsets;

/// Columns of a table, and line numbers of its records.
pub(super) struct Table {
    columns: Vec<String>,
    delimiter: u8,
    lines: Offsets,
}

impl Table {
    /// Indexes the table in `file` from `begin` on. Returns it with the offset of each record, without the header.
    ///
    /// # Errors
    /// If the file has no header, or a column name occurs twice.
    pub(super) fn index(file: &File, begin: u64, delimiter: u8) -> Result<(Self, Offsets)> {
        let input = BufReader::with_capacity(1 << 20, Positioned { file, at: begin });
        let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).delimiter(delimiter).from_reader(input);
        let mut record = ByteRecord::new();
        ensure!(reader.read_byte_record(&mut record)?, "it is empty; a table begins with the names of its columns");
        let name = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| anyhow!("its header is not UTF-8"));
        let columns = record.iter().map(name).collect::<Result<Vec<_>>>()?;
        for (i, column) in columns.iter().enumerate() {
            ensure!(
                !columns[..i].contains(column),
                "its header names the column {column:?} twice; rename one of the two"
            );
        }
        if let [one] = columns.as_slice() {
            let other = [(';', "semicolons"), ('\t', "tabs")].into_iter().find(|(sign, _)| one.contains(*sign));
            if let Some((_, signs)) = other {
                bail!("its header is separated by {signs}; a .csv is separated by commas, and a .tsv by tabs");
            }
        }
        let mut table = Self { columns, delimiter, lines: Offsets::default() };
        let mut offsets = Offsets::default();
        loop {
            let found = reader.read_byte_record(&mut record)?;
            let at = record.position().map_or(reader.position().byte(), csv::Position::byte);
            if !found {
                offsets.push(begin + reader.position().byte());
                break;
            }
            offsets.push(begin + at);
            table.lines.push(record.position().map_or(0, csv::Position::line));
        }
        Ok((table, offsets))
    }

    /// Returns the line on which record `i` begins, blank lines before it included.
    pub(super) fn line(&self, i: usize) -> u64 {
        self.lines.get(i)
    }

    /// Parses the record in `text`; `None` if it is blank. A value that is a JSON list of messages becomes that list.
    ///
    /// # Errors
    /// If the number of values differs from the number of columns, or a quotation is not closed.
    pub(super) fn row(&self, text: &str) -> Result<Option<Value>> {
        if text.trim_matches(['\r', '\n']).is_empty() {
            return Ok(None);
        }
        let quotes = text.bytes().filter(|byte| *byte == b'"').count();
        if quotes % 2 == 1 && text.trim().contains('\n') {
            bail!(
                "a text in quotes is not closed, so that it continues over the next lines; write a quote inside it twice"
            );
        }
        let mut reader = ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(self.delimiter)
            .from_reader(text.as_bytes());
        let record = reader.records().next().context("the record is empty")??;
        ensure!(
            record.len() == self.columns.len(),
            "the record has {} values and the header {} columns; put texts that hold {:?} or a line's end into quotes",
            record.len(),
            self.columns.len(),
            char::from(self.delimiter)
        );
        let values = self.columns.iter().cloned().zip(record.iter().map(value));
        Ok(Some(Value::Object(values.collect::<Map<_, _>>())))
    }
}

fn value(text: &str) -> Value {
    messages_in(text).map_or_else(|| Value::String(text.to_owned()), Value::Array)
}

//! Files that are unpacked before their rows are read: compressed files and parquet.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, ensure};
use parquet::column::page::Page;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use super::Positioned;
use crate::util::quiet;

/// Maximum ratio of unpacked to packed bytes, and a size in bytes that is always allowed: text compresses about ten to
/// one, decompression bombs a thousand to one.
const MAX_UNPACKED: (u64, u64) = (200, 1 << 30);

/// Key of an object that represents a binary value, with its number of bytes. No text has such a key.
pub(in crate::pipeline::data) const BINARY: &str = "\0binary";

fn most(file: &File) -> Result<u64> {
    let (ratio, least) = MAX_UNPACKED;
    Ok(file.metadata()?.len().saturating_mul(ratio).max(least))
}

/// Returns the content of `file` without gzip or zstd compression, which is detected by its first bytes, and `name`
/// without the compression's extension.
///
/// # Errors
/// If the file is damaged, or unpacks to far more than text does.
pub(super) fn unpacked(file: File, name: &str) -> Result<(File, String)> {
    let mut head = [0; 4];
    let read = file.read_at(&mut head, 0)?;
    let (endings, zstd): (&[&str], bool) = match &head[..read] {
        [0x1f, 0x8b, ..] => (&[".gz", ".gzip"], false),
        [0x28, 0xb5, 0x2f, 0xfd] => (&[".zst", ".zstd"], true),
        // A file with the extension but without the magic bytes is refused as damaged.
        _ if name.ends_with(".gz") => (&[".gz"], false),
        _ if name.ends_with(".zst") => (&[".zst"], true),
        _ => return Ok((file, name.to_owned())),
    };
    let stripped = endings.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name).to_owned();
    let most = most(&file)?;
    let input = BufReader::new(Positioned { file: &file, at: 0 });
    let unpacked = if zstd {
        let decoder = zstd::stream::read::Decoder::with_buffer(input)?;
        spool(|out| unpack(decoder, out, most))
    } else {
        spool(|out| unpack(flate2::bufread::MultiGzDecoder::new(input), out, most))
    };
    Ok((unpacked?, stripped))
}

/// Creates an unnamed temporary file and fills it with `fill`.
fn spool(fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<File> {
    let file = tempfile::tempfile().context("cannot create a temporary file to unpack it into")?;
    let mut out = BufWriter::new(&file);
    let filled = fill(&mut out).and_then(|()| Ok(out.flush()?));
    drop(out);
    filled.map_err(|error| {
        let full = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
        };
        if !error.chain().any(full) {
            return error;
        }
        let place = std::env::temp_dir();
        error.context(format!(
            "it is unpacked into a temporary file, and {} is full; make room there, or set TMPDIR to another folder",
            place.display()
        ))
    })?;
    Ok(file)
}

/// Unpacks at most `most` bytes.
fn unpack(input: impl Read, out: &mut BufWriter<&File>, most: u64) -> Result<()> {
    let unpacked = std::io::copy(&mut input.take(most.saturating_add(1)), out)?;
    ensure!(unpacked <= most, "{}", too_much(most));
    Ok(())
}

fn too_much(most: u64) -> String {
    format!(
        "it unpacks to more than {most} bytes, far more than text does; if that is intended, unpack it and name the .jsonl"
    )
}

/// Returns the rows of a parquet file as JSON lines.
///
/// # Errors
/// If the file is damaged, or unpacks to far more than text does.
pub(super) fn parquet(file: File) -> Result<File> {
    let most = most(&file)?;
    spool(|out| rows(file, out, most))
}

/// Writes at most `most` bytes of rows. The parquet crate trusts the file's metadata and panics if it is inconsistent.
fn rows(file: File, out: &mut BufWriter<&File>, most: u64) -> Result<()> {
    let read = || -> Result<()> {
        let reader =
            SerializedFileReader::new(file).map_err(|error| anyhow!("not a readable parquet file: {error}"))?;
        let refused = |error| anyhow!("not a readable parquet file: {error}");
        for group in 0..reader.num_row_groups() {
            let group = reader.get_row_group(group).map_err(refused)?;
            for column in 0..group.num_columns() {
                let first = group.get_column_page_reader(column).and_then(|mut pages| pages.get_next_page());
                // The library allocates space for this many values before it reads any.
                if let Some(Page::DictionaryPage { buf, num_values, .. }) = first.map_err(refused)? {
                    ensure!(
                        num_values as usize <= buf.len(),
                        "a dictionary of {} bytes says that it has {num_values} values",
                        buf.len()
                    );
                }
            }
        }
        let fields = reader.metadata().file_metadata().schema().get_fields();
        for (i, field) in fields.iter().enumerate() {
            let twice = fields[..i].iter().any(|other| other.name() == field.name());
            ensure!(!twice, "it has the column {:?} twice; rename one of the two", field.name());
        }
        let rows = reader.get_row_iter(None).map_err(|error| anyhow!("its columns cannot be read: {error}"))?;
        let mut written = 0;
        for (i, row) in rows.enumerate() {
            let row = row.map_err(|error| anyhow!("row {} cannot be read: {error}", i + 1))?;
            let line = serde_json::to_vec(&object(&row))?;
            written += line.len() as u64 + 1;
            ensure!(written <= most, "{}", too_much(most));
            out.write_all(&line)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    };
    quiet::catch(read).unwrap_or_else(|| Err(anyhow!("not a readable parquet file: its contents are inconsistent")))
}

fn object(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect::<Map<_, _>>())
}

/// Converts a value to JSON. A binary value is not text and becomes an object with [`BINARY`].
fn value(field: &Field) -> Value {
    match field {
        Field::Bytes(bytes) => json!({ BINARY: bytes.len() }),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        Field::MapInternal(map) => {
            let name = |field: &Field| match field.to_json_value() {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(key, field)| (name(key), value(field))).collect())
        }
        other => other.to_json_value(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;
    use crate::pipeline::data::Rows;

    #[test]
    fn a_decompression_bomb_is_refused() {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        packed.write_all(&vec![b'\n'; 1 << 20]).unwrap();
        let packed = packed.finish().unwrap();
        let unpacked = |most| spool(|out| unpack(flate2::bufread::MultiGzDecoder::new(packed.as_slice()), out, most));
        let error = unpacked((1 << 20) - 1).unwrap_err().to_string();
        assert!(error.contains("more than 1048575 bytes"), "{error}");
        assert_eq!(unpacked(1 << 20).unwrap().metadata().unwrap().len(), 1 << 20);
    }

    /// Returns a parquet file with one column `a` that has the same value in each of `rows`.
    fn parquet_file(text: &str, annotation: &str, rows: usize) -> Vec<u8> {
        let schema = parse_message_type(&format!("message rows {{ required binary a{annotation}; }}")).unwrap();
        let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&vec![ByteArray::from(text); rows], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.into_inner().unwrap()
    }

    #[test]
    fn a_parquet_decompression_bomb_is_refused() {
        let packed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(packed.path(), parquet_file("many times", " (utf8)", 1 << 16)).unwrap();
        assert!(packed.path().metadata().unwrap().len() < 4096);
        let unpacked = |most| spool(|out| rows(File::open(packed.path()).unwrap(), out, most));
        let line = r#"{"a":"many times"}"#.len() as u64 + 1;
        let error = unpacked((line << 16) - 1).unwrap_err().to_string();
        assert!(error.contains("it unpacks to more than"), "{error}");
        assert_eq!(unpacked(line << 16).unwrap().metadata().unwrap().len(), line << 16);
    }

    /// A column that is not marked as text is not read as text, nor as base64.
    #[test]
    fn a_binary_column_of_parquet_is_not_read_as_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        std::fs::write(&path, parquet_file("x", "", 1)).unwrap();
        assert_eq!(Rows::open(&path).unwrap().get(0).unwrap().unwrap()["a"], json!({ BINARY: 1 }));
    }

    /// Changes each byte of a valid file in turn: the file is read, or refused with one error.
    #[test]
    fn a_damaged_parquet_file_is_refused_and_nothing_panics() {
        let sound = parquet_file("x", " (utf8)", 3);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        let mut refused = 0;
        for (i, flip) in (0..sound.len()).flat_map(|i| [0x01, 0x40, 0xff].map(|flip| (i, flip))) {
            let mut bytes = sound.clone();
            bytes[i] ^= flip;
            std::fs::write(&path, bytes).unwrap();
            refused += u32::from(Rows::open(&path).is_err());
        }
        assert!(refused > 100, "{refused}");
    }
}

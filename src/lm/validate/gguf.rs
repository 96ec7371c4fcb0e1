//! Bounded reader of GGUF headers. Candle's own reader divides by an alignment of zero, lets shapes overflow, and lets
//! values take thirty times the file's size; this one reads the header safely and returns candle's type.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::Shape;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value, VersionedMagic};

/// Largest number of metadata entries, and of tensors; models have some dozens and some thousands.
const MAX_ENTRIES: u64 = 1 << 16;
/// Largest total number of values, counting the elements of lists; the largest vocabularies have a million.
const MAX_VALUES: u64 = 1 << 24;
/// Largest number of bytes of one text.
const LONGEST_TEXT: u64 = 16 << 20;
/// Largest depth of nested lists.
const MAX_DEPTH: usize = 4;

/// Opens a file and reads its header. Checks that every listed tensor lies completely in the file and overlaps no
/// other.
///
/// # Errors
/// If the file is invalid; the error names the entry or tensor and the byte.
pub fn read(path: &Path) -> Result<(BufReader<File>, Content)> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let size = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    let mut header = Header { file: BufReader::new(file), at: 0, size, values: MAX_VALUES, long_lengths: true };
    let content = header.content().with_context(|| format!("{} is not a readable GGUF file", path.display()))?;
    Ok((header.file, content))
}

/// Returns the text in a value. Unlike candle's accessors, this function and the next ones report a value's type
/// without printing the complete value.
///
/// # Errors
/// If the value has another type; the error names it.
pub fn text(value: &Value) -> Result<&str> {
    match value {
        Value::String(text) => Ok(text),
        other => bail!("is of type {:?}, not a text", other.value_type()),
    }
}

/// Returns the elements of an array of a GGUF file's metadata.
///
/// # Errors
/// If the value is not an array. The error names its type but not its key.
pub fn list(value: &Value) -> Result<&[Value]> {
    match value {
        Value::Array(list) => Ok(list),
        other => bail!("is of type {:?}, not a list", other.value_type()),
    }
}

/// Returns the boolean in a value.
///
/// # Errors
/// If the value has another type; the error names it.
pub fn boolean(value: &Value) -> Result<bool> {
    match value {
        Value::Bool(boolean) => Ok(*boolean),
        other => bail!("is of type {:?}, not true or false", other.value_type()),
    }
}

struct Header {
    file: BufReader<File>,
    at: u64,
    size: u64,
    /// Number of values that may still be read.
    values: u64,
    /// True if lengths have eight bytes, as they have from version 2 on.
    long_lengths: bool,
}

impl Header {
    fn content(&mut self) -> Result<Content> {
        ensure!(&self.array::<4>()? == b"GGUF", "it does not begin with the letters GGUF");
        let magic = match self.u32()? {
            1 => VersionedMagic::GgufV1,
            2 => VersionedMagic::GgufV2,
            3 => VersionedMagic::GgufV3,
            other => bail!("its version is {other}; these can be read: 1, 2, 3"),
        };
        self.long_lengths = magic != VersionedMagic::GgufV1;
        let (tensors, entries) = (self.length()?, self.length()?);
        for (what, count) in [("tensors", tensors), ("entries of metadata", entries)] {
            ensure!(count <= MAX_ENTRIES, "it claims {count} {what}, the limit is {MAX_ENTRIES}");
        }
        let mut metadata = HashMap::new();
        for i in 0..entries {
            let key = self.text().with_context(|| format!("in the name of metadata entry {i}"))?;
            let value = self.u32().and_then(|kind| self.value(kind, 0));
            let value = value.with_context(|| format!("in the metadata entry {}", quoted(&key)))?;
            ensure!(metadata.insert(key.clone(), value).is_none(), "the metadata entry {} appears twice", quoted(&key));
        }
        let mut tensor_infos = HashMap::new();
        for i in 0..tensors {
            let name = self.text().with_context(|| format!("in the name of tensor {i}"))?;
            let info = self.tensor().with_context(|| format!("in the tensor {}", quoted(&name)))?;
            ensure!(tensor_infos.insert(name.clone(), info).is_none(), "the tensor {} appears twice", quoted(&name));
        }
        check_complete(&metadata)?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::U32(n)) if n.is_power_of_two() && *n <= 1 << 16 => u64::from(*n),
            Some(Value::U32(n)) => bail!("general.alignment = {n} is not a power of two up to {}", 1 << 16),
            Some(other) => bail!("general.alignment is of type {:?}, not U32", other.value_type()),
        };
        let tensor_data_offset = self.at.div_ceil(alignment) * alignment;
        self.check_layout(&tensor_infos, tensor_data_offset)?;
        Ok(Content { magic, metadata, tensor_infos, tensor_data_offset })
    }

    /// Checks that all tensors lie in the file and do not overlap, so that memory stays in proportion to the file.
    fn check_layout(&self, tensors: &HashMap<String, TensorInfo>, data: u64) -> Result<()> {
        let mut places: Vec<(u64, u64, &String)> = Vec::with_capacity(tensors.len());
        for (name, info) in tensors {
            let bytes = bytes(info).with_context(|| format!("in the tensor {}", quoted(name)))?;
            let start = data.checked_add(info.offset);
            let end = start.and_then(|start| start.checked_add(bytes));
            match (start, end) {
                (Some(start), Some(end)) if end <= self.size => places.push((start, end, name)),
                _ => bail!(
                    "the tensor {} takes {bytes} bytes from byte {} on, and the file ends at byte {}; is the download complete?",
                    quoted(name),
                    start.unwrap_or(u64::MAX),
                    self.size
                ),
            }
        }
        places.sort_unstable();
        match places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => bail!("the tensors {} and {} overlap", quoted(pair[0].2), quoted(pair[1].2)),
            None => Ok(()),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.check_remaining(N as u64)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    /// Checks that at least this many bytes follow.
    fn check_remaining(&self, bytes: u64) -> Result<()> {
        ensure!(
            bytes <= self.size.saturating_sub(self.at),
            "{bytes} bytes should follow at byte {}, and the file ends at byte {}; is the download complete?",
            self.at,
            self.size
        );
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<u64> {
        if self.long_lengths { self.u64() } else { Ok(u64::from(self.u32()?)) }
    }

    fn text(&mut self) -> Result<String> {
        let length = self.length()?;
        ensure!(length <= LONGEST_TEXT, "a text claims {length} bytes, the limit is {LONGEST_TEXT}");
        self.check_remaining(length)?;
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes)?;
        self.at += length;
        // Some files end their texts with zeros, and some contain bytes that are not UTF-8.
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        self.values = self
            .values
            .checked_sub(1)
            .with_context(|| format!("the metadata has more than {MAX_VALUES} values, which is the limit"))?;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => bail!("{other} is neither true (1) nor false (0)"),
            },
            8 => Value::String(self.text()?),
            9 => {
                ensure!(depth < MAX_DEPTH, "lists are nested more than {MAX_DEPTH} deep");
                let (kind, length) = (self.u32()?, self.length()?);
                ensure!(length <= self.values, "a list claims {length} values, the limit is {MAX_VALUES} in total");
                // A value takes at least one byte.
                self.check_remaining(length)?;
                Value::Array((0..length).map(|_| self.value(kind, depth + 1)).collect::<Result<_>>()?)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => bail!("the value type {other} is unknown"),
        })
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let rank = self.u32()?;
        ensure!((1..=4).contains(&rank), "it has {rank} dimensions; from 1 to 4 can be read");
        let mut shape = (0..rank).map(|_| Ok(usize::try_from(self.length()?)?)).collect::<Result<Vec<_>>>()?;
        // GGUF stores the innermost dimension first.
        shape.reverse();
        let ggml_dtype = kind(self.u32()?)?;
        let offset = self.u64()?;
        Ok(TensorInfo { ggml_dtype, shape: Shape::from(shape), offset })
    }
}

/// Returns the dtype with this number, if candle supports it.
fn kind(number: u32) -> Result<GgmlDType> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        other => bail!(
            "values of type {} cannot be read; these can: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K. Take the model's file of one of these types",
            TYPES
                .iter()
                .find(|(number, _)| *number == other)
                .map_or_else(|| other.to_string(), |(_, name)| (*name).into())
        ),
    })
}

/// Names of unsupported types, by their numbers in GGUF.
const TYPES: [(u32, &str); 23] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// Rejects a file that is only a part of a model.
fn check_complete(metadata: &HashMap<String, Value>) -> Result<()> {
    let number = |key: &str| match metadata.get(key) {
        Some(Value::U8(n)) => Some(u64::from(*n)),
        Some(Value::U16(n)) => Some(u64::from(*n)),
        Some(Value::U32(n)) => Some(u64::from(*n)),
        Some(Value::I32(n)) => u64::try_from(*n).ok(),
        Some(Value::U64(n)) => Some(*n),
        _ => None,
    };
    let count = number("split.count").unwrap_or(1);
    ensure!(
        count <= 1,
        "it is part {} of a model in {count} files (split.count), which are not read; join them with llama-gguf-split --merge",
        number("split.no").map_or(1, |n| n + 1)
    );
    Ok(())
}

/// Returns the number of bytes of a tensor.
fn bytes(info: &TensorInfo) -> Result<u64> {
    let (dims, block) = (info.shape.dims(), info.ggml_dtype.block_size());
    let row = *dims.last().unwrap_or(&0);
    ensure!(dims.iter().all(|size| *size > 0), "its shape {dims:?} has no values");
    ensure!(row.is_multiple_of(block), "its rows of {row} values are not a multiple of a block's {block}");
    let values = dims.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
    // A dequantised value takes four bytes.
    let values = values.filter(|values| *values < isize::MAX as usize / 4);
    let values = values.ok_or_else(|| anyhow!("its shape {dims:?} has more values than memory can hold"))?;
    (values / block)
        .checked_mul(info.ggml_dtype.type_size())
        .map(|bytes| bytes as u64)
        .ok_or_else(|| anyhow!("its shape {dims:?} has more values than memory can hold"))
}

/// Formats a name for an error: quoted, on one line, at most 80 characters.
fn quoted(name: &str) -> String {
    let short: String = name.chars().take(80).collect();
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a file of version 3 from its counts and `body`.
    fn file(tensors: u64, entries: u64, body: &[&[u8]]) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([tensors.to_le_bytes(), entries.to_le_bytes()].concat());
        bytes.extend(body.concat());
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn tensor(name: &str, shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let shape_bytes: Vec<u8> = shape.iter().flat_map(|size| size.to_le_bytes()).collect();
        [&text(name), &(shape.len() as u32).to_le_bytes()[..], &shape_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()]
            .concat()
    }

    fn entry(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&text(name), &kind.to_le_bytes()[..], value].concat()
    }

    #[track_caller]
    fn check(bytes: &[u8], expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", read(&path).expect_err("it should be rejected"));
        assert!(error.contains(expected) && error.contains("x.gguf"), "{error}");
    }

    #[test]
    fn the_claims_of_a_header_are_checked_against_the_file() {
        let list = |kind: u32, length: u64| [&kind.to_le_bytes()[..], &length.to_le_bytes()].concat();
        check(b"GGML\x03\0\0\0", "letters GGUF");
        check(b"GGUF\x09\0\0\0", "its version is 9");
        check(b"GGUF\x03\0\0\0", "8 bytes should follow at byte 8, and the file ends at byte 8");
        check(&file(1 << 40, 0, &[]), "claims 1099511627776 tensors, the limit is 65536");
        check(&file(0, u64::MAX, &[]), "entries of metadata");
        check(&file(0, 1, &[&u64::MAX.to_le_bytes()]), "a text claims 18446744073709551615 bytes");
        check(&file(0, 1, &[&1000u64.to_le_bytes()]), "1000 bytes should follow at byte 32");
        check(&file(0, 1, &[&entry("a", 13, &[])]), "in the metadata entry \"a\": the value type 13 is unknown");
        check(&file(0, 1, &[&entry("a", 7, &[2])]), "2 is neither true");
        check(&file(0, 1, &[&entry("a", 9, &list(0, 1 << 30))]), "a list claims 1073741824 values");
        check(&file(0, 1, &[&entry("a", 9, &list(0, 1 << 20))]), "1048576 bytes should follow");
        let deep: Vec<u8> = (0..8).flat_map(|_| list(9, 1)).collect();
        check(&file(0, 1, &[&entry("a", 9, &[&deep[..], &[0; 8]].concat())]), "lists are nested more than 4 deep");
        check(&file(0, 2, &[&entry("a", 7, &[1]), &entry("a", 7, &[1])]), "\"a\" appears twice");
        check(&file(0, 1, &[&entry("general.alignment", 0, &[0])]), "of type U8");
        for wrong in [0u32, 3, 1 << 20] {
            check(&file(0, 1, &[&entry("general.alignment", 4, &wrong.to_le_bytes())]), "not a power of two");
        }
    }

    #[test]
    fn tensors_must_lie_in_the_file_and_not_overlap() {
        check(&file(1, 0, &[&tensor("w", &[], 0, 0)]), "in the tensor \"w\": it has 0 dimensions");
        check(&file(1, 0, &[&tensor("w", &[1; 5], 0, 0)]), "it has 5 dimensions");
        check(&file(1, 0, &[&tensor("w", &[4], 99, 0)]), "values of type 99 cannot be read");
        check(&file(1, 0, &[&tensor("w", &[4], 20, 0)]), "values of type IQ4_NL cannot be read");
        let split = [entry("split.no", 2, &1u16.to_le_bytes()), entry("split.count", 2, &2u16.to_le_bytes())];
        check(&file(0, 2, &[&split.concat()]), "part 2 of a model in 2 files (split.count)");
        check(&file(1, 0, &[&tensor("w", &[0, 4], 0, 0)]), "has no values");
        check(&file(1, 0, &[&tensor("w", &[33], 2, 0)]), "rows of 33 values are not a multiple of a block's 32");
        check(&file(1, 0, &[&tensor("w", &[1 << 32, 1 << 32], 0, 0)]), "more values than memory can hold");
        check(&file(1, 0, &[&tensor("w", &[1 << 40], 0, 0)]), "takes 4398046511104 bytes from byte 64 on");
        check(&file(1, 0, &[&tensor("w", &[4], 0, u64::MAX)]), "takes 16 bytes from byte 18446744073709551615 on");
        let twice = file(2, 0, &[&tensor("v", &[4], 0, 0), &tensor("w", &[4], 0, 8), &[0; 64]]);
        check(&twice, "the tensors \"v\" and \"w\" overlap");
    }

    #[test]
    fn a_valid_file_is_read_as_by_candle() {
        let body = [entry("a", 9, &[&5u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7i32.to_le_bytes()].concat())];
        let bytes = file(1, 1, &[&body[0], &tensor("w", &[2, 3], 0, 0), &[0; 64]]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        std::fs::write(&path, &bytes).unwrap();
        let (_, ours) = read(&path).unwrap();
        let theirs = Content::read(&mut std::io::Cursor::new(&bytes)).unwrap();
        assert_eq!(format!("{:?}", ours.metadata), format!("{:?}", theirs.metadata));
        assert_eq!(format!("{:?}", ours.tensor_infos), format!("{:?}", theirs.tensor_infos));
        assert_eq!(ours.tensor_data_offset, theirs.tensor_data_offset);
    }
}

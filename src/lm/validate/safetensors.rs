//! Validation of the header of a safetensors file, before the complete file is read.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::quantised;
use crate::util::read_bounded;

/// Largest number of bytes of a header, as the format specifies it.
const LONGEST: u64 = 100_000_000;

/// Dtypes that can be converted to f32.
const READABLE: [Dtype; 9] =
    [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I64, Dtype::I32, Dtype::I16, Dtype::U32, Dtype::U8];

/// Places of the tensors in a file.
#[derive(Debug)]
pub struct Layout {
    /// Offset in the file of the first tensor's values, in bytes.
    pub begin: u64,
    /// The tensors by name, in the order of their values. Their offsets are relative to [`Self::begin`].
    pub tensors: Vec<(String, TensorInfo)>,
}

/// Checks that a file is as long as its header says, and that every tensor in it can be read. Returns the places of its
/// tensors.
///
/// # Errors
/// If the file is invalid; the error names the file and the tensor.
pub fn check(path: &Path) -> Result<Layout> {
    let check = || -> Result<Layout> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut begin = Vec::new();
        file.by_ref().take(64).read_to_end(&mut begin)?;
        if let Some(words) = read_bounded::misplaced_content(&begin) {
            bail!("{words}");
        }
        file.rewind()?;
        let mut length = [0; 8];
        ensure!(size >= 8, "it has {size} bytes, and its header's length alone takes 8; is the download complete?");
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= LONGEST, "its header claims {length} bytes, the limit is {LONGEST}");
        ensure!(
            length <= size - 8,
            "its header claims {length} bytes, and the file has {size}; is the download complete?"
        );
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header)?;
        Ok(Layout { begin: 8 + length, tensors: check_header(&header, size - 8 - length)? })
    };
    check().with_context(|| format!("cannot read {}", path.display()))
}

/// Checks a header that is followed by `data` bytes of values.
fn check_header(header: &[u8], data: u64) -> Result<Vec<(String, TensorInfo)>> {
    // Parsing also checks that the tensors are contiguous and as long as their shapes.
    let metadata: Metadata =
        serde_json::from_slice(header).context("its header is invalid; is the download complete?")?;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let short: String = name.chars().take(80).collect();
        quantised::check_tensor(&name, info.dtype)?;
        let known = READABLE.contains(&info.dtype);
        ensure!(known, "the tensor {short:?} holds values of type {:?}, which cannot be read", info.dtype);
        let (has_values, rank) = (info.shape.iter().all(|size| *size > 0), info.shape.len());
        ensure!(has_values && rank <= 8, "the tensor {short:?} has no values, or more than 8 dimensions");
        tensors.push((name, info.clone()));
    }
    let claimed = metadata.data_len() as u64;
    ensure!(
        claimed == data,
        "its header lists {claimed} bytes of values, and {data} follow; is the download complete?"
    );
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    fn check(header: &str, data: usize, expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        std::fs::write(&path, bytes).unwrap();
        match (super::check(&path), expected) {
            (Ok(_), "") => {}
            (Ok(_), _) => panic!("{header} is accepted"),
            (Err(error), expected) => {
                let error = format!("{error:#}");
                assert!(error.contains(expected) && error.contains("x.safetensors"), "{header}: {error}");
            }
        }
    }

    #[test]
    fn files_in_place_of_the_weights_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        for (content, words) in [
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
            ("\n<!DOCTYPE html><html>", "an HTML page"),
            ("<HTML>  ", "an HTML page"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = format!("{:#}", super::check(&path).unwrap_err());
            assert!(error.contains(words), "{content:?}: {error}");
        }
    }

    #[test]
    fn the_claims_of_a_header_are_checked_against_the_file() {
        let one = |dtype: &str, shape: &str, end: &str| {
            format!(
                r#"{{"__metadata__":{{"format":"pt"}},"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#
            )
        };
        check(&one("F32", "[2]", "8"), 8, "");
        check(&one("F32", "[]", "4"), 4, "");
        check(&one("F32", "[2]", "8"), 7, "lists 8 bytes of values, and 7 follow");
        check(&one("F32", "[2]", "8"), 9, "lists 8 bytes of values, and 9 follow");
        check(&one("F32", "[3]", "8"), 8, "its header is invalid");
        check(&one("F32", "[4294967296,4294967296,4]", "8"), 8, "its header is invalid");
        check(&one("C64", "[1]", "8"), 8, "the tensor \"w\" holds values of type C64");
        check(&one("F8_E4M3", "[8]", "8"), 8, "holds values of type F8_E4M3, which are quantised");
        check(&one("F8_E5M2", "[8]", "8"), 8, "holds values of type F8_E5M2, which are quantised");
        check(&one("I8", "[8]", "8"), 8, "holds values of type I8");
        check(&one("F32", "[0,1099511627776,1099511627776]", "0"), 0, "has no values");
        check("{", 0, "its header is invalid");
        check("[]", 0, "its header is invalid");
    }

    #[test]
    fn a_length_beyond_the_file_is_rejected_before_allocation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        for (length, words) in [(u64::MAX, "the limit is"), (50_000_000, "and the file has 16")] {
            std::fs::write(&path, [length.to_le_bytes(), [0; 8]].concat()).unwrap();
            let error = format!("{:#}", super::check(&path).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        std::fs::write(&path, b"1234").unwrap();
        assert!(format!("{:#}", super::check(&path).unwrap_err()).contains("it has 4 bytes"));
    }
}

//! The header of a safetensors file, checked before the file is read whole.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::quantised;
use crate::util::read_bounded;

/// Most bytes of a header, as the format has it.
const LONGEST: u64 = 100_000_000;

/// The types of values that become f32 here.
const READABLE: [Dtype; 9] =
    [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I64, Dtype::I32, Dtype::I16, Dtype::U32, Dtype::U8];

/// Checks that the file at `path` is as long as its header says, and that every tensor of it can be read. Returns the names of
/// its tensors.
///
/// # Errors
/// Names the file, and the tensor at fault.
pub fn check(path: &Path) -> Result<Vec<String>> {
    let check = || -> Result<Vec<String>> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut begin = Vec::new();
        file.by_ref().take(64).read_to_end(&mut begin)?;
        if let Some(words) = read_bounded::stand_in(&begin) {
            bail!("{words}");
        }
        file.rewind()?;
        let mut length = [0; 8];
        ensure!(size >= 8, "it has {size} bytes, and its header's length alone takes 8; was it downloaded whole?");
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= LONGEST, "its header claims {length} bytes, and {LONGEST} are the most there may be");
        ensure!(
            length <= size - 8,
            "its header claims {length} bytes, and the file has {size}; was it downloaded whole?"
        );
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header)?;
        sound(&header, size - 8 - length)
    };
    check().with_context(|| format!("cannot read {}", path.display()))
}

/// Checks a header that `data` bytes of values follow.
fn sound(header: &[u8], data: u64) -> Result<Vec<String>> {
    // This also checks that the tensors' places follow on each other, and are as long as their shapes.
    let metadata: Metadata = serde_json::from_slice(header).context("its header is wrong; was it downloaded whole?")?;
    let mut names = Vec::new();
    for (name, info) in metadata.tensors() {
        let short: String = name.chars().take(80).collect();
        quantised::tensor(&name, info.dtype)?;
        let known = READABLE.contains(&info.dtype);
        ensure!(known, "the tensor {short:?} holds values of type {:?}, which cannot be read", info.dtype);
        let (whole, rank) = (info.shape.iter().all(|size| *size > 0), info.shape.len());
        ensure!(whole && rank <= 8, "the tensor {short:?} has no values, or more than 8 dimensions");
        names.push(name);
    }
    let claimed = metadata.data_len() as u64;
    ensure!(claimed == data, "its header lists {claimed} bytes of values, and {data} follow; was it downloaded whole?");
    Ok(names)
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
    fn what_a_header_claims_is_held_against_the_file() {
        let one = |dtype: &str, shape: &str, end: &str| {
            format!(
                r#"{{"__metadata__":{{"format":"pt"}},"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#
            )
        };
        check(&one("F32", "[2]", "8"), 8, "");
        check(&one("F32", "[]", "4"), 4, "");
        check(&one("F32", "[2]", "8"), 7, "lists 8 bytes of values, and 7 follow");
        check(&one("F32", "[2]", "8"), 9, "lists 8 bytes of values, and 9 follow");
        check(&one("F32", "[3]", "8"), 8, "its header is wrong");
        check(&one("F32", "[4294967296,4294967296,4]", "8"), 8, "its header is wrong");
        check(&one("C64", "[1]", "8"), 8, "the tensor \"w\" holds values of type C64");
        check(&one("F8_E4M3", "[8]", "8"), 8, "holds values of type F8_E4M3, which are quantised");
        check(&one("F8_E5M2", "[8]", "8"), 8, "holds values of type F8_E5M2, which are quantised");
        check(&one("I8", "[8]", "8"), 8, "holds values of type I8");
        check(&one("F32", "[0,1099511627776,1099511627776]", "0"), 0, "has no values");
        check("{", 0, "its header is wrong");
        check("[]", 0, "its header is wrong");
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_memory_is_spent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        for (length, words) in [(u64::MAX, "the most there may be"), (50_000_000, "and the file has 16")] {
            std::fs::write(&path, [length.to_le_bytes(), [0; 8]].concat()).unwrap();
            let error = format!("{:#}", super::check(&path).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        std::fs::write(&path, b"1234").unwrap();
        assert!(format!("{:#}", super::check(&path).unwrap_err()).contains("it has 4 bytes"));
    }
}

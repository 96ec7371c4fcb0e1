//! An entry of the label cache: an answer as JSON after a checksum of it and its key.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::Key;

/// First byte of an entry with a checksum. Neither this byte nor any that differs from it in one bit can begin a JSON
/// text.
const MARK: u8 = 1;

/// Length of the checksum in bytes.
const SUM: usize = 8;

/// Result of decoding an entry.
#[derive(Debug, PartialEq)]
pub(super) enum Found<T> {
    /// An intact answer.
    Answer(T),
    /// A damaged entry: its checksum is wrong, or it has none and is not JSON.
    Damaged,
    /// An answer of another type than the requested one, possibly written by another version of the program.
    Other,
}

/// Encodes an answer as an entry.
pub(super) fn encode<T: Serialize>(key: &Key, answer: &T) -> serde_json::Result<Vec<u8>> {
    let json = serde_json::to_vec(answer)?;
    let mut entry = vec![MARK];
    entry.extend(sum(key, &json));
    entry.extend(json);
    Ok(entry)
}

/// Decodes an entry. Entries without a checksum, as earlier versions wrote them, are plain JSON.
pub(super) fn decode<T: DeserializeOwned>(key: &Key, entry: &[u8]) -> Found<T> {
    let json = match entry.split_first() {
        Some((&MARK, rest)) => match rest.split_at_checked(SUM) {
            Some((found, json)) if *found == sum(key, json) => json,
            _ => return Found::Damaged,
        },
        _ => entry,
    };
    match serde_json::from_slice(json) {
        Ok(answer) => Found::Answer(answer),
        Err(error) if error.is_data() => Found::Other,
        Err(_) => Found::Damaged,
    }
}

fn sum(key: &Key, json: &[u8]) -> [u8; SUM] {
    let digest = Sha256::new().chain_update(key).chain_update(json).finalize();
    std::array::from_fn(|i| digest[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_detected() {
        let key = [7; 32];
        let entry = encode(&key, &vec![0.25, 0.75]).unwrap();
        assert_eq!(decode(&key, &entry), Found::Answer(vec![0.25, 0.75]));
        for bit in 0..8 * entry.len() {
            let mut flipped = entry.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode::<Vec<f64>>(&key, &flipped), Found::Damaged, "bit {bit}");
        }
        for length in 0..entry.len() {
            assert_eq!(decode::<Vec<f64>>(&key, &entry[..length]), Found::Damaged, "{length} bytes");
        }
        assert_eq!(decode::<Vec<f64>>(&[8; 32], &entry), Found::Damaged, "an entry under another key");
    }

    #[test]
    fn an_entry_without_a_checksum_is_read() {
        assert_eq!(decode(&[7; 32], b"[0.25,0.75]"), Found::Answer(vec![0.25, 0.75]));
        assert_eq!(decode(&[7; 32], b"\"text\""), Found::Answer("text".to_owned()));
        assert_eq!(decode::<String>(&[7; 32], b"[0.25]"), Found::Other);
        assert_eq!(decode::<Vec<f64>>(&[7; 32], b"[0.25,"), Found::Damaged);
    }
}

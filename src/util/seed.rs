//! The mixing function for seeds, hashes and fingerprints.

/// Mixes `x` by the finaliser of SplitMix64 (Steele et al. 2014).
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Returns the seed of completion `k` of group `seq`. Seeds of neighbouring completions and groups are unrelated.
pub fn completion(seed: u64, seq: u64, k: usize) -> u64 {
    mix(mix(mix(seed) ^ seq) ^ k as u64)
}

/// Returns the hash of a text.
pub fn text(text: &str) -> u64 {
    text.bytes().fold(text.len() as u64, |hash, byte| mix(hash ^ u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_neighbours_differ() {
        let seeds: std::collections::HashSet<u64> =
            (0..10).flat_map(|s| (0..10).flat_map(move |q| (0..10).map(move |k| completion(s, q, k)))).collect();
        assert_eq!(seeds.len(), 1000);
        // First output of SplitMix64 seeded with 0, from its reference implementation.
        assert_eq!(mix(0), 0xE220_A839_7B1D_CDAF);
    }
}

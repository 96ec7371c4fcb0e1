//! Drawing from a row of logits.

use super::vector::{LANES, exp, inline_max, total, vectorised};

/// Places whose mass is summed before the draw is looked for among them.
const BLOCK: usize = 2048;

/// The place at which the running sum of `softmax(row · inv_t)` passes `share` (in `[0, 1)`), and its log-probability. A
/// place of probability 0 is not chosen, unless there is no other.
pub fn draw_from_row(row: &[f32], inv_t: f32, share: f64) -> (usize, f32) {
    let max = row_max(row);
    // Blocks first, so that only the one that the draw falls in is gone through by single places.
    let sums: Vec<f64> = row.chunks(BLOCK).map(|block| sum_of_powers(block, max, inv_t)).collect();
    let total: f64 = sums.iter().sum();
    let (mut left, mut first) = (share * total, 0);
    for (i, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        first = i * BLOCK;
        if left < *sum {
            break;
        }
        left -= sum;
    }
    let mut chosen = first;
    for (i, z) in row[first..].iter().take(BLOCK).enumerate() {
        let p = f64::from(((z - max) * inv_t).exp());
        if p > 0.0 {
            chosen = first + i;
            left -= p;
            // Rounding may leave a sliver after the last place, which this passes to the last one that has any mass.
            if left < 0.0 {
                break;
            }
        }
    }
    (chosen, (row[chosen] - max) * inv_t - total.ln() as f32)
}

vectorised! {
fn row_max<FMA>(row: &[f32]) -> f32 {
    inline_max(row)
}
}

vectorised! {
/// Σ e^((z − max)·inverse) of at most [`BLOCK`] elements.
fn sum_of_powers<FMA>(block: &[f32], max: f32, inverse: f32) -> f64 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            sums[i] += exp::<FMA>((chunk[i] - max) * inverse);
        }
    }
    for z in rest {
        sums[0] += exp::<FMA>((z - max) * inverse);
    }
    f64::from(total(sums))
}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of one block and of several, with places and whole blocks that have no mass.
    #[test]
    fn the_place_is_that_of_the_running_sum() {
        for width in [1, 37, BLOCK, 3 * BLOCK + 11] {
            let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 150.0 - 3.0;
            let hidden = |i: usize| i % 5 == 3 || (BLOCK..2 * BLOCK).contains(&i);
            let row: Vec<f32> = (0..width).map(|i| if hidden(i) { f32::NEG_INFINITY } else { value(i) }).collect();
            let powers: Vec<f64> = row.iter().map(|z| (f64::from(*z) * 0.7).exp()).collect();
            let total: f64 = powers.iter().sum();
            for share in [0.0, 0.1, 0.333, 0.5, 0.9, 0.999_999] {
                let (place, logprob) = draw_from_row(&row, 0.7, share);
                assert!(powers[place] > 0.0, "place {place} of {width} has no mass");
                let before: f64 = powers[..place].iter().sum::<f64>() / total;
                let after = before + powers[place] / total;
                assert!(
                    before <= share + 1e-5 && share <= after + 1e-5,
                    "{share} fell to {before}..{after} of {width}"
                );
                assert!((f64::from(logprob) - (powers[place] / total).ln()).abs() < 1e-5);
            }
        }
    }
}

//! Sampling from rows of logits.

use candle_core::{D, DType, Result, Tensor};

use super::vector::{LANES, exp, inline_max, total, vectorised};

/// Number of elements whose mass is summed before the sampled one is searched among them.
const BLOCK: usize = 256;

/// Samples from `softmax(row · inv_t)` by inversion: returns the index at which the cumulative sum exceeds `share` (in
/// `[0, 1)`), and its log-probability. An element of probability 0 is not chosen unless all are 0.
pub fn draw_from_row(row: &[f32], inv_t: f32, share: f64) -> (usize, f32) {
    let max = row_max(row);
    // Sums per block come first, so that only the block of the sampled element is searched element by element.
    let sums: Vec<f64> = row.chunks(BLOCK).map(|block| sum_of_powers(block, max, inv_t)).collect();
    let total: f64 = sums.iter().sum();
    let (block, left) = passing(&sums, share * total);
    let first = block * BLOCK;
    let powers = row[first..].iter().take(BLOCK).map(|z| f64::from(((z - max) * inv_t).exp()));
    let chosen = first + passing_place(powers, left);
    (chosen, (row[chosen] - max) * inv_t - total.ln() as f32)
}

/// Samples as [`draw_from_row`] from each row of `[N, V]` with its own share, on any device. Only a sum per block and
/// the block of the sampled element are copied to the host, not the logits. Only the first `drawn` columns can be
/// sampled; the others count in the log-probability.
///
/// # Errors
/// If a tensor operation fails.
pub fn draw_from_rows(rows: &Tensor, drawn: usize, inv_t: f32, shares: &[f64]) -> Result<Vec<(usize, f32)>> {
    /// Number of elements per block; it keeps both transfers short: a row of 50,000 has about a hundred blocks.
    const BLOCK: usize = 512;
    let (n, width) = rows.dims2()?;
    let rows = rows.to_dtype(DType::F32)?;
    let mut powers = (rows.broadcast_sub(&rows.max_keepdim(D::Minus1)?)? * f64::from(inv_t))?.exp()?;
    let mut beyond = vec![0.0; n];
    if drawn < width {
        beyond = powers.narrow(1, drawn, width - drawn)?.sum(1)?.to_vec1::<f32>()?;
        powers = powers.narrow(1, 0, drawn)?;
    }
    let width = width.min(drawn);
    let blocks = width.div_ceil(BLOCK);
    let powers = powers.pad_with_zeros(1, 0, blocks * BLOCK - width)?.reshape((n, blocks, BLOCK))?;
    let sums = powers.sum(2)?.to_vec2::<f32>()?;
    let mut totals = Vec::with_capacity(n);
    let mut found = Vec::with_capacity(n);
    for ((sums, share), beyond) in sums.iter().zip(shares).zip(beyond) {
        let sums: Vec<f64> = sums.iter().map(|sum| f64::from(*sum)).collect();
        totals.push(sums.iter().sum::<f64>() + f64::from(beyond));
        found.push(passing(&sums, share * sums.iter().sum::<f64>()));
    }
    let at: Vec<u32> = found.iter().enumerate().map(|(row, (block, _))| (row * blocks + block) as u32).collect();
    let at = Tensor::new(at, powers.device())?;
    let powers = powers.reshape((n * blocks, BLOCK))?.index_select(&at, 0)?.to_vec2::<f32>()?;
    let draws = powers.iter().zip(found).zip(totals).map(|((powers, (block, left)), total)| {
        let place = passing_place(powers.iter().map(|p| f64::from(*p)), left);
        (block * BLOCK + place, (f64::from(powers[place]) / total).ln() as f32)
    });
    Ok(draws.collect())
}

/// Returns the block in which the cumulative sum exceeds `left`, and the remainder of `left` at its start.
fn passing(sums: &[f64], mut left: f64) -> (usize, f64) {
    let mut block = 0;
    for (i, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        block = i;
        if left < *sum {
            break;
        }
        left -= sum;
    }
    (block, left)
}

/// Returns the index in a block at which the cumulative sum exceeds `left`. An element without mass is not chosen.
fn passing_place(powers: impl Iterator<Item = f64>, mut left: f64) -> usize {
    let mut chosen = 0;
    for (i, p) in powers.enumerate().filter(|(_, p)| *p > 0.0) {
        chosen = i;
        left -= p;
        // Rounding may leave a remainder after the last element; the last element with mass is chosen then.
        if left < 0.0 {
            break;
        }
    }
    chosen
}

vectorised! {
fn row_max<FMA>(row: &[f32]) -> f32 {
    inline_max(row)
}
}

vectorised! {
/// Computes Σ e^((z − max)·inverse) of at most [`BLOCK`] elements.
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
    use candle_core::Device;

    use super::*;

    /// Tests rows of one block and of several, with elements and complete blocks without mass.
    #[test]
    fn the_sampled_index_is_that_of_the_cumulative_sum() {
        for width in [1, 37, BLOCK, 6 * BLOCK + 11] {
            let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 150.0 - 3.0;
            let hidden = |i: usize| i % 5 == 3 || (2 * BLOCK..4 * BLOCK).contains(&i);
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
            // Sampling several rows at once, each with its share, gives the same.
            let shares = [0.05, 0.5, 0.98];
            let rows = Tensor::new([&row[..]; 3].concat(), &Device::Cpu).unwrap().reshape((3, width)).unwrap();
            let draws = draw_from_rows(&rows, width, 0.7, &shares).unwrap();
            let first = width.div_ceil(2);
            for ((place, logprob), share) in draw_from_rows(&rows, first, 0.7, &shares).unwrap().into_iter().zip(shares)
            {
                let (alone, _) = draw_from_row(&row[..first], 0.7, share);
                assert!(place == alone && (f64::from(logprob) - (powers[place] / total).ln()).abs() < 1e-4, "{share}");
            }
            for ((place, logprob), share) in draws.into_iter().zip(shares) {
                let (alone, logprob_alone) = draw_from_row(&row, 0.7, share);
                assert!(place == alone && (logprob - logprob_alone).abs() < 1e-5, "{share}: {place} for {alone}");
            }
        }
    }
}

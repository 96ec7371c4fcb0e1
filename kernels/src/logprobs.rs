//! Log-probabilities of chosen tokens, and entropies, computed without a normalised copy of the logits.

mod composite;

use super::accumulate::{self, Sum};
use super::linear::AddTransposedTimes;
use super::matmul::{times, times_transposed, transposed_product};
use super::vector::{LANES, exp, inline_max, total, vectorised};
use super::{elements, fill_rows, is_fused, tensor_elements};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Number of logits that [`linear_logprobs`] computes per chunk, and the number that it keeps for the backward (32
/// MiB).
const CHUNK_ELEMENTS: usize = 1 << 23;
/// Number of elements summed in `f32` before the sum is added to an `f64` total.
const BLOCK: usize = 2048;

/// Returns each row's log-probability of its target and each row's entropy, under `softmax(logits / temperature)`.
///
/// `logits` is `[N, V]`, `targets` has `N` token ids; both results are `[N]`, in nats (`f32`, or `f64` for `f64`
/// logits). Gradients of both flow to the logits. A logit of −∞ has probability 0 and adds nothing to the entropy.
/// Fails when the counts differ, a target is not below `V`, or the temperature is not positive.
pub fn token_logprobs(logits: &Tensor, targets: &[u32], temperature: f64) -> Result<(Tensor, Tensor)> {
    let (rows, vocabulary) = logits.dims2()?;
    check(rows, vocabulary, targets, temperature)?;
    if is_fused(logits) {
        let op = TokenLogprobs { targets: targets.to_vec(), inverse: (1.0 / temperature) as f32 };
        let stats = logits.contiguous()?.apply_op1(op)?;
        return Ok((stats.get(0)?, stats.get(1)?));
    }
    composite::token_logprobs(logits, targets, temperature)
}

/// Computes `cap · tanh(x / cap)`, which keeps values within ±`cap` (Gemma 2, section 2). Returns `x` unchanged for
/// `None`.
///
/// It is composed of candle operations, so the gradient flows.
pub fn softcap(x: &Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        None => Ok(x.clone()),
        Some(cap) => (x / cap)?.tanh()? * cap,
    }
}

/// Returns [`token_logprobs`] of `softcap(hidden · headᵀ, cap)` without materialising all logits.
///
/// `hidden` is `[N, D]`, `head` is `[V, D]`. The logits are computed a few rows at a time and computed again in the
/// backward, so that a large `[N, V]` never exists. The fused path keeps those of the first rows, up to 32 MiB, for the
/// backward. Gradients flow to both inputs. Fails when the widths differ, and on the errors of [`token_logprobs`].
pub fn linear_logprobs(
    hidden: &Tensor,
    head: &Tensor,
    cap: Option<f64>,
    targets: &[u32],
    temperature: f64,
) -> Result<(Tensor, Tensor)> {
    let (rows, width) = hidden.dims2()?;
    let (vocabulary, head_width) = head.dims2()?;
    if width != head_width {
        bail!("linear_logprobs: hidden has shape {:?} and head {:?}, the widths differ", hidden.dims(), head.dims())
    }
    check(rows, vocabulary, targets, temperature)?;
    if !(is_fused(hidden) && is_fused(head)) {
        return composite::linear_logprobs(hidden, head, cap, targets, temperature);
    }
    let (hidden, head) = (hidden.contiguous()?, head.contiguous()?);
    let stats = hidden.apply_op2(&head, LinearLogprobs::new(&hidden, &head, cap, targets, temperature)?)?;
    Ok((stats.get(0)?, stats.get(1)?))
}

/// Returns the log-probabilities `[N]` of [`linear_logprobs`] at each of several temperatures, from one product of
/// `hidden` and `head`. Gradients do not flow.
pub fn linear_logprobs_at(
    hidden: &Tensor,
    head: &Tensor,
    cap: Option<f64>,
    targets: &[u32],
    temperatures: &[f64],
) -> Result<Vec<Vec<f32>>> {
    let (hidden, head) = (hidden.detach(), head.detach());
    let (rows, vocabulary) = (hidden.dim(0)?, head.dim(0)?);
    temperatures.iter().try_for_each(|temperature| check(rows, vocabulary, targets, *temperature))?;
    let mut out = vec![Vec::with_capacity(rows); temperatures.len()];
    if !(is_fused(&hidden) && is_fused(&head)) {
        composite::each_chunk(&hidden, &head, cap, targets, |logits, targets| {
            for (out, temperature) in out.iter_mut().zip(temperatures) {
                let (logprobs, _) = composite::token_logprobs(logits, targets, *temperature)?;
                out.extend(logprobs.to_dtype(DType::F32)?.to_vec1::<f32>()?);
            }
            Ok(())
        })?;
        return Ok(out);
    }
    let op = LinearLogprobs::new(&hidden.contiguous()?, &head.contiguous()?, cap, targets, 1.0)?;
    op.chunks(None, |logits, _, _, targets| {
        for (i, temperature) in temperatures.iter().enumerate() {
            // Callers often pass the same temperature twice.
            match temperatures[..i].iter().position(|before| before == temperature) {
                Some(known) => {
                    let at = out[i].len();
                    let again = out[known][at..].to_vec();
                    out[i].extend(again);
                }
                None => {
                    let rows = rows_of(logits, targets, (1.0 / temperature) as f32);
                    out[i].extend(rows.iter().map(|row| row.logprob));
                }
            }
        }
        Ok(())
    })?;
    Ok(out)
}

/// Returns `ln Σ e^(row · inv_t)`, with `inv_t` the inverse temperature (positive). −∞ if all elements are −∞.
pub fn row_logsumexp(row: &[f32], inv_t: f32) -> f32 {
    let (max, sum, _) = row_stats(row, inv_t);
    max * inv_t + (sum.ln() as f32)
}

fn check(rows: usize, vocabulary: usize, targets: &[u32], temperature: f64) -> Result<()> {
    if targets.len() != rows {
        bail!("token_logprobs: {} targets for {rows} rows of logits", targets.len())
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocabulary) {
        bail!("token_logprobs: target {target} is outside the vocabulary of {vocabulary}")
    }
    if temperature.is_nan() || temperature <= 0.0 {
        bail!("token_logprobs: temperature {temperature} must be positive")
    }
    Ok(())
}

/// Statistics of a row that the backward needs besides its logits.
#[derive(Clone, Copy, Default)]
struct Row {
    logprob: f32,
    entropy: f32,
    max: f32,
    /// `ln Σ e^((z − max) · inverse)`.
    log_sum: f32,
}

impl Row {
    fn of(logits: &[f32], target: u32, inverse: f32) -> Self {
        let (max, sum, weighted) = row_stats(logits, inverse);
        let log_sum = sum.ln();
        let logprob = ((logits[target as usize] - max) * inverse) as f64 - log_sum;
        let entropy = log_sum - weighted / sum;
        Self { logprob: logprob as f32, entropy: entropy as f32, max, log_sum: log_sum as f32 }
    }
}

/// Computes the statistics of each row of a chunk of logits.
fn rows_of(logits: &[f32], targets: &[u32], inverse: f32) -> Vec<Row> {
    let width = logits.len() / targets.len().max(1);
    let row = |(z, &t): (&[f32], &u32)| Row::of(z, t, inverse);
    if rayon::current_num_threads() == 1 {
        return logits.chunks_exact(width.max(1)).zip(targets).map(row).collect();
    }
    logits.par_chunks_exact(width.max(1)).zip(targets).map(row).collect()
}

/// Packs the statistics into `[4, N]`: log-probability, entropy, maximum, log-sum. Only the backward reads the last
/// two.
fn pack(rows: &[Row]) -> (CpuStorage, Shape) {
    let fields: [fn(&Row) -> f32; 4] = [|r| r.logprob, |r| r.entropy, |r| r.max, |r| r.log_sum];
    let data = fields.iter().flat_map(|field| rows.iter().map(field)).collect();
    (CpuStorage::F32(data), Shape::from((4, rows.len())))
}

/// Returns one row's saved statistics and the gradients of its log-probability and entropy.
fn unpack(stats: &[f32], grad: &[f32], row: usize, rows: usize) -> (Row, f32, f32) {
    let at = |i: usize| stats[i * rows + row];
    (Row { logprob: at(0), entropy: at(1), max: at(2), log_sum: at(3) }, grad[row], grad[rows + row])
}

struct TokenLogprobs {
    targets: Vec<u32>,
    inverse: f32,
}

impl CustomOp1 for TokenLogprobs {
    fn name(&self) -> &'static str {
        "token-logprobs"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(pack(&rows_of(elements(storage, layout)?, &self.targets, self.inverse)))
    }

    fn bwd(&self, logits: &Tensor, stats: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (zs, zl) = logits.storage_and_layout();
        let (ss, sl) = stats.storage_and_layout();
        let (gs, gl) = grad.storage_and_layout();
        let (z, stats, grad) = (tensor_elements(&zs, zl)?, tensor_elements(&ss, sl)?, tensor_elements(&gs, gl)?);
        let (rows, width) = logits.dims2()?;
        let mut out = vec![0.0; z.len()];
        fill_rows(&mut out, width, |first, out| {
            for (r, out) in out.chunks_exact_mut(width).enumerate() {
                let n = first + r;
                out.copy_from_slice(&z[n * width..][..width]);
                let (row, dlogprob, dentropy) = unpack(stats, grad, n, rows);
                backward_row(out, row, self.inverse, dlogprob, dentropy);
                out[self.targets[n] as usize] += dlogprob * self.inverse;
            }
        });
        Tensor::from_vec(out, logits.shape(), logits.device()).map(Some)
    }
}

struct LinearLogprobs {
    hidden: Tensor,
    head: Tensor,
    targets: Vec<u32>,
    inverse: f32,
    cap: Option<f32>,
    /// Number of rows of logits computed at a time.
    chunk: usize,
    /// True if a backward will need the logits again.
    needs_backward: bool,
    /// Logits of the first chunk, kept from the forward to the backward.
    kept: Mutex<Option<Vec<f32>>>,
}

impl LinearLogprobs {
    fn new(hidden: &Tensor, head: &Tensor, cap: Option<f64>, targets: &[u32], temperature: f64) -> Result<Self> {
        Ok(Self {
            hidden: hidden.detach(),
            head: head.detach(),
            targets: targets.to_vec(),
            inverse: (1.0 / temperature) as f32,
            cap: cap.map(|cap| cap as f32),
            chunk: (CHUNK_ELEMENTS / head.dim(0)?.max(1)).clamp(16, 1024),
            needs_backward: hidden.track_op() || head.track_op(),
            kept: Mutex::default(),
        })
    }

    /// Calls `each` for every chunk in order with its logits, its hidden states, its first row and its targets, and
    /// returns the logits of the first chunk as `each` left them. `known` replaces the computation of the first chunk.
    /// The other chunks share one buffer; without a backward, the first chunk shares it too.
    fn chunks(
        &self,
        known: Option<Vec<f32>>,
        mut each: impl FnMut(&mut [f32], &[f32], usize, &[u32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let ((xs, xl), (ws, wl)) = (self.hidden.storage_and_layout(), self.head.storage_and_layout());
        let (x, head) = (tensor_elements(&xs, xl)?, tensor_elements(&ws, wl)?);
        let (vocabulary, width) = self.head.dims2()?;
        let size = |rows: usize| rows.min(self.chunk) * vocabulary;
        let product = |x: &[f32]| {
            let mut logits = transposed_product(x, head, width);
            self.cap_all(&mut logits, vocabulary);
            logits
        };
        let first_rows = self.targets.len().min(self.chunk) * width;
        let mut head_chunk = known.unwrap_or_else(|| product(&x[..first_rows]));
        let others = if self.needs_backward { self.targets.len().saturating_sub(self.chunk) } else { 0 };
        let mut others = vec![0.0; size(others)];
        for (i, targets) in self.targets.chunks(self.chunk).enumerate() {
            let first = i * self.chunk;
            let x = &x[first * width..(first + targets.len()) * width];
            let buffer = if i == 0 || !self.needs_backward { &mut head_chunk } else { &mut others };
            let logits = &mut buffer[..targets.len() * vocabulary];
            if i > 0 {
                times_transposed(logits, x, head, width);
                self.cap_all(logits, vocabulary);
            }
            each(logits, x, first, targets)?;
        }
        Ok(head_chunk)
    }

    fn cap_all(&self, logits: &mut [f32], vocabulary: usize) {
        if let Some(cap) = self.cap {
            fill_rows(logits, vocabulary, |_, z| cap_in_place(z, cap));
        }
    }

    fn kept(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CustomOp2 for LinearLogprobs {
    fn name(&self) -> &'static str {
        "linear-logprobs"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut rows = Vec::with_capacity(self.targets.len());
        let first = self.chunks(None, |logits, _, _, targets| {
            rows.extend(rows_of(logits, targets, self.inverse));
            Ok(())
        })?;
        if self.needs_backward {
            *self.kept() = Some(first);
        }
        Ok(pack(&rows))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        stats: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (ss, sl) = stats.storage_and_layout();
        let (gs, gl) = grad.storage_and_layout();
        let (ws, wl) = head.storage_and_layout();
        let (stats, grad) = (tensor_elements(&ss, sl)?, tensor_elements(&gs, gl)?);
        let weights = tensor_elements(&ws, wl)?;
        let ((vocabulary, width), rows) = (head.dims2()?, self.targets.len());
        let mut dhidden = vec![0.0; if hidden.track_op() { rows * width } else { 0 }];
        let dhead = if head.track_op() { Some(accumulate::of_or_zeros(head)?) } else { None };
        // `take` because the gradient overwrites the kept logits. A second backward computes them again.
        let known = self.kept().take();
        self.chunks(known, |logits, x, start, targets| {
            fill_rows(logits, vocabulary, |first, z| {
                for (r, z) in z.chunks_exact_mut(vocabulary).enumerate() {
                    let (row, dlogprob, dentropy) = unpack(stats, grad, start + first + r, rows);
                    let capped = self.cap.map(|cap| (cap, z.to_vec()));
                    backward_row(z, row, self.inverse, dlogprob, dentropy);
                    z[targets[first + r] as usize] += dlogprob * self.inverse;
                    if let Some((cap, capped)) = capped {
                        uncap(z, &capped, cap);
                    }
                }
            });
            if !dhidden.is_empty() {
                times(&mut dhidden[start * width..(start + targets.len()) * width], logits, weights, vocabulary);
            }
            dhead.as_ref().map_or(Ok(()), |dhead| {
                dhead.sum().inplace_op1(&AddTransposedTimes { x: logits, w: x, rows: targets.len() })
            })
        })?;
        let dhidden = hidden.track_op().then(|| Tensor::from_vec(dhidden, hidden.shape(), hidden.device()));
        Ok((dhidden.transpose()?, dhead.and_then(Sum::into_gradient)))
    }
}

vectorised! {
/// Returns the maximum of z, Σ e^d and Σ d·e^d, with d = (z − max)·inverse.
fn row_stats<FMA>(logits: &[f32], inverse: f32) -> (f32, f64, f64) {
    let max = inline_max(logits);
    if max == f32::NEG_INFINITY && !logits.iter().any(|z| z.is_nan()) {
        return (max, 0.0, 0.0);
    }
    let (mut sum, mut weighted) = (0.0f64, 0.0f64);
    for block in logits.chunks(BLOCK) {
        let (mut sums, mut weights) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (chunks, rest) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                let d = bounded((chunk[i] - max) * inverse);
                let e = exp::<FMA>(d);
                sums[i] += e;
                weights[i] += e * d;
            }
        }
        for z in rest {
            let d = bounded((z - max) * inverse);
            let e = exp::<FMA>(d);
            sums[0] += e;
            weights[0] += e * d;
        }
        sum += total(sums) as f64;
        weighted += total(weights) as f64;
    }
    (max, sum, weighted)
}
}

vectorised! {
/// Replaces a row of logits by its gradient without the target's own term: inverse · (−dlogprob·p − dentropy·p·(ln p +
/// entropy)).
fn backward_row<FMA>(z: &mut [f32], row: Row, inverse: f32, dlogprob: f32, dentropy: f32) {
    for z in z {
        let logp = bounded((*z - row.max) * inverse) - row.log_sum;
        *z = -inverse * exp::<FMA>(logp) * (dlogprob + dentropy * (logp + row.entropy));
    }
}
}

vectorised! {
/// Replaces each z by cap · tanh(z / cap), with tanh(x) = 1 − 2/(e^2x + 1).
fn cap_in_place<FMA>(z: &mut [f32], cap: f32) {
    for z in z {
        *z = cap * (1.0 - 2.0 / (exp::<FMA>(2.0 * *z / cap) + 1.0));
    }
}
}

vectorised! {
/// Converts the gradient of capped logits into that of the logits: multiplies it by 1 − tanh².
fn uncap<FMA>(grad: &mut [f32], capped: &[f32], cap: f32) {
    for (grad, capped) in grad.iter_mut().zip(capped) {
        let tanh = capped / cap;
        *grad *= 1.0 - tanh * tanh;
    }
}
}

/// Bounds −∞ to a finite value, so that its product with the probability 0 is 0. NaN is kept.
#[inline(always)]
fn bounded(d: f32) -> f32 {
    if d < -1e4 { -1e4 } else { d }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, check, flat, values};
    use super::*;
    use candle_core::Device;

    fn targets(rows: usize, vocabulary: usize) -> Vec<u32> {
        (0..rows).map(|i| ((i * 7 + 3) % vocabulary) as u32).collect()
    }

    #[test]
    fn several_temperatures_share_one_product() {
        let (hidden, head, targets) = (values(1, &[70, 12]), values(2, &[40, 12]), vec![7u32; 70]);
        for cap in [None, Some(3.0)] {
            let both = linear_logprobs_at(&hidden, &head, cap, &targets, &[1.0, 0.6]).unwrap();
            for (got, temperature) in both.iter().zip([1.0, 0.6]) {
                let (want, _) = linear_logprobs(&hidden, &head, cap, &targets, temperature).unwrap();
                assert_eq!(*got, want.to_vec1::<f32>().unwrap(), "at {temperature}");
            }
        }
    }

    #[test]
    fn matches_the_composite() {
        for (rows, vocabulary) in [(1, 2), (5, 17), (37, 2503)] {
            let targets = targets(rows, vocabulary);
            let logits = (values(1, &[rows, vocabulary]) * 3.0).unwrap();
            for temperature in [0.6, 1.0] {
                check(std::slice::from_ref(&logits), |t| Ok(token_logprobs(&t[0], &targets, temperature)?.0));
                check(std::slice::from_ref(&logits), |t| {
                    let (logprob, entropy) = token_logprobs(&t[0], &targets, temperature)?;
                    logprob + (entropy * 0.3)?
                });
            }
        }
    }

    #[test]
    fn linear_matches_the_composite_over_several_chunks() {
        // 2^23 / 20011 gives 419 rows a chunk: two chunks, the second not full.
        for (rows, width, vocabulary) in [(3, 5, 11), (431, 3, 20011)] {
            let targets = targets(rows, vocabulary);
            for cap in [None, Some(2.5)] {
                check(&[values(1, &[rows, width]), values(2, &[vocabulary, width])], |t| {
                    let (logprob, entropy) = linear_logprobs(&t[0], &t[1], cap, &targets, 0.8)?;
                    logprob + (entropy * 0.3)?
                });
            }
        }
    }

    /// The first backward consumes the logits that the forward kept; the second computes them again.
    #[test]
    fn a_second_backward_gives_the_same_gradients() {
        for (rows, vocabulary) in [(9, 31), (431, 20011)] {
            let var = |seed, shape: &[usize]| candle_core::Var::from_tensor(&values(seed, shape)).unwrap();
            let (hidden, head, targets) = (var(1, &[rows, 3]), var(2, &[vocabulary, 3]), targets(rows, vocabulary));
            let (logprob, _) = linear_logprobs(&hidden, &head, Some(2.5), &targets, 0.8).unwrap();
            let loss = logprob.sum_all().unwrap();
            let (first, second) = (loss.backward().unwrap(), loss.backward().unwrap());
            for var in [&hidden, &head] {
                assert_eq!(flat(first.get(var).unwrap()), flat(second.get(var).unwrap()));
            }
        }
    }

    #[test]
    fn linear_logprobs_equal_token_logprobs_of_the_product() {
        let (hidden, head) = (values(1, &[7, 12]), values(2, &[31, 12]));
        let targets = targets(7, 31);
        let (a, ha) = linear_logprobs(&hidden, &head, None, &targets, 0.7).unwrap();
        let logits = hidden.matmul(&head.t().unwrap()).unwrap();
        let (b, hb) = token_logprobs(&logits, &targets, 0.7).unwrap();
        // Two orders of summing n products differ by at most n·ε·Σ|h||w| (Higham 2002, §3.1), whichever kernels the
        // processor has. A log-probability changes by at most twice the change of the logits.
        let sums = hidden.abs().unwrap().matmul(&head.abs().unwrap().t().unwrap()).unwrap();
        let most = flat(&sums).into_iter().fold(0.0, f64::max);
        let slack = 2.0 * 12.0 * f64::from(f32::EPSILON) * most / 0.7;
        for (what, got, want) in [("logprob", &a, &b), ("entropy", &ha, &hb)] {
            for (g, w) in flat(got).into_iter().zip(flat(want)) {
                assert!((g - w).abs() <= slack, "{what}: {g} against {w}, of at most {slack}");
            }
        }
    }

    #[test]
    fn a_banned_token_changes_nothing_but_its_own_probability() {
        let banned = Tensor::new(&[[1f32, f32::NEG_INFINITY, 2.0]], &Device::Cpu).unwrap();
        let banned = candle_core::Var::from_tensor(&banned).unwrap();
        let two = Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap();
        let (a, ha) = token_logprobs(&banned, &[2], 1.0).unwrap();
        let (b, hb) = token_logprobs(&two, &[1], 1.0).unwrap();
        assert_close("logprob", &a, &b, 1e-6);
        assert_close("entropy", &ha, &hb, 1e-6);
        let grads = (a + ha).unwrap().sum_all().unwrap().backward().unwrap();
        let grad = flat(grads.get(&banned).unwrap());
        assert!(grad.iter().all(|g| g.is_finite()) && grad[1] == 0.0, "{grad:?}");
    }

    #[test]
    fn nan_propagates_and_invalid_arguments_are_rejected() {
        let logits = Tensor::new(&[[1f32, f32::NAN, 2.0]], &Device::Cpu).unwrap();
        assert!(flat(&token_logprobs(&logits, &[0], 1.0).unwrap().0)[0].is_nan());
        assert!(token_logprobs(&logits, &[3], 1.0).unwrap_err().to_string().contains("target 3"));
        assert!(token_logprobs(&logits, &[0, 1], 1.0).unwrap_err().to_string().contains("2 targets"));
        assert!(token_logprobs(&logits, &[0], 0.0).unwrap_err().to_string().contains("positive"));
    }

    #[test]
    fn logsumexp_of_a_row() {
        let row: Vec<f32> = (0..5000).map(|i| (i % 83) as f32 * 0.3).collect();
        let want = row.iter().map(|z| (*z as f64 * 0.5).exp()).sum::<f64>().ln();
        assert!((row_logsumexp(&row, 0.5) as f64 - want).abs() < 1e-5);
        assert_eq!(row_logsumexp(&[f32::NEG_INFINITY; 3], 1.0), f32::NEG_INFINITY);
    }
}

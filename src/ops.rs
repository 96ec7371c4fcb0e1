//! temporary composite
use candle_core::{D, Result, Tensor, Var, backprop::GradStore};
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let ms = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(ms + eps)?.sqrt()?)?.broadcast_mul(w)
}
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let h = x.dim(2)? / 2;
    let (a, b) = (x.narrow(2, 0, h)?, x.narrow(2, h, h)?);
    let (c, s) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    Tensor::cat(&[(a.broadcast_mul(&c)? - b.broadcast_mul(&s)?)?, (b.broadcast_mul(&c)? + a.broadcast_mul(&s)?)?], 2)
}
pub fn swiglu(g: &Tensor, u: &Tensor) -> Result<Tensor> { g.silu()? * u }
pub fn masked_softmax(s: &Tensor, m: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let mut s = (s * scale)?;
    if let Some(m) = m { s = s.broadcast_add(m)?; }
    candle_nn::ops::softmax(&s, D::Minus1)
}
pub fn token_logprobs(l: &Tensor, t: &[u32], temp: f64) -> Result<(Tensor, Tensor)> {
    let lp = candle_nn::ops::log_softmax(&(l / temp)?, D::Minus1)?;
    let e = (lp.exp()? * &lp)?.sum(D::Minus1)?.neg()?;
    let t = Tensor::new(t, l.device())?.unsqueeze(1)?;
    Ok((lp.gather(&t, 1)?.squeeze(1)?, e))
}
pub fn linear_logprobs(h: &Tensor, w: &Tensor, t: &[u32], temp: f64) -> Result<(Tensor, Tensor)> {
    token_logprobs(&h.matmul(&w.t()?)?, t, temp)
}
pub fn row_logsumexp(row: &[f32], inv: f32) -> f32 {
    let m = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().map(|x| ((x - m) * inv).exp()).sum::<f32>().ln() + m * inv
}

//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019), in one pass over parameter, moments and gradient.

use super::accumulate::Gradients;
use super::frozen::Frozen;
use super::vector::vectorised;
use super::{PARALLEL_FROM, elements, elements_mut, is_fused};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, InplaceOp2, Layout, Result, Tensor, Var, bail};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Number of elements per task.
const BLOCK: usize = 1 << 14;
/// Name of the step count in an exported state.
const STEP: &str = "step";

/// Hyperparameters of [`AdamW`] that are constant over a run. The learning rate is an argument of each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay rate of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Constant added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step subtracts `lr · weight_decay · θ`.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW optimizer with moments in `f32`, and an `f32` master copy of each parameter of another dtype.
///
/// [`AdamW::step`] writes into the parameters' own storage, so a tensor that shares it (a detached clone, a view) changes
/// too; copy tensors that must keep their values. [`AdamW::replace`] leaves the old values as they are.
pub struct AdamW {
    params: Vec<Param>,
    config: AdamWConfig,
    step: u64,
}

struct Param {
    name: String,
    var: Var,
    state: State,
}

enum State {
    /// Moments of a contiguous CPU `f32` parameter.
    Fused { m: Arc<Vec<f32>>, v: Arc<Vec<f32>> },
    /// Master copy and moments of any other parameter, all three `f32` on the parameter's device.
    Composite { master: Tensor, m: Tensor, v: Tensor },
}

/// Scalars of one step, shared by all elements.
#[derive(Clone, Copy)]
struct StepSizes {
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// Factor of the parameter, `1 − lr · weight_decay`.
    keep: f32,
    /// Step size with the first moment's bias correction, `lr / (1 − β1ᵗ)`.
    rate: f32,
    /// Bias correction of the second moment's square root, `1 / sqrt(1 − β2ᵗ)`.
    root_correction: f32,
    clip: f32,
}

/// Returns the factor, at most 1, that scales a gradient of Euclidean norm `norm` down to `max_norm`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / norm.max(f64::MIN_POSITIVE)).min(1.0)
}

impl AdamW {
    /// Creates an optimizer with zero moments for these named parameters.
    pub fn new(params: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        let params = params
            .into_iter()
            .map(|(name, var)| {
                let state = if is_fused(&var) && var.is_contiguous() {
                    let zeros = || Arc::new(vec![0.0; var.elem_count()]);
                    State::Fused { m: zeros(), v: zeros() }
                } else {
                    let m = Tensor::zeros(var.shape(), DType::F32, var.device())?;
                    State::Composite { master: var.to_dtype(DType::F32)?.copy()?, v: m.copy()?, m }
                };
                Ok(Param { name, var, state })
            })
            .collect::<Result<_>>()?;
        Ok(Self { params, config, step: 0 })
    }

    /// Returns the number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Takes one step at learning rate `lr` with each gradient multiplied by `clip_scale` (1 for no clipping). A
    /// parameter whose gradient is zero still changes by weight decay and momentum. Fails, before any parameter
    /// changes, if `grads` lacks a parameter or has a gradient of another shape.
    pub fn step(&mut self, grads: &Gradients, lr: f64, clip_scale: f64) -> Result<()> {
        let (config, step) = (self.config, self.begin(grads, lr, clip_scale)?);
        for Param { name, var, state } in &mut self.params {
            let grad = grads.get(name)?;
            match state {
                State::Fused { m, v } => {
                    // `make_mut` copies moments that a checkpoint still holds.
                    let moments = Mutex::new((Arc::make_mut(m), Arc::make_mut(v)));
                    var.inplace_op2(&grad.contiguous()?, &Update { step, moments })?;
                }
                State::Composite { .. } => var.set(&state.composite(grad, config, step)?.to_dtype(var.dtype())?)?,
            }
        }
        Ok(())
    }

    /// Takes one step as [`Self::step`], but leaves the old values of the parameters as they are, so that tensors which
    /// share their storage stay valid, and returns variables with the new values, in the order of the parameters. On the CPU
    /// an `f32` parameter gets the memory of its gradient, so that a step needs no memory of its own. `grads` is zero
    /// afterwards, belongs to the new variables, and has no memory until the next backward pass.
    ///
    /// # Errors
    /// If `grads` lacks a parameter or has a gradient of another shape, before anything changes; or if a tensor operation
    /// fails.
    pub fn replace(&mut self, grads: &mut Gradients, lr: f64, clip_scale: f64) -> Result<Vec<(String, Var)>> {
        let (config, step) = (self.config, self.begin(grads, lr, clip_scale)?);
        for Param { name, var, state } in &mut self.params {
            let grad = grads.take(name)?;
            *var = match state {
                State::Fused { m, v } => {
                    let (m, v) = (Arc::make_mut(m), Arc::make_mut(v));
                    let mut values = owned(grad)?;
                    let (storage, layout) = var.storage_and_layout();
                    let theta = super::tensor_elements(&storage, layout)?;
                    in_blocks(&mut values, m, v, theta, |next, m, v, theta| moved_to(next, m, v, theta, step));
                    Var::from_vec(values, var.shape(), var.device())?
                }
                State::Composite { .. } => {
                    Var::from_tensor(&state.composite(&grad, config, step)?.to_dtype(var.dtype())?)?
                }
            };
        }
        let params: Vec<_> = self.params.iter().map(|param| (param.name.clone(), param.var.clone())).collect();
        grads.follow(&params)?;
        Ok(params)
    }

    /// Makes the optimizer train other variables for the same parameters. The moments stay as they are.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape; the error names it. Nothing has changed then.
    pub fn follow(&mut self, params: &[(String, Var)]) -> Result<()> {
        if params.len() != self.params.len() {
            bail!("adamw: {} parameters in place of {}", params.len(), self.params.len());
        }
        for (own, (name, var)) in self.params.iter().zip(params) {
            if (&own.name, own.var.dims()) != (name, var.dims()) {
                bail!("adamw: {name} of shape {:?} in place of {} of shape {:?}", var.dims(), own.name, own.var.dims());
            }
        }
        self.params.iter_mut().zip(params).for_each(|(own, (_, var))| own.var = var.clone());
        Ok(())
    }

    /// Checks `grads` and counts a step.
    fn begin(&mut self, grads: &Gradients, lr: f64, clip_scale: f64) -> Result<StepSizes> {
        for Param { name, var, .. } in &self.params {
            match grads.dims(name) {
                Some(dims) if dims == var.dims() => {}
                Some(dims) => bail!("adamw: the gradient of {name} has shape {dims:?}, not {:?}", var.dims()),
                None => bail!("adamw: no gradient accumulator for {name}; build both from the same parameters"),
            }
        }
        self.step += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        let power = |beta: f64| 1.0 - beta.powf(self.step as f64);
        Ok(StepSizes {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            eps: eps as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            rate: (lr / power(beta1)) as f32,
            root_correction: power(beta2).sqrt().recip() as f32,
            clip: clip_scale as f32,
        })
    }

    /// Returns the current state, unaffected by later steps: `step` (a `u32` scalar), and for each parameter
    /// `NAME.exp_avg`, `NAME.exp_avg_sq`, and `NAME.master` if a master copy exists. On the CPU no data is copied at
    /// first; a step that runs while the export is held copies the moments that it changes.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn export(&self) -> Result<Vec<(String, Frozen)>> {
        let step = u32::try_from(self.step).map_err(candle_core::Error::wrap)?;
        let mut out = vec![(STEP.to_string(), Frozen::Tensor(Tensor::new(step, &Device::Cpu)?))];
        for Param { name, var, state } in &self.params {
            let (m, v) = match state {
                State::Fused { m, v } => {
                    let share =
                        |data: &Arc<Vec<f32>>| Frozen::Host { shape: var.dims().to_vec(), data: Arc::clone(data) };
                    (share(m), share(v))
                }
                State::Composite { master, m, v } => {
                    out.push((format!("{name}.master"), master.clone().into()));
                    (m.clone().into(), v.clone().into())
                }
            };
            out.push((format!("{name}.exp_avg"), m));
            out.push((format!("{name}.exp_avg_sq"), v));
        }
        Ok(out)
    }

    /// Restores an exported state. The caller restores the parameters themselves; master copies come from the state.
    /// Fails, and changes nothing, if a tensor is missing or has another shape. Ignores unknown names.
    pub fn import(&mut self, state: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
        let saved: HashMap<String, Tensor> = state.into_iter().collect();
        let find = |name: &str| match saved.get(name) {
            Some(tensor) => Ok(tensor),
            None => bail!("adamw: the saved state has no {name}; it belongs to another model or is not complete"),
        };
        let step = find(STEP)?.to_dtype(DType::U32)?.to_scalar::<u32>()?;
        let mut states = Vec::with_capacity(self.params.len());
        for Param { name, var, state } in &self.params {
            let load = |field: &str| {
                let tensor = find(&format!("{name}.{field}"))?;
                if tensor.dims() != var.dims() {
                    bail!("adamw: {name}.{field} has shape {:?}, expected {:?}", tensor.dims(), var.dims())
                }
                tensor.to_dtype(DType::F32)?.to_device(var.device())
            };
            let (m, v) = (load("exp_avg")?, load("exp_avg_sq")?);
            states.push(match state {
                State::Fused { .. } => {
                    State::Fused { m: Arc::new(m.flatten_all()?.to_vec1()?), v: Arc::new(v.flatten_all()?.to_vec1()?) }
                }
                // The state of an f32 parameter that was trained on the CPU has no master copy, because the parameter
                // is its own.
                State::Composite { .. }
                    if var.dtype() == DType::F32 && !saved.contains_key(&format!("{name}.master")) =>
                {
                    State::Composite { master: var.as_tensor().copy()?.detach(), m, v }
                }
                State::Composite { .. } => State::Composite { master: load("master")?, m, v },
            });
        }
        self.step = step as u64;
        self.params.iter_mut().zip(states).for_each(|(param, state)| param.state = state);
        Ok(())
    }
}

impl State {
    /// Makes a step of a composite state with the gradient `grad`; returns the new master copy.
    fn composite(&mut self, grad: &Tensor, config: AdamWConfig, step: StepSizes) -> Result<&Tensor> {
        let Self::Composite { master, m, v } = self else { bail!("adamw: internal error: the state is not composite") };
        let AdamWConfig { beta1, beta2, eps, .. } = config;
        let StepSizes { keep, rate, root_correction, clip, .. } = step;
        let grad = (grad.detach() * f64::from(clip))?;
        *m = ((&*m * beta1)? + (&grad * (1.0 - beta1))?)?;
        *v = ((&*v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let root = ((v.sqrt()? * f64::from(root_correction))? + eps)?;
        let change = ((&*m / root)? * f64::from(rate))?;
        *master = ((&*master * f64::from(keep))? - change)?;
        Ok(master)
    }
}

/// Returns the elements of a contiguous CPU `f32` tensor, without a copy if it owns its storage alone. Other tensors that
/// share the storage become unusable.
fn owned(tensor: Tensor) -> Result<Vec<f32>> {
    let taken = Taken(Mutex::new(Vec::new()));
    tensor.inplace_op1(&taken)?;
    taken.0.into_inner().map_err(candle_core::Error::wrap)
}

/// In-place operation that moves the elements out of a tensor.
struct Taken(Mutex<Vec<f32>>);

impl InplaceOp1 for Taken {
    fn name(&self) -> &'static str {
        "take-elements"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.lock()) {
            (CpuStorage::F32(values), Some((0, end)), Ok(mut taken)) if end == values.len() => {
                *taken = std::mem::take(values);
                Ok(())
            }
            _ => bail!("adamw: a gradient is not a contiguous f32 tensor"),
        }
    }
}

/// Runs `update` on blocks of `out`, `m`, `v` and `input`, in parallel for a large parameter.
fn in_blocks(
    out: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    input: &[f32],
    update: impl Fn(&mut [f32], &mut [f32], &mut [f32], &[f32]) + Sync,
) {
    if out.len() < PARALLEL_FROM || rayon::current_num_threads() == 1 {
        return update(out, m, v, input);
    }
    out.par_chunks_mut(BLOCK)
        .zip(m.par_chunks_mut(BLOCK))
        .zip(v.par_chunks_mut(BLOCK))
        .zip(input.par_chunks(BLOCK))
        .for_each(|(((out, m), v), input)| update(out, m, v, input));
}

struct Update<'a> {
    step: StepSizes,
    /// An in-place operation changes one tensor and receives `&self`, so the moments are behind a lock, which is never
    /// contended.
    moments: Mutex<(&'a mut Vec<f32>, &'a mut Vec<f32>)>,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (theta, grad) = (elements_mut(s1, l1)?, elements(s2, l2)?);
        let Ok(mut moments) = self.moments.lock() else { bail!("adamw: a step before this one panicked") };
        let (m, v) = &mut *moments;
        in_blocks(theta, m, v, grad, |theta, m, v, grad| update(theta, m, v, grad, self.step));
        Ok(())
    }
}

vectorised! {
fn update<FMA>(theta: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], step: StepSizes) {
    for (((theta, m), v), g) in theta.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(grad) {
        *theta = moved(*theta, m, v, *g, step);
    }
}
}

vectorised! {
/// Replaces each gradient by the new value of its parameter.
fn moved_to<FMA>(grad: &mut [f32], m: &mut [f32], v: &mut [f32], theta: &[f32], step: StepSizes) {
    for (((g, m), v), theta) in grad.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(theta) {
        *g = moved(*theta, m, v, *g, step);
    }
}
}

/// Updates the moments of one element with its gradient; returns the element's new value.
#[inline(always)]
fn moved(theta: f32, m: &mut f32, v: &mut f32, gradient: f32, step: StepSizes) -> f32 {
    let g = gradient * step.clip;
    *m = *m * step.beta1 + g * (1.0 - step.beta1);
    *v = *v * step.beta2 + g * g * (1.0 - step.beta2);
    theta * step.keep - step.rate * *m / (v.sqrt() * step.root_correction + step.eps)
}

#[cfg(test)]
mod tests {
    use super::super::backward;
    use super::super::testing::{assert_close, flat, values};
    use super::*;

    const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

    fn fixture(name: &str) -> HashMap<String, Tensor> {
        let path = format!("{}/../tests/fixtures/llama/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    }

    /// Reads an exported state back.
    fn tensors(adamw: &AdamW) -> Vec<(String, Tensor)> {
        let frozen = adamw.export().unwrap();
        let bytes = safetensors::serialize(frozen.iter().map(|(name, tensor)| (name, tensor)), None).unwrap();
        let read = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
        frozen.into_iter().map(|(name, _)| (name.clone(), read[&name].clone())).collect()
    }

    /// Runs a backward of `Σ θ·g`, so that the gradient is `g`.
    fn accumulate(params: &[(String, Var)], gradient: impl Fn(&str) -> Tensor) -> Gradients {
        let mut grads = Gradients::new(params);
        for (name, var) in params {
            let loss = (var.as_tensor() * gradient(name).to_dtype(var.dtype()).unwrap()).unwrap().sum_all().unwrap();
            backward(&loss, &mut [&mut grads]).unwrap();
        }
        grads
    }

    #[test]
    fn one_step_matches_the_reference() {
        let (model, gradients, reference) = (fixture("model"), fixture("grads_all"), fixture("ref"));
        let params: Vec<(String, Var)> =
            model.iter().map(|(name, t)| (name.clone(), Var::from_tensor(t).unwrap())).collect();
        let grads = accumulate(&params, |name| gradients[name].clone());
        let norm = grads.global_norm().unwrap();
        assert!((norm - flat(&reference["adamw.grad_norm"])[0]).abs() < 1e-5 * norm, "{norm}");
        let mut adamw = AdamW::new(params.clone(), CONFIG).unwrap();
        adamw.step(&grads, 1e-3, (1.0 / (norm + 1e-6)).min(1.0)).unwrap();
        let mut compared = 0;
        for (name, var) in &params {
            let Some(want) = reference.get(&format!("adamw.{name}")) else { continue };
            compared += 1;
            for ((got, want), before) in flat(var).iter().zip(flat(want)).zip(flat(&model[name])) {
                assert!((got - want).abs() < 2e-7, "{name}: {got} against {want}, from {before}");
            }
        }
        assert_eq!(compared, 3);
    }

    /// Compares with the same arithmetic in f64 loops, over several steps.
    #[test]
    fn several_steps_follow_the_definition_for_f32_and_for_a_master_copy() {
        let start = values(1, &[131, 193]);
        let single = Var::from_tensor(&start).unwrap();
        let double = Var::from_tensor(&start.to_dtype(DType::F64).unwrap()).unwrap();
        let params = vec![("single".to_string(), single), ("double".to_string(), double)];
        let mut adamw = AdamW::new(params.clone(), CONFIG).unwrap();
        let mut theta = flat(&start);
        let (mut m, mut v) = (vec![0.0; theta.len()], vec![0.0; theta.len()]);
        for t in 1..=5 {
            let gradient = values(10 + t, &[131, 193]);
            adamw.step(&accumulate(&params, |_| gradient.clone()), 1e-2, 0.5).unwrap();
            for (i, g) in flat(&gradient).iter().enumerate() {
                let g = g * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (m, v) = (m[i] / (1.0 - 0.9f64.powi(t as i32)), v[i] / (1.0 - 0.999f64.powi(t as i32)));
                theta[i] -= 1e-2 * 0.01 * theta[i];
                theta[i] -= 1e-2 * m / (v.sqrt() + 1e-8);
            }
        }
        let want = Tensor::from_vec(theta, (131, 193), &Device::Cpu).unwrap();
        assert_close("single", params[0].1.as_tensor(), &want, 1e-5);
        assert_close("double", params[1].1.as_tensor(), &want, 1e-5);
    }

    /// The new variables have the values of a step in place, and the old ones keep theirs.
    #[test]
    fn a_step_into_the_gradients_leaves_the_old_values() {
        let start = [values(1, &[131, 193]), values(2, &[9]).to_dtype(DType::BF16).unwrap(), values(3, &[4, 2])];
        let params = || -> Vec<(String, Var)> {
            let vars = start.iter().map(|tensor| Var::from_tensor(&tensor.copy().unwrap()).unwrap());
            ["a", "b", "c"].map(String::from).into_iter().zip(vars).collect()
        };
        let gradient = |params: &[(String, Var)], seed| {
            accumulate(params, |name| values(seed, params.iter().find(|(own, _)| own == name).unwrap().1.dims()))
        };
        let (in_place, mut replaced) = (params(), params());
        let mut one = AdamW::new(in_place.clone(), CONFIG).unwrap();
        let mut other = AdamW::new(replaced.clone(), CONFIG).unwrap();
        for seed in 3..6 {
            one.step(&gradient(&in_place, seed), 1e-2, 0.5).unwrap();
            let mut grads = gradient(&replaced, seed);
            let old: Vec<Tensor> = replaced.iter().map(|(_, var)| var.as_detached_tensor()).collect();
            let before: Vec<_> = old.iter().map(flat).collect();
            replaced = other.replace(&mut grads, 1e-2, 0.5).unwrap();
            assert_eq!(old.iter().map(flat).collect::<Vec<_>>(), before);
            for ((name, a), (same, b)) in in_place.iter().zip(&replaced) {
                assert_eq!((name, flat(a)), (same, flat(b)));
            }
            // The accumulators belong to the new variables.
            assert_eq!(grads.global_norm().unwrap(), 0.0);
            let loss = replaced[0].1.sqr().unwrap().sum_all().unwrap();
            assert_eq!(backward(&loss, &mut [&mut grads]).unwrap(), 1);
        }
        assert_eq!(flat(&tensors(&one)[1].1), flat(&tensors(&other)[1].1));
    }

    /// Steps smaller than the resolution of bf16 add up in the master copy.
    #[test]
    fn small_steps_move_a_bf16_parameter() {
        let ones = Tensor::ones(4, DType::BF16, &Device::Cpu).unwrap();
        let params = vec![("a".to_string(), Var::from_tensor(&ones).unwrap())];
        let mut adamw = AdamW::new(params.clone(), AdamWConfig { weight_decay: 0.0, ..CONFIG }).unwrap();
        let grads = accumulate(&params, |_| Tensor::ones(4, DType::F32, &Device::Cpu).unwrap());
        for step in 1..=200 {
            adamw.step(&grads, 1e-4, 1.0).unwrap();
            // Between 0.5 and 1 the resolution of bf16 is 1/256.
            let (got, want) = (flat(&params[0].1)[0], 1.0 - 1e-4 * f64::from(step));
            assert!((got - want).abs() <= 1.0 / 512.0, "after {step} steps: {got} against {want}");
        }
    }

    #[test]
    fn a_restored_state_continues_bit_for_bit() {
        let params = |from: &[Tensor]| -> Vec<(String, Var)> {
            let vars = from.iter().map(|t| Var::from_tensor(&t.copy().unwrap()).unwrap());
            ["a", "b"].map(String::from).into_iter().zip(vars).collect()
        };
        let start = [values(1, &[7, 5]), values(2, &[9]).to_dtype(DType::BF16).unwrap()];
        let first = params(&start);
        let grads = |params: &[(String, Var)], seed| {
            accumulate(params, |name| values(seed, if name == "a" { &[7, 5] } else { &[9] }))
        };
        let mut adamw = AdamW::new(first.clone(), CONFIG).unwrap();
        for seed in 3..6 {
            adamw.step(&grads(&first, seed), 1e-2, 1.0).unwrap();
        }
        let second = params(&first.iter().map(|(_, var)| var.as_tensor().clone()).collect::<Vec<_>>());
        let mut restored = AdamW::new(second.clone(), CONFIG).unwrap();
        let exported = tensors(&adamw);
        restored.import(exported.clone()).unwrap();
        assert_eq!(restored.steps(), 3);
        adamw.step(&grads(&first, 9), 1e-2, 1.0).unwrap();
        restored.step(&grads(&second, 9), 1e-2, 1.0).unwrap();
        for ((_, a), (_, b)) in first.iter().zip(&second) {
            assert_eq!(flat(a), flat(b));
        }
        assert_eq!(flat(&tensors(&adamw)[1].1), flat(&tensors(&restored)[1].1));
        // The export holds the values of its time, whatever steps came later.
        assert_ne!(flat(&tensors(&adamw)[1].1), flat(&exported[1].1));
    }

    /// The state is of a run on the CPU that is resumed on a device where the optimizer keeps a master copy.
    #[test]
    fn a_state_without_a_master_copy_continues_from_the_parameter() {
        let wide = vec![("a".to_string(), Var::from_tensor(&values(1, &[6])).unwrap())];
        let mut elsewhere = AdamW::new(wide.clone(), CONFIG).unwrap();
        let zeros = Tensor::zeros(6, DType::F32, &Device::Cpu).unwrap();
        elsewhere.params[0].state = State::Composite { master: zeros.clone(), m: zeros.clone(), v: zeros };
        elsewhere.import(tensors(&AdamW::new(wide.clone(), CONFIG).unwrap())).unwrap();
        let before = flat(&wide[0].1);
        elsewhere.step(&Gradients::new(&wide), 1e-3, 1.0).unwrap();
        for (got, before) in flat(&wide[0].1).iter().zip(before) {
            assert!((got - before * (1.0 - 1e-3 * 0.01)).abs() < 1e-6, "{got} after {before}");
        }
    }

    #[test]
    fn a_state_or_gradients_of_another_model_are_rejected() {
        let one = vec![("a".to_string(), Var::from_tensor(&values(1, &[3])).unwrap())];
        let other = vec![("b".to_string(), Var::from_tensor(&values(1, &[3])).unwrap())];
        let mut adamw = AdamW::new(one.clone(), CONFIG).unwrap();
        let state = tensors(&AdamW::new(other.clone(), CONFIG).unwrap());
        assert!(adamw.import(state).unwrap_err().to_string().contains("no a.exp_avg"));
        let error = adamw.step(&Gradients::new(&other), 1e-3, 1.0).unwrap_err();
        assert!(error.to_string().contains("no gradient accumulator for a"), "{error}");
        assert_eq!(adamw.steps(), 0);
    }
}

//! Copies of a model on another device.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor, TensorId};

use super::{Decoder, Weights};

/// Copies of successive versions of a model on one device. A tensor that the previous version had too is not copied
/// again.
///
/// A device is a stream of a card, so passing a model between two streams of the same card also needs a copy.
pub struct DeviceReplicas {
    device: Device,
    /// Previous copies by name: the identity of the original tensor, and its copy.
    last: BTreeMap<String, (TensorId, Tensor)>,
}

impl DeviceReplicas {
    /// Creates an empty set of copies for `device`.
    pub fn new(device: Device) -> Self {
        Self { device, last: BTreeMap::new() }
    }

    /// Returns a copy of `model` on the device, or `model` itself if it is there already. All kernels that write
    /// `model` must have completed; reading any of its tensors back to the host guarantees that.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn of(&mut self, model: &Arc<Decoder>) -> Result<Arc<Decoder>> {
        if model.device().same_device(&self.device) {
            return Ok(Arc::clone(model));
        }
        let device = self.device.clone();
        let copy = self.copy_changed(model, |tensor| Ok(tensor.to_device(&device)?.detach()))?;
        // The originals may be freed and their memory reused only after the copies are complete.
        self.device.synchronize()?;
        Ok(Arc::new(copy))
    }

    fn copy_changed(&mut self, model: &Decoder, copy: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Decoder> {
        let mut copies = BTreeMap::new();
        for (name, tensor) in &model.weights().0 {
            let known = self.last.get(name).filter(|(id, _)| *id == tensor.id());
            let copied = known.map_or_else(|| copy(tensor), |(_, copied)| Ok(copied.clone()))?;
            copies.insert(name.clone(), (tensor.id(), copied));
        }
        self.last = copies;
        model.with_weights(&Weights(self.last.iter().map(|(name, (_, copy))| (name.clone(), copy.clone())).collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::lm::model::{Lora, ModelConfig};

    #[test]
    fn unchanged_tensors_are_not_copied_again() {
        let config = ModelConfig {
            hidden_size: 16,
            intermediate_size: 24,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            vocab_size: 20,
            context: 32,
            ..ModelConfig::llama()
        };
        let weights = Weights::scratch(&config, 0.2, 3, &Device::Cpu).unwrap();
        let model = Arc::new(Decoder::new(&config, &weights).unwrap());
        let lora = Lora { rank: 2, alpha: 4.0, targets: vec!["q_proj".into()] };
        let (trained, params) = model.adapted(&lora, 1).unwrap();
        let mut copies = DeviceReplicas::new(Device::Cpu);
        assert!(Arc::ptr_eq(&copies.of(&model).unwrap(), &model), "a model on the same device is shared");
        let copied = RefCell::new(0);
        let mut copy_changed = |model: &Decoder| {
            copied.replace(0);
            let copy = copies
                .copy_changed(model, |tensor| {
                    *copied.borrow_mut() += 1;
                    Ok(tensor.copy()?)
                })
                .unwrap();
            (copy, *copied.borrow())
        };
        let (_, first) = copy_changed(&trained.snapshot().unwrap());
        assert_eq!(first, model.weights().0.len() + params.len());
        params[0].1.set(&(params[0].1.as_tensor() + 1.0).unwrap()).unwrap();
        let later = trained.snapshot().unwrap();
        let (copy, second) = copy_changed(&later);
        assert_eq!(second, params.len(), "the frozen matrices are not copied again");
        assert_eq!(copy.weights().fingerprint().unwrap(), later.weights().fingerprint().unwrap());
        assert_eq!(copy.lora(), later.lora());
    }
}

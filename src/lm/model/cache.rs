//! Key/value cache of generation: slots for sequences, one shared prompt per group, sequences of different lengths
//! without padding on the host.

mod host;
mod pool;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::attention::Attend;
use super::decoder::Decoder;
use host::Slabs;
use pool::{Pool, Rows};

/// Initial number of rows of a device's pool, one per token.
const ROWS: usize = 1024;

/// Keys and values of the sequences under way.
///
/// A sequence occupies a slot, whose memory is reused by the next one. A prompt's keys and values are stored once for
/// all sequences that continue it, and freed with the last of them. Attention over a cache has no gradient.
pub struct KvCache {
    storage: Storage,
    free: Vec<usize>,
    slots: usize,
}

/// Storage of keys and values.
enum Storage {
    /// In host memory, laid out for one new token at a time, for a model in `f32` on the CPU.
    Host(Slabs),
    /// In tensors of the model's dtype on its device.
    Device(Pool),
}

/// Keys and values of a prompt that sequences continue.
pub struct CachedPrompt(StoredPrompt);

enum StoredPrompt {
    Host(host::Prompt),
    Device(Rows),
}

impl KvCache {
    /// Creates an empty cache for `model`. On the host each sequence has room for `capacity` tokens after its prompt
    /// before it grows.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn new(model: &Decoder, capacity: usize) -> Result<Self> {
        if model.device().is_cpu() && model.dtype() == DType::F32 {
            return Ok(Self::of(Storage::Host(Slabs::new(model.config(), capacity))));
        }
        Self::pooled(model, ROWS)
    }

    fn pooled(model: &Decoder, rows: usize) -> Result<Self> {
        Ok(Self::of(Storage::Device(Pool::new(model.config(), model.dtype(), model.device(), rows)?)))
    }

    fn of(storage: Storage) -> Self {
        Self { storage, free: Vec::new(), slots: 0 }
    }

    /// Stores a prompt's keys and values `[T, KV, hd]` per layer, for sequences that continue it.
    ///
    /// # Errors
    /// If the tensors cannot be read, or the device has not enough memory.
    pub fn prompt(&mut self, layers: &[(Tensor, Tensor)]) -> Result<Arc<CachedPrompt>> {
        let storage = match &mut self.storage {
            Storage::Host(slabs) => StoredPrompt::Host(slabs.prompt(layers)?),
            Storage::Device(pool) => StoredPrompt::Device(pool.prompt(layers)?),
        };
        Ok(Arc::new(CachedPrompt(storage)))
    }

    /// Assigns a free slot to a sequence that continues `prompt`, and returns the slot.
    pub fn enter(&mut self, prompt: &Arc<CachedPrompt>) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots += 1;
            self.slots - 1
        });
        match &mut self.storage {
            Storage::Host(slabs) => slabs.enter(slot, prompt),
            Storage::Device(pool) => pool.enter(slot, prompt),
        }
        slot
    }

    /// Frees the slot of a sequence that has ended.
    pub fn leave(&mut self, slot: usize) {
        match &mut self.storage {
            Storage::Host(slabs) => slabs.leave(slot),
            Storage::Device(pool) => pool.leave(slot),
        }
        self.free.push(slot);
    }

    /// Returns the attention for one new token of each sequence in `slots`: row `i` of the model's input is the next
    /// token of the sequence in `slots[i]`.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn step<'a>(&'a mut self, slots: &'a [usize]) -> Result<Box<dyn Attend + 'a>> {
        Ok(match &mut self.storage {
            Storage::Host(slabs) => Box::new(slabs.step(slots)),
            Storage::Device(pool) => Box::new(pool.step(slots)?),
        })
    }
}

impl CachedPrompt {
    fn host(&self) -> &host::Prompt {
        match &self.0 {
            StoredPrompt::Host(prompt) => prompt,
            StoredPrompt::Device(_) => panic!("a prompt belongs to the cache that made it"),
        }
    }

    fn device(&self) -> &Rows {
        match &self.0 {
            StoredPrompt::Device(rows) => rows,
            StoredPrompt::Host(_) => panic!("a prompt belongs to the cache that made it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::lm::model::config::Window;
    use crate::lm::model::trie::prefill;
    use crate::lm::model::{ModelConfig, Pack, PackedAttention, Weights};

    fn model(config: ModelConfig, dtype: DType) -> Decoder {
        let weights = Weights::scratch(&config, 0.2, 3, &Device::Cpu).unwrap();
        Decoder::new(&config, &weights).unwrap().to_dtype(dtype).unwrap()
    }

    /// Returns the hidden state of a sequence's last token, from a pass over the complete sequence.
    fn alone(model: &Decoder, sequence: &[u32]) -> Vec<f32> {
        let pack = Pack::prefill(sequence);
        let hidden = model.hidden(&pack.ids, &pack.positions, &mut PackedAttention::new(&pack)).unwrap();
        rows(&hidden).pop().unwrap()
    }

    fn rows(hidden: &Tensor) -> Vec<Vec<f32>> {
        hidden.to_dtype(DType::F32).unwrap().to_vec2().unwrap()
    }

    /// Decodes sequences of two prompts together, in any order, one of which gives its slot to another.
    fn check(model: &Decoder, mut cache: KvCache, tolerance: f32) {
        let prompts = [&[7, 8, 1, 2, 3, 4, 5, 6, 9][..], &[11, 12]];
        let cached = prompts.map(|prompt| cache.prompt(&prefill(model, prompt, None).unwrap().1).unwrap());
        let mut under_way: Vec<(usize, Vec<u32>)> =
            [0, 1, 0].map(|p| (cache.enter(&cached[p]), prompts[p].to_vec())).into();
        let mut left = 0;
        for step in 0..9 {
            if step == 4 {
                left = under_way.remove(1).0;
                cache.leave(left);
            }
            if step == 5 {
                under_way.insert(0, (cache.enter(&cached[0]), prompts[0].to_vec()));
                assert_eq!(under_way[0].0, left, "a freed slot is reused");
            }
            under_way.rotate_left(1);
            for (slot, sequence) in &mut under_way {
                sequence.push((*slot * 17 + step * 5) as u32 % 50);
            }
            let ids: Vec<u32> = under_way.iter().map(|(_, sequence)| sequence[sequence.len() - 1]).collect();
            let positions: Vec<u32> = under_way.iter().map(|(_, sequence)| sequence.len() as u32 - 1).collect();
            let slots: Vec<usize> = under_way.iter().map(|(slot, _)| *slot).collect();
            let hidden = model.hidden(&ids, &positions, &mut *cache.step(&slots).unwrap()).unwrap();
            for ((slot, sequence), got) in under_way.iter().zip(rows(&hidden)) {
                let want = alone(model, sequence);
                let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < tolerance, "step {step}, slot {slot}: hidden states differ by {worst}");
            }
        }
    }

    #[test]
    fn decoding_over_a_cache_equals_a_pass_over_the_complete_sequence() {
        let window = Some(Window { size: 6, layers: vec![true, false] });
        for config in [
            ModelConfig::tiny(50),
            ModelConfig { window, attention_cap: Some(5.0), query_scalar: Some(24), ..ModelConfig::tiny(50) },
        ] {
            let single = model(config.clone(), DType::F32);
            check(&single, KvCache::new(&single, 4).unwrap(), 1e-5);
            // The pool has room for one row, so it grows.
            check(&single, KvCache::pooled(&single, 1).unwrap(), 1e-5);
            let half = model(config, DType::BF16);
            check(&half, KvCache::new(&half, 4).unwrap(), 0.06);
        }
    }

    /// Rows are free again after their owners are dropped.
    #[test]
    fn freed_rows_of_a_pool_are_reused() {
        let model = model(ModelConfig::tiny(50), DType::F32);
        let mut cache = KvCache::pooled(&model, 16).unwrap();
        let free = |cache: &KvCache| match &cache.storage {
            Storage::Device(pool) => pool.free_rows(),
            Storage::Host(_) => unreachable!(),
        };
        assert_eq!(free(&cache), 15);
        let prompt = cache.prompt(&prefill(&model, &[1, 2, 3], None).unwrap().1).unwrap();
        let slots = [cache.enter(&prompt), cache.enter(&prompt)];
        drop(prompt);
        for position in 3..5 {
            model.hidden(&[4, 5], &[position, position], &mut *cache.step(&slots).unwrap()).unwrap();
        }
        assert_eq!(free(&cache), 15 - 3 - 4);
        cache.leave(slots[0]);
        assert_eq!(free(&cache), 15 - 3 - 2);
        cache.leave(slots[1]);
        assert_eq!(free(&cache), 15);
    }
}

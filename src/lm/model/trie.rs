//! Many sequences in one row; shared beginnings are computed once.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::attention::{Attend, PackedAttention, Scope, within};
use super::decoder::Decoder;
use super::pack::Pack;
use kernels::TreeMask;

/// Prefix tree of token sequences, laid out as one row: a token attends to its ancestors.
///
/// Prompts that begin alike (the same instructions, the same text, several candidates) share the computation of their
/// common part, at every level and without annotations.
#[derive(Debug, Clone, PartialEq)]
pub struct Trie {
    ids: Vec<u32>,
    positions: Vec<u32>,
    parents: Vec<Option<usize>>,
    /// Row of each token of each sequence after the cached prefix.
    rows: Vec<Vec<u32>>,
    cached: usize,
}

/// Keys and values of a prefix that many sequences share.
pub struct Prefix {
    ids: Vec<u32>,
    /// Keys and values, `[P, KV, hd]` each, by layer.
    layers: Vec<(Tensor, Tensor)>,
}

impl Prefix {
    /// Computes the keys and values of a prefix.
    ///
    /// # Errors
    /// The same as for [`Decoder::hidden`].
    pub fn new(model: &Decoder, ids: &[u32]) -> Result<Self> {
        let pack = Pack::prefill(ids);
        let mut attention = PackedAttention::keeping(&pack);
        model.hidden(&pack.ids, &pack.positions, &mut attention)?;
        Ok(Self { ids: ids.to_vec(), layers: attention.into_kept() })
    }

    /// Returns the tokens of the prefix.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

/// Returns the final hidden state `[1, D]` of a prompt's last token, and the prompt's keys and values `[T, KV, hd]` by
/// layer for a cache. If the prompt begins with `prefix`, that part is not computed again.
///
/// # Errors
/// The same as for [`Decoder::hidden`].
pub fn prefill(model: &Decoder, prompt: &[u32], prefix: Option<&Prefix>) -> Result<(Tensor, Vec<(Tensor, Tensor)>)> {
    let prefix = prefix.filter(|prefix| prompt.len() > prefix.ids.len() && prompt.starts_with(&prefix.ids));
    let trie = Trie::new(&[prompt], prefix.map_or(0, |prefix| prefix.ids.len()));
    let mut attention = TrieAttention { mask: trie.mask(), prefix, kept: Some(Vec::new()) };
    let hidden = model.hidden(&trie.ids, &trie.positions, &mut attention)?;
    Ok((hidden.narrow(0, trie.len() - 1, 1)?, attention.kept.unwrap_or_default()))
}

impl Trie {
    /// Lays out `sequences` without their first `cached` tokens, which must be the same in all.
    ///
    /// # Panics
    /// If a sequence has no token after the cached ones.
    pub fn new<S: AsRef<[u32]>>(sequences: &[S], cached: usize) -> Self {
        let mut trie = Self { ids: vec![], positions: vec![], parents: vec![], rows: vec![], cached };
        let mut children: HashMap<(Option<usize>, u32), usize> = HashMap::new();
        for sequence in sequences {
            let tokens = &sequence.as_ref()[cached..];
            assert!(!tokens.is_empty(), "a sequence needs a token after the cached prefix");
            let mut rows = Vec::with_capacity(tokens.len());
            let mut parent = None;
            for (depth, token) in tokens.iter().enumerate() {
                let node = *children.entry((parent, *token)).or_insert_with(|| {
                    trie.ids.push(*token);
                    trie.positions.push((cached + depth) as u32);
                    trie.parents.push(parent);
                    trie.ids.len() - 1
                });
                rows.push(node as u32);
                parent = Some(node);
            }
            trie.rows.push(rows);
        }
        trie
    }

    /// Returns the number of fed tokens, `T`.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Returns whether no tokens are fed.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Returns the row of token `index` of `sequence`; the index counts the cached tokens.
    pub fn row(&self, sequence: usize, index: usize) -> u32 {
        self.rows[sequence][index - self.cached]
    }

    /// Returns the attention mask.
    fn mask(&self) -> Arc<TreeMask> {
        Arc::new(TreeMask::new(self.cached, self.parents.iter().copied()))
    }

    /// Returns the final hidden states `[T, D]`. `prefix` must hold the cached tokens, or be `None` if there are none.
    ///
    /// # Errors
    /// The same as for [`Decoder::hidden`].
    pub fn hidden(&self, model: &Decoder, prefix: Option<&Prefix>) -> Result<Tensor> {
        let mut attention = TrieAttention { mask: self.mask(), prefix, kept: None };
        model.hidden(&self.ids, &self.positions, &mut attention)
    }
}

struct TrieAttention<'a> {
    mask: Arc<TreeMask>,
    prefix: Option<&'a Prefix>,
    /// Keys and values of all visible tokens, by layer, if they are to be kept.
    kept: Option<Vec<(Tensor, Tensor)>>,
}

impl Attend for TrieAttention<'_> {
    fn attend(&mut self, scope: Scope, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (k, v) = match self.prefix {
            Some(prefix) => {
                let (keys, values) = &prefix.layers[scope.layer];
                (Tensor::cat(&[keys, k], 0)?, Tensor::cat(&[values, v], 0)?)
            }
            None => (k.clone(), v.clone()),
        };
        let mixed = within(&self.mask, scope, q, &k, &v)?;
        if let Some(kept) = &mut self.kept {
            kept.push((k, v));
        }
        Ok(mixed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::model::config::Window;
    use crate::lm::model::{ModelConfig, Weights};
    use candle_core::Device;

    fn model(window: Option<Window>) -> Decoder {
        let config = ModelConfig { window, ..ModelConfig::tiny(50) };
        Decoder::new(&config, &Weights::scratch(&config, 0.2, 3, &Device::Cpu).unwrap()).unwrap()
    }

    #[test]
    fn shared_tokens_are_fed_once_at_every_level() {
        let trie = Trie::new(&[vec![1, 2, 3], vec![1, 2, 4, 5], vec![6], vec![1, 2]], 0);
        assert_eq!(trie.ids, [1, 2, 3, 4, 5, 6]);
        assert_eq!(trie.positions, [0, 1, 2, 2, 3, 0]);
        assert_eq!((trie.row(1, 3), trie.row(2, 0), trie.row(3, 1)), (4, 5, 1));
        let trie = Trie::new(&[vec![9, 9, 1], vec![9, 9, 2]], 2);
        assert_eq!((trie.ids.as_slice(), trie.positions.as_slice()), (&[1, 2][..], &[2, 2][..]));
        let mask = trie.mask().dense(None, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(mask, [[0.0, 0.0, 0.0, f32::NEG_INFINITY], [0.0, 0.0, f32::NEG_INFINITY, 0.0]]);
    }

    #[test]
    fn a_prefill_after_a_prefix_equals_that_of_the_complete_prompt() {
        let model = model(None);
        let prompt = [7, 8, 1, 2, 3];
        let prefix = Prefix::new(&model, &[7, 8, 1]).unwrap();
        let (whole, layers) = prefill(&model, &prompt, None).unwrap();
        for other in [&prefix, &Prefix::new(&model, &[9]).unwrap(), &Prefix::new(&model, &prompt).unwrap()] {
            let (hidden, kept) = prefill(&model, &prompt, Some(other)).unwrap();
            let worst = |a: &Tensor, b: &Tensor| {
                assert_eq!(a.dims(), b.dims());
                (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
            };
            assert!(worst(&whole, &hidden) < 1e-5);
            for ((k, v), (other_k, other_v)) in layers.iter().zip(&kept) {
                assert!(worst(k, other_k) < 1e-5 && worst(v, other_v) < 1e-5);
            }
        }
    }

    #[test]
    fn each_sequence_gives_the_result_of_a_separate_pass() {
        check_alone(&model(None));
        check_alone(&model(Some(Window { size: 3, layers: vec![true, false] })));
    }

    fn check_alone(model: &Decoder) {
        let sequences = [vec![7, 8, 1, 2, 3], vec![7, 8, 1, 4], vec![7, 8, 9, 9, 9, 2]];
        let prefix = Prefix::new(model, &[7, 8]).unwrap();
        for (cached, prefix) in [(0, None), (2, Some(&prefix))] {
            let trie = Trie::new(&sequences, cached);
            let hidden = trie.hidden(model, prefix).unwrap().to_vec2::<f32>().unwrap();
            for (i, sequence) in sequences.iter().enumerate() {
                let pack = Pack::prefill(sequence);
                let mut attention = PackedAttention::new(&pack);
                let alone = model.hidden(&pack.ids, &pack.positions, &mut attention).unwrap();
                let alone = alone.to_vec2::<f32>().unwrap();
                for index in cached..sequence.len() {
                    let row = &hidden[trie.row(i, index) as usize];
                    let worst = row.iter().zip(&alone[index]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-5, "sequence {i}, token {index}: {worst}");
                }
            }
        }
    }
}

//! Shapes of the measured models. The time does not depend on the weights.

use preceptor::lm::model::ModelConfig;

/// Returns the shape `tiny` (4.0 M parameters) or `smollm2` (that of SmolLM2-135M).
pub fn shape(name: &str) -> Option<ModelConfig> {
    let [hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size] = match name {
        "tiny" => [256, 704, 4, 4, 2, 4096],
        "smollm2" => [576, 1536, 30, 9, 3, 49_152],
        _ => return None,
    };
    let llama = ModelConfig::llama();
    Some(ModelConfig {
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        head_dim: 64,
        vocab_size,
        context: 16_384,
        ..llama
    })
}

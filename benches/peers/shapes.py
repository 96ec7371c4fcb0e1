"""Shapes and sizes of the compared work, as in benches/common/shapes.rs and benches/peers.rs."""

GROUP, PROMPT, ANSWER, BLANK, SEQUENCE, BATCH = 8, 64, 64, 16, 128, 4

SHAPES = {
    "tiny": dict(
        hidden_size=256, intermediate_size=704, vocab_size=4096, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=16384,
    ),
    "smollm2": dict(
        hidden_size=576, intermediate_size=1536, vocab_size=49152, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=16384,
    ),
}
# Number of sequences in a training step.
SEQUENCES = {"tiny": 8, "smollm2": 4}


def words(model, place, length):
    """Returns `length` token ids, which differ for each `place`."""
    return [i * 61 % SHAPES[model]["vocab_size"] for i in range(place * length, (place + 1) * length)]

"""Other people's models: their checkpoints and tokenizers, read as they are published."""

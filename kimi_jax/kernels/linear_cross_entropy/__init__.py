"""The language-model head and its cross-entropy, a chunk of tokens at a time."""

"""From a file of conversations to batches: tokenizer, chat template, rows, examples, packing."""

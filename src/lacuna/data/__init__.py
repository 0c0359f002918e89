"""From text to `PackedBatch`: sources -> tokenize -> pack -> loader, in this order and never back."""

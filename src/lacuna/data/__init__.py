"""From text to `PackedBatch`, in this order: batch (the contract), tokenize, conversations, sources, loader."""

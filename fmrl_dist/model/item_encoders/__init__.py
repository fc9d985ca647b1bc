"""Items to embeddings: one projection (the paper's), UniSRec's adaptor, or VQRec's codes."""

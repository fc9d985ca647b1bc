"""Rows of the pretrained encoders, kept on disk by content and recipe: no build encodes again what one has encoded."""

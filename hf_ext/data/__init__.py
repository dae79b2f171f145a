"""Data pipelines: documents decomposed into buckets of one length."""

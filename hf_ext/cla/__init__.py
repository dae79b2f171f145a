"""Cross-Layer Attention (arXiv 2405.12981): which layers share keys and values, and the maths around that choice."""

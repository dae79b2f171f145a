"""ReALLM: low-bit linear layers."""

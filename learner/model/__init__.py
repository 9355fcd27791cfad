"""The language model: loading, packing, attention over shared prompts, logprobs."""

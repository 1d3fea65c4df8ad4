"""Scoring a model: benchmarks by the harness, perplexity of long texts, planted sentences, tokenizers."""

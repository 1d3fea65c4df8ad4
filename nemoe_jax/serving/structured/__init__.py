"""Structured output: grammars over tokens, for JSON schemas and tool calls."""

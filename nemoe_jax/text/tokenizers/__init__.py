"""Tekken, SentencePiece and Hugging Face tokenizers behind one class."""

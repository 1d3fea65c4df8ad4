"""Rows of text and chats, from files to batches of packed tokens."""

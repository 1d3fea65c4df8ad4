"""Text in and out: tokenizers, chats, files of text."""

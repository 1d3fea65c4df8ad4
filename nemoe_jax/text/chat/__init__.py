"""Chats: templates, tools, and tool calls read back."""

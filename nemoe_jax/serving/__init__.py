"""Using a model: sampling, continuous batching, chats with tools, the server and the terminal."""

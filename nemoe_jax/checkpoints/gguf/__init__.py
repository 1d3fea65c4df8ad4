"""Models in the one-file format of llama.cpp, read as if they were model directories."""

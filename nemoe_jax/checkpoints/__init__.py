"""Model directories on disk: Hugging Face's and Mistral's layouts, read and written in slices."""

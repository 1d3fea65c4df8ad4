"""LoRA adapters: their tree, many of them in one batch, and the files of Hugging Face PEFT."""

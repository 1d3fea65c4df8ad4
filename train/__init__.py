"""Training: recipes, data, LoRA and full updates, distillation."""

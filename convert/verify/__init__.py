"""Two models compared: logits and routing."""

"""What a model is: its configuration, every array that it owns, and how they lie on a mesh."""

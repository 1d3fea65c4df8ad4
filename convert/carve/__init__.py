"""Dense FFNs partitioned into experts."""

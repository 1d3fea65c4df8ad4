"""The command `nemoe`: one module for each sub-command."""

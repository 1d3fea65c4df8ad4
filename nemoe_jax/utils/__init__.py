"""What commands of all packages share: flags, progress bars, files."""

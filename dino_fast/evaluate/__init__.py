"""What a trained backbone is worth: one evaluation protocol a file."""

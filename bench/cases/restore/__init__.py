"""What a restore takes."""

"""What a reconstruction or a set of samples is worth."""

"""Video in and out: sources, the clip index, the order of clips, decoding, synthesis, writing."""

"""EVATok on Ray: adaptive-length video tokenizers and the generators on top."""

__version__ = "0.1.0"

"""Training: steps DeepSpeed engines over batches. The same code under Ray Train, torchrun and one process."""

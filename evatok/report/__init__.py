"""One self-contained page per run, drawn from its artifacts alone."""

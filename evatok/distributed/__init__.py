"""Everything that runs on Ray: the only package that imports it."""

"""Where the runs are: the layout of a run directory, its state, its provenance, and a read-only view on it."""

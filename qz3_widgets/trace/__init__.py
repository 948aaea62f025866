"""What happened: the trace files of a run, written by its ranks and read back as DataFrames."""

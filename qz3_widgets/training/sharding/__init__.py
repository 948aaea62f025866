"""4-bit weights that ZeRO-3 really shards: while they load, and within the step."""

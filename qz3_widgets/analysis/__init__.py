"""What the traces mean: memory per rank and phase, losses and speed, how a run ended, and runs against each other."""

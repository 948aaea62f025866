"""What runs inside each rank. Nothing else in the package imports this: the launchers do."""

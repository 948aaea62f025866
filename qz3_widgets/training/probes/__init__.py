"""The proof in every run: what a rank counts of its sharding, its 4-bit weights, its peak and its gradients."""

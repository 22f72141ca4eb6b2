"""What the comparison with TRL is made of: the workloads, and one program for each side."""

"""What operators mean, and from a student to its graph of integers."""

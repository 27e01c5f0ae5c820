"""Documents become windows: readers of each format, repetitions left out, whole sentences cut to a length."""

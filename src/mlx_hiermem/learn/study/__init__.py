"""What is written about each window before it is learnt: by patterns, or freely by a model that can write."""

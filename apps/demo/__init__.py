"""`hiermem demo`: its model, its exam, and what its bank was learnt from."""

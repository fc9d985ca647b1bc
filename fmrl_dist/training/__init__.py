"""What the training loop (fmrl_dist/train.py) is made of."""

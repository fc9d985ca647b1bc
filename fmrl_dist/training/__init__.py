"""What training (fmrl_dist/train.py) is made of."""

"""Tests of fmrl_dist.deploy.batch."""

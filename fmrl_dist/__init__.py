"""fMRLRec at scale: train once, deploy any size."""

__version__ = "0.1.0"

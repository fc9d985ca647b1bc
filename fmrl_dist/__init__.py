"""fMRLRec at scale: train once, deploy any size."""

from fmrl_dist.base.early_signals import end_while_importing

__version__ = "0.1.0"

end_while_importing()

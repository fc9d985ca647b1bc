"""Everything that only a GPU can tell: ``python -m benchmarks.gpu`` runs the stages of this folder one by one."""

"""Fuzzers: every command of :data:`tests.fuzz.commands.COMMANDS`, under every kind of misfortune.

Each test draws its cases from seeds 0, 1, 2, …, so that runs repeat. ``FMRL_FUZZ=20`` draws twenty times as many.
A failure names its seed; ``FMRL_FUZZ_SEED=7`` runs that case alone.
"""

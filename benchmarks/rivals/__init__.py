"""Rival libraries from PyPI, trained on our split and judged by our evaluator; see README.md."""

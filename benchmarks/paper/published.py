"""Figures of the paper's table 2 (arXiv 2409.16627), all items ranked, and others' with seen items masked."""

from __future__ import annotations

# Set → row → NDCG@10, Recall@10, all items ranked.
TABLE_2 = {
    "beauty": {
        "sasrec": (0.0364, 0.0734),
        "bert4rec": (0.0350, 0.0653),
        "fmlprec": (0.0416, 0.0846),
        "lrurec": (0.0438, 0.0871),
        "unisrec": (0.0375, 0.0799),
        "vqrec": (0.0411, 0.0849),
        "ours": (0.0520, 0.0939),
        "ours-projection": (0.0520, 0.0939),
    },
    "sports": {
        "sasrec": (0.0210, 0.0474),
        "bert4rec": (0.0181, 0.0355),
        "fmlprec": (0.0252, 0.0508),
        "lrurec": (0.0266, 0.0536),
        "unisrec": (0.0195, 0.0408),
        "vqrec": (0.0235, 0.0497),
        "ours": (0.0284, 0.0516),
        "ours-projection": (0.0284, 0.0516),
    },
}
# Set → row → NDCG@10, Recall@10 that other papers publish with seen items masked.
MASKED = {
    "beauty": {"bsarec": (0.0611, 0.1008)},
    "sports": {},
}

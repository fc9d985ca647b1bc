"""The demo data: a small invented shop, generated from a seed.

An item has a leaf of a category tree, a price tier, a hue and a motif (``catalogue``). The text shows only leaf and
tier (``item_texts``: title, price, brand, categories), the image only hue and motif (``item_images``): neither is
enough without the other. Histories depend on all four (``histories``). All names are invented.
"""

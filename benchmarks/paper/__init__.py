"""Table 2 of the paper in one harness: ours and the rivals, every size, masked and unmasked."""

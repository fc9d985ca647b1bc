"""Images of items: found by their content, decoded, told apart by what is wrong with them, and made small."""

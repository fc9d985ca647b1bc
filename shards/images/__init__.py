"""Images of items: decoded, told apart by what is wrong with them, and made small."""

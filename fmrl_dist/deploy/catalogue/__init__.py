"""What changes an export's catalogue after training: items added, updated and removed."""

"""From item texts and images to feature rows."""

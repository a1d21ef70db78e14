"""What a call passes before its route, and on the way back: keys, limits, errors, streams."""

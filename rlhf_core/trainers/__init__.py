"""Training loops: a folder an algorithm with one loop in it, and what all of them share."""

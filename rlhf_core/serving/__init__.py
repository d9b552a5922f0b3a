"""Models that answer while others are being answered: rows in slots of one cache, text as it grows. Knows no web."""

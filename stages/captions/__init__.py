"""What a caption has to be, and what becomes of an answer that is none. Knows no engine."""

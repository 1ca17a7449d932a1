"""Videos: which frames stand for a clip, and their pixels."""

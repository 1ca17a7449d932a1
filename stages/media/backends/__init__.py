"""Decoders behind one interface (`base.Backend`): chosen frames of a video, by their times."""

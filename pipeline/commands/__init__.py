"""The commands of `vidpipe`: thin shells over library calls."""

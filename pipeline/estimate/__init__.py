"""`vidpipe estimate`: what a run over the whole source will take, from a sample that is run."""

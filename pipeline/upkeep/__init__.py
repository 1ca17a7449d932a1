"""Keeping a workdir sound: what is proved of it, what may go, what is made anew."""
